"""The frame of a client's file: its functions are the cases, the outcome of each a line of JSON.

Nothing of ours is imported here, because these files run where the client is installed. A case passes if it returns;
what it returns is shown. `fails` has the kinds of refusal, and a client's `refused` must raise on each.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
from collections.abc import Callable
from typing import Any

URL, KEYS = os.environ["TIDE_URL"], json.loads(os.environ["TIDE_KEYS"])
GOOD, MODEL = KEYS["good"], "tide-nano"
# (key, model, what of our words must reach who called)
FAILS = {
    "key": ("sk-nobody", MODEL, "API key"), "model": (KEYS["strict"], "no-such-model", "no-such-model"),
    "banned": (KEYS["banned"], MODEL, "suspended"), "empty": (KEYS["empty"], MODEL, "insufficient balance"),
    "cut": (KEYS["poor"], MODEL, "insufficient balance"),
}  # fmt: skip
HI, TOOL = "Say hi to 'Ann'.", "Use the weather tool for 'Paris'."
BOTH = "Use the weather tool for 'Paris' and for 'Rome' in parallel."
WEATHER = {"Paris": "sun over Paris", "Rome": "rain over Rome"}
RECITE = "Recite the poem."
PLACE = "Fill in the JSON of the place."
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
CASES: dict[str, Callable[[], Any]] = {}


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    CASES[function.__name__] = function
    return function


def refusals(ask: Callable[[str, str, bool], Any]) -> None:
    """`ask(key, model, streamed)` asks for the recital. A case for each kind of refusal: it must raise, in time."""
    for kind, (key, model, words) in FAILS.items():
        CASES[f"refused_{kind}"] = lambda key=key, model=model, words=words, kind=kind: _raised(ask, key, model, words, kind)


def _raised(ask: Callable[[str, str, bool], Any], key: str, model: str, words: str, kind: str) -> str:
    try:
        found = ask(key, model, kind == "cut")
        if inspect.isawaitable(found):
            asyncio.run(_awaited(found))
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        if words not in f"{told} {error.__cause__} {error.__context__}":
            raise AssertionError(f"{words!r} is lost: {told}") from error
        return told[:300]
    raise AssertionError("nothing was raised")


async def _awaited(found: Any) -> Any:
    return await found


def run() -> None:
    for name, function in CASES.items():
        if len(sys.argv) > 2 and name not in sys.argv[2:]:
            continue
        try:
            value = function()
            if inspect.isawaitable(value):
                value = asyncio.run(_awaited(value))
            outcome = {"case": name, "ok": True, "said": str(value)}
        except BaseException as error:
            outcome = {"case": name, "ok": False, "said": f"{type(error).__name__}: {error}"[:600]}
        print("\n" + json.dumps(outcome), flush=True)


VARIANT = sys.argv[1] if len(sys.argv) > 1 else ""

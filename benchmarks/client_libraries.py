"""Client libraries against our server: what each does in its own words, and what it makes of a refusal.

    python -m benchmarks.client_libraries                       # all, installed on the first run
    python -m benchmarks.client_libraries --only pydantic-ai --show

Each file in `benchmarks/clients` is one library; its functions are the cases. They are run in a virtual environment or a
node folder outside the repository (`--prefix`, kept from run to run), through a proxy that remembers every exchange. The
model is `suite_mind`; all else is real. A case fails if the library says so, if it asks more than once for what was
refused, or if the ledger charged other than the client was told. Exits with 1 if one does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.recording_proxy import Exchange, recording
from benchmarks.suite_mind import SuiteMind
from tidelock.engine import Engine, Limits
from tidelock.loop.rundir import MODEL, PRICES
from tidelock.models import TransformerLM, preset
from tidelock.service import suspension
from tidelock.service.server import serving
from tidelock.service.state import ServiceState, open_state
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer

HERE = Path(__file__).with_name("clients")
ENOUGH, TOO_LITTLE = 10**12, 2_250_000  # nano-USD; the latter is less than the recital costs, and more than its prompt
PATIENCE_S = 240
PYTHON, NODE = "python", "node"


@dataclass(frozen=True)
class Client:
    """`packages`: with their versions, as they were tried. `variants`: the ways to our server that the file knows.
    `folder`: of the environment; some cannot share one."""

    file: str
    kind: str
    packages: tuple[str, ...]
    variants: tuple[str, ...] = ("",)
    folder: str = "python"


CLIENTS = {
    "pydantic-ai": Client("with_pydantic_ai.py", PYTHON, ("pydantic-ai-slim[openai]==2.31.1",), ("chat", "responses")),
    "pydantic-ai-anthropic": Client("with_pydantic_ai.py", PYTHON, ("pydantic-ai-slim[anthropic]==2.31.1", "anthropic<1"),
                                    ("messages",), "older"),
    "openai-agents": Client("with_openai_agents.py", PYTHON, ("openai-agents==0.20.0",), ("chat", "responses")),
    "instructor": Client("with_instructor.py", PYTHON, ("instructor==1.17.0", "openai", "anthropic"), ("chat", "messages")),
    "litellm": Client("with_litellm.py", PYTHON, ("litellm==1.110.2",), ("chat", "responses", "messages", "kimi")),
    "llama-index": Client("with_llama_index.py", PYTHON, ("llama-index-llms-openai-like==0.8.1", "llama-index-llms-openai==0.8.3"),
                          ("chat", "responses")),
    "llama-index-anthropic": Client("with_llama_index.py", PYTHON, ("llama-index-llms-anthropic==0.12.3", "anthropic<1"),
                                    ("messages",), "older"),
    "dspy": Client("with_dspy.py", PYTHON, ("dspy==3.4.1",)),
    "smolagents": Client("with_smolagents.py", PYTHON, ("smolagents[openai]==1.26.0",)),
    "llm": Client("with_llm.py", PYTHON, ("llm==0.32.1",), ("chat",)),
    "llm-anthropic": Client("with_llm.py", PYTHON, ("llm==0.32.1", "llm-anthropic==0.26", "anthropic<1"), ("messages",), "older"),
    "ai-sdk": Client("with_ai_sdk.mjs", NODE, ("ai@6.0.326", "@ai-sdk/openai@3.0.141", "@ai-sdk/openai-compatible@2.0.92",
                     "@ai-sdk/anthropic@3.0.140", "@ai-sdk/moonshotai@2.0.61", "zod@4"),
                     ("chat", "responses", "compatible", "messages", "kimi"), "node"),
    "openai-agents-js": Client("with_openai_agents.mjs", NODE, ("@openai/agents@0.20.0", "openai", "zod@4"),
                               ("chat", "responses"), "node"),
}  # fmt: skip


@dataclass
class Case:
    client: str
    name: str
    ok: bool
    said: str
    faults: list[str] = field(default_factory=list)


def keys(state: ServiceState, run: str) -> dict[str, str]:
    """Secrets of customers with money, with none, with too little, suspended, and one that is held to Kimi's contract."""
    made = {}
    for name, money in (("good", ENOUGH), ("strict", ENOUGH), ("banned", ENOUGH), ("empty", 0), ("poor", TOO_LITTLE)):
        _, made[name] = state.keys.create(f"{run}-{name}", profile="" if name == "strict" else "lenient")
        if money:
            state.ledger.topup(f"{run}-{name}", money)
    suspension.suspend(state.ledger, f"{run}-banned", "unpaid")
    return made


def environment(prefix: Path, client: Client) -> list[str]:
    """The command that runs its file; what it needs is installed if it is not there."""
    folder = prefix / client.folder
    if client.kind == PYTHON:
        python = folder / "bin/python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install, command = [python, "-m", "pip", "install", "-q", *client.packages], [str(python), str(HERE / client.file)]
    else:
        folder.mkdir(parents=True, exist_ok=True)
        install = ["npm", "install", "--no-audit", "--no-fund", "--prefix", folder, *client.packages]
        command = ["node", str(folder / client.file)]
    marker = folder / ("installed " + " ".join(client.packages).replace("/", "+"))
    if not marker.exists():
        subprocess.run(install, check=True)
        marker.touch()
    if client.kind == NODE:  # node looks for packages beside the file
        for source in (client.file, "case.mjs"):
            (folder / source).write_bytes((HERE / source).read_bytes())
    return command


async def started(command: list[str], env: dict[str, str]) -> str:
    with tempfile.TemporaryFile() as out:
        process = await asyncio.create_subprocess_exec(*command, env=env, stdout=out, stderr=subprocess.STDOUT)
        try:
            await asyncio.wait_for(process.wait(), PATIENCE_S)
        except TimeoutError:
            process.kill()
            await process.wait()
        out.seek(0)
        return out.read().decode()


def outcomes(name: str, text: str) -> list[Case]:
    cases = []
    for line in text.splitlines():
        if line.startswith('{"case"'):
            told = json.loads(line)
            cases.append(Case(name, told["case"], told["ok"], told["said"].replace("\n", " ")))
    return cases or [Case(name, "start", False, text.strip()[-1500:])]


def judge(cases: list[Case], seen: list[Exchange], made: dict[str, str], state: ServiceState) -> None:
    """Adds to each case what its library does not know: how often it asked, and what it was charged."""
    asked = Counter(e.key for e in seen if e.method == "POST")
    secrets = {"refused_key": "sk-nobody", "refused_model": made["strict"], "refused_banned": made["banned"],
               "refused_empty": made["empty"], "refused_cut": made["poor"]}  # fmt: skip
    for case in cases:
        times = asked[secrets.get(case.name, "")]
        if times > 1:
            case.faults.append(f"asked {times} times")
        if case.name in secrets and not times:
            case.faults.append("never asked")
    charged = dict(state.ledger.db.read("SELECT request_id, nano_usd FROM usage"))
    for e in seen:
        told = (e.usage or {}).get("cost_nano_usd", 0)
        if e.method == "POST" and "count_tokens" not in e.path and charged.get(e.request_id, 0) != told:
            cases[-1].faults.append(f"{e.path}: charged {charged.get(e.request_id)}, told {told}")
    if not state.ledger.audit().sound:
        cases[-1].faults.append("the ledger is not sound")


async def measure(names: list[str], prefix: Path, only: list[str], show: bool) -> int:
    template = get_template("xtml", ByteTokenizer())
    model = TransformerLM(preset("nano-k3", template.tokenizer.vocab_size), seed=0)
    engine = Engine(model, 1, limits=Limits(context=16384), boundary_id=template.stop_ids[0], template=template)
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="clients") as directory:
        state = open_state(
            directory, policy=SuiteMind(template, engine), template=template, prices=PRICES, model=MODEL,
            context_length=1 << 17, weights_version=1, default_max_tokens=2048,
        )  # fmt: skip
        async with serving(state) as running, recording(running.base_url.removesuffix("/v1")) as (url, seen):
            for name in names:
                command = environment(prefix, CLIENTS[name])
                for variant in CLIENTS[name].variants:
                    seen.clear()
                    made = keys(state, f"{name}-{variant}")
                    env = {**os.environ, "TIDE_URL": url, "TIDE_KEYS": json.dumps(made), "NO_COLOR": "1", **QUIET}
                    cases = outcomes(f"{name} {variant}".strip(), await started([*command, variant or "-", *only], env))
                    judge(cases, seen, made, state)
                    wrong += report(cases, seen if show else [])
        state.traces.close()
        state.ledger.db.close()
    return wrong


QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_AGENTS_DISABLE_TRACING": "1", "DO_NOT_TRACK": "1"}


def report(cases: list[Case], seen: list[Exchange]) -> int:
    wrong = [case for case in cases if not case.ok or case.faults]
    done = " ".join(case.name for case in cases if case not in wrong)
    print(f"{cases[0].client:<32} {len(cases) - len(wrong):>3} of {len(cases):>3}   {done}")
    for case in wrong:
        print(f"    {case.name}: {'' if case.ok else case.said[:900]} {'; '.join(case.faults)}")
    if seen:
        for case in cases:
            print(f"    {case.name:<18} {case.said[:200]}")
        for e in seen:
            asked, told = e.body[:2000].decode(errors="replace"), bytes(e.shown[:600]).decode(errors="replace")
            print(f"    {e.method} {e.path} {e.status} {asked} -> {told}")
    sys.stdout.flush()
    return len(wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=Path, default=Path(tempfile.gettempdir()) / "tidelock-client-libraries")
    parser.add_argument("--only", choices=CLIENTS, action="append")
    parser.add_argument("--case", action="append", default=[])
    parser.add_argument("--show", action="store_true", help="what was said, and every request")
    args = parser.parse_args()
    torch.set_num_threads(1)
    wrong = asyncio.run(measure(args.only or list(CLIENTS), args.prefix, args.case, args.show))
    print(f"{wrong} cases failed")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

"""Forced tool calls and strict formats on random weights at temperature 1: is every answer what its schema says?

    python -m benchmarks.forced_calls                                     # 150 random MFJS schemas
    python -m benchmarks.forced_calls --walle CHECKOUT                    # and the valid cases of MoonshotAI/walle
    python -m benchmarks.forced_calls --schemas 20 --seed 3 --show

The real service over the real nano engine. Each schema is asked four ways (any of two tools required, one tool named,
a strict response_format, and the same through Messages), whole and streamed. Random weights hardly ever end by
themselves, so closing tokens are favoured a little; an answer that reaches `max_tokens` all the same is counted as
cut, never as valid. What cannot be held to is refused before anything is sampled (a tool whose parameters allow no
object, a text of 10^12 letters) or where it becomes clear (an object that must hold its like without end), and listed.
At the end come schemas that explode: each must be refused, or served, within a bounded time. Exits with 1 if an answer
does not satisfy its schema.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import torch

from benchmarks.mfjs_schemas import EXPLOSIVE, random_schema, walle_schemas
from benchmarks.recording_proxy import Exchange
from tidelock.engine import Engine, Limits
from tidelock.loop.rundir import MODEL, PRICES
from tidelock.models import TransformerLM, preset
from tidelock.service.mfjs import fault
from tidelock.service.server import serving
from tidelock.service.state import open_state
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer

CONTEXT, ANSWER, AT_ONCE = 8192, 3000, 16
BOUND_S = 15.0  # a grammar is given 10 s to compile
OTHER = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
USER = [{"role": "user", "content": "go"}]
KINDS = ("valid", "cut", "refused")
WAYS = ("required", "named", "format", "messages")


def bias(tokenizer: ByteTokenizer) -> dict[str, float]:
    """Towards the ends of strings, lists and turns; nothing is forbidden by it."""
    closing = {str(i): 3.0 for i in tokenizer.encode('"]}')}
    return closing | {str(i): 5.0 for i in range(tokenizer.base, tokenizer.vocab_size)}


def request(
    way: str, schema: dict[str, Any], stream: bool, seed: int, biases: dict[str, float]
) -> tuple[str, dict[str, Any]]:
    """(path, body)."""
    if way == "messages":
        tools = [{"name": "first", "input_schema": schema}, {"name": "second", "input_schema": OTHER}]
        choice = {"type": "tool", "name": "first"}
        return "/messages", {"model": MODEL, "messages": USER, "max_tokens": ANSWER, "tools": tools, "tool_choice": choice,
                             "thinking": {"type": "disabled"}, "stream": stream}  # fmt: skip
    body: dict[str, Any] = {
        "model": MODEL, "messages": USER, "max_tokens": ANSWER, "thinking": {"type": "disabled"}, "temperature": 1.0,
        "logit_bias": biases, "seed": seed, "stream": stream,
    }  # fmt: skip
    if way == "format":
        return "/chat/completions", body | {"response_format": {
            "type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}}  # fmt: skip
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters, "strict": True}}
             for name, parameters in (("first", schema), ("second", OTHER))]  # fmt: skip
    choice = "required" if way == "required" else {"type": "function", "function": {"name": "first"}}
    return "/chat/completions", body | {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False}


def said(exchange: Exchange) -> tuple[str, list[tuple[str, str]]]:
    """(how it ended, [(tool or "", JSON text)])."""
    texts: dict[int, list[str]] = {}
    names: dict[int, str] = {}
    ended = ""
    for doc in exchange.events:
        for choice in doc.get("choices", ()):
            part = choice.get("delta") or choice.get("message") or {}
            ended = choice.get("finish_reason") or ended
            if part.get("content"):
                texts.setdefault(-1, []).append(part["content"])
            for n, call in enumerate(part.get("tool_calls") or ()):
                n = call.get("index", n)
                names[n] = call["function"].get("name") or names.get(n, "")
                texts.setdefault(n, []).append(call["function"].get("arguments") or "")
        if doc.get("type") == "message":
            ended = doc["stop_reason"]
            blocks = [b for b in doc["content"] if b["type"] == "tool_use"]
            names |= {n: b["name"] for n, b in enumerate(blocks)}
            texts |= {n: [json.dumps(b["input"])] for n, b in enumerate(blocks)}
        if doc.get("type") == "content_block_start" and doc["content_block"]["type"] == "tool_use":
            names[doc["index"]] = doc["content_block"]["name"]
            texts[doc["index"]] = []
        if doc.get("type") == "content_block_delta" and doc["delta"]["type"] == "input_json_delta":
            texts[doc["index"]].append(doc["delta"]["partial_json"])
        if doc.get("type") == "message_delta":
            ended = doc["delta"]["stop_reason"]
    return ended, [(names.get(n, ""), "".join(parts)) for n, parts in texts.items()]


def verdict(way: str, schema: dict[str, Any], exchange: Exchange) -> str:
    """ "valid", "cut", "refused: …" or what is wrong."""
    if exchange.status == 400 or "the constraint is refused" in str(exchange.failure):
        return f"refused: {exchange.failure['message'][:110]}"
    if exchange.status != 200 or exchange.failure:
        return f"HTTP {exchange.status}: {exchange.failure}"
    ended, calls = said(exchange)
    if ended in ("length", "max_tokens"):
        return "cut"
    if len(calls) != 1 or (way != "format") != (ended in ("tool_calls", "tool_use")):
        return f"{len(calls)} answers, ended by {ended}"
    name, text = calls[0]
    if way in ("named", "messages") and name != "first":
        return f"called {name}"
    try:
        jsonschema.Draft202012Validator(OTHER if name == "second" else schema).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{str(error).splitlines()[0]} in {text[:200]}"
    return "valid"


async def post(http: aiohttp.ClientSession, url: str, path: str, body: dict[str, Any]) -> Exchange:
    exchange = Exchange("POST", path, b"", time.monotonic())
    async with http.post(url + path, json=body, headers={"x-tidelock-profile": "lenient"}) as answer:
        exchange.status = answer.status
        exchange.shown += await answer.read()
    exchange.ended = time.monotonic()
    return exchange


async def measure(schemas: list[dict[str, Any]], explosive: dict[str, dict[str, Any]], seed: int, show: bool) -> bool:
    """Prints the table; whether all is well."""
    template = get_template("xtml", ByteTokenizer())
    model = TransformerLM(preset("nano-k3", template.tokenizer.vocab_size), seed=seed)
    engine = Engine(model, 1, limits=Limits(context=CONTEXT), boundary_id=template.stop_ids[0], template=template)
    counts: Counter[tuple[str, bool, str]] = Counter()
    refused: Counter[str] = Counter()
    faults: list[str] = []
    gate = asyncio.Semaphore(AT_ONCE)
    with tempfile.TemporaryDirectory() as directory:
        state = open_state(directory, policy=engine, template=template, prices=PRICES, model=MODEL, context_length=CONTEXT,
                           weights_version=1)  # fmt: skip
        _, key = state.keys.create("ann")
        state.ledger.topup("ann", 10**14)
        biases = bias(template.tokenizer)

        async def one(way: str, stream: bool, n: int, schema: dict[str, Any]) -> None:
            async with gate:
                path, body = request(way, schema, stream, seed + n, biases)
                found = verdict(way, schema, await post(http, url, path, body))
            kind = found.partition(":")[0]
            counts[way, stream, kind if kind in KINDS else "wrong"] += 1
            if kind == "refused":
                refused[found] += 1
            elif kind not in KINDS:
                faults.append(f"{way}, {'streamed' if stream else 'whole'}: {found}\n      {json.dumps(schema)[:600]}")

        async with serving(state) as running, aiohttp.ClientSession(headers={"authorization": f"Bearer {key}"}) as http:
            url, began = running.base_url, time.monotonic()
            await asyncio.gather(*(one(way, stream, n, schema) for way in WAYS for stream in (False, True)
                                   for n, schema in enumerate(schemas)))  # fmt: skip
            print(f"{len(schemas)} schemas, {time.monotonic() - began:.0f} s")
            print(f"{'forced by':<22} {'valid':>6} {'cut':>5} {'refused':>8} {'wrong':>6}")
            for way in WAYS:
                for stream in (False, True):
                    row = [counts[way, stream, kind] for kind in (*KINDS, "wrong")]
                    name = f"{way}, {'streamed' if stream else 'whole'}"
                    print(f"{name:<22} {row[0]:>6} {row[1]:>5} {row[2]:>8} {row[3]:>6}")
            for reason, n in refused.most_common():
                print(f"    {n} x {reason}")
            for text in faults if show else faults[:10]:
                print(f"    {text}")
            slow = await _explode(http, url, explosive, seed, biases)
        state.traces.close()
        state.ledger.db.close()
    engine.close()
    total = Counter(kind for (_, _, kind), n in counts.items() for _ in range(n))
    print(f"{total['valid']} of {total['valid'] + total['wrong']} finished answers satisfy their schema; "
          f"{total['cut']} were cut, {total['refused']} refused")
    return not faults and not slow


async def _explode(
    http: aiohttp.ClientSession, url: str, explosive: dict[str, dict[str, Any]], seed: int, biases: dict[str, float]
) -> list[str]:
    slow = []
    for name, schema in explosive.items():
        path, body = request("format", schema, False, seed, biases)  # not in the prompt, so it gets as far as the grammar
        exchange = await post(http, url, path, body | {"max_tokens": 50})
        took = exchange.ended - exchange.began
        words = (exchange.failure or {}).get("message", "served, and cut")
        print(f"    explosive: {name:<30} {exchange.status} after {took:5.2f} s  {words[:110]}")
        if took > BOUND_S or exchange.status not in (200, 400):
            slow.append(name)
    return slow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=int, default=150, help="random ones")
    parser.add_argument("--walle", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="all that is wrong")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    schemas = [random_schema(rng) for _ in range(args.schemas)] + (walle_schemas(args.walle) if args.walle else [])
    foreign = [schema for schema in schemas if fault(schema) is not None]
    if foreign:
        sys.exit(f"not MFJS: {fault(foreign[0])}: {json.dumps(foreign[0])}")
    sys.exit(not asyncio.run(measure(schemas, EXPLOSIVE, args.seed, args.show)))


if __name__ == "__main__":
    main()

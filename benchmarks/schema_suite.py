"""The schemas of JSON-Schema-Test-Suite as formats of answers: each is refused in words, or held to.

    python -m benchmarks.schema_suite --suite CHECKOUT            # of json-schema-org/JSON-Schema-Test-Suite

Every schema of draft 2020-12 (the required ones, without those that fetch others) becomes the one property of an object,
as answers are objects here, and is asked for on both profiles. A random model answers. What must not be: a 5xx, a refusal
that names no reason, a finished answer that does not satisfy its schema. Exits with 1 if one is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema

from benchmarks.sdk_suites import served
from tidelock.loop.rundir import MODEL

TOKENS, AT_ONCE = 600, 4
KEYWORDS = ("$id", "$anchor", "$dynamicRef", "$dynamicAnchor", "$vocabulary")  # of a schema that stands alone in its document
FETCHED = ("http://", "https://", "file:", "urn:", "tag:")


def schemas(suite: Path) -> list[tuple[str, Any]]:
    """(name, schema) of those that need nothing from elsewhere."""
    out = []
    for file in sorted((suite / "tests/draft2020-12").glob("*.json")):
        for group in json.loads(file.read_text()):
            text = json.dumps({k: v for k, v in group["schema"].items() if k != "$schema"} if isinstance(group["schema"], dict)
                              else group["schema"])  # fmt: skip
            if not any(f'"{word}"' in text for word in KEYWORDS) and not any(f'"{word}' in text for word in FETCHED):
                out.append((f"{file.stem}: {group['description']}", json.loads(text)))
    return out


def wrapped(schema: Any) -> dict[str, Any]:
    """As the one property of an object; what it refers to by a path from the root moves with it."""

    def moved(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: "#/$defs/asked" + v[1:] if k == "$ref" and isinstance(v, str) and v.startswith("#") else moved(v)
                    for k, v in node.items()}  # fmt: skip
        return [moved(item) for item in node] if isinstance(node, list) else node

    asked = {"$ref": "#/$defs/asked"}
    return {"type": "object", "properties": {"value": asked}, "required": ["value"], "additionalProperties": False,
            "$defs": {"asked": moved(schema)}}  # fmt: skip


async def judged(http: aiohttp.ClientSession, url: str, schema: dict[str, Any]) -> tuple[str, str]:
    """(verdict, why)."""
    form = {"type": "json_schema", "json_schema": {"name": "asked", "schema": schema, "strict": True}}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Say it."}], "response_format": form, "max_tokens": TOKENS}
    async with http.post(f"{url}/v1/chat/completions", json=body, headers={"authorization": "Bearer sk-test"}) as answer:
        status, told = answer.status, await answer.json()
    if status == 400:
        words = told["error"]["message"]
        return ("refused", words.rpartition(": ")[2][:60]) if len(words) > 20 else ("WRONG", f"refused without a reason: {words}")
    if status != 200:
        return "WRONG", f"{status}: {told}"
    choice = told["choices"][0]
    if choice["finish_reason"] != "stop":
        return "cut", ""
    try:
        jsonschema.Draft202012Validator(schema).validate(json.loads(choice["message"]["content"]))
    except (re.error, RecursionError):
        return "unjudged", ""  # a pattern that is none of Python's, a schema that only refers to itself
    except (ValueError, jsonschema.ValidationError) as error:
        return "WRONG", f"{choice['message']['content'][:200]}: {str(error).splitlines()[0][:160]}"
    return "held", ""


async def measure(url: str, cases: list[tuple[str, Any]]) -> Counter[str]:
    gate, verdicts = asyncio.Semaphore(AT_ONCE), Counter()

    async def one(http: aiohttp.ClientSession, name: str, schema: Any) -> None:
        async with gate:
            verdict, why = await judged(http, url, wrapped(schema))
        verdicts[verdict] += 1
        if verdict == "WRONG":
            print(f"  {name}: {json.dumps(schema)[:200]}\n      {why}", flush=True)

    async with aiohttp.ClientSession() as http:
        await asyncio.gather(*(one(http, *case) for case in cases))
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, required=True)
    args = parser.parse_args()
    cases, wrong = schemas(args.suite), 0
    for lenient in (False, True):
        with served("--able", *(["--lenient"] if lenient else [])) as url:
            verdicts = asyncio.run(measure(url, cases))
        wrong += verdicts["WRONG"]
        words = ", ".join(f"{n} {verdict}" for verdict, n in sorted(verdicts.items()))
        print(f"{'lenient' if lenient else 'strict'}: {len(cases)} schemas, {words}", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

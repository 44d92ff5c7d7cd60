"""Schemas to force calls with: random ones of Kimi's dialect (MFJS), and ones that explode."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

NAMES = ("a", "city", "unit_2", "from", "naïve", "with space")
WORDS = ("c", "f", "up/down", 'say "x"', "ünï", "<tag>")
DEPTH = 3


def random_schema(rng: random.Random) -> dict[str, Any]:
    """The parameters of a tool: an object of up to four properties, with definitions that some of them refer to."""
    definitions = {"point": {**_object(rng, 1, {}), "additionalProperties": False}} if rng.random() < 0.4 else {}
    schema = _object(rng, DEPTH, definitions)
    if rng.random() < 0.2:
        following = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}
        definitions["node"] = _holding({"value": _scalar(rng), "next": following}, "next")
        schema["properties"]["tree"] = {"$ref": "#/$defs/node"}
    return {**schema, **({"$defs": definitions} if definitions else {})}


def _holding(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


def _object(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(0 if depth < DEPTH else 1, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: _value(rng, depth - 1, definitions) for name in names}}
    if names and rng.random() < 0.8:
        schema["required"] = sorted(rng.sample(names, rng.randint(1, len(names))))
    if rng.random() < 0.7:
        schema["additionalProperties"] = False
    elif rng.random() < 0.5:
        schema["additionalProperties"] = _scalar(rng)
    return schema


def _value(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    kind = rng.choice(["scalar", "scalar", "enum", "array", "object", "either", "reference"])
    if depth <= 0 or kind == "scalar" or (kind == "reference" and not definitions):
        return _scalar(rng)
    if kind == "enum":
        words = {"type": "string", "enum": rng.sample(WORDS, rng.randint(1, 4))}
        return rng.choice([words, {"type": "integer", "enum": [3, 1, 2]}])
    if kind == "array":
        low = rng.randint(0, 2)
        bounds = {"minItems": low, "maxItems": low + rng.randint(0, 2)} if rng.random() < 0.7 else {}
        return {"type": "array", "items": _value(rng, depth - 1, definitions), **bounds}
    if kind == "object":
        return _object(rng, depth, definitions)
    if kind == "either":
        return {"anyOf": [_value(rng, depth - 1, definitions), {"type": "null"}]}
    return {"$ref": f"#/$defs/{rng.choice(list(definitions))}"}


def _scalar(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-20, 20)
    return rng.choice([
        {"type": "string"}, {"type": "string", "minLength": 1, "maxLength": rng.randint(1, 8)}, {"type": "boolean"},
        {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 50)}, {"type": "integer"}, {"type": "null"},
        {"type": "number", "minimum": low / 4}, {"type": "number"}, {"type": ["string", "null"]},
        {"type": "string", "description": "any"},
    ])  # fmt: skip


def walle_schemas(checkout: Path) -> list[dict[str, Any]]:
    """What MoonshotAI/walle itself calls valid (testdata/validator_cases/*/valid.jsonl)."""
    files = sorted(checkout.glob("testdata/validator_cases/*/valid.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines() if line.strip()]


def _wide(width: int, depth: int) -> dict[str, Any]:
    if depth == 0:
        return {"type": "string", "minLength": 3, "maxLength": 300}
    return {"type": "object", "properties": {f"p{n}": _wide(width, depth - 1) for n in range(width)}}


def _array(items: dict[str, Any], least: int) -> dict[str, Any]:
    return {"type": "array", "minItems": least, "maxItems": 1000, "items": items}


def _matching(pattern: str) -> dict[str, Any]:
    return {"type": "string", "pattern": pattern}


EXPLOSIVE: dict[str, dict[str, Any]] = {
    "a hundred thousand letters": _holding({"a": {"type": "string", "minLength": 100_000}}, "a"),
    "arrays of arrays": _holding({"a": _array(_array(_array({"type": "number"}, 0), 999), 999)}, "a"),
    "3,600 texts in sixties": _wide(60, 2),
    "a nested repetition": _holding({"a": _matching("^((a{1,300}){1,300}){1,300}$")}, "a"),
    "a pattern of long looks": _holding({"a": _matching("(.*a.{400}){5}(.*b.{400}){5}")}, "a"),
    "sixty times either of eight": _holding({f"p{n}": {"anyOf": [_matching(f".{{0,{n}}}x.{{{n}}}")] * 8} for n in range(60)}),
    "a megabyte": _holding({"a": {"enum": ["x" * 100 + str(n) for n in range(10_000)]}}, "a"),
}

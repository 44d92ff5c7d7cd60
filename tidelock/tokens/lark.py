"""Grammars for constrained turns, in Lark's syntax: the parts every template builds its own from.

Special tokens are written as <[id]>, so nothing depends on how a marker is spelled. JSON is compact, as templates write
it: a constraint that allowed white space would let a weak model emit nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from . import jsontext
from .errors import UserError
from .policy import Constraint

TEXT = "/(.|\\n)*/"  # any text; a special token is never part of one
COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
JSON_TYPES = ("string", "number", "boolean", "null", "object", "array")
MAX_DEPTH = 32  # of references and alternatives at the head of one schema


def special(token: int) -> str:
    return f"<[{token}]>"


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def any_of(expressions: Sequence[str]) -> str:
    return expressions[0] if len(expressions) == 1 else "(" + " | ".join(expressions) + ")"


def json_value(schema: Mapping[str, Any], root: Mapping[str, Any] | None = None) -> str:
    """A JSON text that satisfies the schema. `root`: the whole that it is a part of, which its references point into."""
    carried = {k: root[k] for k in DEFINITIONS if root and k in root}
    part = {**carried, **schema}
    if root is not None and _refers_to_whole(part):
        others = {k: v for k, v in root.items() if k not in DEFINITIONS}
        part = _rehomed({**part, "$defs": {**part.get("$defs", {}), WHOLE: others}})
    whole = _finite(part)
    definitions = {**whole.get("$defs", {}), "any_finite": ANY}
    return "%json " + json.dumps({**whole, "$defs": definitions, "x-guidance": COMPACT}, ensure_ascii=False)


DEFINITIONS, WHOLE = ("$defs", "definitions"), "the_whole"


def _refers_to_whole(schema: Any) -> bool:
    """Whether it refers to what is not a definition: "#", or a place within the properties."""
    if isinstance(schema, Mapping):
        return _is_elsewhere(schema.get("$ref")) or any(map(_refers_to_whole, schema.values()))
    return isinstance(schema, list) and any(map(_refers_to_whole, schema))


def _is_elsewhere(reference: Any) -> bool:
    if not isinstance(reference, str) or not reference.startswith("#"):
        return False
    return not reference.startswith(("#/$defs/", "#/definitions/"))


def _rehomed(schema: Any) -> Any:
    """With such references leading into the definition that the whole has become."""
    if isinstance(schema, list):
        return [_rehomed(inner) for inner in schema]
    if not isinstance(schema, Mapping):
        return schema
    out = {key: _rehomed(inner) for key, inner in schema.items()}
    if _is_elsewhere(schema.get("$ref")):
        out["$ref"] = f"#/$defs/{WHOLE}{schema['$ref'][1:].rstrip('/')}"
    return out


# What is written must be readable: 1e999 is JSON, but no reader gets a finite number from it, nor one of 5,000 digits.
NUMBER = {"minimum": -(10**15), "maximum": 10**15}
ANY_REF = {"$ref": "#/$defs/any_finite"}
ANY = {"anyOf": [
    {"type": "string"}, {"type": "boolean"}, {"type": "null"}, {"type": "number", **NUMBER},
    {"type": "array", "items": ANY_REF}, {"type": "object", "additionalProperties": ANY_REF},
]}  # fmt: skip
NAMED = {"$id", "$schema"}  # who it is; references stay within it, so nothing follows from its address
SHAPING = {"type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"}  # keywords that say what kind of value it is
SILENT = {"title", "description", "default", "examples", "$comment"}  # keywords that allow everything


def _finite(schema: Any, top: bool = True) -> Any:
    """The schema with bounds on every number that has none, however free its place."""
    if schema is True or (isinstance(schema, dict) and not top and not set(schema) - SILENT):
        return ANY_REF
    if not isinstance(schema, dict):
        return schema
    out = {k: v for k, v in schema.items() if k not in NAMED}
    types = out.get("type", ())
    types = (types,) if isinstance(types, str) else types
    if "number" in types or "integer" in types:
        low = {} if "exclusiveMinimum" in out else {"minimum": NUMBER["minimum"]}
        high = {} if "exclusiveMaximum" in out else {"maximum": NUMBER["maximum"]}
        out = {**low, **high, **out}
    if "object" in types:
        out.setdefault("additionalProperties", True)
    if "array" in types and "prefixItems" not in out:
        out.setdefault("items", True)
    for key in ("additionalProperties", "items"):
        if key in out:
            out[key] = _finite(out[key], False)
    for key in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(out.get(key), dict):
            out[key] = {name: _finite(inner, False) for name, inner in out[key].items()}
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if isinstance(out.get(key), list):
            out[key] = [_finite(inner, False) for inner in out[key]]
    return out


def content(constraint: Constraint | None) -> str:
    """The expression for an answer's text."""
    if constraint is None:
        return TEXT
    if constraint.kind == "regex":
        return regex(constraint.text)
    if constraint.kind == "json_schema":
        try:
            return json_value(_object(json.loads(constraint.text)))
        except ValueError as e:
            raise UserError(f"the schema is not JSON: {e}") from None
    raise UserError(f"an answer cannot be constrained by {constraint.kind!r}; use json_schema or regex")


def regex(pattern: str) -> str:
    return "/" + pattern.replace("/", "\\/").replace("\n", "\\n") + "/"


def argument_forms(schema: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The objects that a call's arguments may be; each has no keys but the declared ones, unless it says otherwise.
    Definitions stay with `schema`.

    Raises UserError for a schema that allows no object: nothing could ever be called with it.
    """
    shaped = schema if SHAPING & schema.keys() else {"type": "object", **schema}
    objects = [{k: v for k, v in form.items() if k not in ("$defs", "definitions")}
               for kind, form in forms(shaped, schema) if kind == "object"]  # fmt: skip
    if not objects:
        raise UserError("a tool is called with an object, and the schema of its parameters allows none")
    return [{**({"additionalProperties": False} if form.get("properties") else {}), **form} for form in objects]


def forms(schema: Any, root: Mapping[str, Any], depth: int = 0) -> list[tuple[str, Any]]:
    """How a value may look at top level: (JSON type, schema of that type alone) pairs; a fixed value is ("const", value).

    Raises UserError for a reference that leads nowhere or in a circle.
    """
    if depth > MAX_DEPTH:
        raise UserError("a schema's references or alternatives go round in a circle")
    if schema is True or schema == {}:
        return [(t, {"type": t}) for t in JSON_TYPES]
    if not isinstance(schema, dict):
        raise UserError("a schema must be an object")
    if "$ref" in schema:
        rest = {k: v for k, v in schema.items() if k != "$ref"}
        return forms({**_resolve(schema["$ref"], root), **rest}, root, depth + 1)
    if "const" in schema:
        return [("const", schema["const"])]
    if "enum" in schema:
        return [("const", value) for value in schema["enum"]]
    for word in ("anyOf", "oneOf"):
        if word in schema:
            rest = {k: v for k, v in schema.items() if k != word}
            return [f for s in schema[word] for f in forms({**rest, **_object(s)}, root, depth + 1)]
    if "allOf" in schema:
        merged = {k: v for k, v in schema.items() if k != "allOf"}
        for s in schema["allOf"]:
            merged |= _resolve(s["$ref"], root) if "$ref" in _object(s) else s
        return forms(merged, root, depth + 1)
    types = schema.get("type", JSON_TYPES)
    return [(t, {**schema, "type": t}) for t in ([types] if isinstance(types, str) else types)]


def raw_text(schema: Mapping[str, Any]) -> str:
    """A string as it stands, without quotes, under the schema's pattern (found anywhere, as JSON Schema has it) and
    lengths. For the right side of a terminal."""
    low, high, pattern = schema.get("minLength", 0), schema.get("maxLength"), schema.get("pattern")
    parts = []
    if low or high is not None:
        parts.append("/(.|\\n){%d,%s}/" % (low, "" if high is None else high))
    if pattern is not None:
        start, end = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
        body = pattern[start : len(pattern) - end]
        parts.append(regex(("" if start else "(.|\n)*") + f"({body})" + ("" if end else "(.|\n)*")))
    return " & ".join(parts) or TEXT


def text_of(value: Any) -> str:
    """A fixed value as an argument spells it: strings raw, everything else JSON."""
    return value if isinstance(value, str) else jsontext.dump(value)


def _object(schema: Any) -> dict[str, Any]:
    if not isinstance(schema, dict):
        raise UserError("a schema must be an object")
    return schema


def _resolve(reference: str, root: Mapping[str, Any]) -> dict[str, Any]:
    at: Any = root
    if not str(reference).startswith("#"):
        raise UserError(f"a schema may only refer to itself, not to {reference!r}")
    for step in str(reference).lstrip("#").strip("/").split("/"):
        if step:
            step = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(at, dict) or step not in at:
                raise UserError(f"nothing in the schema is called {reference!r}")
            at = at[step]
    return _object(at)

"""Moonshot-flavored JSON Schema: the subset that Kimi takes for tool parameters and response formats.

`fault` says what is wrong with a schema, or nothing. The rules are those of the public MFJS specification.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

TYPES = ("null", "boolean", "object", "array", "number", "integer", "string")
NOTES = {"description", "title"}
ROOT_ONLY = {"$defs", "$id"}
KEYWORDS = {
    "null": {"default", "enum"},
    "boolean": {"default", "enum"},
    "object": {"default", "properties", "required", "additionalProperties"},
    "array": {"default", "items", "minItems", "maxItems"},
    "number": {"default", "enum", "minimum", "maximum"},
    "integer": {"default", "enum", "minimum", "maximum"},
    "string": {"default", "enum", "minLength", "maxLength", "pattern"},
}
RESERVED = {"$defs", "$ref", "anyOf", "required", "additionalProperties"}  # no names for properties
LIMITS = (("minLength", "maxLength"), ("minItems", "maxItems"), ("minimum", "maximum"))
MAX_DEPTH, MAX_PROPERTIES, MAX_BRANCHES = 5, 100, 10
MAX_ENUM = 1000  # values in all
MAX_LOOKS = 50_000  # at schemas, for whether they come to an end


class _Fault(Exception):
    pass


def fault(schema: Any) -> str | None:
    """None for a sound schema, else one line: what is wrong, and where (a JSON pointer)."""
    try:
        _Checker(schema).check()
    except _Fault as found:
        return str(found)
    except RecursionError:
        return "/: nested too deeply"
    return None


class _Checker:
    def __init__(self, schema: Any) -> None:
        self.root = schema
        self.properties = self.enums = self.looks = 0

    def check(self) -> None:
        if not isinstance(self.root, dict):
            raise _Fault("/: a schema must be an object")
        definitions = self.root.get("$defs", {})
        if not isinstance(definitions, dict):
            raise _Fault("/$defs: must be an object")
        for name, inner in definitions.items():
            if not name or "/" in name:
                raise _Fault(f"/$defs: {name!r} is no name; it must not be empty or hold a slash")
            if not isinstance(inner, dict):
                raise _Fault(f"/$defs/{name}: must be an object")
        if self.root:
            self._schema(self.root, "", 0)
        for name, inner in definitions.items():
            self._schema(inner, f"/$defs/{name}", 0)
        self._terminates()

    def _schema(self, schema: Any, at: str, depth: int) -> None:
        where = at or "/"
        if not isinstance(schema, dict):
            raise _Fault(f"{where}: a schema must be an object")
        for keyword in ROOT_ONLY & schema.keys():
            if at:
                raise _Fault(f"{where}: {keyword} may only stand at the root")
        for keyword in ("description", "title", "$id", "pattern"):
            if keyword in schema and not isinstance(schema[keyword], str):
                raise _Fault(f"{where}: {keyword} must be a string")
        beside = NOTES | ({"$defs", "$id"} if not at else set())
        if "anyOf" in schema or "$ref" in schema:
            self._combined(schema, at, beside, depth)
        elif not schema.keys() - NOTES:
            pass  # anything
        elif "type" not in schema:
            raise _Fault(f"{where}: every schema needs a type, anyOf or $ref")
        else:
            self._typed(schema, at, beside, depth)

    def _combined(self, schema: Mapping[str, Any], at: str, beside: set[str], depth: int) -> None:
        word = "anyOf" if "anyOf" in schema else "$ref"
        others = sorted(schema.keys() - beside - {word})
        if others:
            raise _Fault(f"{at or '/'}: {', '.join(others)} cannot stand beside {word}")
        if word == "$ref":
            self._target(schema["$ref"], at)
            return
        branches = schema["anyOf"]
        if not isinstance(branches, list) or not 1 <= len(branches) <= MAX_BRANCHES:
            raise _Fault(f"{at or '/'}: anyOf must be an array of 1 to {MAX_BRANCHES} schemas")
        for n, branch in enumerate(branches):
            self._schema(branch, f"{at}/anyOf/{n}", depth)

    def _typed(self, schema: Mapping[str, Any], at: str, beside: set[str], depth: int) -> None:
        where = at or "/"
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not types or not all(isinstance(t, str) and t in TYPES for t in types):
            raise _Fault(f"{where}: type must be one of {', '.join(TYPES)}, or an array of them")
        allowed = beside | {"type"} | (KEYWORDS[types[0]] if len(types) == 1 else {"enum"})
        others = sorted(schema.keys() - allowed)
        if others:
            raise _Fault(f"{where}: {', '.join(others)} cannot stand in a schema of type {'/'.join(types)}")
        if "enum" in schema:
            self._enum(schema["enum"], types, where)
        if "default" in schema and not _is(schema["default"], types[0]):
            raise _Fault(f"{where}: default is no {types[0]}")
        self._limits(schema, types, where)
        if types == ["object"]:
            self._object(schema, at, depth)
        if "items" in schema:
            if not schema["items"]:
                raise _Fault(f"{where}: items must be a schema that is not empty")
            self._schema(schema["items"], f"{at}/items", depth)

    def _object(self, schema: Mapping[str, Any], at: str, depth: int) -> None:
        where = at or "/"
        properties = schema.get("properties", {})
        if not isinstance(properties, dict):
            raise _Fault(f"{where}: properties must be an object")
        self.properties += len(properties)
        if self.properties > MAX_PROPERTIES:
            raise _Fault(f"{where}: more than {MAX_PROPERTIES} properties in all")
        if properties and depth + 1 > MAX_DEPTH:
            raise _Fault(f"{where}: objects nest deeper than {MAX_DEPTH}")
        for name, inner in properties.items():
            if not name or name in RESERVED or ("/" in name and at.startswith("/$defs/")):
                raise _Fault(f"{where}: a property cannot be called {name!r}")
            self._schema(inner, f"{at}/properties/{name}", depth + 1)
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise _Fault(f"{where}: required must be an array of strings")
        for name in required:
            if name not in properties:
                raise _Fault(f"{where}: required names {name!r}, which is not among the properties")
        more = schema.get("additionalProperties", True)
        if isinstance(more, bool) or more == {} and isinstance(more, dict):
            return
        self._schema(more, f"{at}/additionalProperties", depth + 1)

    def _enum(self, values: Any, types: list[str], where: str) -> None:
        if not isinstance(values, list) or not values:
            raise _Fault(f"{where}: enum must be an array that is not empty")
        scalars = [t for t in types if t not in ("null", "object", "array")]
        nullable = len(types) == 2 and "null" in types and len(scalars) == 1
        if not nullable and (len(types) > 1 or types[0] in ("object", "array")):
            raise _Fault(f"{where}: with enum, type is one scalar type, or one and null")
        for value in values:
            if not any(_is(value, t) for t in types):
                raise _Fault(f"{where}: enum holds {value!r}, which is no {' or '.join(types)}")
        self.enums += len(values)
        if self.enums > MAX_ENUM:
            raise _Fault(f"{where}: too many enum values")

    def _limits(self, schema: Mapping[str, Any], types: list[str], where: str) -> None:
        for low, high in LIMITS:
            for keyword in (low, high):
                value = schema.get(keyword, 0)
                kind = "integer" if types == ["integer"] or keyword not in ("minimum", "maximum") else "number"
                if not _is(value, kind) or (kind == "integer" and keyword not in ("minimum", "maximum") and value < 0):
                    raise _Fault(f"{where}: {keyword} must be {'an integer' if kind == 'integer' else 'a number'} in range")
            if low in schema and high in schema and schema[low] > schema[high]:
                raise _Fault(f"{where}: {low} is greater than {high}")

    def _target(self, reference: Any, at: str) -> Mapping[str, Any]:
        if reference == "#":
            return self.root
        if not isinstance(reference, str) or not reference.startswith("#/$defs/"):
            raise _Fault(f"{at or '/'}: $ref must be \"#\" or start with #/$defs/")
        found = _resolve(self.root, reference)
        if found is None:
            raise _Fault(f"{at or '/'}: $ref leads nowhere: {reference!r}")
        return found

    def _terminates(self) -> None:
        """A value of a schema must be able to end. Every reference is taken to be endless until its schema shows otherwise,
        and all are looked at again until none changes: following each path by itself would take 2^n looks where n
        definitions name the next one twice."""
        endless: dict[str, int] = {"#": 2}
        before: dict[str, int] = {}
        while endless != before:
            before = dict(endless)
            for reference in [*endless][::-1]:
                endless[reference] = self._endless(self._target(reference, ""), endless)
        if endless["#"]:
            raise _Fault("/: infinite recursion")

    def _endless(self, schema: Mapping[str, Any], known: dict[str, int]) -> int:
        """Whether a value of this schema must go on for ever: 0 no; 1 only its arrays would, if they were not empty; 2 yes.

        An object is endless when one of the properties it requires is, or when all it requires are arrays of that sort.
        A reference that is met for the first time is looked at there and then, so that most are known after one round.
        """
        self.looks += 1
        if self.looks > MAX_LOOKS:
            raise _Fault("/: too many references to follow")
        if "$ref" in schema:
            reference = schema["$ref"]
            if reference not in known:
                known[reference] = 2
                known[reference] = self._endless(self._target(reference, ""), known)
            return known[reference]
        if "anyOf" in schema:
            return min(self._endless(branch, known) for branch in schema["anyOf"])
        if "items" in schema:
            inner = self._endless(schema["items"], known)
            return inner if schema.get("minItems", 0) > 0 else min(inner, 1)
        needed = [self._endless(schema["properties"][name], known) for name in schema.get("required", ())]
        return 2 if 2 in needed else min(needed, default=0)


def _resolve(root: Mapping[str, Any], reference: str) -> Mapping[str, Any] | None:
    """The schema a pointer leads to: through properties, items, additionalProperties and branches."""
    at: Any = root
    for step in reference.removeprefix("#/").split("/"):
        if isinstance(at, list) and step.isdecimal() and int(step) < len(at):
            at = at[int(step)]
        elif isinstance(at, dict) and step in at:
            at = at[step]
        else:
            return None
    return at if isinstance(at, dict) and ("type" in at or "anyOf" in at or "$ref" in at) else None


def _is(value: Any, kind: str) -> bool:
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "null":
        return value is None
    if kind in ("string", "array", "object"):
        return isinstance(value, {"string": str, "array": list, "object": dict}[kind])
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if kind == "integer":
        return isinstance(value, int)
    return kind == "number" and math.isfinite(value)

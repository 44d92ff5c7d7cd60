"""Moonshot-flavored JSON Schema, rule by rule: each rule has a schema that keeps it and one that breaks it."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidelock.service.mfjs import fault

TEXT = {"type": "string"}


def obj(**properties) -> dict:
    return {"type": "object", "properties": properties}


def nested(depth: int) -> dict:
    return obj(**({"inner": nested(depth - 1)} if depth > 1 else {"leaf": TEXT}))


def node(**more) -> dict:
    return {**obj(node={"$ref": "#/$defs/node"}), "$defs": {"node": {**obj(next={"$ref": "#/$defs/node"}), **more}}}


VALID = {
    "anything": {}, "anything inside": obj(a={}, b={"description": "d"}),
    "every type": {"anyOf": [{"type": t} for t in ("null", "boolean", "object", "array", "number", "integer", "string")]},
    "notes": {**obj(a={**TEXT, "description": "d", "title": "t", "default": "x"}), "$id": "here", "description": "d"},
    "free additions": {"type": "object", "additionalProperties": {}},
    "typed additions": {"type": "object", "additionalProperties": TEXT},
    "no additions": {**obj(a=TEXT), "required": ["a"], "additionalProperties": False},
    "array of anything": {"type": "array"},
    "bounded": obj(a={**TEXT, "minLength": 1, "maxLength": 2}, b={"type": "array", "items": TEXT, "minItems": 0, "maxItems": 0},
                   c={"type": "number", "minimum": -1.5, "maximum": 1.5}, d={"type": "integer", "minimum": 0}),
    "enum": obj(a={**TEXT, "enum": ["x", "y"]}, b={"type": "number", "enum": [1, 2.5]}),
    "nullable": obj(a={"type": ["string", "null"], "enum": ["x", None]}, b={"type": ["object", "array"]}),
    "reference": {**obj(a={"$ref": "#/$defs/t", "description": "d"}), "$defs": {"t": TEXT}},
    "recursion through an option": node(),
    "recursion that may end": {"type": "object", "properties": {"n": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["n"]},
    "recursion through a list": {**obj(name=TEXT, children={"type": "array", "items": {"$ref": "#"}}), "required": ["name", "children"]},
    "five levels": nested(5),
    "a hundred properties": obj(**{f"p{n}": TEXT for n in range(100)}),
    "ten branches": {"anyOf": [TEXT] * 10},
}  # fmt: skip

INVALID = {
    "no object": [], "null": None, "boolean": True,
    "no type": {"properties": {}}, "unknown type": {"type": "text"}, "type is null": {"type": None}, "no types": {"type": []},
    "type beside anyOf": {"type": "string", "anyOf": [TEXT]},
    "type beside $ref": {**obj(a={"type": "string", "$ref": "#/$defs/t"}), "$defs": {"t": TEXT}},
    "keyword beside $ref": {**obj(a={"$ref": "#/$defs/t", "minLength": 1}), "$defs": {"t": TEXT}},
    "anyOf is no list": {"anyOf": "x"}, "anyOf empty": {"anyOf": []}, "anyOf of eleven": {"anyOf": [TEXT] * 11},
    **{word: {**obj(a=TEXT), word: value} for word, value in {
        "oneOf": [TEXT], "allOf": [TEXT], "not": TEXT, "if": TEXT, "const": 1, "patternProperties": {}, "format": "x",
        "uniqueItems": True, "prefixItems": [TEXT], "minProperties": 1, "dependentRequired": {}}.items()},
    "format": obj(a={**TEXT, "format": "date"}), "multipleOf": obj(a={"type": "number", "multipleOf": 2}),
    "exclusive": obj(a={"type": "number", "exclusiveMinimum": 2}),
    "a string's keyword on an array": {"type": "array", "minLength": 1}, "required on an array": {"type": "array", "required": []},
    "properties are no object": {"type": "object", "properties": []}, "property without a name": obj(**{"": TEXT}),
    "reserved name": obj(**{"$ref": TEXT}), "required names nothing": {**obj(a=TEXT), "required": ["b"]},
    "required is no list": {**obj(a=TEXT), "required": "a"}, "required of numbers": {**obj(a=TEXT), "required": [1]},
    "additions are a number": {"type": "object", "additionalProperties": 1}, "additions are null": {"type": "object", "additionalProperties": None},
    "items empty": {"type": "array", "items": {}}, "items list": {"type": "array", "items": [TEXT]},
    "enum of another type": {"type": "string", "enum": [1]}, "enum mixed": {"type": "string", "enum": ["a", 1]},
    "enum empty": {"type": "string", "enum": []}, "enum no list": {"type": "string", "enum": "a"},
    "enum of objects": {"type": "object", "enum": [{}]}, "enum of three types": {"type": ["string", "number", "null"], "enum": ["a"]},
    "bounds on types": {"type": ["string", "null"], "minLength": 1},
    "min above max": {"type": "string", "minLength": 2, "maxLength": 1}, "negative length": {"type": "string", "minLength": -1},
    "length no integer": {"type": "string", "minLength": 1.5}, "fraction of an integer": {"type": "integer", "minimum": 1.5},
    "bound no number": {"type": "number", "minimum": "1"}, "infinite bound": {"type": "number", "maximum": float("inf")},
    "default of another type": {"type": "string", "default": 1}, "description no string": {"type": "string", "description": 1},
    "$defs inside": obj(a={"type": "object", "$defs": {}}), "$id inside": obj(a={**TEXT, "$id": "x"}),
    "$defs no object": {"type": "object", "$defs": []}, "definition no object": {"type": "object", "$defs": {"a": 1}},
    "definition with a slash": {"type": "object", "$defs": {"a/b": TEXT}},
    "reference outside": obj(a={"$ref": "https://example.com/x"}), "reference to nothing": obj(a={"$ref": "#/$defs/x"}),
    "reference no string": obj(a={"$ref": 1}),
    "endless": {**obj(node={"$ref": "#"}), "required": ["node"]},
    "endless through a definition": {**node(required=["next"]), "required": ["node"]},
    "six levels": nested(6), "too many properties": obj(**{f"p{n}": TEXT for n in range(101)}),
}  # fmt: skip


@pytest.mark.parametrize("name", VALID)
def test_valid(name):
    assert fault(VALID[name]) is None


@pytest.mark.parametrize("name", INVALID)
def test_invalid(name):
    assert fault(INVALID[name])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["type", "properties", "items", "anyOf", "$ref", "$defs", "enum", "required", "additionalProperties", "a", "minimum"]),
        inner | st.sampled_from(["object", "array", "string", "#", "#/$defs/a"]), max_size=5),
    max_leaves=12,
)  # fmt: skip


@given(json_values)
def test_whatever_comes_there_is_an_answer_in_one_line(schema):
    found = fault(schema)
    assert found is None or (found and "\n" not in found)


def test_bottomless_nesting_is_a_fault_and_no_crash():
    schema: dict = {"type": "array"}
    for _ in range(5000):
        schema = {"type": "array", "items": schema}
    assert fault(schema)


@pytest.mark.parametrize("wide", [2, 10])
def test_definitions_that_name_the_next_one_twice_do_not_take_for_ever(wide):
    """A schema of 3 kB took 2^60 steps, on the event loop of everybody's requests."""
    last = 60
    options = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * wide} for n in range(last)}
    pairs = {
        f"d{n}": {"type": "object", "required": ["a"], "properties": {"a": {"$ref": f"#/$defs/d{n + 1}"}}} for n in range(last)
    }
    for definitions in (options, pairs):
        for end, expected in ((TEXT, None), ({"$ref": "#/$defs/d0"}, "/: infinite recursion")):
            schema = {**obj(a={"$ref": "#/$defs/d0"}), "required": ["a"], "$defs": {**definitions, f"d{last}": end}}
            began = time.monotonic()
            assert fault(schema) == expected
            assert time.monotonic() - began < 1


def test_definitions_that_all_name_each_other_are_looked_at_a_bounded_number_of_times():
    many = 200
    each = {"anyOf": [{"$ref": f"#/$defs/d{(n * 7) % many}"} for n in range(10)]}
    schema = {**obj(a={"$ref": "#/$defs/d0"}), "required": ["a"], "$defs": {f"d{n}": each for n in range(many)}}
    began = time.monotonic()
    assert fault(schema) == "/: infinite recursion"
    assert time.monotonic() - began < 1

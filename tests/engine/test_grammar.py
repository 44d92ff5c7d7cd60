"""Constrained decoding: whatever the model wants, what comes out is what the grammar says; and nobody else is harmed."""

import asyncio
import json
import random
import threading

import jsonschema
import numpy as np
import pytest
from msgspec.structs import replace

from tidelock.engine import Engine, Limits, grammar
from tidelock.engine.grammar import Grammars
from tidelock.models import TransformerLM, preset
from tidelock.tokens.errors import UserError
from tidelock.tokens.message import ToolSpec
from tidelock.tokens.policy import Constraint, PolicyError, SamplingParams, kept_ids
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import BPETokenizer, ByteTokenizer

TEXTS = ['{"city": "Ely", "days": 3}', "functions.weather:0 the weather in the city", 'call tool="weather" index="1"'] * 20
each_tokenizer = pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPETokenizer.train(TEXTS, 300)], ids=["bytes", "bpe"])
each_template = pytest.mark.parametrize("name", ["xtml", "chatml"])

TOOLS = (
    ToolSpec("weather", "", {
        "type": "object",
        "properties": {
            "city": {"type": "string", "minLength": 2, "maxLength": 5},
            "unit": {"enum": ["C", "F", 0, None]},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "zip": {"type": "string", "pattern": "^[0-9]{3}$"},
            "where": {"$ref": "#/$defs/point"},
            "note": {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "integer"}, "maxItems": 2}]},
        },
        "required": ["city", "days", "where"],
        "$defs": {"point": {
            "type": "object", "properties": {"x": {"type": "number"}, "y": {"const": "a\"b&<"}},
            "required": ["x", "y"], "additionalProperties": False,
        }},
    }),
    ToolSpec("say-it", "", {"type": "object", "properties": {"text": {"type": ["string", "null"]}}, "required": ["text"]}),
    ToolSpec("now", "", {"type": "object", "properties": {}, "additionalProperties": False}),
    ToolSpec("anything", "", {}),
)  # fmt: skip


def matcher(tokenizer, constraint):
    grammars = Grammars(tokenizer, tokenizer.vocab_size + 7)
    try:
        return asyncio.run(grammars.matcher(constraint))
    finally:
        grammars.close()


def walk(m, rng, stop_ids=(), most=3000, hurry=()):
    """Random ids among those allowed, preferring `hurry` (what closes things), until only the end is left."""
    ids = []
    while not m.complete and len(ids) < most:
        options = np.flatnonzero(m.allowed(stop_ids))
        quick = [i for i in options if i in hurry]
        ids.append(int(rng.choice(quick if quick and rng.random() < 0.3 else options)))
        if ids[-1] in stop_ids:
            break
        m.take(ids[-1])
    return ids


@each_tokenizer
def test_json_follows_its_schema(tokenizer):
    schema = TOOLS[0].parameters
    m = Constraint("json_schema", json.dumps(schema | {"additionalProperties": False}))
    for seed in range(8):
        ids = walk(matcher(tokenizer, m), random.Random(seed), hurry=tokenizer.encode('"]}') + tokenizer.encode("."))
        jsonschema.validate(json.loads(tokenizer.decode(ids)), schema)


@each_tokenizer
def test_a_regex_and_a_lark_grammar_hold_and_special_tokens_are_not_text(tokenizer):
    rng = random.Random(0)
    assert tokenizer.decode(walk(matcher(tokenizer, Constraint("regex", "(ab|c{2,3})!")), rng)) in ("ab!", "cc!", "ccc!")
    anything = matcher(tokenizer, Constraint("regex", "(.|\n)*")).allowed(())
    assert anything[: tokenizer.base].sum() > 100 and not anything[tokenizer.base :].any()
    ids = walk(matcher(tokenizer, Constraint("lark", 'start: "<|sep|>" <|sep|> "x"')), rng)
    assert tokenizer.decode(ids) == "<|sep|><|sep|>x" and ids.count(tokenizer.special("<|sep|>")) == 1


@each_tokenizer
@each_template
@pytest.mark.parametrize("choice", ["required", "weather", "say-it", "now", "anything"])
def test_forced_calls_have_arguments_that_satisfy_their_schema(tokenizer, name, choice):
    template = get_template(name, tokenizer)
    constraint = template.constraint(TOOLS, choice)
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    specs = {t.name: t.parameters for t in TOOLS}
    hurry = {*range(tokenizer.base, tokenizer.vocab_size), *tokenizer.encode('"]}.')}
    for seed in range(6):
        m = asyncio.run(grammars.matcher(constraint))
        ids = walk(m, random.Random(seed), template.stop_ids, hurry=hurry)
        assert ids[-1] in template.stop_ids
        parser = template.parser()
        parser.feed(ids)
        message = parser.finish()
        assert message.tool_calls and (choice == "required" or [c.name for c in message.tool_calls] == [choice])
        for call in message.tool_calls:
            jsonschema.validate(call.arguments, specs[call.name])
            declared = specs[call.name].get("properties")
            assert not declared or set(call.arguments) <= set(declared)
    grammars.close()


@pytest.mark.parametrize("name", ["xtml", "xtml-instruct", "chatml", "k2", "k2-thinking", "k2.5-instant"])
def test_every_answer_the_template_writes_is_in_its_own_grammar(name):
    """`auto` allows text, calls, or both; what we render ourselves, id for id, must be among it."""
    from tidelock.tokens.message import Message
    from tidelock.tokens.template import make_calls

    tokenizer = ByteTokenizer()
    template = get_template(name.removesuffix("-instruct").removesuffix("-instant"), tokenizer, False if "-inst" in name else None)
    thinks = template.name in ("xtml", "chatml", "k2-thinking")
    calls = make_calls([
        ("weather", {"city": "Ely", "days": 3, "where": {"x": 1.5, "y": 'a"b&<'}, "note": [1, 2]}), ("now", {}),
        ("say-it", {"text": 'tag <|close|> & "quotes"\n'}), ("anything", {"a": "b", "c": [1, {"d": None}]}),
    ], 0)  # fmt: skip
    said = [Message("assistant", "hé\n", "hm"), Message("assistant", "", "", calls), Message("assistant", "so", "x", calls)]
    for message in said if thinks else [replace(m, reasoning="") for m in said]:
        m = matcher(tokenizer, template.constraint(TOOLS, "auto"))
        for token in template.sampled(message):
            assert m.allowed(template.stop_ids)[token]
            m.take(token)
        assert m.complete


@each_template
def test_an_answer_can_be_held_to_a_schema_inside_its_turn(name):
    template = get_template(name, ByteTokenizer())
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    m = matcher(template.tokenizer, template.constraint((), "none", Constraint("json_schema", json.dumps(schema))))
    ids = walk(m, random.Random(1), template.stop_ids, hurry=set(range(256, 273)))
    parser = template.parser()
    parser.feed(ids)
    assert json.loads(parser.finish().content) in ({"ok": True}, {"ok": False})


def test_what_cannot_be_forced_is_said_so():
    template = get_template("xtml", ByteTokenizer())
    loop = ToolSpec("loop", "", {"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"$ref": "#/$defs/b"}}})
    for tools, choice in ((TOOLS, "nobody"), ((), "required"), ((loop,), "loop")):
        with pytest.raises(UserError):
            template.constraint(tools, choice)


# -- in the engine ----------------------------------------------------------------------------------------------------


def with_engine(work, name="xtml", **limits):
    async def inside():
        template = get_template(name, ByteTokenizer())
        model = TransformerLM(preset("nano-k3", 280), seed=0).eval()
        engine = Engine(model, 1, limits=Limits(n_pages=512, n_slots=64, **limits), boundary_id=template.stop_ids[0],
                        template=template)  # fmt: skip
        try:
            return await work(engine, template)
        finally:
            engine.close()

    return asyncio.run(asyncio.wait_for(inside(), 60))


async def ask(engine, prompt, **params):
    return [c async for c in engine.generate(prompt, SamplingParams(**{"max_tokens": 40, "seed": 3, **params}))]


def joined(chunks, field="ids"):
    return [x for c in chunks for x in getattr(c, field)]


@each_template
def test_a_model_without_a_clue_calls_tools_correctly_when_it_must(name):
    async def work(engine, template):
        prompt = [*template.tokenizer.encode("hi"), *template.generation_prompt()]
        hurry = tuple((i, 4.0) for i in range(256, 273)) + tuple((i, 3.0) for i in b'"]}.')
        asked = [
            ask(engine, prompt, seed=s, max_tokens=600, stop_ids=template.stop_ids, logit_bias=hurry,
                constraint=template.constraint(TOOLS, "weather"))
            for s in range(8)
        ]  # fmt: skip
        free = [ask(engine, prompt, seed=s) for s in range(4)]
        together = await asyncio.gather(*asked, *free)
        for chunks in together[:8]:
            assert chunks[-1].finish_reason == "stop"
            parser = template.parser()
            parser.feed(joined(chunks))
            (call,) = parser.finish().tool_calls
            jsonschema.validate(call.arguments, TOOLS[0].parameters)
            for token, kept in zip(joined(chunks), joined(chunks, "kept")):
                assert kept is not None and token in kept_ids(kept)
        alone = [await ask(engine, prompt, seed=s) for s in range(4)]
        assert [joined(c) for c in together[8:]] == [joined(c) for c in alone]  # company under constraints changes nothing

    with_engine(work, name)


def test_a_complete_grammar_ends_the_request_and_the_limit_ends_an_incomplete_one():
    async def work(engine, template):
        word = Constraint("regex", "abc")
        (done,) = await ask(engine, [1], constraint=word, max_tokens=20, seed=1)
        (ended,) = await ask(engine, [1], constraint=word, max_tokens=20, stop_ids=(9, 260))
        (cut,) = await ask(engine, [1], constraint=word, max_tokens=2)
        return done, ended, cut

    done, ended, cut = with_engine(work, stream_every=99)
    assert (done.ids, done.finish_reason) == (tuple(b"abc"), "stop")
    assert ended.ids[:3] == tuple(b"abc") and ended.ids[3] in (9, 260) and ended.finish_reason == "stop"
    assert [kept_ids(k).tolist() for k in ended.kept] == [[97], [98], [99], [9, 260]]
    assert set(ended.sampled_logprobs[:3]) == {0.0} and all(p < -1 for p in ended.logprobs)
    assert (cut.ids, cut.finish_reason) == (tuple(b"ab"), "length")


def test_a_grammar_that_explodes_is_refused_and_others_go_on(monkeypatch):
    bad = [
        Constraint("regex", "(" * 3000 + "a" + ")" * 3000),
        Constraint("regex", "(?=x)x"),
        Constraint("json_schema", "{" * 5000),
        Constraint("json_schema", '{"type": "no such"}'),
        Constraint("json_schema", '{"$ref": "http://elsewhere/schema"}'),
        Constraint("lark", "start: nothing"),
        Constraint("lark", "start: " + " | ".join(f'"{i}" a{i}' for i in range(9000)) + "\n" + "\n".join(
            f"a{i}: /[ab]*a[ab]{{20}}/" for i in range(9000))),
        Constraint("regex", "x" * (1 << 19)),
        Constraint("xml", "<a/>"),
    ]  # fmt: skip

    async def work(engine, template):
        expected = joined(await ask(engine, [1, 2]))
        refused = await asyncio.gather(*(ask(engine, [1], constraint=c) for c in bad), return_exceptions=True)
        during = await asyncio.gather(ask(engine, [1, 2]), *(ask(engine, [1], constraint=c) for c in bad), return_exceptions=True)
        assert joined(during[0]) == expected
        return refused

    refused = with_engine(work)
    assert [(type(e), getattr(e, "status", None)) for e in refused] == [(PolicyError, 400)] * len(bad)


def test_a_compilation_that_takes_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr(grammar, "COMPILE_S", 0.05)
    release = threading.Event()
    monkeypatch.setattr(Grammars, "_compile", lambda self, c: release.wait(5))

    async def work(engine, template):
        with pytest.raises(PolicyError, match="compile") as e:
            await ask(engine, [1], constraint=Constraint("regex", "a"))
        free = await ask(engine, [1])
        many = await asyncio.gather(
            *(ask(engine, [1], constraint=Constraint("regex", f"b{i}")) for i in range(9)), return_exceptions=True
        )
        with pytest.raises(PolicyError):  # one that was given up is tried again, not remembered as cancelled
            await ask(engine, [1], constraint=Constraint("regex", "b3"))
        release.set()
        return e.value.status, len(joined(free)), sorted(e.status for e in many)

    monkeypatch.setattr(grammar, "WAITING", 5)
    assert with_engine(work) == (400, 40, [400] * 4 + [429] * 5)


def test_a_grammar_is_compiled_once_and_the_least_used_is_dropped(monkeypatch):
    monkeypatch.setattr(grammar, "CACHED", 2)
    compiled, real = [], Grammars._compile
    monkeypatch.setattr(Grammars, "_compile", lambda self, c: (compiled.append(c.text), real(self, c))[1])

    async def work(engine, template):
        for text in ("a", "b", "a", "c", "a", "b"):
            await ask(engine, [1], constraint=Constraint("regex", text))

    with_engine(work)
    assert compiled == ["a", "b", "c", "b"]


def test_without_a_tokenizer_stops_and_constraints_are_refused():
    async def inside():
        engine = Engine(TransformerLM(preset("nano-k3", 64), seed=0))
        try:
            for extra in ({"stop": ("x",)}, {"constraint": Constraint("regex", "a")}, {"logit_bias": ((64, 1.0),)}, {"top_p": 0.0}):
                with pytest.raises(PolicyError) as e:
                    await ask(engine, [1], **extra)
                assert e.value.status == 400
        finally:
            engine.close()

    asyncio.run(inside())


def test_a_stop_string_ends_the_request_and_streams_hold_back_only_what_may_become_one():
    async def work(engine, template):
        free = joined(await ask(engine, [5], max_tokens=60))
        text = [template.tokenizer.token_bytes(i) if i < 256 else b"\0" for i in free]
        at = next(n for n in range(20, 50) if free[n] < 128 and free[n + 1] < 128 and free[n] != free[n + 1])
        stop = (text[at] + text[at + 1]).decode()
        chunks = await ask(engine, [5], max_tokens=60, stop=(stop, "\x01never"))
        first = next(n for n in range(60) if text[n] + text[n + 1] == stop.encode())
        assert joined(chunks) == free[: first + 2]  # the ids of the stop belong to the output
        assert (chunks[-1].stop, chunks[-1].finish_reason) == (stop, "stop")
        assert all(c.stop is None for c in chunks[:-1])
        before = joined(chunks[:-1])
        assert len(before) <= first  # no part of it was streamed before it was certain
        held = [n for n in range(len(before)) if text[n] == stop[:1].encode() and n + 1 == len(before)]
        assert not held
        assert all(len(c.ids) == 1 or text_is_open(c, stop) for c in chunks[:-1])

    def text_is_open(chunk, stop):
        """A chunk of several tokens, though every one is sent at once, had a first half that waited for its second."""
        return any(t == ord(stop[0]) for t in chunk.ids[:-1]) or any(t == 1 for t in chunk.ids[:-1])

    with_engine(work, stream_every=1)


NODE = {"type": "object", "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}}, "required": ["value"]}
ITSELF = {
    "type": "object", "required": ["tag"], "additionalProperties": False,
    "properties": {"tag": {"enum": ["a"]}, "children": {"type": "array", "maxItems": 2, "items": {"$ref": "#"}},
                   "twin": {"$ref": "#/properties/children"}},
}  # fmt: skip
ADDRESSED = {**NODE, "$id": "no address", "$defs": {"node": NODE}}
EITHER = {"anyOf": [{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}, {"type": "string"},
                    {"$ref": "#/$defs/node"}], "$defs": {"node": NODE}}  # fmt: skip


@each_template
@pytest.mark.parametrize("schema", [ITSELF, EITHER, ADDRESSED], ids=["itself", "either", "addressed"])
def test_arguments_may_refer_to_the_whole_schema_and_be_one_of_several_objects(name, schema):
    tokenizer = ByteTokenizer()
    template = get_template(name, tokenizer)
    m = template.constraint([ToolSpec("grow", "", schema)], "grow")
    hurry = {*range(tokenizer.base, tokenizer.vocab_size), *tokenizer.encode('"]}.')}
    for seed in range(8):
        parser = template.parser()
        parser.feed(walk(matcher(tokenizer, m), random.Random(seed), template.stop_ids, hurry=hurry))
        jsonschema.validate(parser.finish().tool_calls[0].arguments, {k: v for k, v in schema.items() if k != "$id"})


@each_template
def test_a_tool_that_no_object_can_call_and_a_second_call_where_one_is_wanted_are_out(name):
    template = get_template(name, ByteTokenizer())
    for schema in ({"type": "string"}, {"anyOf": [{"type": "null"}, {"type": "array"}]}, {"enum": ["a"]}):
        with pytest.raises(UserError, match="allows none"):
            template.constraint([ToolSpec("t", "", schema)], "required")
    ids = walk(matcher(ByteTokenizer(), template.constraint(TOOLS[2:3], "required", parallel=False)), random.Random(0))
    parser = template.parser()
    parser.feed(ids)
    assert len(parser.finish().tool_calls) == 1

"""Tokenizers, random conversations and random nonsense for the token laws."""

from __future__ import annotations

import functools
import json

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from msgspec.structs import asdict, replace

from tiny_kimi import tiny_kimi

from tidelock.tokens.directives import response_format, thinking_effort, tool_choice
from tidelock.tokens.message import Message, ToolCall, ToolSpec
from tidelock.tokens.template import Template, canonical, get_template
from tidelock.tokens.tokenizer import SPECIALS, BPETokenizer, ByteTokenizer

CORPUS = [
    'message role="user" message role="assistant" message role="tool" tool="lookup" index="1"',
    'call tool="lookup" index="1" argument key="key" type="string" think response tools call argument message',
    "the quick brown fox asks the calculator for 12 + 30 and says é, 漢字, 🙂 back\n\nfunctions.lookup:0 <|open|>think",
] * 30

law = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


@functools.cache
def bpe() -> BPETokenizer:
    return BPETokenizer.train(CORPUS, 700)


@functools.cache
def template(name: str, kind: str = "bpe", thinking: bool | None = None) -> Template:
    return get_template(name, {"bpe": bpe, "bytes": ByteTokenizer, "kimi": tiny_kimi}[kind](), thinking)


def these(*templates: Template) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("t", [pytest.param(t, id=f"{t.name}-{type(t.tokenizer).__name__}") for t in templates])


OURS = [template(name, kind) for name in ("xtml", "chatml") for kind in ("bpe", "bytes")]
DIRECT = [template("k2", "kimi"), template("k2.5", "kimi", False), template("k3", "kimi", False)]  # no reasoning at all
FORGETFUL = [template("k2-thinking", "kimi"), template("k2.5", "kimi")]
every_template = these(*OURS, *DIRECT, *FORGETFUL)
every_stable_template = these(*OURS, *DIRECT)
every_forgetful_template = these(*FORGETFUL)


def shown(t: Template, messages: list[Message]) -> list[Message]:
    """What of the reasoning a model is shown, as the models' descriptions say it."""
    answers = [i for i, m in enumerate(messages) if m.role == "assistant" and not m.tool_calls]
    forgotten = len(messages) if t in DIRECT else max(answers, default=-1) + 1 if t in FORGETFUL else 0
    return [replace(m, reasoning="") if i < forgotten else m for i, m in enumerate(messages)]


def exactly(messages: list[Message]) -> str:
    """Messages as text, so that 1, 1.0 and True, which Python calls equal, are not. Declarations are sorted."""
    declared = [json.dumps([asdict(tool) for tool in m.tools], sort_keys=True) for m in messages]
    return "\n".join(repr(replace(m, tools=())) + d for m, d in zip(messages, declared, strict=True))


MARKERS = [*SPECIALS, '<|open|>message role="user"<|sep|>', "<|close|>argument<|sep|>", "## Return of functions.f:0\n",
           "&amp;", "&quot;", '"', "\n```", "functions.f:3", "🙂", "é", "\r\n", " ", "\x00"]  # fmt: skip
texts = st.lists(
    st.one_of(st.sampled_from(MARKERS), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)), max_size=5
).map("".join)
names = st.one_of(st.sampled_from(["lookup", "system", "tool_declare", "tool", "a:1", "functions.f", "a-b.c", "tool-choice"]), texts)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(10**30, 10**60), texts,
    st.floats(allow_nan=False, allow_infinity=False),
)  # fmt: skip
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3), max_leaves=6)
arguments = st.dictionaries(texts, values, max_size=3)
calls = st.builds(ToolCall, st.sampled_from(["a", "b", "call_0"]), names, arguments)
tools = st.lists(st.builds(ToolSpec, names, texts, arguments), max_size=2).map(tuple)
assistants = st.builds(Message, st.just("assistant"), texts, texts, st.lists(calls, max_size=3).map(tuple)).map(
    lambda m: canonical([m])[0]
)
messages = st.one_of(
    st.builds(Message, st.just("system"), texts, tools=tools),
    st.sampled_from([thinking_effort("low"), tool_choice("none"), response_format({"type": "object"})]),
    st.builds(Message, st.just("user"), texts, name=st.none() | names),
    assistants,
    st.builds(Message, st.just("tool"), texts, tool_call_id=st.sampled_from([None, "a", "b"]), name=st.none() | names),
)
conversations = st.lists(messages, max_size=6).map(canonical)


@st.composite
def chunked(draw, ids: list[int]) -> list[list[int]]:
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


def malformed(t: Template) -> st.SearchStrategy[list[int]]:
    """Ids as a bad sampler might give them: well-formed turns cut, spliced and sprinkled with markers and bytes."""
    words = st.sampled_from(["think", "response", "tools", "call", "argument", "message", 'message role="user"',
                             'message role="tool"', 'message role="system" type="tool-declare"', "user", "tool_declare",
                             'call tool="f" index="1"', 'argument key="k" type="number"', "functions.f:0", "{",
                             '{"a":1}', "NaN", '"\\ud800"', "[" * 1200, "1e999"])  # fmt: skip
    opening, closing, sep = (t.tokenizer.special(m) for m in ("<|open|>", "<|close|>", "<|sep|>"))
    named = [i for i, name in enumerate(t.tokenizer.specials, t.tokenizer.base) if "reserved" not in name]
    piece = st.one_of(
        st.sampled_from([[i] for i in named]),
        words.map(t.tokenizer.encode),
        words.map(lambda w: [opening, *t.tokenizer.encode(w), sep]),
        words.map(lambda w: [closing, *t.tokenizer.encode(w), sep]),
        st.lists(st.integers(0, t.tokenizer.vocab_size + 3), max_size=6),
        st.builds(lambda m, a, b: t.sampled(m)[a:b], assistants, st.integers(0, 9), st.integers(9, 80)),
    )
    return st.lists(piece, max_size=10).map(lambda pieces: [i for p in pieces for i in p])


def turns(t: Template) -> st.SearchStrategy[list[int]]:
    return st.one_of(assistants.map(t.sampled), malformed(t))

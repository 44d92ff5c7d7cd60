"""What every chat template can do, and the parts they share: rendering one message after another, canonical call ids.

A template turns messages into ids and sampled ids back into a message. `extend` appends to existing ids and never
renders an earlier message again, which is how the ids a user saw stay the ids that are trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence

from msgspec.structs import replace

from . import lark
from .errors import NotAnExtension, UserError
from .message import DIRECTIVES, Message, ToolCall, ToolSpec
from .policy import Constraint
from .tokenizer import Vocabulary
from .turn import Delta, TurnParser, call_id, make_calls

__all__ = ["Delta", "Template", "TurnParser", "canonical", "count_calls", "declared_tools", "get_template"]


class Template:
    """Base of the formats. `stop_ids` end an assistant turn and belong to it.

    prefix_stable: the ids of a longer conversation start with the ids of the shorter one. Where it is False, `extend`
    raises NotAnExtension as soon as they would not. hash: short and stable, over the format, its special ids and the
    tokenizer; equal hashes mean equal ids for equal messages.
    """

    name: str
    version = 1
    prefix_stable: bool
    stop_ids: tuple[int, ...]

    def __init__(self, tokenizer: Vocabulary) -> None:
        self.tokenizer = tokenizer
        identity = f"{self.name}/{self.version}/{tokenizer.base}/{tokenizer.identity}"
        self.hash = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> list[int]:
        """Ids of a canonical conversation (see `canonical`), as a model that is to go on with it is shown it."""
        return self._append([], [], self._shown(messages), generation_prompt)

    def extend(
        self, ids: Sequence[int], messages: Sequence[Message], new: Sequence[Message], generation_prompt: bool = False
    ) -> list[int]:
        """`ids`, which stand for `messages`, followed by the rendering of `new`.

        Raises NotAnExtension when a model would be shown `messages` as other ids once `new` follow them.
        """
        if self.prefix_stable:
            return self._append(ids, messages, new, generation_prompt)
        whole = self.render([*messages, *new], generation_prompt)
        if whole[: len(ids)] != list(ids):
            raise NotAnExtension(
                f"the {self.name} template shows a model no reasoning from before the latest answer, so these ids cannot "
                "be continued: render the conversation anew, or take a template that keeps its reasoning"
            )
        return whole

    def added(self, message: Message, before: Sequence[Message]) -> list[int]:
        """The ids that one more message adds, where the ids of `before` stay as they are (`prefix_stable`)."""
        opening = [] if before else self._opening([message])
        return opening + self._added(message, before)

    def _added(self, message: Message, before: Sequence[Message]) -> list[int]:
        return self.generation_prompt() + self.turn(message) if message.role == "assistant" else self._input(message, before)

    def _append(
        self, ids: Sequence[int], messages: Sequence[Message], new: Sequence[Message], generation_prompt: bool
    ) -> list[int]:
        out, before = list(ids), list(messages)
        if not before and (new or generation_prompt):
            out += self._opening(new)
        for message in new:
            out += self._added(message, before)
            before.append(message)
        if generation_prompt:
            out += self.generation_prompt()
        return out

    def _opening(self, messages: Sequence[Message]) -> list[int]:
        """What comes before the first message."""
        return []

    def _shown(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages without what the format leaves out of a prompt."""
        return messages

    def generation_prompt(self) -> list[int]:
        """What comes before the first sampled id of an assistant turn."""
        raise NotImplementedError

    def turn(self, message: Message) -> list[int]:
        """The ids that were sampled for an assistant message: what follows the generation prompt."""
        return self.sampled(message) if message.verbatim is None else list(message.verbatim)

    def sampled(self, message: Message) -> list[int]:
        """The ids a model would sample to say this assistant message, from its text, stop id included."""
        raise NotImplementedError

    def parser(self, calls_before: int = 0, tools: Sequence[ToolSpec] = ()) -> TurnParser:
        """Reads one sampled turn. `calls_before`: tool calls made earlier in the conversation, which number the new.
        `tools`: those declared, by which a call that says no name may still be understood."""
        raise NotImplementedError

    def text_reader(self, prompt_ids: Sequence[int]) -> Callable[[int], bytes | None]:
        """Gives, id by id, the bytes in which stop strings are looked for; None is no text.

        In an assistant's turn that is the content of the answer, not its reasoning, calls and markup; after a prompt
        that opens no such turn it is all that is no special token.
        """
        opening, ids = self.generation_prompt(), list(prompt_ids)
        last_stop = max((i for i, token in enumerate(ids) if token in self.stop_ids), default=-1)
        for at in range(last_stop + 1, len(ids) - len(opening) + 1):
            if ids[at : at + len(opening)] == opening:
                parser = self.parser()
                parser.feed(ids[at + len(opening) :])  # what was put into the answer's mouth
                return parser.content_bytes
        return lambda token: None if self.tokenizer.is_special(token) else self.tokenizer.token_bytes(token)

    def constraint(
        self, tools: Sequence[ToolSpec] = (), choice: str = "auto", content: Constraint | None = None, thinking: bool = True,
        parallel: bool = True,
    ) -> Constraint:  # fmt: skip
        """What a turn of this format must match, from the first id after the generation prompt to the stop id.

        choice: "none", "auto" (calls or not), "required" (at least one call), or the name of the tool to call, once.
        Arguments satisfy their tool's schema. content: what an answer without calls must match, a JSON schema or regex.
        thinking: False leaves the thought empty. parallel: False makes a required call the only one.
        Raises UserError for an unknown tool, or a schema that cannot be read.
        """
        named = [t for t in tools if t.name == choice]
        if choice not in ("none", "auto", "required") and not named:
            raise UserError(f"no tool is called {choice!r}")
        if choice == "required" and not tools:
            raise UserError("a call is required, but there are no tools")
        answering = self._turn("content")
        if named or choice == "required":  # a call and no words: a model that would rather talk could talk for ever
            start, callable_ = self._turn('""', "call" if named or not parallel else "call+"), named or tools
        elif choice == "auto" and tools:
            start, callable_ = f"{answering} | {self._turn('text', 'call+')}", tools
        else:
            start, callable_ = answering, ()
        thought = lark.TEXT if thinking else '""'
        rules = [f"start: {start}", f"thought: {thought}", f"content: {lark.content(content)}", f"text: {lark.TEXT}"]
        if callable_:
            rules.append("call: " + lark.any_of([f"call_{i}" for i in range(len(callable_))]))
            rules += [rule for i, tool in enumerate(callable_) for rule in self._call_rules(f"call_{i}", tool)]
        return Constraint("lark", "\n".join(rules) + "\n")

    def _turn(self, content: str, calls: str | None = None) -> str:
        """A whole turn in Lark's syntax, given the expressions for its content and its calls."""
        raise NotImplementedError

    def _call_rules(self, rule: str, tool: ToolSpec) -> list[str]:
        """The rule for one call of this tool, and those it needs, in Lark's syntax. Their names begin with `rule`."""
        raise NotImplementedError

    def parse(self, ids: Sequence[int]) -> list[Message]:
        """The messages of a whole conversation: the inverse of `render`.

        Raises UserError when `ids` do not start with a message of this format. Anything wrong further on is read as
        well as it can be; a turn that itself sampled the header of another message reads as two.
        """
        raise NotImplementedError

    def _input(self, message: Message, before: Sequence[Message]) -> list[int]:
        raise NotImplementedError

    def with_verbatim(self, message: Message, sampled: Sequence[int]) -> Message:
        """The message, carrying its ids when its text alone would not give them back."""
        return message if self.sampled(message) == list(sampled) else replace(message, verbatim=tuple(sampled))

    def _plain(self, ids: Sequence[int], start: int = 0) -> list[int]:
        """The ids from `start` up to the next special one."""
        base, end, n = self.tokenizer.base, start, len(ids)
        while end < n and ids[end] < base:
            end += 1
        return list(ids[start:end])

    def _not_a_conversation(self) -> UserError:
        return UserError(f"these ids do not start with a message of the {self.name} template; check the tokenizer")


def get_template(name: str, tokenizer: Vocabulary, thinking: bool | None = None) -> Template:
    """A format by its own name or by that of a model that speaks it.

    `thinking`: whether turns begin with reasoning; None takes the format's usual mode. Raises UserError for a name there
    is none of, a mode the format has not, a tokenizer without its special tokens.
    """
    from . import chatml, xtml

    formats = {**xtml.FORMATS, **chatml.FORMATS}
    if name not in formats:
        raise UserError(f"unknown template {name!r}; choose one of {', '.join(sorted(formats))}")
    modes = formats[name]
    if thinking is None:
        thinking = next(iter(modes))
    if thinking not in modes:
        raise UserError(f"the {name} template has no mode {'with' if thinking else 'without'} thinking")
    return modes[thinking](tokenizer)


def count_calls(messages: Sequence[Message]) -> int:
    return sum(len(m.tool_calls) for m in messages)


def declared_tools(messages: Sequence[Message]) -> tuple[ToolSpec, ...]:
    return tuple(tool for m in messages for tool in m.tools)


def last_calls(messages: Sequence[Message]) -> tuple[ToolCall, ...]:
    """The calls of the latest assistant message: those a tool message can answer."""
    return next((m.tool_calls for m in reversed(messages) if m.role == "assistant"), ())


def call_position(message: Message, before: Sequence[Message]) -> int:
    """0-based position, among `last_calls`, of the call a tool message answers.

    By id where the id is known; otherwise results answer calls in order (and may outnumber them).
    """
    ids = [call.id for call in last_calls(before)]
    if message.tool_call_id in ids:
        return ids.index(message.tool_call_id)
    answered = 0
    for earlier in reversed(before):
        if earlier.role == "assistant":
            break
        answered += earlier.role == "tool"
    return answered


def result_number(position: int, before: Sequence[Message]) -> int:
    """The number, in the whole conversation, of the call at `position` of the latest assistant message."""
    return count_calls(before) - len(last_calls(before)) + position


def canonical(messages: Sequence[Message]) -> list[Message]:
    """The same conversation in the one form that rendering and parsing agree on, whatever form a client used.

    Call ids follow from position, and results stand in the order of their calls. Each role keeps the fields it has, a
    name that only repeats the role is dropped, and a declaration of tools without text joins the system text after it.
    """
    out: list[Message] = []
    made = answered = 0  # calls so far; results since the latest assistant message
    ids: list[str] = []  # what that message's calls were named
    calls: tuple[ToolCall, ...] = ()  # and the calls, in their own form
    for m in messages:
        if m.role == "assistant":
            ids, answered = [call.id for call in m.tool_calls], 0
            calls = make_calls([(c.name, c.arguments) for c in m.tool_calls], made)
            made += len(calls)
            out.append(Message("assistant", m.content, m.reasoning, calls, verbatim=m.verbatim))
        elif m.role == "tool":
            position = ids.index(m.tool_call_id) if m.tool_call_id in ids else answered  # as `call_position`
            answered += 1
            name = calls[position].name if position < len(calls) else m.name or "unknown"
            number = made - len(calls) + position
            out.append(Message("tool", m.content, tool_call_id=call_id(name, number), name=name))
        elif m.role == "user":
            out.append(Message("user", m.content, name=None if m.name in ("", "user") else m.name))
        elif m.name in DIRECTIVES and not m.tools:
            out.append(Message("system", m.content, name=m.name))
        elif out and out[-1].role == "system" and out[-1].tools and not out[-1].content and not m.tools:
            out[-1] = replace(out[-1], content=m.content)
        else:
            out.append(Message("system", m.content, tools=m.tools))
    return in_call_order(out)


def in_call_order(messages: Sequence[Message]) -> list[Message]:
    """The results of parallel calls in the order of the calls. What answers no call by its id stays put."""
    out: list[Message] = []
    for message in messages:
        at = len(out)
        if message.role == "tool":
            ids = [call.id for call in last_calls(out)]
            later = ids[ids.index(message.tool_call_id) + 1 :] if message.tool_call_id in ids else []
            while at and out[at - 1].role == "tool" and out[at - 1].tool_call_id in later:
                at -= 1
        out.insert(at, message)
    return out


def system_parts(message: Message, sort_keys: bool = True) -> Iterator[tuple[str, str]]:
    """A system message as formats spell it: ("tools", declaration), then (its name or "text", content) unless only tools."""
    if message.tools:
        yield "tools", tools_json(message.tools, sort_keys)
    if message.content or not message.tools:
        yield message.name if message.name in DIRECTIVES else "text", message.content


def add_system_text(messages: list[Message], text: str) -> None:
    """The inverse of `system_parts`: text right after a declaration belongs to the same message."""
    if messages and messages[-1].role == "system" and messages[-1].tools and not messages[-1].content:
        messages[-1] = replace(messages[-1], content=text)
    else:
        messages.append(Message("system", text))


def tools_json(tools: Sequence[ToolSpec], sort_keys: bool = True) -> str:
    """The declaration as templates embed it: compact."""
    return json.dumps([t.openai() for t in tools], sort_keys=sort_keys, separators=(",", ":"), ensure_ascii=False)


def tools_from_json(text: str) -> tuple[ToolSpec, ...] | None:
    """None when the text declares nothing."""
    try:
        functions = [entry["function"] for entry in json.loads(text)]
        return tuple(ToolSpec(f["name"], f["description"], f["parameters"]) for f in functions)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None

"""The K2-style ChatML format with tool sections, in the dialect of each model of the K2 line.

    <|im_user|>user<|im_middle|>...<|im_end|>
    <|im_assistant|>assistant<|im_middle|><think>...</think>text<|tool_calls_section_begin|>...<|im_end|>

K2 Thinking and K2.5 show a model no reasoning from before its latest answer, so there a longer conversation does not
always start with the ids of the shorter one (within one task it does, however many tools it takes). `chatml` keeps all
reasoning: it is K2.6 with `preserve_thinking` and K2.7, and prefix-stable. What no dialect can help: a client that leaves
`reasoning_content` out when it sends the history back gets other ids than those sampled.

A call's id is rendered and is the only carrier of its name: render canonical conversations only. From K2.5 on the models'
own code writes tool declarations as TypeScript where it can; all dialects here use the JSON their templates fall back to.

Format: K2 tool-call guidance and report App. B (facts in the model reference, sections 1.10, 2 and 3).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from msgspec.structs import replace

from . import jsontext, lark
from .dialects import CHATML, DIALECTS, Dialect
from .message import DIRECTIVES, Message, ToolSpec
from .template import (
    Template,
    add_system_text,
    call_position,
    count_calls,
    declared_tools,
    result_number,
    system_parts,
    tools_from_json,
)
from .turn import TurnParser, call_id

# `functions.name:3`: the name may hold anything, so the last colon counts.
CALL_ID = re.compile(r"\s*(?:functions\.)?(.*):[0-9]+\s*", re.DOTALL)
# A counter alone names no function: which tool is meant can only be told from the arguments.
BARE_ID = re.compile(r"\s*(?:functions\.|:)?[0-9]+\s*")
RETURN = "## Return of {id}\n"
# Messages under these names are not tool results; a tool of such a name answers under `TOOL` (the id has its name).
RESERVED = ("system", "tool_declare", *DIRECTIVES)
TOOL = "tool"
# The one argument of a call whose arguments were no JSON object: tools refuse it, and the model reads why.
UNREADABLE = "unreadable_arguments"

NESTING = {
    "start": ("content",),
    "reasoning": ("reasoning",),
    "content": ("content",),
    "section": ("section",),
    "call": ("section", "call"),
    "arguments": ("section", "call", "arguments"),
    "end": (),
}
ANYWHERE = {
    "<|tool_calls_section_begin|>": "section", "<|tool_call_begin|>": "call",
    "<|im_end|>": "end", "<|im_user|>": "end", "<|im_assistant|>": "end", "<|im_system|>": "end",
}  # fmt: skip
IN_SECTION = {**ANYWHERE, "<|tool_call_end|>": "section", "<|tool_calls_section_end|>": "content"}
TABLE = {
    "start": {**ANYWHERE, "<think>": "reasoning"},
    "reasoning": {**ANYWHERE, "</think>": "content"},
    "content": ANYWHERE,
    "section": IN_SECTION,
    "call": {**IN_SECTION, "<|tool_call_argument_begin|>": "arguments"},
    "arguments": IN_SECTION,
    "end": {},
}


class ChatML(Template):
    def __init__(self, tokenizer, dialect: Dialect = CHATML) -> None:
        self.name, self.dialect, self.prefix_stable = dialect.name, dialect, not dialect.forgets
        super().__init__(tokenizer)
        special = tokenizer.special
        self.USER, self.ASSISTANT, self.SYSTEM = (special(f"<|im_{r}|>") for r in ("user", "assistant", "system"))
        self.MIDDLE, self.END = special("<|im_middle|>"), special("<|im_end|>")
        self.SECTION, self.SECTION_END = special("<|tool_calls_section_begin|>"), special("<|tool_calls_section_end|>")
        self.CALL, self.CALL_END = special("<|tool_call_begin|>"), special("<|tool_call_end|>")
        self.ARGUMENTS = special("<|tool_call_argument_begin|>")
        self.stop_ids = (self.END,)
        self._opened = [special(name) for name in dialect.opened]
        self._prompt = [self.ASSISTANT, *tokenizer.encode("assistant"), self.MIDDLE, *self._opened]
        self.start, unused = "content", ("start", "reasoning")
        if dialect.thinks:
            self.THINK, self.THINK_END = special("<think>"), special("</think>")
            self.start, unused = "reasoning" if self._opened else "start", ()
        rows = {state: row for state, row in TABLE.items() if state not in unused}
        self.table = {state: {special(m): to for m, to in row.items()} for state, row in rows.items()}

    def _message(self, role: int, name: str, text: str) -> list[int]:
        return [role, *self.tokenizer.encode(name), self.MIDDLE, *self.tokenizer.encode(text), self.END]

    def generation_prompt(self) -> list[int]:
        return list(self._prompt)

    def sampled(self, message: Message) -> list[int]:
        encode = self.tokenizer.encode
        out = self._reasoned(message.reasoning) if self.dialect.thinks else []
        out += encode(message.content)
        if message.tool_calls:
            out.append(self.SECTION)
            for call in message.tool_calls:
                arguments = encode(jsontext.dump(call.arguments))
                out += [self.CALL, *encode(call.id), self.ARGUMENTS, *arguments, self.CALL_END]
            out.append(self.SECTION_END)
        return [*out, self.END]

    def _reasoned(self, reasoning: str) -> list[int]:
        return [*([] if self._opened else [self.THINK]), *self.tokenizer.encode(reasoning), self.THINK_END]

    def _opening(self, messages: Sequence[Message]) -> list[int]:
        return [] if messages and messages[0].role == "system" else self._default_system()

    def _default_system(self) -> list[int]:
        return self._message(self.SYSTEM, "system", self.dialect.system) if self.dialect.system else []

    def _shown(self, messages: Sequence[Message]) -> list[Message]:
        """Reasoning is kept only after the latest answer, which is an assistant message without calls."""
        answers = [i for i, m in enumerate(messages) if m.role == "assistant" and not m.tool_calls]
        if not self.dialect.forgets or not answers:
            return list(messages)
        return [self._forgotten(m) if i <= answers[-1] else m for i, m in enumerate(messages)]

    def _forgotten(self, message: Message) -> Message:
        """The message without its reasoning. Of the rest, the sampled ids stay as they are."""
        if message.role != "assistant":
            return message
        plain = replace(message, reasoning="", verbatim=None)
        if message.verbatim is None:
            return plain
        state, kept = self.start, []
        for token in message.verbatim:
            target = self.table[state].get(token, state)
            if not state == target == "reasoning":
                kept.append(token)
            state = target
        return self.with_verbatim(plain, kept)

    def _input(self, message: Message, before: Sequence[Message]) -> list[int]:
        if message.role == "user":
            return self._message(self.USER, message.name or "user", message.content)
        if message.role == "tool":
            name = "unknown" if message.name is None else message.name
            identifier = call_id(name, result_number(call_position(message, before), before))
            header = TOOL if name in RESERVED else name
            return self._message(self.SYSTEM, header, RETURN.format(id=identifier) + message.content)
        names = {"tools": "tool_declare", "text": "system"}
        parts = system_parts(message, self.dialect.sorted_tools)
        out = [i for kind, text in parts for i in self._message(self.SYSTEM, names.get(kind, kind), text)]
        return out if before or message.content or not message.tools else out + self._default_system()

    def _turn(self, content: str, calls: str | None = None) -> str:
        called = f"{lark.special(self.SECTION)} {calls} {lark.special(self.SECTION_END)} " if calls else ""
        opening = "" if self._opened or not self.dialect.thinks else f"{lark.special(self.THINK)} "
        reasoning = f"{opening}thought {lark.special(self.THINK_END)} " if self.dialect.thinks else ""
        return f"{reasoning}{content} {called}{lark.special(self.END)}"

    def _call_rules(self, rule: str, tool: ToolSpec) -> list[str]:
        head = f"{lark.special(self.CALL)} {lark.literal(f'functions.{tool.name}:')} /[0-9]{{1,4}}/"
        ways = lark.argument_forms(tool.parameters)
        arguments = lark.json_value(ways[0] if len(ways) == 1 else {"anyOf": ways}, tool.parameters)
        return [f"{rule}: {head} {lark.special(self.ARGUMENTS)} {arguments} {lark.special(self.CALL_END)}"]

    def parser(self, calls_before: int = 0, tools: Sequence[ToolSpec] = ()) -> ChatMLParser:
        return ChatMLParser(self, calls_before, tools)

    def parse(self, ids: Sequence[int]) -> list[Message]:
        messages: list[Message] = []
        for role, name, body in self._split(ids):
            text = self.tokenizer.decode(self._plain(body))
            if role == self.ASSISTANT:
                parser = self.parser(count_calls(messages), declared_tools(messages))
                opened = len(self._opened)
                parser.feed(body[opened:] if body[:opened] == self._opened else body)
                messages.append(parser.finish())
            elif role == self.USER:
                messages.append(Message("user", text, name=None if name == "user" else name))
            elif name == "tool_declare" and (tools := tools_from_json(text)):
                messages.append(Message("system", tools=tools))
            elif name in DIRECTIVES:
                messages.append(Message("system", text, name=name))
            elif name in RESERVED:
                add_system_text(messages, text)
            else:
                messages.append(_tool_result(name, text))
        return self._without_default(messages)

    def _without_default(self, messages: list[Message]) -> list[Message]:
        """A system prompt that says what is said without one stands for none, wherever none would bring it back."""
        first, rest = messages[0] if messages else Message("user"), messages[1:]
        if not self.dialect.system or first.role != "system" or first.name or first.content != self.dialect.system:
            return messages
        if first.tools:
            joins = rest and rest[0].role == "system" and not rest[0].tools and not rest[0].name
            return messages if joins else [replace(first, content=""), *rest]
        return rest if rest and rest[0].role != "system" else messages

    def _split(self, ids: Sequence[int]) -> list[tuple[int, str, list[int]]]:
        """(role, name, what follows the header) of each message; a cut turn ends where the next message begins."""
        parts: list[tuple[int, str, list[int]]] = []
        skip = 0
        for at, token in enumerate(ids):
            if token in (self.USER, self.ASSISTANT, self.SYSTEM):
                header = self._plain(ids, at + 1)
                if list(ids[at + 1 + len(header) : at + 2 + len(header)]) == [self.MIDDLE]:
                    parts.append((token, self.tokenizer.decode(header), []))
                    skip = len(header) + 2
            if not parts:
                raise self._not_a_conversation()
            if skip:
                skip -= 1
            else:
                parts[-1][2].append(token)
        return parts


def _tool_result(header: str, text: str) -> Message:
    for name in (header, *RESERVED):
        match = re.match(RETURN.format(id=f"({re.escape(f'functions.{name}')}:[0-9]+)"), text)
        if match:
            return Message("tool", text[match.end() :], tool_call_id=match.group(1), name=name)
    return Message("tool", text, name=header)


class ChatMLParser(TurnParser):
    """Every marker is a terminal of its own. Arguments go out when they are complete, as the JSON the message holds:
    text that turns out to be no JSON could not be taken back."""

    nesting = NESTING
    sinks = {"start": "content", "reasoning": "reasoning", "content": "content", "call": "value", "arguments": "value"}
    entering = {"call": "_begin_call", "arguments": "_end_id"}
    leaving = {"arguments": "_end_arguments", "call": "_end_call"}

    def __init__(self, template: ChatML, calls_before: int, tools: Sequence[ToolSpec] = ()) -> None:
        super().__init__(template, template.table, template.start, calls_before)
        self.tools = tools
        self.identified = self.named = False  # whether the open call's id is complete, whether it said a name

    def _read(self, token: int) -> None:
        if self.template.tokenizer.is_special(token):
            self._on(token)
        else:
            self._hear((token,))

    def _begin_call(self) -> None:
        self.calls.append(("", {}))
        self.identified = self.named = False

    def _end_id(self) -> None:
        identifier = self._take_value()
        match = CALL_ID.fullmatch(identifier)
        self._name_call(match.group(1) if match else identifier.strip().removeprefix("functions."))
        self.identified, self.named = True, not (self.tools and BARE_ID.fullmatch(identifier))
        if self.named:
            self._on_call("tool_name", self.calls[-1][0])

    def _name_call(self, name: str) -> None:
        self.calls[-1] = (name, self.calls[-1][1])

    def _end_arguments(self) -> None:
        text = self._take_value()
        try:
            value = jsontext.load(text or "{}")
        except ValueError:
            value = None
        self.calls[-1][1].update(value if isinstance(value, dict) else {UNREADABLE: text})

    def _end_call(self) -> None:
        if not self.identified:
            self._end_id()
        name, arguments = self.calls[-1]
        if not self.named:
            self._name_call(_tool_that_takes(arguments, self.tools) or name)
            self._on_call("tool_name", self.calls[-1][0])
        self._on_call("tool_arguments", jsontext.dump(arguments))


def _tool_that_takes(arguments: dict[str, object], tools: Sequence[ToolSpec]) -> str | None:
    """The one tool whose parameters fit these arguments; None when there is none or more than one."""
    fitting = [tool.name for tool in tools if _fits(list(arguments), tool.parameters)]
    return fitting[0] if len(fitting) == 1 else None


def _fits(keys: list[str], schema: object) -> bool:
    """A schema that says its parameters in no way we know fits nothing."""
    if not isinstance(schema, dict):
        return False
    known, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(known, dict) or not isinstance(required, list):
        return False
    return all(key in known for key in keys) and all(key in keys for key in required)


FORMATS = {name: {d.thinks: partial(ChatML, dialect=d) for d in modes} for name, modes in DIALECTS.items()}

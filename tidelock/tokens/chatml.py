"""The K2-style ChatML format with tool sections.

    <|im_user|>user<|im_middle|>...<|im_end|>
    <|im_assistant|>assistant<|im_middle|><think>...</think>text<|tool_calls_section_begin|>...<|im_end|>

K2 Thinking drops old reasoning from its prompts, so there a longer conversation does not start with the ids of the
shorter one. We keep all of it (K2.6's `preserve_thinking`): here it does. What is not stable: a client that leaves
`reasoning_content` out when it sends the history back gets other ids than those sampled (as with any format), and
weights trained on dropped reasoning see prompts they were not trained on.

A call's id is rendered and is the only carrier of its name: render canonical conversations only.

Format: K2 tool-call guidance and report App. B (facts in the model reference).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from . import jsontext, lark
from .message import Message, ToolSpec
from .template import (
    Template,
    add_system_text,
    call_position,
    count_calls,
    result_number,
    system_parts,
    tools_from_json,
)
from .turn import TurnParser, call_id

# `functions.name:3`: the name may hold anything, so the last colon counts. A bare counter names no function.
CALL_ID = re.compile(r"\s*(?:functions\.)?(.*):[0-9]+\s*", re.DOTALL)
RETURN = "## Return of {id}\n"
# Messages under these names are not tool results; a tool of such a name answers under `TOOL` (the id has its name).
RESERVED = ("system", "tool_declare")
TOOL = "tool"
# The one argument of a call whose arguments were no JSON object: tools refuse it, and the model reads why.
UNREADABLE = "unreadable_arguments"

NESTING = {
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
    "reasoning": {**ANYWHERE, "</think>": "content"},
    "content": ANYWHERE,
    "section": IN_SECTION,
    "call": {**IN_SECTION, "<|tool_call_argument_begin|>": "arguments"},
    "arguments": IN_SECTION,
    "end": {},
}


class ChatML(Template):
    name = "chatml"
    prefix_stable = True

    def __init__(self, tokenizer) -> None:
        super().__init__(tokenizer)
        special = tokenizer.special
        self.USER, self.ASSISTANT, self.SYSTEM = (special(f"<|im_{r}|>") for r in ("user", "assistant", "system"))
        self.MIDDLE, self.END = special("<|im_middle|>"), special("<|im_end|>")
        self.SECTION, self.SECTION_END = special("<|tool_calls_section_begin|>"), special("<|tool_calls_section_end|>")
        self.CALL, self.CALL_END = special("<|tool_call_begin|>"), special("<|tool_call_end|>")
        self.ARGUMENTS = special("<|tool_call_argument_begin|>")
        self.THINK, self.THINK_END = special("<think>"), special("</think>")
        self.stop_ids = (self.END,)
        self.table = {state: {special(m): to for m, to in row.items()} for state, row in TABLE.items()}
        self._prompt = [self.ASSISTANT, *tokenizer.encode("assistant"), self.MIDDLE, self.THINK]

    def _message(self, role: int, name: str, text: str) -> list[int]:
        return [role, *self.tokenizer.encode(name), self.MIDDLE, *self.tokenizer.encode(text), self.END]

    def generation_prompt(self) -> list[int]:
        return list(self._prompt)

    def sampled(self, message: Message) -> list[int]:
        encode = self.tokenizer.encode
        out = [*encode(message.reasoning), self.THINK_END, *encode(message.content)]
        if message.tool_calls:
            out.append(self.SECTION)
            for call in message.tool_calls:
                arguments = encode(jsontext.dump(call.arguments))
                out += [self.CALL, *encode(call.id), self.ARGUMENTS, *arguments, self.CALL_END]
            out.append(self.SECTION_END)
        return [*out, self.END]

    def _input(self, message: Message, before: Sequence[Message]) -> list[int]:
        if message.role == "user":
            return self._message(self.USER, message.name or "user", message.content)
        if message.role == "tool":
            name = "unknown" if message.name is None else message.name
            identifier = call_id(name, result_number(call_position(message, before), before))
            header = TOOL if name in RESERVED else name
            return self._message(self.SYSTEM, header, RETURN.format(id=identifier) + message.content)
        names = {"tools": "tool_declare", "text": "system"}
        return [i for kind, text in system_parts(message) for i in self._message(self.SYSTEM, names[kind], text)]

    def _turn(self, content: str, calls: str | None = None) -> str:
        called = f"{lark.special(self.SECTION)} {calls} {lark.special(self.SECTION_END)} " if calls else ""
        return f"thought {lark.special(self.THINK_END)} {content} {called}{lark.special(self.END)}"

    def _call_rules(self, rule: str, tool: ToolSpec) -> list[str]:
        head = f"{lark.special(self.CALL)} {lark.literal(f'functions.{tool.name}:')} /[0-9]{{1,4}}/"
        arguments = lark.json_value(lark.closed(tool.parameters))
        return [f"{rule}: {head} {lark.special(self.ARGUMENTS)} {arguments} {lark.special(self.CALL_END)}"]

    def parser(self, calls_before: int = 0) -> ChatMLParser:
        return ChatMLParser(self, calls_before)

    def parse(self, ids: Sequence[int]) -> list[Message]:
        messages: list[Message] = []
        for role, name, body in self._split(ids):
            text = self.tokenizer.decode(self._plain(body))
            if role == self.ASSISTANT:
                parser = self.parser(count_calls(messages))
                parser.feed(body[1:] if body[:1] == [self.THINK] else body)
                messages.append(parser.finish())
            elif role == self.USER:
                messages.append(Message("user", text, name=None if name == "user" else name))
            elif name == "tool_declare" and (tools := tools_from_json(text)):
                messages.append(Message("system", tools=tools))
            elif name in RESERVED:
                add_system_text(messages, text)
            else:
                messages.append(_tool_result(name, text))
        return messages

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
    sinks = {"reasoning": "reasoning", "content": "content", "call": "value", "arguments": "value"}

    def __init__(self, template: ChatML, calls_before: int) -> None:
        super().__init__(template, template.table, "reasoning", calls_before)
        self.entering = {"call": self._begin_call, "arguments": self._end_id}
        self.leaving = {"arguments": self._end_arguments, "call": self._end_call}
        self.named = False  # whether the id of the open call is complete

    def _read(self, token: int) -> None:
        if self.template.tokenizer.is_special(token):
            self._on(token)
        else:
            self._hear(token)

    def _begin_call(self) -> None:
        self.calls.append(("", {}))
        self.named = False

    def _end_id(self) -> None:
        identifier = self._take_value()
        match = CALL_ID.fullmatch(identifier)
        self.calls[-1] = (match.group(1) if match else identifier.strip().removeprefix("functions."), {})
        self._on_call("tool_name", self.calls[-1][0])
        self.named = True

    def _end_arguments(self) -> None:
        text = self._take_value()
        try:
            value = jsontext.load(text or "{}")
        except ValueError:
            value = None
        self.calls[-1][1].update(value if isinstance(value, dict) else {UNREADABLE: text})

    def _end_call(self) -> None:
        if not self.named:
            self._end_id()
        self._on_call("tool_arguments", jsontext.dump(self.calls[-1][1]))

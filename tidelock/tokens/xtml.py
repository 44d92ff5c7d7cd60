"""The K3-style XTML format: four marker tokens, everything else plain text.

    <|open|>message role="user"<|sep|>...<|close|>message<|sep|><|end_of_msg|>

An assistant message has the channels think, response and (with calls) tools; the think channel is always there, even
empty, and never dropped later, so a longer conversation starts with the exact ids of the shorter one. In instruct mode
there is no think channel at all. Arguments are typed: strings raw, everything else JSON. Only markers are special tokens;
text that spells a marker stays text.

Format: K3 report, App. F (facts in the model reference, section 6.7). Of a declaration in the middle of a conversation
the reference quotes the first two lines; the third and the message's type are ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from . import jsontext, lark
from .message import DIRECTIVES, Message, ToolSpec
from .template import (
    Template,
    add_system_text,
    call_position,
    in_call_order,
    last_calls,
    system_parts,
    tools_from_json,
)
from .turn import TurnParser, call_id

HEADER = re.compile(r'(\w+)((?: \w+="[^"]*")*)')
ATTRIBUTE = re.compile(r' (\w+)="([^"]*)"')
CACHED_IDS = 2048  # of a turn that is remembered
ROLES = ("system", "user", "assistant", "tool")
DECLARE = "# Tools\nHere are the available tools, described in JSONSchema.\n\n```json\n"
DECLARE_LATER = (
    "## New Tools Available\nThe system dynamically extends the toolset via lazy-loading.\n"
    "From here on these tools can be called too, described in JSONSchema.\n\n```json\n"
)
DECLARE_END = "\n```"
TYPES = {
    str: "string", bool: "boolean", int: "number", float: "number", type(None): "null", dict: "object", list: "array",
}  # fmt: skip

# What is open in each state, outermost first.
NESTING = {
    "message": ("message",),
    "think": ("message", "think"),
    "response": ("message", "response"),
    "tools": ("message", "tools"),
    "call": ("message", "tools", "call"),
    "argument": ("message", "tools", "call", "argument"),
    "end": (),
}
# A channel or call may open anywhere: what was still open ends there. Another message's header, like the stop token,
# ends the turn.
ANYWHERE = {
    "think": "think", "response": "response", "tools": "tools", "call": "call",
    "/message": "message", "message": "end", "end_of_msg": "end",
}  # fmt: skip
TABLE = {
    "message": ANYWHERE,
    "think": {**ANYWHERE, "/think": "message"},
    "response": {**ANYWHERE, "/response": "message"},
    "tools": {**ANYWHERE, "/tools": "message"},
    "call": {**ANYWHERE, "argument": "argument", "/call": "tools", "/tools": "message"},
    "argument": {**ANYWHERE, "argument": "argument", "/argument": "call", "/call": "tools", "/tools": "message"},
    "end": {},
}


def _escape(value: str) -> str:
    return value.replace("&", "&amp;").replace('"', "&quot;")


def _unescape(value: str) -> str:
    return value.replace("&quot;", '"').replace("&amp;", "&")


def _header(tag: str, **attributes: object) -> str:
    return tag + "".join(f' {key}="{_escape(str(value))}"' for key, value in attributes.items())


def _tag_and_attributes(header: str) -> tuple[str, dict[str, str]]:
    match = HEADER.fullmatch(header)
    if match is None:
        return "", {}
    return match.group(1), {key: _unescape(value) for key, value in ATTRIBUTE.findall(match.group(2))}


class XTML(Template):
    prefix_stable = True

    def __init__(self, tokenizer, thinking: bool = True) -> None:
        self.name, self.thinking = "xtml" if thinking else "xtml-instruct", thinking
        super().__init__(tokenizer)
        names = ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>")
        self.OPEN, self.CLOSE, self.SEP, self.END = (tokenizer.special(n) for n in names)
        self.stop_ids = (self.END,)
        self.start = "think" if thinking else "response"
        # a conversation comes again with each of its turns
        self._said_before, self._text_before = lru_cache(4096)(self._said), lru_cache(4096)(self._text)
        self.read_header = lru_cache(4096)(self._read_header)  # a conversation has few different ones
        self._opened = self._open(self.start)
        self._prompt = self._open("message", role="assistant") + self._opened

    def _read_header(self, ids: tuple[int, ...]) -> tuple[str, dict[str, str]]:
        return _tag_and_attributes(self.tokenizer.decode(ids))

    def _open(self, tag: str, **attributes: object) -> list[int]:
        return [self.OPEN, *self.tokenizer.encode(_header(tag, **attributes)), self.SEP]

    def _close(self, tag: str) -> list[int]:
        return [self.CLOSE, *self.tokenizer.encode(tag), self.SEP]

    def _message(self, text: str, **attributes: object) -> list[int]:
        body = self.tokenizer.encode(text)
        return [*self._open("message", **attributes), *body, *self._close("message"), self.END]

    def _shown(self, messages: Sequence[Message]) -> list[Message]:
        return in_call_order(messages)

    def generation_prompt(self) -> list[int]:
        return list(self._prompt)

    def sampled(self, message: Message) -> list[int]:
        encode = self.tokenizer.encode
        out = [*encode(message.reasoning), *self._close("think"), *self._open("response")] if self.thinking else []
        out += [*encode(message.content), *self._close("response")]
        if message.tool_calls:
            out += self._open("tools")
            for index, call in enumerate(message.tool_calls, 1):
                out += self._open("call", tool=call.name, index=index)
                for key, value in call.arguments.items():
                    text = value if isinstance(value, str) else jsontext.dump(value)
                    out += [*self._open("argument", key=key, type=TYPES[type(value)]), *encode(text)]
                    out += self._close("argument")
                out += self._close("call")
            out += self._close("tools")
        return [*out, *self._close("message"), self.END]

    def _input(self, message: Message, before: Sequence[Message]) -> list[int]:
        if message.role == "tool":
            name, index = "unknown" if message.name is None else message.name, call_position(message, before) + 1
            return self._message(message.content, role="tool", tool=name, index=index)
        if message.role == "user":
            name = {} if message.name is None else {"name": message.name}
            return self._message(message.content, role="user", **name)
        out: list[int] = []
        for kind, text in system_parts(message):
            if kind == "tools":
                words = DECLARE_LATER if before else DECLARE
                out += self._message(words + text + DECLARE_END, role="system", type="tool-declare")
            else:
                out += self._message(text, role="system", **({} if kind == "text" else {"type": kind}))
        return out

    def _turn(self, content: str, calls: str | None = None) -> str:
        opened, closed = self._mark_open, self._mark_close
        called = f"{opened('tools')} {calls} {closed('tools')} " if calls else ""
        end = f"{closed('message')} {lark.special(self.END)}"
        reasoning = f"thought {closed('think')} {opened('response')} " if self.thinking else ""
        return f"{reasoning}{content} {closed('response')} {called}{end}"

    def _mark_open(self, header: str) -> str:
        return f"{lark.special(self.OPEN)} {lark.literal(header)} {lark.special(self.SEP)}"

    def _mark_close(self, tag: str) -> str:
        return f"{lark.special(self.CLOSE)} {lark.literal(tag)} {lark.special(self.SEP)}"

    def _call_rules(self, rule: str, tool: ToolSpec) -> list[str]:
        """Arguments in the order of the schema's properties, those not required optional; each in one of its forms."""
        head = f"{lark.special(self.OPEN)} {lark.literal(_header('call', tool=tool.name) + ' index=')} /\"[1-9][0-9]?\"/"
        ways, rules = [], []
        for n, schema in enumerate(lark.argument_forms(tool.parameters)):
            arguments, needed = self._arguments(f"{rule}_{n}", {**tool.parameters, **schema})
            ways.append(" ".join([*arguments, self._mark_close("call")]))
            rules += needed
        return [f"{rule}: {head} {lark.special(self.SEP)} {lark.any_of(ways)}", *rules]

    def _arguments(self, rule: str, schema: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """(the expressions for the arguments of a call, the rules they need)."""
        rules, arguments = [], []
        for i, (key, inner) in enumerate(schema.get("properties", {}).items()):
            argument, value = f"{rule}_{i}", f"{rule.upper()}_{i}"
            rules += self._argument_rules(argument, value, _header("argument", key=key), lark.forms(inner, schema), schema)
            arguments.append(argument if key in schema.get("required", ()) else f"{argument}?")
        if schema.get("additionalProperties", True) is not False:
            rules += self._argument_rules(f"{rule}_more", f"{rule.upper()}_MORE", None, lark.forms(
                schema.get("additionalProperties", True), schema), schema)  # fmt: skip
            arguments.append(f"{rule}_more*")
        return arguments, rules

    def _argument_rules(
        self, rule: str, terminal: str, header: str | None, forms: list[tuple[str, Any]], root: Mapping[str, Any]
    ) -> list[str]:
        """header None: an argument of any name that needs no escape."""
        rules, ways = [], []
        for i, (kind, form) in enumerate(forms):
            if kind == "const":
                kind, value = TYPES[type(form)], lark.literal(lark.text_of(form))
            elif kind == "string":
                value = f"{terminal}_{i}"
                rules.append(f"{value}: {lark.raw_text(form)}")
            else:
                value, kind = lark.json_value(form, root), "number" if kind == "integer" else kind
            typed = lark.literal(f' type="{kind}"')
            opening = f"{lark.literal(header)} {typed}" if header else f'"argument key=" /"[^"<>&]+"/ {typed}'
            ways.append(f"{lark.special(self.OPEN)} {opening} {lark.special(self.SEP)} {value} {self._mark_close('argument')}")
        return [f"{rule}: {lark.any_of(ways)}", *rules]

    def parser(self, calls_before: int = 0, tools: Sequence[ToolSpec] = ()) -> XTMLParser:
        return XTMLParser(self, calls_before)

    def parse(self, ids: Sequence[int]) -> list[Message]:
        messages: list[Message] = []
        made = 0  # calls
        for header, body in self._split(ids):
            role, text = header["role"], ""
            if role != "assistant":
                text = (self._text_before if len(body) <= CACHED_IDS else self._text)(tuple(body))
            if role == "assistant":
                said = self._said_before if len(body) <= CACHED_IDS else self._said
                messages.append(said(tuple(body), made))
                made += len(messages[-1].tool_calls)
            elif role == "tool":
                name, index = header.get("tool", "unknown"), header.get("index", "")
                position = int(index) - 1 if re.fullmatch("[0-9]{1,9}", index) else 0
                identifier = call_id(name, made - len(last_calls(messages)) + position)
                messages.append(Message("tool", text, tool_call_id=identifier, name=name))
            elif role == "user":
                messages.append(Message("user", text, name=header.get("name")))
            elif header.get("type") in DIRECTIVES:
                messages.append(Message("system", text, name=header["type"]))
            else:
                tools = None
                if header.get("type") == "tool-declare":
                    words = DECLARE_LATER if messages else DECLARE
                    tools = tools_from_json(text.removeprefix(words).removesuffix(DECLARE_END))
                if tools:
                    messages.append(Message("system", tools=tools))
                else:
                    add_system_text(messages, text)
        return messages

    def _split(self, ids: Sequence[int]) -> list[tuple[dict[str, str], list[int]]]:
        """(attributes, what follows the header) of each message. A cut turn ends where the next message begins."""
        ids = list(ids)
        starts: list[tuple[int, int, dict[str, str]]] = []  # (where its header begins, where that ends, attributes)
        for at in _places(ids, self.OPEN):
            header = self._plain(ids, at + 1)
            end = at + 1 + len(header)
            if ids[end : end + 1] == [self.SEP]:
                tag, attributes = self.read_header(tuple(header))
                if tag == "message" and attributes.get("role") in ROLES:
                    starts.append((at, end + 1, attributes))
        if ids and (not starts or starts[0][0] != 0):
            raise self._not_a_conversation()
        ends = [at for at, _, _ in starts[1:]] + [len(ids)] if starts else []
        return [(attributes, ids[begin:end]) for (_, begin, attributes), end in zip(starts, ends, strict=True)]

    def _text(self, body: tuple[int, ...]) -> str:
        return self.tokenizer.decode(self._plain(body))

    def _said(self, body: tuple[int, ...], calls_before: int) -> Message:
        """The assistant message with these ids."""
        parser = self.parser(calls_before)
        opened = len(self._opened)
        parser.feed(body[opened:] if list(body[:opened]) == self._opened else body)
        return parser.finish()


def _places(ids: list[int], token: int) -> Iterator[int]:
    at = -1
    while True:
        try:
            at = ids.index(token, at + 1)
        except ValueError:
            return
        yield at


class XTMLParser(TurnParser):
    """Ids between <|open|> or <|close|> and <|sep|> collect into a header, whose tag is one terminal of the table."""

    nesting = NESTING
    sinks = {"think": "reasoning", "response": "content", "argument": "value"}
    entering = {"call": "_begin_call", "argument": "_begin_argument"}
    leaving = {"call": "_end_call", "argument": "_end_argument"}

    def __init__(self, template: XTML, calls_before: int) -> None:
        super().__init__(template, TABLE, template.start, calls_before)
        self.marks = template
        self.header: list[int] | None = None  # ids of the header being read
        self.closing = False  # whether that header is a closing one
        self.attributes: dict[str, str] = {}
        self.key, self.kind = "", "string"  # of the argument being read

    def _in_text(self) -> bool:
        return self.header is None

    def _read(self, token: int) -> None:
        marks = self.marks
        if token == marks.OPEN or token == marks.CLOSE:
            self.header, self.closing = [], token == marks.CLOSE
        elif token == marks.END:
            self.header = None
            self._on("end_of_msg")
        elif self.header is None:
            if not marks.tokenizer.is_special(token):
                self._hear((token,))
        elif token == marks.SEP:
            tag, self.attributes = marks.read_header(tuple(self.header))
            self.header = None
            self._on("/" + tag if self.closing else tag, self.closing)
        elif marks.tokenizer.is_special(token):
            self.header = None
        else:
            self.header.append(token)

    def _begin_call(self) -> None:
        self.calls.append((self.attributes.get("tool", ""), {}))
        self._on_call("tool_name", self.calls[-1][0])

    def _end_call(self) -> None:
        self._on_call("tool_arguments", "}" if self.calls[-1][1] else "{}")

    def _begin_argument(self) -> None:
        self.key, self.kind = self.attributes.get("key", ""), self.attributes.get("type", "string")
        self._streams_value = self.kind == "string"
        lead, quote = ", " if self.calls[-1][1] else "{", '"' if self._streams_value else ""
        self._on_call("tool_arguments", f"{lead}{jsontext.dump(self.key)}: {quote}")

    def _end_argument(self) -> None:
        """A value that is not what its type says stays the text it was; the message is then verbatim."""
        text = self._take_value()
        value: object = text
        if not self._streams_value:
            try:
                value = jsontext.load(text)
            except ValueError:
                pass
        self._on_call("tool_arguments", '"' if self._streams_value else jsontext.dump(value))
        self.calls[-1][1][self.key] = value
        self._streams_value = False


FORMATS = {name: {True: XTML, False: partial(XTML, thinking=False)} for name in ("xtml", "k3")}

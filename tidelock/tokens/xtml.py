"""The K3-style XTML format: four marker tokens, everything else plain text.

    <|open|>message role="user"<|sep|>...<|close|>message<|sep|><|end_of_msg|>

An assistant message has the channels think, response and (with calls) tools; the think channel is always there, even
empty, and never dropped later, so a longer conversation starts with the exact ids of the shorter one. Arguments are
typed: strings raw, everything else JSON. Only markers are special tokens; text that spells a marker stays text.

Format: K3 report, App. F (facts in the model reference).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence

from .message import Message
from .template import (
    Delta,
    Template,
    call_id,
    call_position,
    count_calls,
    make_calls,
    tools_from_json,
    tools_json,
)

HEADER = re.compile(r'(\w+)((?: \w+="[^"]*")*)')
ATTRIBUTE = re.compile(r' (\w+)="([^"]*)"')
DECLARE = "# Tools\nHere are the available tools, described in JSONSchema.\n\n```json\n"
DECLARE_END = "\n```"

# Which element may open inside which. A channel also opens when an earlier one was left unclosed.
CHANNELS = ("think", "response", "tools")
PARENT = {"think": "message", "response": "message", "tools": "message", "call": "tools", "argument": "call"}


def _escape(value: str) -> str:
    return value.replace("&", "&amp;").replace('"', "&quot;")


def _unescape(value: str) -> str:
    return value.replace("&quot;", '"').replace("&amp;", "&")


def _header(tag: str, **attributes: object) -> str:
    return tag + "".join(f' {key}="{_escape(str(value))}"' for key, value in attributes.items())


def _typed(value: object) -> tuple[str, str]:
    """(type name, text) of an argument."""
    if isinstance(value, str):
        return "string", value
    names = {bool: "boolean", int: "number", float: "number", type(None): "null", dict: "object", list: "array"}
    return names[type(value)], json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class XTML(Template):
    name = "xtml"
    prefix_stable = True

    def __init__(self, tokenizer) -> None:
        super().__init__(tokenizer)
        names = ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>")
        self.OPEN, self.CLOSE, self.SEP, self.END = (tokenizer.special(n) for n in names)
        self.stop_ids = (self.END,)
        self._prompt = self._open("message", role="assistant") + self._open("think")

    def _open(self, tag: str, **attributes: object) -> list[int]:
        return [self.OPEN, *self.tokenizer.encode(_header(tag, **attributes)), self.SEP]

    def _close(self, tag: str) -> list[int]:
        return [self.CLOSE, *self.tokenizer.encode(tag), self.SEP]

    def _message(self, text: str, **attributes: object) -> list[int]:
        body = self.tokenizer.encode(text)
        return [*self._open("message", **attributes), *body, *self._close("message"), self.END]

    def generation_prompt(self) -> list[int]:
        return list(self._prompt)

    def sampled(self, message: Message) -> list[int]:
        encode = self.tokenizer.encode
        out = [*encode(message.reasoning), *self._close("think")]
        out += [*self._open("response"), *encode(message.content), *self._close("response")]
        if message.tool_calls:
            out += self._open("tools")
            for index, call in enumerate(message.tool_calls, 1):
                out += self._open("call", tool=call.name, index=index)
                for key, value in call.arguments.items():
                    kind, text = _typed(value)
                    out += [*self._open("argument", key=key, type=kind), *encode(text), *self._close("argument")]
                out += self._close("call")
            out += self._close("tools")
        return [*out, *self._close("message"), self.END]

    def _input(self, message: Message, before: Sequence[Message]) -> list[int]:
        if message.role == "tool":
            index = call_position(message, before) + 1
            return self._message(message.content, role="tool", tool=message.name or "unknown", index=index)
        declare = []
        if message.tools:
            declare = self._message(DECLARE + tools_json(message.tools) + DECLARE_END, role="system", type="tool-declare")
        name = {} if message.name is None else {"name": message.name}
        return declare + self._message(message.content, role=message.role, **name)

    def parser(self, calls_before: int = 0) -> XTMLParser:
        return XTMLParser(self, calls_before)

    def parse(self, ids: Sequence[int]) -> list[Message]:
        messages: list[Message] = []
        tools: tuple = ()
        for part in self._split(ids):
            if part[: len(self._prompt)] == self._prompt:
                parser = self.parser(count_calls(messages))
                parser.feed(part[len(self._prompt) :])
                messages.append(parser.finish())
                continue
            header, text = self._header_and_text(part)
            role = header.get("role")
            if role == "system" and header.get("type") == "tool-declare":
                tools = tools_from_json(text[len(DECLARE) : -len(DECLARE_END)])
            elif role == "system":
                messages.append(Message("system", text, name=header.get("name"), tools=tools))
                tools = ()
            elif role == "tool":
                messages.append(self._tool_result(header, text, messages))
            else:
                messages.append(Message("user", text, name=header.get("name")))
        return messages

    def _split(self, ids: Sequence[int]) -> list[list[int]]:
        """One part per message. A cut assistant turn has no end marker: the next message header ends it."""
        parts, part = [], []
        for i, token in enumerate(ids):
            if part and token == self.OPEN and self._starts_message(ids, i):
                parts.append(part)
                part = []
            part.append(token)
            if token == self.END:
                parts.append(part)
                part = []
        return parts + ([part] if part else [])

    def _starts_message(self, ids: Sequence[int], at: int) -> bool:
        header = []
        for token in ids[at + 1 : at + 64]:
            if self.tokenizer.is_special(token):
                break
            header.append(token)
        return self.tokenizer.decode(header).startswith("message ")

    def _header_and_text(self, part: list[int]) -> tuple[dict[str, str], str]:
        sep = part.index(self.SEP)
        last = len(part) - 1 - part[::-1].index(self.CLOSE)
        return _attributes(self.tokenizer.decode(part[1:sep])), self.tokenizer.decode(part[sep + 1 : last])

    def _tool_result(self, header: dict[str, str], text: str, before: list[Message]) -> Message:
        calls = next((m.tool_calls for m in reversed(before) if m.role == "assistant"), ())
        position = int(header["index"]) - 1
        known = 0 <= position < len(calls)
        name = header["tool"]
        return Message("tool", text, tool_call_id=calls[position].id if known else call_id(name, position), name=name)


def _attributes(header: str) -> dict[str, str]:
    return {key: _unescape(value) for key, value in ATTRIBUTE.findall(header)}


class XTMLParser:
    """A state machine over token ids. The state is the innermost open element; markers move it, text feeds it.

    Between <|open|> or <|close|> and <|sep|> ids collect into a header. Whatever does not fit is skipped: the message
    then re-renders to other ids and is kept verbatim.
    """

    def __init__(self, template: XTML, calls_before: int) -> None:
        self.template, self.calls_before = template, calls_before
        self.ids: list[int] = []
        self.element = "think"
        self.marker: int | None = None  # OPEN or CLOSE while a header is being read
        self.header: list[int] = []
        self.reasoning: list[str] = []
        self.content: list[str] = []
        self.calls: list[tuple[str, dict]] = []
        self.key, self.kind, self.value = "", "string", []
        self._new_text()

    def feed(self, ids: Sequence[int]) -> list[Delta]:
        out: list[Delta] = []
        t = self.template
        for token in ids:
            self.ids.append(token)
            if token == t.OPEN or token == t.CLOSE:
                self.marker, self.header = token, []
            elif token == t.SEP and self.marker is not None:
                header = t.tokenizer.decode(self.header)
                marker, self.marker = self.marker, None
                self._on_open(header, out) if marker == t.OPEN else self._on_close(header, out)
            elif self.marker is not None:
                self.header.append(token)
            elif not t.tokenizer.is_special(token):
                self._on_text(self._decoder.decode(t.tokenizer.token_bytes(token)), out)
        return out

    def finish(self) -> Message:
        sampled = list(self.ids)
        self._leave("message", [])
        message = Message(
            "assistant", "".join(self.content), "".join(self.reasoning), make_calls(self.calls, self.calls_before)
        )
        return self.template.with_verbatim(message, sampled)

    def _new_text(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def _on_open(self, header: str, out: list[Delta]) -> None:
        match = HEADER.fullmatch(header)
        tag = match.group(1) if match else ""
        attributes = _attributes(header)
        if tag not in PARENT:
            return
        if tag in CHANNELS:
            self._leave("message", out)
        elif tag == "call":
            self._leave("tools", out)
            self.calls.append((attributes.get("tool", ""), {}))
            out.append(Delta("tool_name", self.calls[-1][0], len(self.calls) - 1))
        else:
            self._leave("call", out)
            if not self.calls:
                return
            self.key, self.kind, self.value = attributes.get("key", ""), attributes.get("type", "string"), []
            lead = ", " if self.calls[-1][1] else "{"
            quote = '"' if self.kind == "string" else ""
            text = f"{lead}{json.dumps(self.key, ensure_ascii=False)}: {quote}"
            out.append(Delta("tool_arguments", text, len(self.calls) - 1))
        self.element = tag
        self._new_text()

    def _on_close(self, header: str, out: list[Delta]) -> None:
        if header in PARENT:
            self._leave(PARENT[header], out)
        elif header == "message":
            self._leave("message", out)

    def _leave(self, target: str, out: list[Delta]) -> None:
        """Close elements from the innermost outwards until `target` is the current one (or is not an ancestor)."""
        depth = {"message": 0, "think": 1, "response": 1, "tools": 1, "call": 2, "argument": 3}
        while depth[self.element] > depth[target]:
            self._on_text(self._decoder.decode(b"", final=True), out)
            if self.element == "argument":
                self._end_argument(out)
            elif self.element == "call":
                out.append(Delta("tool_arguments", "}" if self.calls[-1][1] else "{}", len(self.calls) - 1))
            self.element = PARENT[self.element]
            self._new_text()

    def _end_argument(self, out: list[Delta]) -> None:
        text = "".join(self.value)
        value: object = text
        if self.kind == "string":
            out.append(Delta("tool_arguments", '"', len(self.calls) - 1))
        else:
            try:
                value = json.loads(text)
            except ValueError:
                pass  # keep the raw text; the message will be verbatim
            out.append(Delta("tool_arguments", json.dumps(value, ensure_ascii=False), len(self.calls) - 1))
        self.calls[-1][1][self.key] = value

    def _on_text(self, text: str, out: list[Delta]) -> None:
        if not text:
            return
        if self.element == "think":
            self.reasoning.append(text)
            out.append(Delta("reasoning", text))
        elif self.element == "response":
            self.content.append(text)
            out.append(Delta("content", text))
        elif self.element == "argument":
            self.value.append(text)
            if self.kind == "string":
                escaped = json.dumps(text, ensure_ascii=False)[1:-1]
                out.append(Delta("tool_arguments", escaped, len(self.calls) - 1))

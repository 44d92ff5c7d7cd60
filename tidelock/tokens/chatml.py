"""The K2-style ChatML format with tool sections.

    <|im_user|>user<|im_middle|>...<|im_end|>
    <|im_assistant|>assistant<|im_middle|><think>...</think>text<|tool_calls_section_begin|>...<|im_end|>

K2 Thinking drops old reasoning, which makes its prompts unstable; we keep all of it (K2.6's `preserve_thinking`), so
here too a longer conversation starts with the ids of the shorter one. What is not stable is the format across turns of
*other* clients that strip `reasoning_content` before sending history back.

Format: K2 tool-call guidance and report App. B (facts in the model reference).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence

from .errors import UserError
from .message import Message
from .template import Delta, Template, call_id, call_position, count_calls, make_calls, tools_from_json, tools_json

RETURN = "## Return of {id}\n"
# `functions.name:3`; names may hold anything but the colon is the last one. A bare counter names no function.
CALL_ID = re.compile(r"\s*(?:functions\.)?(.*):(\d+)\s*", re.DOTALL)
RESERVED = ("system", "tool_declare")


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
                arguments = json.dumps(call.arguments, ensure_ascii=False, separators=(",", ":"))
                out += [self.CALL, *encode(call.id), self.ARGUMENTS, *encode(arguments), self.CALL_END]
            out.append(self.SECTION_END)
        return [*out, self.END]

    def _input(self, message: Message, before: Sequence[Message]) -> list[int]:
        if message.role == "user":
            return self._message(self.USER, message.name or "user", message.content)
        if message.role == "tool":
            name = message.name or "unknown"
            if name in RESERVED:
                raise UserError(f"tool name {name!r} is reserved by the chatml template; rename the tool")
            number = count_calls(before) - self._open_calls(before) + call_position(message, before)
            text = RETURN.format(id=message.tool_call_id or call_id(name, number)) + message.content
            return self._message(self.SYSTEM, name, text)
        declare = self._message(self.SYSTEM, "tool_declare", tools_json(message.tools)) if message.tools else []
        return declare + self._message(self.SYSTEM, "system", message.content)

    def _open_calls(self, before: Sequence[Message]) -> int:
        return next((len(m.tool_calls) for m in reversed(before) if m.role == "assistant"), 0)

    def parser(self, calls_before: int = 0) -> ChatMLParser:
        return ChatMLParser(self, calls_before)

    def parse(self, ids: Sequence[int]) -> list[Message]:
        messages: list[Message] = []
        tools: tuple = ()
        for part in self._split(ids):
            if part[0] == self.ASSISTANT:
                parser = self.parser(count_calls(messages))
                parser.feed(part[len(self._prompt) :])
                messages.append(parser.finish())
                continue
            middle = part.index(self.MIDDLE)
            name = self.tokenizer.decode(part[1:middle])
            text = self.tokenizer.decode(part[middle + 1 : -1 if part[-1] == self.END else None])
            if part[0] == self.USER:
                messages.append(Message("user", text, name=None if name == "user" else name))
            elif name == "tool_declare":
                tools = tools_from_json(text)
            elif name == "system":
                messages.append(Message("system", text, tools=tools))
                tools = ()
            else:
                head, _, result = text.partition("\n")
                messages.append(Message("tool", result, tool_call_id=head.removeprefix("## Return of "), name=name))
        return messages

    def _split(self, ids: Sequence[int]) -> list[list[int]]:
        """One part per message; a cut assistant turn ends where the next message begins."""
        parts: list[list[int]] = []
        for token in ids:
            if not parts or parts[-1][-1] == self.END or token in (self.USER, self.ASSISTANT, self.SYSTEM):
                parts.append([])
            parts[-1].append(token)
        return parts


class ChatMLParser:
    """A state machine over token ids: `ACTIONS[state][marker] -> next state`; text goes to the state's buffer.

    A marker that has no entry is skipped, and the message is then kept verbatim. Opening the tool section without
    closing the think block ends the think block.
    """

    def __init__(self, template: ChatML, calls_before: int) -> None:
        t = self.template = template
        self.calls_before = calls_before
        self.ids: list[int] = []
        self.state = "reasoning"
        self.text: dict[str, list[str]] = {"reasoning": [], "content": []}
        self.calls: list[list[str]] = []  # [id text, arguments text]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        section = {t.CALL: "id", t.SECTION_END: "content", t.END: "end"}
        self.actions = {
            "reasoning": {t.THINK_END: "content", t.SECTION: "section", t.CALL: "id", t.END: "end"},
            "content": {t.SECTION: "section", t.CALL: "id", t.END: "end"},
            "section": section,
            "id": {t.ARGUMENTS: "arguments", t.CALL_END: "section", **section},
            "arguments": {t.CALL_END: "section", **section},
            "end": {},
        }

    def feed(self, ids: Sequence[int]) -> list[Delta]:
        out: list[Delta] = []
        for token in ids:
            self.ids.append(token)
            if self.template.tokenizer.is_special(token):
                following = self.actions[self.state].get(token)
                if following is not None:
                    self._enter(following, out)
            else:
                self._on_text(self._decoder.decode(self.template.tokenizer.token_bytes(token)), out)
        return out

    def finish(self) -> Message:
        sampled = list(self.ids)
        self._enter("end", [])
        calls = []
        for identifier, arguments in self.calls:
            try:
                value = json.loads(arguments)
            except ValueError:
                value = None
            calls.append((_function_name(identifier), value if isinstance(value, dict) else {}))
        message = Message(
            "assistant", "".join(self.text["content"]), "".join(self.text["reasoning"]),
            make_calls(calls, self.calls_before),
        )  # fmt: skip
        return self.template.with_verbatim(message, sampled)

    def _enter(self, state: str, out: list[Delta]) -> None:
        self._on_text(self._decoder.decode(b"", final=True), out)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        if self.state == "id":
            out.append(Delta("tool_name", _function_name(self.calls[-1][0]), len(self.calls) - 1))
        if state == "id":
            self.calls.append(["", ""])
        self.state = state

    def _on_text(self, text: str, out: list[Delta]) -> None:
        if not text:
            return
        if self.state in self.text:
            self.text[self.state].append(text)
            out.append(Delta(self.state, text))
        elif self.state == "id":
            self.calls[-1][0] += text
        elif self.state == "arguments":
            self.calls[-1][1] += text
            out.append(Delta("tool_arguments", text, len(self.calls) - 1))


def _function_name(identifier: str) -> str:
    match = CALL_ID.fullmatch(identifier)
    return match.group(1) if match else identifier.strip().removeprefix("functions.")

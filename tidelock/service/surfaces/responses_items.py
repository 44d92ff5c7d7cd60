"""The Responses API's items: what a conversation consists of there, and the messages it is here.

A reference to an item of a stored response stands for that item; clients that store their responses send nothing else of
what the model said.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from tidelock.service import wire
from tidelock.service.ask import MAX_CALLS
from tidelock.service.errors import ApiError, invalid_request
from tidelock.service.keys import Key
from tidelock.service.media import stand_in
from tidelock.service.state import ServiceState
from tidelock.service.surfaces import custom_tools
from tidelock.tokens.message import Message

KIND = "response"
ROLES = ("user", "assistant", "system", "developer")
MEDIA = {"input_image": "image", "input_file": "file"}
EARLIER = "The conversation so far, in short:"
OUTPUTS = ("function_call_output", "custom_tool_call_output")
PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc", "compaction": "cmp"}
OWN_ID = re.compile(r"(?:rs|msg|fc|ctc)_(.+)_(\d{1,6})")  # of an output item: its response's, and its place there


class Part(msgspec.Struct, gc=False):
    """Text under one of its names, or an image or file by URL, data or id."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    file_url: str | None = None
    file_data: str | None = None
    file_id: str | None = None
    detail: str | None = None


class Item(msgspec.Struct, gc=False):
    """Any input item; which fields it must have depends on its type. Without one it is a message, or a reference."""

    type: str | None = None
    id: str | None = None
    role: str | None = None
    content: str | list[Part] | None = None
    summary: list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: str | list[Part] | None = None
    encrypted_content: str | None = None

    @property
    def kind(self) -> str:
        return self.type or ("item_reference" if self.id and self.role is None else "message")


class Compacted(msgspec.Struct, gc=False):
    """What a compaction item holds: the users' last words and the summary of everything."""

    users: list[str]
    summary: str


_compacted_decoder = msgspec.json.Decoder(Compacted)


def resolved(state: ServiceState, key: Key, items: Sequence[Item]) -> list[Item]:
    """The items, with what is referred to in the place of its reference. Raises a 400 for one that is not stored."""
    known: dict[str, list[dict[str, Any]]] = {}
    return [_stored(state, key, item.id or "", n, known) if item.kind == "item_reference" else item
            for n, item in enumerate(items)]  # fmt: skip


def _stored(state: ServiceState, key: Key, name: str, n: int, known: dict[str, list[dict[str, Any]]]) -> Item:
    given = OWN_ID.fullmatch(name)
    try:
        if given is None:
            raise invalid_request("no id of ours")
        response, place = f"resp_{given[1]}", int(given[2])
        if response not in known:
            known[response] = state.objects.get(KIND, key.customer, response)["response"]["output"]
        return msgspec.convert(known[response][place], Item)
    except (ApiError, IndexError):
        raise invalid_request(f"no item {name!r} is stored here", f"input[{n}].id") from None


def messages_of(items: Sequence[Item], lenient: bool) -> list[Message]:
    """Items of one assistant turn (thought, text, calls) become one message."""
    out: list[Message] = []
    turn = Message("assistant")
    for n, item in enumerate(items):
        where = f"input[{n}]"
        if item.kind == "reasoning":
            if turn.content or turn.tool_calls:
                out.append(turn)
                turn = Message("assistant")
            turn = replace(turn, reasoning=turn.reasoning + _thought(item, where))
        elif item.kind == "message" and item.role == "assistant":
            if turn.content or turn.tool_calls:
                out.append(turn)
                turn = Message("assistant")
            turn = replace(turn, content=text_of(item.content, f"{where}.content", lenient))
        elif item.kind == "function_call":
            if not item.call_id or not item.name:
                raise invalid_request("a function_call needs call_id and name", where)
            call = wire.parse_call(item.call_id, item.name, item.arguments or "{}", f"{where}.arguments")
            _check_calls(turn, where)
            turn = replace(turn, tool_calls=(*turn.tool_calls, call))
        elif item.kind == "custom_tool_call":
            if not item.call_id or not item.name:
                raise invalid_request("a custom_tool_call needs call_id and name", where)
            _check_calls(turn, where)
            turn = replace(turn, tool_calls=(*turn.tool_calls, custom_tools.call(item.call_id, item.name, item.input or "")))
        else:
            if turn != Message("assistant"):
                out.append(turn)
                turn = Message("assistant")
            out += _compacted(item, where) if item.kind == "compaction" else [_input(item, where, lenient)]
    if turn != Message("assistant"):
        out.append(turn)
    return out


def _check_calls(turn: Message, where: str) -> None:
    if len(turn.tool_calls) >= MAX_CALLS:
        raise invalid_request(f"at most {MAX_CALLS} calls in a turn", where)


def _thought(item: Item, where: str) -> str:
    """What the client was shown of it, or what it was given to keep."""
    shown = text_of(item.content) or text_of(item.summary)
    if shown or not item.encrypted_content:
        return shown
    try:
        return base64.b64decode(item.encrypted_content, validate=True).decode("utf-8", "surrogatepass")
    except ValueError:
        raise invalid_request("encrypted_content was not made here", f"{where}.encrypted_content") from None


def sealed(thought: str) -> str:
    """A thought as `encrypted_content`, for clients that keep the conversation themselves. The prefix is no secret to who
    was shown the thought; it only has to come back."""
    return base64.b64encode(thought.encode("utf-8", "surrogatepass")).decode()


def _compacted(item: Item, where: str) -> list[Message]:
    """The conversation that an item made by `compaction` stands for."""
    try:
        held = _compacted_decoder.decode(base64.b64decode(item.encrypted_content or "", validate=True))
    except (ValueError, msgspec.DecodeError):
        raise invalid_request("encrypted_content was not made here", f"{where}.encrypted_content") from None
    return [*(Message("user", text) for text in held.users), Message("user", f"{EARLIER}\n{held.summary}")]


def _input(item: Item, where: str, lenient: bool) -> Message:
    if item.kind in OUTPUTS:
        if not item.call_id:
            raise invalid_request(f"a {item.kind} needs call_id", f"{where}.call_id")
        return Message("tool", text_of(item.output, f"{where}.output", lenient), tool_call_id=item.call_id)
    if item.kind != "message":
        raise invalid_request(f"items of type {item.kind!r} are not taken here", f"{where}.type")
    if item.role not in ROLES:
        raise invalid_request(f"{item.role!r} is no role; use one of {', '.join(ROLES)}", f"{where}.role")
    return Message("user" if item.role == "user" else "system", text_of(item.content, f"{where}.content", lenient))


def text_of(content: str | list[Part] | None, where: str = "", lenient: bool = False) -> str:
    """Raises a 400 that names the part that is no text."""
    if isinstance(content, str):
        return content
    return "".join(_part(part, f"{where}[{n}]", lenient) for n, part in enumerate(content or ()))


def _part(part: Part, where: str, lenient: bool) -> str:
    if part.text is not None or part.refusal is not None:
        return part.text or part.refusal or ""
    kind = MEDIA.get(part.type)
    if kind is None:
        raise invalid_request(f"parts of type {part.type!r} are not taken here", where)
    url = part.image_url or part.file_url or part.file_data
    if url is None and not part.file_id:
        raise invalid_request(f"an {part.type} needs a URL or a file_id", where)
    return stand_in(kind, url, where, lenient)


def docs_of(given: str | Sequence[Item] | None, unique: str) -> list[dict[str, Any]]:
    """The input as items with ids, for those who list it later."""
    items = [Item(role="user", content=given or "")] if given is None or isinstance(given, str) else given
    names = [f"{PREFIXES.get(item.kind, 'item')}_in_{unique}_{n}" for n, item in enumerate(items)]
    return [{**_item_doc(item), "id": name} for name, item in zip(names, items, strict=True)]


def _item_doc(item: Item) -> dict[str, Any]:
    doc = {"type": item.kind, **{k: v for k, v in msgspec.to_builtins(item).items() if v is not None}}
    if item.kind == "message":
        parts = item.content if isinstance(item.content, list) else [Part("text", item.content or "")]
        doc |= {"content": [_part_doc(part, item.role) for part in parts], "status": "completed"}
    elif item.kind not in ("item_reference", "compaction", "reasoning"):
        doc["status"] = "completed"
    return doc


def _part_doc(part: Part, role: str | None) -> dict[str, Any]:
    if part.text is None and part.refusal is None:
        return {k: v for k, v in msgspec.to_builtins(part).items() if v is not None} | {"detail": part.detail or "auto"}
    text = part.text or part.refusal or ""
    if role == "assistant":
        return {"type": "output_text", "text": text, "annotations": []}
    return {"type": "input_text", "text": text}

"""Bytes to structs and back: decoding that names the field it refuses, encoding, server-sent events."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from tidelock.service.errors import invalid_request
from tidelock.tokens import jsontext
from tidelock.tokens.message import ToolCall

CACHED_CHARS = 2048  # clients send every call of a conversation again with each turn
_arguments = lru_cache(4096)(jsontext.load)
encode = msgspec.json.Encoder().encode


def decode(body: bytes, decoder: msgspec.json.Decoder) -> Any:
    """Raises a 400 that names the field, from msgspec's own path (`... - at `$.messages[0].role``)."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        raise invalid_request(reason, path.rstrip("`").lstrip(".") or None) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid_request(f"the body is not JSON: {error}") from error


def header(scope: Mapping[str, Any], name: bytes) -> str:
    """Of an HTTP request: the first of this name (in lower case), "" if there is none."""
    for key, value in scope["headers"]:
        if key == name:
            return value.decode("latin-1")
    return ""


def to_json(value: Any) -> str:
    return encode(value).decode()


def parse_call(identifier: str, name: str, arguments: str, where: str) -> ToolCall:
    """A call as a client sends it back. Raises a 400."""
    try:
        value = (_arguments if len(arguments) <= CACHED_CHARS else jsontext.load)(arguments or "{}")
    except ValueError as error:
        raise invalid_request(f"tool call arguments are not JSON: {error}", where) from error
    if not isinstance(value, dict):
        raise invalid_request("tool call arguments must be a JSON object", where)
    return ToolCall(identifier, name, value)


def event(data: Any) -> bytes:
    return b"data: " + encode(data) + b"\n\n"


def named_event(data: dict[str, Any]) -> bytes:
    """An event whose name is the data's `type`, as the Responses and Messages APIs send them."""
    return b"event: " + data["type"].encode() + b"\ndata: " + encode(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"

"""Images, videos and files inside messages. The models served here read text, and `/v1/models` says so.

A part is checked as if it could be looked at. Then a strict server refuses it, by name; a lenient one, whose clients
send pictures to whatever answers (and whose compliance suites demand an answer), puts words in its place that tell the
model what it cannot see.
"""

from __future__ import annotations

import base64
import binascii
import re

from tidelock.service.errors import invalid_request

PICTURES = ("image/png", "image/jpeg", "image/webp", "image/gif")
FILMS = ("video/mp4", "video/mpeg", "video/webm", "video/quicktime", "video/x-msvideo", "video/x-flv", "video/3gpp")
TYPES = {"image": PICTURES, "video": FILMS, "file": ("application/pdf", "text/plain")}
DATA_URL = re.compile(r"data:([a-z]+/[a-z0-9.+-]+);base64,(.*)", re.DOTALL)
ELSEWHERE = re.compile(r"(https?|ms)://\S+")  # ms: Kimi's own files


def stand_in(kind: str, url: str | None, where: str, lenient: bool) -> str:
    """What a lenient server says to the model instead. `kind`: "image" | "video" | "file"; `url`: data, http(s) or ms,
    None for one that is named by a file id. Raises a 400."""
    if url is not None:
        _check(kind, url, where)
    if not lenient:
        raise invalid_request(f"this model reads text; it cannot take the {kind} in {where}", where, "unsupported_content")
    return f"[{'an' if kind == 'image' else 'a'} {kind}, which this model cannot see]"


def _check(kind: str, url: str, where: str) -> None:
    found = DATA_URL.fullmatch(url)
    if found is None:
        if not ELSEWHERE.fullmatch(url):
            raise invalid_request(f"the {kind} must be a data:…;base64, an http(s):// or an ms:// URL", where)
        return
    if found[1] not in TYPES[kind]:
        raise invalid_request(f"{found[1]} is no {kind} type; use one of {', '.join(TYPES[kind])}", where)
    try:
        data = base64.b64decode(found[2], validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if not data:
        raise invalid_request(f"the {kind} is not base64", where)

"""What the server writes to its log: JSON lines or text on one stream, every line of a request with its id.

`logging` with one formatter, and msgspec to encode: structlog was measured first, and on its shortest path the access line
costs 10.3 us where it costs 6.8 here (`benchmarks/logging_cost.py`), for a dependency more. No line may hold a key's secret
or a word that a client sent. So the message of an exception, which may quote either, is left out and its frames are kept;
level debug keeps the message too, for a developer's machine.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import IO, Any

import msgspec

from tidelock.service.record import current

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
FORMS = ("json", "text", "off")
MOST_FRAMES = 12  # of an exception, the innermost
ACCESS = "tidelock.access"

Fields = dict[str, Any]


def configure(form: str, level: str = "info", stream: IO[str] | None = None) -> AccessLog | None:
    """Sets up this process's logging; returns the log of access lines, or None for "off": then there are only warnings and
    errors, as text, and they hold no more of what clients sent than the others do."""
    quiet = form == "off"
    level = "warning" if quiet and level != "debug" else level
    lines = Lines(form == "json", messages=level == "debug")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(lines)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(LEVELS[level], logging.INFO))  # what others say at debug is about sockets
    logging.getLogger("tidelock").setLevel(max(LEVELS[level], logging.WARNING) if quiet else LEVELS[level])
    return None if quiet else AccessLog(lines, handler.stream, LEVELS[level])


class AccessLog:
    """Straight to the stream: a `LogRecord` for every request would cost more than the rest of the line."""

    def __init__(self, lines: Lines, stream: IO[str], level: int) -> None:
        self._lines, self._stream, self._level = lines, stream, level

    def say(self, fields: Fields, level: str = "info") -> None:
        if LEVELS[level] >= self._level:
            self._stream.write(self._lines.line(time.time(), level, ACCESS, "request", fields) + "\n")
            self._stream.flush()


class Lines(logging.Formatter):
    def __init__(self, as_json: bool, messages: bool = False) -> None:
        """`messages`: whether exceptions may say what they have to say."""
        super().__init__()
        self._json, self._messages = as_json, messages
        self._second, self._shown = -1, ""

    def format(self, record: logging.LogRecord) -> str:
        fields: Fields = {}
        if (request := current()) is not None:
            fields["request_id"] = request.request_id
        if record.exc_info and record.exc_info[1] is not None:
            fields["exception"] = described(record.exc_info[1], self._messages)
        return self.line(record.created, record.levelname.lower(), record.name, record.getMessage(), fields)

    def line(self, when: float, level: str, logger: str, event: str, fields: Fields) -> str:
        head = {"time": self._time(when), "level": level, "logger": logger, "event": event}
        if self._json:
            return _json({**head, **fields})
        told = " ".join(f"{name}={value}" for name, value in fields.items())
        return f"{head['time']} {level:<7} {logger}: {event}{' ' if told else ''}{told}"

    def _time(self, when: float) -> str:
        """UTC, ISO 8601, milliseconds. The second's text is made once."""
        second = int(when)
        if second != self._second:
            self._shown = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = second
        return f"{self._shown}.{int((when - second) * 1000):03d}Z"


def described(error: BaseException, messages: bool = False) -> str:
    """Types and places, innermost first, of the exception and what it came from."""
    parts: list[str] = []
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        frames = traceback.extract_tb(at.__traceback__)[-MOST_FRAMES:][::-1]
        places = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames)
        said = f": {at}" if messages else ""
        parts.append(f"{type(at).__name__}{said} at {places or 'nowhere'}")
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    return "; from ".join(parts)


def _json(line: Fields) -> str:
    try:
        return msgspec.json.encode(line, enc_hook=repr).decode()
    except UnicodeEncodeError:  # half a character, from a file name perhaps
        return json.dumps(line, default=repr)

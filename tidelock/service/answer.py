"""The one internal event stream: what a running request says, piece by piece, whatever surface it came through.

Per choice: pieces, then `Ended`; after the last choice one `Bill`. A surface only translates these.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec import Struct
from msgspec.structs import replace

from tidelock.service.ask import Ask
from tidelock.service.stops import StopFilter
from tidelock.tokens.message import Message
from tidelock.tokens.policy import Chunk, Reported, Source, Times
from tidelock.tokens.template import Template, count_calls
from tidelock.tokens.turn import call_id


class Token(Struct, frozen=True, gc=False):
    """One sampled token of the visible text, for clients that ask for log-probabilities."""

    data: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


class Piece(Struct, frozen=True, gc=False):
    """kind: "reasoning" | "content" | "call" (text = the tool's name, `id` set) | "arguments" (JSON text)."""

    choice: int
    kind: str
    text: str
    call: int = 0  # position of the tool call within the answer
    id: str = ""
    tokens: tuple[Token, ...] = ()


class Ended(Struct, frozen=True, gc=False):
    """`message` as the client sees it: without what it had put into the answer's mouth, cut at the stop string."""

    choice: int
    message: Message
    finish_reason: str  # "stop" | "length" | "tool_calls"
    stop: str | None = None
    tokens: tuple[Token, ...] = ()


class Usage(Struct, frozen=True, gc=False):
    """What one request used, summed over its choices; the prompt counts once. `nano_usd` is the exact charge."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    nano_usd: int = 0


class Bill(Struct, frozen=True, gc=False):
    """The last word: settled and stored."""

    usage: Usage
    nodes: tuple[str, ...]  # by choice: the answer's node in the trace


Event = Piece | Ended | Bill


@dataclass
class Sample:
    """What has been sampled so far."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)  # (weights version, tokens) spans
    cached_tokens: int = 0
    finish_reason: str | None = None
    source: Source | None = None  # the upstream, where there are several
    reported: Reported | None = None  # its own count
    times: Times | None = None  # and what it says of the time it took
    chunks: list[Chunk] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self.ids += chunk.ids
        self.logprobs += chunk.logprobs
        if chunk.ids:
            if self.versions and self.versions[-1][0] == chunk.weights_version:
                self.versions[-1] = (chunk.weights_version, self.versions[-1][1] + len(chunk.ids))
            else:
                self.versions.append((chunk.weights_version, len(chunk.ids)))
        self.source = chunk.source or self.source
        if chunk.finish_reason:
            self.finish_reason = chunk.finish_reason
            self.cached_tokens = chunk.cached_tokens
            if chunk.versions and sum(tokens for _, tokens in chunk.versions) == len(self.ids):
                self.versions = list(chunk.versions)
            self.reported, self.times = chunk.reported, chunk.times


class Choice:
    """One answer while it is sampled: ids in, events out.

    `opening_ids` were put after the generation prompt for the model to go on from; the parser reads them too, the
    client does not see them again.
    """

    def __init__(self, index: int, ask: Ask, template: Template, opening_ids: tuple[int, ...]) -> None:
        self.index, self.ask = index, ask
        self.sample = Sample()
        self.message: Message | None = None  # as stored, once ended
        self._tokenizer = template.tokenizer
        self._calls_before = count_calls(ask.messages)
        self._parser = template.parser(self._calls_before, ask.tools)
        self._parser.feed(opening_ids)
        self._opened_ids = self._parser.reasoning_ids
        self._stop = StopFilter(ask.params.stop)  # of the content, as the engine has it
        self._said = {"reasoning": "", "content": ""}
        self._calls: list[int] = []  # the parser's call indices in order of appearance
        self._tokens: list[Token] = []
        self._unsaid: list[Token] = []  # tokens whose character is not complete yet

    @property
    def stopped(self) -> str | None:
        """The stop string that was found; nothing more need be sampled."""
        return self._stop.found

    @property
    def reasoning_tokens(self) -> int:
        return self._parser.reasoning_ids - self._opened_ids

    def take(self, chunk: Chunk) -> list[Piece]:
        self.sample.add(chunk)
        pieces: list[Piece] = []
        parts = ((token,) for token in chunk.ids) if self.ask.logprobs else (chunk.ids,)
        for n, part in enumerate(parts):
            deltas = self._parser.feed(part)
            tokens = self._logprobs(chunk, n, deltas) if self.ask.logprobs else ()
            for delta in deltas:
                self._say(pieces, delta.kind, delta.text, delta.call_index, tokens)
        return pieces

    def end(self) -> list[Piece | Ended]:
        """Closes the answer, cut or whole."""
        pieces: list[Piece] = []
        message = self._parser.finish()
        for delta in self._parser.feed(()):
            self._say(pieces, delta.kind, delta.text, delta.call_index, ())
        self._emit(pieces, "content", self._stop.finish(), ())
        opening = self.ask.opening or Message("assistant")
        if self.stopped is not None:
            content = opening.content + self._said["content"]
            cut = replace(message, content=content, reasoning=opening.reasoning + self._said["reasoning"])
            message = replace(cut, verbatim=message.verbatim or tuple(self._parser.ids))
        self.message = message
        seen = replace(message, content=self._said["content"], reasoning=self._said["reasoning"], verbatim=None)
        return [*pieces, Ended(self.index, seen, self._finish_reason(message), self.stopped, tuple(self._tokens))]

    def _finish_reason(self, message: Message) -> str:
        if self.stopped is not None:
            return "stop"
        reason = self.sample.finish_reason
        return "tool_calls" if message.tool_calls and reason == "stop" else "length" if reason == "length" else "stop"

    def _say(self, pieces: list[Piece], kind: str, text: str, index: int, tokens: tuple[Token, ...]) -> None:
        if kind == "content":
            self._emit(pieces, kind, self._stop.feed(text), tokens)
        elif kind == "reasoning":
            self._emit(pieces, kind, text, tokens)
        elif self.stopped is not None:
            return
        elif kind == "tool_name":
            position = len(self._calls)
            self._calls.append(index)
            pieces.append(Piece(self.index, "call", text, position, call_id(text, self._calls_before + position)))
        else:
            pieces.append(Piece(self.index, "arguments", text, self._calls.index(index)))

    def _emit(self, pieces: list[Piece], kind: str, text: str, tokens: tuple[Token, ...]) -> None:
        self._said[kind] += text
        shown = tokens if kind == "content" else ()
        self._tokens += shown
        if text or shown:
            pieces.append(Piece(self.index, kind, text, tokens=shown))

    def _logprobs(self, chunk: Chunk, n: int, deltas: list) -> tuple[Token, ...]:
        """The tokens that say what `deltas` say: this one, and those before it that held parts of its character."""
        if self._tokenizer.is_special(chunk.ids[n]):
            self._unsaid = []
            return ()
        spell = self._tokenizer.token_bytes
        top = chunk.top_logprobs[n] if n < len(chunk.top_logprobs) else ()
        alternatives = tuple((spell(i), p) for i, p in top[: self.ask.params.top_logprobs])
        self._unsaid.append(Token(spell(chunk.ids[n]), chunk.logprobs[n], alternatives))
        text = "".join(delta.text for delta in deltas if delta.kind == "content").encode()
        if not text:
            return ()
        tokens, self._unsaid = self._unsaid, []
        if b"".join(t.data for t in tokens) == text:
            return tuple(tokens)
        return (tokens[-1],)

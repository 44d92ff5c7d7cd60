"""A `Policy` over a server that speaks token ids: Tidelock's or vLLM's `/inference/v1/generate` and weight routes.

Ids, log-probabilities and weight versions are the sampler's own (`exact`), so what comes back may train. Tidelock says
the version of every streamed chunk; vLLM only at the end, and then the chunks wait for it.
"""

from __future__ import annotations

import base64
import io
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np

from tidelock.tokens.policy import Chunk, PolicyError, Reported, SamplingParams

from .http import Client
from .sse import Endpoint, Patience, numbers

FINISHES = ("stop", "length", "abort", "deadline")
PREFIX = "generate-tokens-"  # how the server names a request to itself
STRUCTURED = {"json_schema": "json", "regex": "regex", "lark": "grammar"}


class TokenPolicy:
    """`base_url` is the server's root (a trailing /v1 is taken off); `model` may be left out where only one is served.

    await_versions: hold back what a server says no version of until it does, at the end of the answer; False hands it on
    at once, as of version -1.
    """

    exact = True

    def __init__(
        self, base_url: str, api_key: str, model: str | None = None, client: Client | None = None, *,
        patience: Patience = Patience(), await_versions: bool = True,
    ) -> None:  # fmt: skip
        self._server = Endpoint(base_url.rstrip("/").removesuffix("/v1"), api_key, client, patience)
        self.model, self._await_versions = model, await_versions
        self.last: dict[str, Any] = {}  # the usage of the last answer
        self._aborted: set[str] = set()

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str | None = None
    ) -> AsyncIterator[Chunk]:
        name = request_id or uuid.uuid4().hex
        body = {
            "request_id": name,
            "token_ids": list(prompt_ids),
            "sampling_params": sampling(params),
            "stream": True,
            "stream_options": {"include_usage": True},
            "priority": params.priority,
            **({"model": self.model} if self.model else {}),
        }
        answer = _Answer(params.top_logprobs, self._await_versions)
        try:
            async with aclosing(self._server.events("/inference/v1/generate", body, name)) as events:
                async for event in events:
                    for chunk in answer.take(event):
                        yield chunk
            for chunk in answer.end():
                yield chunk
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
            raise self._server.broken(f"an event does not follow the contract ({e!r})", "malformed") from None
        if name in self._aborted:
            self._aborted.discard(name)
            if not answer.finished:
                yield Chunk((), (), -1, "abort")
                return
        if not answer.finished:
            raise self._server.broken("the stream ended without a finish reason")
        self.last = {"usage": answer.usage}

    async def count(self, prompt_ids: Sequence[int]) -> int:
        return len(prompt_ids)

    async def abort(self, request_id: str) -> None:
        """Asks the server to, which then says what it has; hangs up on a request that has not reached it yet."""
        done = await self._server.call("POST", "/inference/v1/abort_requests", {"request_ids": [PREFIX + request_id]})
        if done.get("aborted") == 0 and self._server.cut(request_id):
            self._aborted.add(request_id)

    async def swap(self, checkpoint: str, version: int) -> None:
        """`checkpoint` is a path that the server can read. On failure its old weights keep serving."""
        await self._server.call("POST", "/start_weight_update")
        await self._server.call("POST", "/update_weights", {"update_info": {"checkpoint": str(checkpoint)}})
        await self._server.call("POST", "/finish_weight_update", {"weight_version": str(version)})

    # -- beyond Policy ------------------------------------------------------------------------------------------------

    async def alive(self, path: str, within_s: float) -> None:
        """Raises RemoteError unless the server answers GET `path` with 200 in that time."""
        await self._server.alive(path, within_s)

    async def pause(self, mode: str = "keep") -> None:
        """"keep" | "wait" | "abort"; see the engine's own."""
        await self._server.call("POST", f"/pause?mode={mode}")

    async def resume(self) -> None:
        await self._server.call("POST", "/resume")

    async def version(self) -> int:
        """Of the weights that new requests get; -1 where the server's label is no number."""
        return _version((await self._server.call("GET", "/weight_info")).get("weight_version"))


def sampling(p: SamplingParams) -> dict[str, Any]:
    """As the wire spells it. The stop ids are the request's own: the server adds none (`ignore_eos`)."""
    out: dict[str, Any] = {
        "max_tokens": p.max_tokens, "temperature": p.temperature, "top_p": p.top_p, "top_k": p.top_k, "min_p": p.min_p,
        "presence_penalty": p.presence_penalty, "frequency_penalty": p.frequency_penalty,
        "repetition_penalty": p.repetition_penalty, "stop_token_ids": list(p.stop_ids), "ignore_eos": True,
        "logprobs": p.top_logprobs,
    }  # fmt: skip
    if p.logit_bias:
        out["logit_bias"] = {str(token): bias for token, bias in p.logit_bias}
    if p.stop:
        out["stop"] = list(p.stop)
    if p.seed is not None:
        out["seed"] = p.seed
    extra: dict[str, Any] = {} if p.deadline_s is None else {"deadline_s": p.deadline_s}  # vLLM knows neither
    if p.routed_from is not None:
        out["routed_experts_prompt_start"], extra["routed_experts"] = p.routed_from, True
    if extra:
        out["extra_args"] = extra
    if p.constraint is not None:
        out["structured_outputs"] = {STRUCTURED[p.constraint.kind]: p.constraint.text}
    return out


class _Answer:
    """Events of one answer to chunks. The last chunk is held until the usage that follows it."""

    def __init__(self, top_logprobs: int, await_versions: bool) -> None:
        self.finished, self._await_versions = False, await_versions
        self._top = top_logprobs
        self.usage: dict[str, Any] = {}
        self._waiting: list[dict[str, Any]] = []  # choices whose version, or whose end, is not known yet
        self._sent = 0

    def take(self, event: dict[str, Any]) -> Iterator[Chunk]:
        self.usage = event.get("usage") or self.usage
        for choice in numbers(event.get("choices") or []):
            self._waiting.append(choice)
            if choice.get("finish_reason") is not None:
                self.finished = True
            elif choice.get("weight_versions") is not None or not self._await_versions:
                yield from self._chunks(choice.get("weight_versions") or [])

    def end(self) -> Iterator[Chunk]:
        """The rest, which had to wait for the whole answer's versions and usage."""
        if self.finished:
            yield from self._chunks(self._waiting[-1].get("weight_versions") or [])

    def _chunks(self, spans: list[dict[str, Any]]) -> Iterator[Chunk]:
        """The choices that waited, cut where the version changes."""
        waiting, self._waiting = self._waiting, []
        reported = Reported.of(self.usage or None)
        for choice in waiting:
            ids = numbers(choice.get("token_ids") or [])
            cuts = sorted({0, len(ids), *(s["end"] - self._sent for s in spans if 0 < s["end"] - self._sent < len(ids))})
            for begin, end in zip(cuts, cuts[1:]) if ids else [(0, 0)]:
                last = end == len(ids) and choice.get("finish_reason") is not None
                if ids or last:
                    yield _chunk(choice, begin, end, _version_at(spans, self._sent + begin), last, reported, self._top)
            self._sent += len(ids)


def _chunk(
    choice: dict[str, Any], begin: int, end: int, version: int, last: bool, said: Reported | None, n_top: int
) -> Chunk:
    content = numbers((choice.get("logprobs") or {}).get("content") or [])[begin:end]
    ids = tuple(int(i) for i in choice.get("token_ids") or [])[begin:end]
    if [c["token_id"] for c in content] != list(ids):
        raise ValueError("log-probabilities do not go with the ids")
    masks = choice.get("sampling_mask")
    finish, stop = (choice["finish_reason"], choice.get("stop_reason")) if last else (None, None)
    if finish is not None and finish not in FINISHES:
        raise PolicyError(f"the server ended the answer with {finish!r}", status=502, kind="server_error")
    return Chunk(
        ids,
        tuple(float(c["logprob"]) for c in content),
        version,
        finish,
        (said.cached_tokens or 0) if last and said else 0,
        sampled_logprobs=tuple(map(float, (choice.get("sampled_logprobs") or [])[begin:end])),
        top_logprobs=tuple(_ranked(c)[:n_top] for c in content) if n_top else (),
        kept=tuple(tuple(mask) or None for mask in masks[begin:end]) if masks else (),
        stop=stop if isinstance(stop, str) else None,
        routed_experts=_array(choice["routed_experts"]) if last and choice.get("routed_experts") else None,
        reported=said if last else None,
    )


def _array(text: str) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)


def _ranked(content: dict[str, Any]) -> tuple[tuple[int, float], ...]:
    """The likeliest tokens, likeliest first; the wire puts the sampled one first, and one more where it is not among them."""
    return tuple(sorted(((c["token_id"], c["logprob"]) for c in content.get("top_logprobs") or []), key=lambda c: -c[1]))


def _version_at(spans: list[dict[str, Any]], at: int) -> int:
    return next((_version(s["version"]) for s in spans if s["start"] <= at < s["end"]), -1)


def _version(label: Any) -> int:
    try:
        return int(label)
    except (TypeError, ValueError):
        return -1

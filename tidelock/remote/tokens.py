"""A `Policy` over a server that speaks token ids: Tidelock's or vLLM's `/inference/v1/generate` and weight routes.

Ids, log-probabilities and weight versions are the sampler's own (`exact`), so what comes back may train. The two speak
alike, with differences that `dialect` names (vLLM 0.32.0, tried): vLLM says versions only at an answer's end, does not say
whether it knew a request that is to be aborted, knows no deadlines, looks for stop strings in thoughts and markup too, and
takes weights by a call into its workers. Under a constraint its log-probabilities are those among what the constraint
leaves, which it does not name: such answers say that they are not exact, and are for RL no more than a text endpoint's.
"""

from __future__ import annotations

import asyncio
import base64
import io
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from tidelock.tokens.policy import Chunk, PolicyError, Reported, SamplingParams, Source, Times

from .http import Client
from .sse import Endpoint, Patience, numbers

FINISHES = ("stop", "length", "abort", "deadline")
PREFIX = "generate-tokens-"  # how the server names a request to itself
ABORTED_WITHIN_S = 2.0  # a server that does not say what became of an abort may not have known the request: then we hang up
STRUCTURED = {"json_schema": "json", "regex": "regex", "lark": "grammar"}


class TokenPolicy:
    """`base_url` is the server's root (a trailing /v1 is taken off); `model` may be left out where only one is served.

    await_versions: hold back what a server says no version of until it does, at the end of the answer; False hands it on
    at once, as of version -1, and the last chunk tells all (`Chunk.versions`). dialect: "tidelock" | "vllm". stops: False
    leaves stop strings to whoever reads the answer.
    """

    exact = True

    def __init__(
        self, base_url: str, api_key: str, model: str | None = None, client: Client | None = None, *,
        patience: Patience = Patience(), await_versions: bool = True, dialect: str = "tidelock", stops: bool = True,
    ) -> None:  # fmt: skip
        self._server = Endpoint(base_url.rstrip("/").removesuffix("/v1"), api_key, client, patience)
        self.model, self._await_versions, self._vllm, self._stops = model, await_versions, dialect == "vllm", stops
        self.last: dict[str, Any] = {}  # the usage of the last answer
        self._ended: dict[str, str] = {}  # requests that we hung up on, and why

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str | None = None
    ) -> AsyncIterator[Chunk]:
        name = request_id or uuid.uuid4().hex
        body = {
            "request_id": name,
            "token_ids": list(prompt_ids),
            "sampling_params": sampling(params, self._stops),
            "stream": True,
            "stream_options": {"include_usage": True},
            "priority": params.priority,
            **({"model": self.model} if self.model else {}),
        }
        answer = _Answer(params.top_logprobs, self._await_versions)
        source = Source("", False) if self._vllm and params.constraint is not None else None
        timer = None
        if self._vllm and params.deadline_s is not None:
            timer = asyncio.get_running_loop().call_later(params.deadline_s, self._hang_up, name, "deadline")
        try:
            async with aclosing(self._server.events("/inference/v1/generate", body, name)) as events:
                async for event in events:
                    for chunk in answer.take(event):
                        yield chunk if source is None else replace(chunk, source=source)
            for chunk in answer.end():
                yield chunk if source is None else replace(chunk, source=source)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
            raise self._server.broken(f"an event does not follow the contract ({e!r})", "malformed") from None
        finally:
            if timer is not None:
                timer.cancel()
            reason = self._ended.pop(name, None)
        if reason is not None and not answer.finished:
            for chunk in answer.rest():
                yield chunk
            yield Chunk((), (), -1, reason)
            return
        if not answer.finished:
            raise self._server.broken("the stream ended without a finish reason")
        self.last = {"usage": answer.usage}

    async def count(self, prompt_ids: Sequence[int]) -> int:
        return len(prompt_ids)

    async def abort(self, request_id: str) -> None:
        """Asks the server to, which then says what it has; hangs up on a request that has not reached it yet."""
        done = await self._server.call("POST", "/inference/v1/abort_requests", {"request_ids": [PREFIX + request_id]})
        if done.get("aborted") == 0:
            self._hang_up(request_id, "abort")
        elif "aborted" not in done:
            asyncio.get_running_loop().call_later(ABORTED_WITHIN_S, self._hang_up, request_id, "abort")

    def _hang_up(self, request_id: str, reason: str) -> None:
        if self._server.cut(request_id):
            self._ended[request_id] = reason

    async def swap(self, checkpoint: str, version: int) -> None:
        """`checkpoint` is a path that the server can read. On failure its old weights keep serving."""
        if self._vllm:
            await self._reload(str(checkpoint), version)
            return
        await self._server.call("POST", "/start_weight_update")
        await self._server.call("POST", "/update_weights", {"update_info": {"checkpoint": str(checkpoint)}})
        await self._server.call("POST", "/finish_weight_update", {"weight_version": str(version)})

    async def _reload(self, checkpoint: str, version: int) -> None:
        """Through the routes of vLLM's development mode (VLLM_SERVER_DEV_MODE=1). Its workers do not survive a path that
        holds no weights, so one that we can see is looked at first; what runs is finished on the old weights."""
        if Path(checkpoint).parent.exists() and not any(Path(checkpoint).glob("*.safetensors")):
            reason = f"{checkpoint} holds no weights in Hugging Face's layout, which is what vLLM reads"
            raise PolicyError(reason, status=400, kind="invalid_request_error")
        try:
            await self._server.call("POST", "/pause?mode=wait")
        except PolicyError as error:
            if error.status == 404:
                reason = "this vLLM takes no other weights; start it with VLLM_SERVER_DEV_MODE=1"
                raise PolicyError(reason, status=400, kind="invalid_request_error") from error
            raise
        try:
            loaded = {"method": "reload_weights", "kwargs": {"weights_path": checkpoint}}
            await self._server.call("POST", "/collective_rpc", loaded)
            await self._server.call("POST", "/reset_prefix_cache")
            await self._server.call("POST", "/update_weight_version", {"new_version": str(version)})
        finally:
            await self._server.call("POST", "/resume")

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


    async def mistaken(self) -> str | None:
        """What the server is, if it is not what `dialect` says: only vLLM has a version to tell."""
        try:
            vllm = "version" in await self._server.call("GET", "/version")
        except PolicyError as error:
            if error.status != 404:
                raise
            vllm = False
        return None if vllm == self._vllm else "vllm" if vllm else "tidelock"


def sampling(p: SamplingParams, stops: bool = True) -> dict[str, Any]:
    """As the wire spells it, with stop strings or without. The stop ids are the request's own: the server adds none
    (`ignore_eos`)."""
    out: dict[str, Any] = {
        "max_tokens": p.max_tokens, "temperature": p.temperature, "top_p": p.top_p, "top_k": p.top_k, "min_p": p.min_p,
        "presence_penalty": p.presence_penalty, "frequency_penalty": p.frequency_penalty,
        "repetition_penalty": p.repetition_penalty, "stop_token_ids": list(p.stop_ids), "ignore_eos": True,
        "logprobs": p.top_logprobs,
    }  # fmt: skip
    if p.logit_bias:
        out["logit_bias"] = {str(token): bias for token, bias in p.logit_bias}
    if p.stop and stops:
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
        self.metrics: dict[str, Any] = {}
        self._waiting: list[dict[str, Any]] = []  # choices whose version, or whose end, is not known yet
        self._sent = 0

    def take(self, event: dict[str, Any]) -> Iterator[Chunk]:
        self.usage = event.get("usage") or self.usage
        self.metrics = event.get("metrics") or self.metrics
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

    def rest(self) -> Iterator[Chunk]:
        """What waited for an end that does not come; of which version it is, nobody will say."""
        yield from self._chunks([])

    def _chunks(self, spans: list[dict[str, Any]]) -> Iterator[Chunk]:
        """The choices that waited, cut where the version changes."""
        waiting, self._waiting = self._waiting, []
        reported = Reported.of(self.usage or None)
        times = Times.of(self.metrics or None)
        known = self._whole(spans, waiting) if self._sent and self.finished else ()
        for choice in waiting:
            ids = numbers(choice.get("token_ids") or [])
            cuts = sorted({0, len(ids), *(s["end"] - self._sent for s in spans if 0 < s["end"] - self._sent < len(ids))})
            for begin, end in zip(cuts, cuts[1:]) if ids else [(0, 0)]:
                last = end == len(ids) and choice.get("finish_reason") is not None
                if ids or last:
                    chunk = _chunk(choice, begin, end, _version_at(spans, self._sent + begin), last, reported, self._top)
                    yield replace(chunk, versions=known, times=times) if last and (known or times) else chunk
            self._sent += len(ids)


    def _whole(self, spans: list[dict[str, Any]], waiting: list[dict[str, Any]]) -> tuple[tuple[int, int], ...]:
        """(version, tokens) of the whole answer, if the spans do tell it: some servers' go on beyond its end."""
        total = self._sent + sum(len(choice.get("token_ids") or []) for choice in waiting)
        known = tuple((_version(s["version"]), min(s["end"], total) - s["start"]) for s in spans)
        return known if sum(tokens for _, tokens in known) == total and all(tokens > 0 for _, tokens in known) else ()


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

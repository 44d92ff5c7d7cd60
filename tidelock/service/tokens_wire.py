"""The token-level wire, as vLLM 0.33.0 speaks it: requests as `SamplingParams`, chunks as `choices`.

Fields and their meaning are vLLM's (`entrypoints/scale_out/token_in_token_out`); what would change the answer and cannot
be honoured is refused by name. Two additions, which vLLM's own clients ignore: every streamed chunk carries its
`weight_versions` (vLLM says them only at the end), and `sampled_logprobs` appear where sampling bent the distribution.
`extra_args`, which vLLM leaves to its extensions, may hold `deadline_s` and `routed_experts: true` (vLLM: a server's flag).
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import numpy as np

from tidelock.service.errors import invalid_request
from tidelock.tokens.policy import Chunk, Constraint, Kept, SamplingParams, Times, kept_ids

FLOOR = -9999.0  # JSON has no -inf


class Structured(msgspec.Struct):
    json: Any = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool | None = None
    choice: list[str] | None = None
    structural_tag: str | None = None


class Sampling(msgspec.Struct):
    n: int = 1
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    temperature: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=-1)] = 0
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    min_tokens: int = 0
    logprobs: Annotated[int, msgspec.Meta(ge=0)] | None = None
    prompt_logprobs: int | None = None
    structured_outputs: Structured | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool = False
    extra_args: dict[str, Any] | None = None
    routed_experts_prompt_start: Annotated[int, msgspec.Meta(ge=0)] = 0


class StreamOptions(msgspec.Struct):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class Generate(msgspec.Struct):
    token_ids: Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(min_length=1)]
    sampling_params: Sampling
    request_id: str | None = None
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    priority: int = 0
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    output_mode: str = "tokens"
    features: Any = None
    content_parts: Any = None
    kv_transfer_params: Any = None
    ec_transfer_params: Any = None


_REFUSED = (
    ("output_mode", lambda r: r.output_mode != "tokens"),
    *((name, lambda r, name=name: bool(getattr(r, name)))
      for name in ("features", "content_parts", "kv_transfer_params", "ec_transfer_params", "cache_salt")),
    ("sampling_params.n", lambda r: r.sampling_params.n != 1),
    *((f"sampling_params.{name}", lambda r, name=name: bool(getattr(r.sampling_params, name)))
      for name in ("min_tokens", "allowed_token_ids", "bad_words")),
    ("sampling_params.prompt_logprobs", lambda r: r.sampling_params.prompt_logprobs is not None),
)  # fmt: skip

decoder = msgspec.json.Decoder(Generate)


def to_params(request: Generate, *, room: int, stop_ids: tuple[int, ...], tenant: str) -> SamplingParams:
    """`stop_ids` end a turn of this model and are left out for `ignore_eos`; `room` is what the context has left.

    Raises a 400 that names the field.
    """
    for name, refused in _REFUSED:
        if refused(request):
            raise invalid_request(f"this value of `{name}` is not supported", name)
    s, extra = request.sampling_params, request.sampling_params.extra_args or {}
    asked = tuple(s.stop_token_ids or ())
    stop = (s.stop,) if isinstance(s.stop, str) else tuple(s.stop or ())
    return SamplingParams(
        max_tokens=s.max_tokens or room,
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=max(0, s.top_k),
        min_p=s.min_p,
        presence_penalty=s.presence_penalty,
        frequency_penalty=s.frequency_penalty,
        repetition_penalty=s.repetition_penalty,
        logit_bias=tuple((s.logit_bias or {}).items()),
        stop_ids=asked if s.ignore_eos else (*asked, *(i for i in stop_ids if i not in asked)),
        stop=stop,
        seed=s.seed,
        top_logprobs=s.logprobs or 0,
        constraint=_constraint(s.structured_outputs),
        tenant=tenant,
        priority=request.priority,
        deadline_s=_deadline(extra),
        routed_from=min(s.routed_experts_prompt_start, len(request.token_ids)) if extra.get("routed_experts") else None,
    )


def _deadline(extra: dict[str, Any]) -> float | None:
    value = extra.get("deadline_s")
    if value is not None and not (isinstance(value, int | float) and value >= 0):
        raise invalid_request("deadline_s is a number of seconds", "sampling_params.extra_args.deadline_s")
    return value


def _constraint(wanted: Structured | None) -> Constraint | None:
    if wanted is None:
        return None
    given = [name for name in wanted.__struct_fields__ if getattr(wanted, name) not in (None, False)]
    if len(given) != 1 or given[0] in ("choice", "structural_tag"):
        reason = "give exactly one of json, json_object, regex and grammar"
        raise invalid_request(reason, "sampling_params.structured_outputs")
    if given[0] == "json":
        schema = wanted.json if isinstance(wanted.json, str) else msgspec.json.encode(wanted.json).decode()
        return Constraint("json_schema", schema)
    if given[0] == "json_object":
        return Constraint("json_schema", '{"type": "object"}')
    return Constraint("regex", wanted.regex) if wanted.regex is not None else Constraint("lark", wanted.grammar)


@dataclass
class Output:
    """One choice as it grows; `add` returns what one chunk adds, on the wire."""

    want_logprobs: bool
    stop_ids: tuple[int, ...]  # those the request named itself
    ids: list[int] = field(default_factory=list)
    content: list[dict] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    any_kept: bool = False
    sampled_logprobs: list[float] = field(default_factory=list)
    any_sampled: bool = False
    spans: list[dict] = field(default_factory=list)
    routed: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    cached_tokens: int = 0
    times: Times | None = None

    def add(self, chunk: Chunk) -> dict[str, Any]:
        begin = len(self.ids)
        content = logprobs_content(chunk) if self.want_logprobs else []
        kept = [kept_list(k) for k in chunk.kept] if chunk.kept else [[]] * len(chunk.ids)
        self.ids += chunk.ids
        self.content += content
        self.kept += kept
        self.any_kept |= bool(chunk.kept)
        self.any_sampled |= bool(chunk.sampled_logprobs)
        self.sampled_logprobs += chunk.sampled_logprobs or chunk.logprobs
        if chunk.ids:
            self._span(chunk.weights_version, begin)
        if chunk.finish_reason is not None:
            self._finish(chunk)
        ended = chunk.finish_reason is not None
        span = {"version": str(chunk.weights_version), "start": begin, "end": len(self.ids)}
        return {
            "index": 0,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
            "token_ids": list(chunk.ids),
            "routed_experts": self.routed,
            "sampling_mask": kept if chunk.kept else None,
            "weight_versions": self.spans if ended else [span] if chunk.ids else None,
            "logprobs": {"content": content} if self.want_logprobs else None,
            **({"sampled_logprobs": list(map(_finite, chunk.sampled_logprobs))} if chunk.sampled_logprobs else {}),
        }

    def whole(self) -> dict[str, Any]:
        return {
            "index": 0,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
            "token_ids": self.ids,
            "routed_experts": self.routed,
            "sampling_mask": self.kept if self.any_kept else None,
            "weight_versions": self.spans,
            "logprobs": {"content": self.content} if self.want_logprobs else None,
            **({"sampled_logprobs": list(map(_finite, self.sampled_logprobs))} if self.any_sampled else {}),
        }

    def _span(self, version: int, begin: int) -> None:
        if self.spans and self.spans[-1]["version"] == str(version):
            self.spans[-1]["end"] = len(self.ids)
        else:
            self.spans.append({"version": str(version), "start": begin, "end": len(self.ids)})

    def _finish(self, chunk: Chunk) -> None:
        self.finish_reason, self.cached_tokens, self.times = chunk.finish_reason, chunk.cached_tokens, chunk.times
        if chunk.routed_experts is not None:
            self.routed = npy64(chunk.routed_experts)
        if chunk.finish_reason == "stop":
            last = self.ids[-1] if self.ids else None
            self.stop_reason = chunk.stop if chunk.stop is not None else last if last in self.stop_ids else None


def logprobs_content(chunk: Chunk) -> list[dict[str, Any]]:
    """Per token its log-probability and the likeliest ones: the sampled token first, then the others by rank."""
    out = []
    for i, (token, logprob) in enumerate(zip(chunk.ids, chunk.logprobs, strict=True)):
        top = [_candidate(t, p, rank) for rank, (t, p) in enumerate(chunk.top_logprobs[i], 1)] if chunk.top_logprobs else []
        own = next((c for c in top if c["token_id"] == token), None) or _candidate(token, logprob, None)
        out.append({**own, "top_logprobs": [own, *(c for c in top if c["token_id"] != token)]})
    return out


def _candidate(token: int, logprob: float, rank: int | None) -> dict[str, Any]:
    return {"token_id": token, "logprob": _finite(logprob), "rank": rank}


def _finite(logprob: float) -> float:
    return FLOOR if math.isnan(logprob) else max(logprob, FLOOR)


def kept_list(kept: Kept) -> list[int]:
    """Empty where nothing was cut off: a set that something was cut from is never empty."""
    return [] if kept is None else kept_ids(kept).tolist()


def npy64(array: np.ndarray) -> str:
    """Base64 of the array's .npy form, as vLLM sends `routed_experts`."""
    with io.BytesIO() as buffer:
        np.save(buffer, array, allow_pickle=False)
        return base64.b64encode(buffer.getbuffer()).decode("ascii")


def usage(prompt_tokens: int, output: Output) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": len(output.ids),
        "total_tokens": prompt_tokens + len(output.ids),
        "prompt_tokens_details": {"cached_tokens": output.cached_tokens},
    }


def timed(output: Output) -> dict[str, Any]:
    """The engine's own times, where it tells them, by vLLM's name."""
    return {} if output.times is None else {"metrics": output.times.metrics()}

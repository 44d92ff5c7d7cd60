"""What the headers of an answer say of the limits, in the words of each client: OpenAI's, Anthropic's and Kimi's."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from functools import lru_cache

from tidelock.service.limiter import Gauge, Standing


def limit_headers(standing: Standing, now: float | None = None, anthropic: bool | None = None) -> dict[str, str]:
    """Limit, what remains of it, and when all of it is free again; nothing for what has no limit. `anthropic`: in the words of
    its clients, or of the others'; None: in all of them."""
    headers: dict[str, str] = {}
    if anthropic is not False:
        at_ms = math.ceil((time.time() if now is None else now) * 1000)
        for name, gauge in (("requests", standing.requests), ("tokens", standing.tokens)):
            if gauge is not None:
                headers[f"anthropic-ratelimit-{name}-limit"] = str(gauge.limit)
                headers[f"anthropic-ratelimit-{name}-remaining"] = str(gauge.remaining)
                headers[f"anthropic-ratelimit-{name}-reset"] = _rfc3339(-(-(at_ms + gauge.reset_ms) // 1000))
    if not anthropic:
        for name, gauge in (("requests", standing.requests), ("tokens", standing.tokens)):
            if gauge is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(gauge.limit)
                headers[f"x-ratelimit-remaining-{name}"] = str(gauge.remaining)
                headers[f"x-ratelimit-reset-{name}"] = duration(gauge.reset_ms)
        if (kimi := standing.requests or standing.tokens) is not None:
            headers |= _kimi(kimi)
    return headers


@lru_cache(64)
def _rfc3339(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).isoformat().replace("+00:00", "Z")


def _kimi(gauge: Gauge) -> dict[str, str]:
    """One set without a name: requests where they are limited. Seconds, rounded up."""
    return {
        "x-ratelimit-limit": str(gauge.limit),
        "x-ratelimit-remaining": str(gauge.remaining),
        "x-ratelimit-reset": str(-(-gauge.reset_ms // 1000)),
    }


def duration(ms: int) -> str:
    """As OpenAI writes it: `12ms`, `1.5s`, `6m0s`, `1h0m0s`."""
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, 60_000)
    seconds = f"{rest / 1000:g}s"
    if not minutes:
        return seconds
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{seconds}" if hours else f"{minutes}m{seconds}"

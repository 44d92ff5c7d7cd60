"""Other weights for all upstreams of a pool, or for none."""

from __future__ import annotations

from collections.abc import Sequence

from tidelock.service.upstreams.upstream import Upstream
from tidelock.tokens.policy import PolicyError


async def swap_all(
    upstreams: Sequence[Upstream], checkpoint: str, version: int, before: tuple[str, int] | None
) -> None:
    """One after the other. Raises PolicyError, before anything is touched, if one of them cannot be swapped at all.

    Should one fail after others did it, those go back to `before` (checkpoint, version), what the last swap gave them
    all. Those that cannot, or where nothing is known to go back to, hold weights the pool does not: they get no requests
    until a swap succeeds everywhere. Either way this raises, and what serves are the old weights.
    """
    if fixed := [u.name for u in upstreams if not u.exact]:
        reason = f"the weights behind {', '.join(fixed)} are not ours to change, so no upstream's were"
        raise PolicyError(reason, status=400, kind="invalid_request_error")
    if gone := [u.name for u in upstreams if u.circuit.state == "open"]:
        raise PolicyError(f"{', '.join(gone)} cannot be reached, so no upstream's weights were swapped")
    done: list[Upstream] = []
    for upstream in upstreams:
        try:
            await upstream.policy.swap(checkpoint, version)
        except PolicyError as error:
            held = [u.name for u in done if not await _back(u, before)]
            after = f"{', '.join(held)} held back until a swap succeeds everywhere" if held else "the old weights serve on"
            raise PolicyError(f"{upstream.name} did not take the weights ({error}); {after}", status=error.status,
                              kind=error.kind) from error  # fmt: skip
        upstream.version = version
        done.append(upstream)
    for upstream in upstreams:
        upstream.held_back = False


async def _back(upstream: Upstream, before: tuple[str, int] | None) -> bool:
    upstream.held_back = True
    if before is None:
        return False
    try:
        await upstream.policy.swap(*before)
    except PolicyError:
        return False
    upstream.version, upstream.held_back = before[1], False
    return True

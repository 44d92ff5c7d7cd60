"""Looks at one upstream from time to time: whether one that is out is back, whether one that nobody asks is still there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from tidelock.service.upstreams.upstream import Upstream
from tidelock.tokens.policy import PolicyError

log = logging.getLogger(__name__)

WITHIN_S = 5.0  # a probe that takes longer has failed
AGAIN_S = 1.0  # after a look that went badly the next one is soon
TICK_S = 0.1  # how late an open circuit may be looked at


async def watch(upstream: Upstream, every_s: float, changed: Callable[[], None]) -> None:
    """Until cancelled. `changed` is called when the upstream may take requests again, or none any more."""
    clock = asyncio.get_running_loop().time
    looked, pause_s = float("-inf"), every_s
    while True:
        circuit = upstream.circuit
        if circuit.due() or (circuit.state == "closed" and clock() - max(looked, upstream.heard) >= pause_s):
            looked, before = clock(), circuit.state
            pause_s = every_s if await look(upstream) else min(AGAIN_S, every_s)
            if circuit.state != before:
                log.warning("upstream %s: %s -> %s", upstream.name, before, circuit.state)
                changed()
        await asyncio.sleep(min(TICK_S, every_s))


async def look(upstream: Upstream) -> bool:
    """One probe; whether it went well. Where there is no path to ask for, the pause was proof enough for a trial."""
    circuit = upstream.circuit
    was_open = circuit.state == "open"
    try:
        if upstream.probe:
            await upstream.policy.alive(upstream.probe, WITHIN_S)
    except PolicyError as error:
        upstream.tally.failures["probe"] += 1
        if was_open == (circuit.state == "open"):
            circuit.probe_failed()
        if error.status in (401, 403, 404):  # about our key or the path
            log.warning("upstream %s refuses to be looked at: %s", upstream.name, error)
        return False
    if was_open and circuit.state == "open":
        circuit.half_open()
    if upstream.exact and upstream.probe:
        try:
            async with asyncio.timeout(WITHIN_S):
                version = await upstream.policy.version()
            upstream.version = version if version >= 0 else upstream.version
        except (PolicyError, TimeoutError):
            pass  # vLLM tells it only in its development mode; the chunks say it too
        if not upstream.introduced:
            await _introduce(upstream)
    return True


async def _introduce(upstream: Upstream) -> None:
    """Taken for ours, what vLLM samples under a constraint would be called exact, and it is not."""
    try:
        async with asyncio.timeout(WITHIN_S):
            found = await upstream.policy.mistaken()
    except (PolicyError, TimeoutError):
        return
    upstream.introduced = True
    if found is not None:
        log.warning('upstream %s answers as %s does: say dialect = "%s"', upstream.name, found, found)

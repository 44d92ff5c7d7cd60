"""/metrics of a server with several workers: each worker's own numbers under a `worker` label, whichever of them is asked.

A scrape reaches one worker, which asks the others over sockets in the server's meeting place. One that does not answer is
left out: a gap says more than old numbers, and a worker that was started again counts from 0, as Prometheus expects.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from tidelock.service.member import Member
from tidelock.service.metrics import Metrics

log = logging.getLogger(__name__)

PATIENCE_S = 2.0
SAMPLE = re.compile(rb"([A-Za-z_:][A-Za-z0-9_:]*)(\{)?")


async def scrape(metrics: Metrics, member: Member | None) -> bytes:
    if member is None:
        return metrics.text()
    texts = await asyncio.gather(*(_ask(other, metrics if other == member else None) for other in member.all))
    return merged((number, text) for number, text in enumerate(texts) if text is not None)


@asynccontextmanager
async def telling(metrics: Metrics, member: Member | None) -> AsyncIterator[None]:
    """Tells the other workers our numbers, while the block runs."""
    if member is None:
        yield
        return

    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(metrics.text())
        writer.close()

    server = await asyncio.start_unix_server(tell, str(member.socket))
    try:
        yield
    finally:
        server.close()


async def _ask(member: Member, own: Metrics | None) -> bytes | None:
    if own is not None:
        return own.text()
    try:
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_unix_connection(str(member.socket))
            try:
                return await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        log.warning("worker %d does not tell its metrics: %s", member.number, error)
        return None


def merged(texts: Iterable[tuple[int, bytes]]) -> bytes:
    """Prometheus' text format of several workers as one: every family once, its samples labelled by worker."""
    heads: dict[bytes, list[bytes]] = {}
    samples: dict[bytes, list[bytes]] = {}
    for worker, text in texts:
        family = b""
        for line in text.splitlines():
            if line.startswith(b"# "):
                _, kind, family = line.split(b" ", 3)[:3]
                head = heads.setdefault(family, [])
                if kind not in (known.split(b" ", 2)[1] for known in head):
                    head.append(line)
            elif line:
                samples.setdefault(family, []).append(_labelled(line, worker))
    lines = [line for family, head in heads.items() for line in (*head, *samples.get(family, ()))]
    return b"\n".join(lines) + b"\n"


def _labelled(line: bytes, worker: int) -> bytes:
    name = SAMPLE.match(line)
    label = b'worker="%d"' % worker
    if name[2]:
        return b"%s{%s,%s" % (name[1], label, line[name.end() :])
    return b"%s{%s}%s" % (name[1], label, line[name.end() :])

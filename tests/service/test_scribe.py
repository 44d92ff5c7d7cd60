"""Laws of the scribe: what it says is written is on disk, in few writes, and one bad answer spoils no other."""

from __future__ import annotations

import asyncio

import pytest

from tidelock.service.scribe import Scribe
from tidelock.tokens.message import Message
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer
from tidelock.tokens.trace import Node, Trace, TraceStore


def test_answers_that_end_together_share_writes_and_are_all_on_disk(tmp_path, monkeypatch):
    traces = TraceStore(tmp_path / "trace.jsonl", get_template("xtml", ByteTokenizer()))
    writes = []
    append = traces._journal.append_many
    monkeypatch.setattr(traces._journal, "append_many", lambda records: writes.append(1) or append(records))
    scribe = Scribe(traces)

    async def one(n: int) -> None:
        first = Node.of(None, Message("user", "hi"), [1, 2], scope=f"s{n % 5}")
        parent = "nobody" if n == 7 else first.id
        answer = [first, Node.of(parent, Message("assistant", str(n)), [n], scope=f"s{n % 5}")]
        scribe.put(answer, None, written := asyncio.get_running_loop().create_future(), n)
        assert await written == n
        assert {node.message.content for node in Trace.read(tmp_path / "trace.jsonl").nodes.values()} >= {"hi", str(n)}

    async def main() -> list:
        tasks = [asyncio.create_task(one(n)) for n in range(40)]
        await asyncio.sleep(0)
        tasks[3].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(main())
    failed = {n: type(result) for n, result in enumerate(results) if result is not None}
    assert failed == {3: asyncio.CancelledError, 7: KeyError}
    said = [node.message.content for node in Trace.read(tmp_path / "trace.jsonl").nodes.values()]
    assert sorted(said) == sorted(["hi"] * 5 + [str(n) for n in range(40) if n != 7])
    assert len(writes) < 45

    async def lost() -> None:
        scribe.put([Node.of("nobody", Message("user", "x"), [1], scope="s")], None, written := asyncio.get_running_loop().create_future())
        await written

    with pytest.raises(KeyError):
        asyncio.run(lost())
    scribe.close()
    traces.close()

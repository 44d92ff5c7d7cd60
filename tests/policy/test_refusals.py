"""A server that refuses and then says no more is waited for no longer than one that says nothing."""

import asyncio

import pytest

from tidelock.remote.sse import Endpoint, Patience, RemoteError


def test_a_refusal_without_an_end_is_late():
    async def half_a_refusal(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 1000\r\n\r\nwell, ")
        await reader.read()
        writer.close()

    async def main():
        server = await asyncio.start_server(half_a_refusal, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(RemoteError) as refused:
            async with asyncio.timeout(20):
                async for _ in Endpoint(f"http://127.0.0.1:{port}", "k", patience=Patience(first_s=0.3)).batches("/x", {}, "r"):
                    pass
        server.close()
        return refused.value

    error = asyncio.run(main())
    assert (error.status, error.cause) == (504, "first_token")

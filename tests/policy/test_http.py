"""The client of model servers: one answer however it is cut into packets, and an error for whatever is none."""

import asyncio
import ssl
import subprocess
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidelock.remote.http import MOST_HEAD, Client, NotConnected, Server, header_lines
from tidelock.tokens.errors import UserError

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nTrailer: t\r\n\r\n"
ANSWERS = {
    "chunked": CHUNKED,
    "length": HEAD + b"Content-Length: 11\r\n\r\nhello world",
    "to the end": HEAD + b"\r\nhello world",
    "old": b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\nhello world",
    "early hints": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + CHUNKED,
}
BROKEN = {
    "short": HEAD + b"Content-Length: 12\r\n\r\nhello world",
    "no last chunk": CHUNKED[:-20],
    "bad chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello",
    "nothing": b"",
    "half a head": HEAD,
    "no http": b"220 smtp.example.com ESMTP\r\n",
    "two lengths": HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "switches protocols": b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
    "endless head": HEAD + b"x: " + b"y" * (2 * MOST_HEAD) + b"\r\n\r\n",
}


@asynccontextmanager
async def serving(handler, **options):
    """(server address, connections made so far)."""
    made, writers = [], []

    async def accepted(reader, writer):
        made.append(writer)
        writers.append(writer)
        try:
            await handler(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(accepted, "127.0.0.1", 0, **options)
    try:
        yield Server("127.0.0.1", server.sockets[0].getsockname()[1], "ssl" in options), made
    finally:
        server.close()
        for writer in writers:
            writer.close()


async def asked(reader):
    """(head, body) of one request."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    return head, await reader.readexactly(length)


async def get(client, server, body=b"{}"):
    answer = await client.send(server, server.head("POST", "/x"), body, 5)
    return answer.status, answer.content_type, await answer.read()


def saying(*packets):
    async def handler(reader, writer):
        while True:
            await asked(reader)
            for packet in packets:
                writer.write(packet)
                await writer.drain()
                if len(packets) > 1:
                    await asyncio.sleep(0)
            if b"chunked" not in b"".join(packets).lower() and b"length" not in b"".join(packets).lower():
                return

    return handler


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


@given(name=st.sampled_from(sorted(ANSWERS)), cuts=st.lists(st.integers(0, 300), max_size=12))
def test_an_answer_is_the_same_however_it_is_cut(name, cuts):
    data = ANSWERS[name]
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    packets = [data[a:b] for a, b in zip(places, places[1:], strict=False) if a < b]

    async def main():
        async with serving(saying(*packets)) as (server, made):
            client = Client()
            said = [await get(client, server) for _ in range(2)]
            client.close()
            return said, len(made)

    said, connections = run(main())
    assert said == [(200, "text/event-stream", b"hello world")] * 2
    assert connections == (2 if name in ("to the end", "old") else 1)


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_what_is_no_answer_is_a_connection_error(data):
    async def handler(reader, writer):
        await asked(reader)
        writer.write(data)

    async def main():
        async with serving(handler) as (server, _):
            client = Client()
            with pytest.raises(ConnectionError):
                await get(client, server)
            assert not client._kept

    run(main())


def test_what_comes_unasked_ends_the_connection():
    """An answer to nothing must not become the answer to the next request."""

    async def handler(reader, writer):
        await asked(reader)
        writer.write(ANSWERS["length"])
        await asyncio.sleep(0.05)
        writer.write(ANSWERS["length"].replace(b"hello world", b"HELLO WORLD"))
        await asyncio.sleep(0.05)

    async def main():
        async with serving(handler) as (server, made):
            client = Client()
            first = await get(client, server)
            await asyncio.sleep(0.2)
            second = await get(client, server)
            client.close()
            return first[2], second[2], len(made)

    assert run(main()) == (b"hello world", b"hello world", 2)


def test_a_connection_that_the_server_closed_is_not_used():
    async def handler(reader, writer):
        await asked(reader)
        writer.write(ANSWERS["length"])

    async def main():
        async with serving(handler) as (server, made):
            client = Client()
            for _ in range(3):
                assert (await get(client, server))[2] == b"hello world"
                await asyncio.sleep(0.05)
            return len(made)

    assert run(main()) == 3


def test_idle_connections_are_closed_in_time():
    async def main():
        ended = asyncio.Event()

        async def handler(reader, writer):
            await asked(reader)
            writer.write(ANSWERS["length"])
            await reader.read()
            ended.set()

        async with serving(handler) as (server, _):
            client = Client(keep_s=0.1)
            await get(client, server)
            async with asyncio.timeout(5):
                await ended.wait()
            assert not client._kept and client._timer is None

    run(main())


def test_a_reader_who_goes_takes_the_connection_along():
    async def main():
        gone = asyncio.Event()

        async def handler(reader, writer):
            await asked(reader)
            writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
            await reader.read()
            gone.set()

        async with serving(handler) as (server, _):
            client = Client()
            answer = await client.send(server, server.head("POST", "/x"))
            assert await answer.some() == b"hello"
            waiting = asyncio.create_task(answer.some())
            await asyncio.sleep(0)
            answer.close()
            with pytest.raises(ConnectionError):
                await waiting
            async with asyncio.timeout(5):
                await gone.wait()

            gone.clear()
            sending = asyncio.create_task(client.send(server, server.head("POST", "/x")))
            await asyncio.sleep(0.05)
            sending.cancel()
            answer = await asyncio.gather(sending, return_exceptions=True)
            if not isinstance(answer[0], BaseException):
                answer[0].close()
            async with asyncio.timeout(5):
                await gone.wait()

    run(main())


def test_a_slow_reader_makes_the_server_wait():
    sent = 0

    async def main():
        nonlocal sent

        async def handler(reader, writer):
            nonlocal sent
            await asked(reader)
            writer.write(HEAD + b"Content-Length: 100000000\r\n\r\n")
            while sent < 100_000_000:
                writer.write(b"x" * 100_000)
                await writer.drain()
                sent += 100_000

        async with serving(handler) as (server, _):
            client = Client()
            answer = await client.send(server, server.head("POST", "/x"))
            await asyncio.sleep(0.5)
            waiting = sent
            size = len(await answer.read())
            client.close()
            return waiting, size

    waiting, size = run(main())
    assert waiting < 50_000_000 and size == 100_000_000


def test_where_nobody_listens_nothing_was_sent():
    async def main():
        async with serving(saying()) as (server, _):
            pass
        with pytest.raises(NotConnected):
            await get(Client(), server)
        with pytest.raises(NotConnected):
            await get(Client(), Server("no-such-host.invalid", 80, False))

    run(main())


def test_a_client_outlives_its_event_loop():
    client = Client()

    async def main():
        async with serving(saying(ANSWERS["length"])) as (server, _):
            return await get(client, server)

    assert run(main()) == run(main())


def test_tls_is_checked(tmp_path):
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key,
                    "-out", cert, "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
                   check=True, capture_output=True)  # fmt: skip
    own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    own.load_cert_chain(cert, key)

    async def main():
        async with serving(saying(ANSWERS["chunked"]), ssl=own) as (server, _):
            named = Server("localhost", server.port, True)
            with pytest.raises(NotConnected):  # nobody vouches for it
                await get(Client(), named)
            trusting = ssl.create_default_context(cafile=cert)
            client = Client(tls=trusting)
            said = await get(client, named)
            with pytest.raises(NotConnected):  # it is vouched for, by another name
                await get(client, server)
            client.close()
            return said

    assert run(main())[2] == b"hello world"


@pytest.mark.parametrize(
    "url", ["", "localhost:80", "ftp://x", "http://", "http://u:p@h/v1", "http://h:99999", "http://h:x", "http://[::1"]
)
def test_what_is_no_address_is_told(url):
    with pytest.raises(UserError):
        Server.at(url)


def test_what_is_sent_is_one_request():
    assert Server.at("https://h/a b/v1/").head("GET", "/x?y=1") == b"GET /a%20b/v1/x?y=1 HTTP/1.1\r\nHost: h\r\n"
    assert Server.at("http://[::1]:8/v1").head("GET", "/x") == b"GET /v1/x HTTP/1.1\r\nHost: [::1]:8\r\n"
    assert header_lines({"a": "1", "b": "x"}) == b"a: 1\r\nb: x\r\n"
    with pytest.raises(UserError):
        header_lines({"Authorization": "Bearer k\r\nHost: other"})

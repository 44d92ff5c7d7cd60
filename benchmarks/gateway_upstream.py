"""The gateway benchmark's model server: answers at once and always the same, so that what is measured is what is in front.

`POST /v1/chat/completions` speaks text, whole or streamed, as LiteLLM and a direct client ask; `POST /v1/completions` speaks
token ids with `return_token_ids`, as vLLM does. A bare asyncio protocol, because it shares its core with the load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from pathlib import Path

WORDS = 100  # events of a long answer, streamed as ids
MOST = re.compile(rb'"max_tokens": ?(\d+)')


def _http(body: bytes, kind: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: " + kind + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def answers(ids: list[int], text: str) -> dict[str, bytes]:
    """Whole responses by (route, streamed)."""
    usage = {"prompt_tokens": 20, "completion_tokens": len(ids), "total_tokens": 20 + len(ids)}
    head = {"id": "chatcmpl-1", "created": 1, "model": "tide"}
    whole = {
        **head, "object": "chat.completion", "usage": usage,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
    }  # fmt: skip
    exact = {
        **head, "object": "text_completion", "usage": usage,
        "choices": [{"index": 0, "text": text, "token_ids": ids, "finish_reason": "stop"}],
    }  # fmt: skip

    def chunk(delta: dict, finish: str | None = None) -> dict:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return {**head, "object": "chat.completion.chunk", "choices": [choice]}

    def piece(part: list[int], finish: str | None = None) -> dict:
        choice = {"index": 0, "text": "", "token_ids": part, "finish_reason": finish}
        return {**head, "object": "text_completion", "choices": [choice]}

    def events(items: list[dict]) -> bytes:
        return b"".join(b"data: " + json.dumps(item).encode() + b"\n\n" for item in items) + b"data: [DONE]\n\n"

    said = [chunk({"content": word}) for word in text.split(" ")]
    first, last = chunk({"role": "assistant", "content": ""}), {**chunk({}), "choices": [], "usage": usage}
    share = -(-len(ids) // WORDS)
    sampled = [piece(ids[at : at + share]) for at in range(0, len(ids), share)]
    return {
        "chat": _http(json.dumps(whole).encode(), b"application/json"),
        "chat stream": _http(events([first, *said, chunk({}, "stop"), last]), b"text/event-stream"),
        "ids": _http(json.dumps(exact).encode(), b"application/json"),
        "ids stream": _http(events([*sampled, piece([], "stop")]), b"text/event-stream"),
    }  # fmt: skip


class Protocol(asyncio.Protocol):
    def __init__(self, short: dict[str, bytes], long: dict[str, bytes], words: int) -> None:
        """Whoever may have `words` tokens gets the long answer."""
        self._short, self._long, self._words = short, long, words
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = self._data[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._data) < end + 4 + length:
                return
            body, self._data = self._data[end + 4 : end + 4 + length], self._data[end + 4 + length :]
            route = "chat" if b"/chat/" in head[: head.find(b"\r\n")] else "ids"
            streamed = b'"stream":true' in body or b'"stream": true' in body
            most = MOST.search(body)
            said = self._long if most and int(most[1]) >= self._words else self._short
            self._transport.write(said[f"{route} stream" if streamed else route])


async def serve(args: argparse.Namespace) -> None:
    said = json.loads(args.said.read_text())
    short, long = answers(*said["short"]), answers(*said["long"])
    made = lambda: Protocol(short, long, len(said["long"][0]))  # noqa: E731
    server = await asyncio.get_running_loop().create_server(made, "127.0.0.1", args.port)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--said", type=Path, required=True, help='JSON {"short": [ids, text], "long": [ids, text]}')
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()

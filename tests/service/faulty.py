"""A model server over real HTTP that speaks ids and text, and fails as it is told to; it writes down what it really sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from aiohttp import web

from tidelock.tokens.message import Message
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer

TEMPLATE = get_template("xtml", ByteTokenizer())
# before the first event; and after some tokens
EARLY = ("refuse", "500", "401", "404", "full", "html", "json", "hang up", "silent", "abort at once", "error first")
LATE = ("cut", "stall", "malformed", "no end", "error later", "odd ids")


@dataclass
class Sent:
    """What one request got. ids: of the tokens route; text: of the chat route."""

    name: str
    kind: str
    at: float
    body: dict
    ids: list[int] = field(default_factory=list)
    text: str = ""
    ended: bool = False
    tenant_left: bool = False


@dataclass
class Faulty:
    """`fault(n, request body)`: what happens to the n-th request; "" = nothing bad."""

    fault: Callable[[int, dict], str] = lambda n, body: ""
    words: Callable[[int], int] = lambda n: 12
    pause_s: float = 0.0
    after: int = 40  # tokens or letters, before a late fault
    gate: asyncio.Event | None = None  # waited for after the event that begins with the token `gate_at`
    gate_at: int = 0
    version: int = 7
    retry_after: str | None = None
    usage: bool = True
    cached: Callable[[dict], int] = lambda body: 3
    sent: list[Sent] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    swaps: list[tuple[str, int]] = field(default_factory=list)
    refuses_swaps: bool = False
    running: int = 0
    most: int = 0  # at the same time
    port: int = 0
    healthy: bool = True
    is_vllm: bool = False
    _runner: web.AppRunner | None = None
    _pending: str = ""

    async def start(self) -> Faulty:
        app = web.Application()
        app.router.add_post("/inference/v1/generate", self._tokens)
        app.router.add_post("/inference/v1/abort_requests", self._abort)
        app.router.add_post("/v1/chat/completions", self._chat)
        for path in ("/health", "/v1/models"):
            app.router.add_get(path, self._health)
        app.router.add_get("/weight_info", self._info)
        if self.is_vllm:
            app.router.add_get("/version", self._version)
        app.router.add_post("/start_weight_update", self._update)
        app.router.add_post("/update_weights", self._update)
        app.router.add_post("/finish_weight_update", self._finish)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        if self._runner is not None:
            runner, self._runner = self._runner, None
            for server in list(runner.server.connections) if runner.server else []:
                if server.transport is not None:
                    server.transport.abort()
            await runner.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # ---- the routes ---------------------------------------------------------------------------------------------

    async def _tokens(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        ids, n = self._answer(body), body["sampling_params"]["max_tokens"]
        finish, ids = ("length" if n < len(ids) else "stop"), ids[:n]

        def event(part, end, start):
            content = [{"token_id": i, "logprob": -0.5, "top_logprobs": []} for i in part]
            spans = [{"version": str(self.version), "start": 0 if end else start, "end": start + len(part)}]
            return {"request_id": body["request_id"], "choices": [{
                "index": 0, "token_ids": part, "finish_reason": finish if end else None, "logprobs": {"content": content},
                "weight_versions": spans}]}  # fmt: skip

        sent = Sent(body["request_id"], "tokens", _now(), body)
        return await self._stream(request, sent, ids, event, len(body["token_ids"]))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        text = self._text()[: body["max_tokens"]]
        finish = "length" if len(text) == body["max_tokens"] else "stop"

        def event(part, end, start):
            choice = {"index": 0, "delta": {"content": part}, "finish_reason": finish if end else None}
            return {"id": "c", "choices": [choice]}

        assert body["stream_options"] == {"include_usage": True}
        return await self._stream(request, Sent("", "chat", _now(), body), text, event, 11)

    async def _stream(self, request, sent: Sent, whole, event, prompt: int) -> web.StreamResponse:
        n, fault = len(self.sent), self.fault(len(self.sent), sent.body)
        self.sent.append(sent)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if (early := await self._early(request, fault)) is not None:
                return early
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            if fault == "abort at once":
                await self._say(response, {"choices": [{"index": 0, "token_ids": [], "finish_reason": "abort", "delta": {},
                                                        "logprobs": {"content": []}}]})  # fmt: skip
                return response
            if fault == "error first":
                await self._say(response, {"error": {"message": "no", "code": 500}})
                return response
            for start in range(0, len(whole), 10):
                if fault in LATE and start >= self.after:
                    return await self._late(request, response, fault)
                part, end = whole[start : start + 10], start + 10 >= len(whole)
                if sent.kind == "tokens":
                    sent.ids += part
                else:
                    sent.text += part
                await self._say(response, event(part, end, start))
                if self.gate is not None and start == self.gate_at:
                    await self.gate.wait()
                await asyncio.sleep(self.pause_s)
            if self.usage:
                usage = {"prompt_tokens": prompt, "completion_tokens": len(whole),
                         "prompt_tokens_details": {"cached_tokens": self.cached(sent.body)}}  # fmt: skip
                await self._say(response, {"choices": [], "usage": usage})
            await response.write(b"data: [DONE]\n\n")
            sent.ended = True
            return response
        except (ConnectionError, asyncio.CancelledError):
            sent.tenant_left = True
            raise
        finally:
            self.running -= 1
            assert n < len(self.sent)

    async def _early(self, request, fault: str) -> web.StreamResponse | None:
        headers = {"retry-after": self.retry_after} if self.retry_after else {}
        error = {"error": {"message": f"secret words of the upstream: {fault}", "type": "x"}}
        statuses = {"refuse": 503, "500": 500, "401": 401, "404": 404, "full": 429, "yours": 400}
        if fault in statuses:
            return web.json_response(error, status=statuses[fault], headers=headers)
        if fault == "yours, in HTML":
            return web.Response(text="<html>secret words", status=400)
        if fault == "html":
            return web.Response(text="<html>hello", content_type="text/html")
        if fault == "json":
            return web.json_response({"choices": []})
        if fault == "hang up":
            request.transport.abort()
            return web.Response()
        if fault == "silent":
            await asyncio.sleep(30)
        return None

    async def _late(self, request, response, fault: str) -> web.StreamResponse:
        if fault == "cut":
            request.transport.abort()
        if fault == "stall":
            await asyncio.sleep(30)
        if fault == "malformed":
            await response.write(b'data: {"choices": [\n\n')
        if fault == "odd ids":
            await self._say(response, {"choices": [{"index": 0, "token_ids": ["x"], "delta": {"content": 7}}]})
        if fault == "error later":
            await self._say(response, {"error": {"message": "no", "code": 500}})
        return response

    async def _say(self, response, event: dict) -> None:
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _text(self) -> str:
        return "word " * self.words(len(self.sent))

    def _answer(self, body: dict) -> list[int]:
        return TEMPLATE.sampled(Message("assistant", self._text()))

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"}, status=200 if self.healthy else 503)

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": str(self.version)})

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborted += (await request.json())["request_ids"]
        return web.json_response({"aborted": 0})

    async def _update(self, request: web.Request) -> web.Response:
        info = (await request.text()) and (await request.json()).get("update_info")
        self._pending = info["checkpoint"] if info else ""
        return web.json_response({})

    async def _finish(self, request: web.Request) -> web.Response:
        if self.refuses_swaps:
            return web.json_response({"error": {"message": "no such checkpoint", "type": "x"}}, status=400)
        self.version = int((await request.json())["weight_version"])
        self.swaps.append((self._pending, self.version))
        return web.json_response({})


def _now() -> float:
    return asyncio.get_running_loop().time()


@contextlib.asynccontextmanager
async def upstreams(*servers: Faulty) -> AsyncIterator[tuple[Faulty, ...]]:
    for server in servers:
        await server.start()
    try:
        yield servers
    finally:
        for server in servers:
            if server.gate is not None:
                server.gate.set()
            await server.stop()

"""The money torture's model server: streams scripted token ids as vLLM does, and fails in every way upstreams fail.

It writes down how many tokens of each request it really sent, so that bills can be compared with them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from pathlib import Path

from aiohttp import web

from tidelock.tokens.message import Message
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer

# what happens to a request, and how often of a hundred
FAULTS = {"none": 66, "cut after 40": 8, "cut after 60": 8, "stall": 3, "malformed": 8, "refuse": 5, "huge": 2}
PER_LINE = 10


async def generate(request: web.Request) -> web.StreamResponse:
    asked = await request.json()
    rng, app = random.Random(f"{asked['request_id']} at {request.match_info['name']}"), request.app
    fault = rng.choices(list(FAULTS), list(FAULTS.values()))[0] if app["faults"] else "none"
    if fault == "refuse":
        return web.json_response({"error": "full"}, status=503)
    words = "word " * (rng.randint(2000, 4000) if fault == "huge" else rng.randint(4, 60))
    ids = app["template"].sampled(Message("assistant", words))
    most = asked["sampling_params"]["max_tokens"]
    ids, ended = ids[:most], "stop" if len(ids) <= most else "length"
    stop_at = {"cut after 40": 40, "cut after 60": 60, "malformed": 50}.get(fault, len(ids))
    response = web.StreamResponse()
    await response.prepare(request)
    sent = 0
    try:
        while sent < len(ids):
            if sent >= stop_at:
                if fault == "malformed":
                    await response.write(b'data: {"choices": [\n\n')
                if request.transport is not None:
                    request.transport.close()
                return response
            if fault == "stall" and sent >= 30:
                fault = "none"
                await asyncio.sleep(app["stall_s"])
            part = ids[sent : sent + PER_LINE]
            sent += len(part)  # counted before the write: what may have arrived may be charged
            await response.write(event(part, ended if sent == len(ids) else None))
            await asyncio.sleep(app["pause_s"])
        usage = {"prompt_tokens": len(asked["token_ids"]), "completion_tokens": sent}
        await response.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())
        return response
    except ConnectionError:  # the server hung up, or was killed
        return response
    finally:
        app["log"].write(f"{asked['request_id']} {sent}\n")
        app["log"].flush()


def event(ids: list[int], finish: str | None) -> bytes:
    content = [{"token_id": i, "logprob": -0.5, "top_logprobs": []} for i in ids]
    versions = [{"version": "1", "start": 0, "end": 1_000_000}]  # of every token, whichever part says it
    choice = {"index": 0, "token_ids": list(ids), "finish_reason": finish, "logprobs": {"content": content},
              "weight_versions": versions}  # fmt: skip
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


async def health(request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def weights(request: web.Request) -> web.Response:
    return web.json_response({"weight_version": "1"})


async def aborted(request: web.Request) -> web.Response:
    """It stops when the server hangs up, and says it knows of nothing."""
    return web.json_response({"aborted": 0})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--stall", type=float, default=3.0)
    parser.add_argument("--pause", type=float, default=0.01)
    parser.add_argument("--no-faults", action="store_true")
    args = parser.parse_args()
    app = web.Application()
    app["template"] = get_template("xtml", ByteTokenizer())
    app["log"], app["stall_s"], app["pause_s"] = open(args.log, "a"), args.stall, args.pause
    app["faults"] = not args.no_faults
    app.router.add_post("/{name}/inference/v1/generate", generate)
    app.router.add_post("/{name}/inference/v1/abort_requests", aborted)
    app.router.add_get("/{name}/health", health)
    app.router.add_get("/{name}/weight_info", weights)
    web.run_app(app, host="127.0.0.1", port=args.port, print=None, access_log=None)


if __name__ == "__main__":
    main()

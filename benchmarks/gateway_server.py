"""The gateway benchmark's server: the real service with everything on, in front of a policy that costs as little as it can.

`--upstream URL` puts the service's own pool in front of a server that speaks chat completions; with `--by-hand` a plain
request for token ids takes the pool's place. Without an upstream the answer is canned in the process, which bounds from
above what any upstream allows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import msgspec

from tidelock.sandbox.level import die_with_parent
from tidelock.service import server
from tidelock.service.fleet import Fleet
from tidelock.service.member import Member
from tidelock.service.prices import Price, PriceBook
from tidelock.service.state import open_state
from tidelock.service.upstreams import read_upstreams
from tidelock.service.upstreams.pool import Pool
from tidelock.tokens.policy import Chunk, PolicyError
from tidelock.tokens.template import Template, get_template
from tidelock.tokens.tokenizer import ByteTokenizer, load_tokenizer

BOOK = PriceBook("bench", {"tide": Price(input_nano=300, cached_input_nano=30, output_nano=1500)})


class Canned:
    """Always the same answer: a long one to those that may have one, a token at a time."""

    exact = True

    def __init__(self, said: dict) -> None:
        self._short, self._long = tuple(said["short"][0]), tuple(said["long"][0])

    async def generate(self, prompt_ids, params, request_id=None) -> AsyncIterator[Chunk]:
        if params.max_tokens < len(self._long):
            yield Chunk(self._short, (-0.5,) * len(self._short), 1, "stop")
            return
        for n, token in enumerate(self._long):
            yield Chunk((token,), (-0.5,), 1, "stop" if n + 1 == len(self._long) else None)

    async def count(self, prompt_ids) -> int:
        return len(prompt_ids)

    async def abort(self, request_id) -> None:
        pass


class _Choice(msgspec.Struct):
    token_ids: list[int]
    finish_reason: str | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]


class Hop(Canned):
    """The same over HTTP, by hand: ids go out, ids come back, streamed where the answer may be long."""

    def __init__(self, said: dict, url: str) -> None:
        super().__init__(said)
        self._url, self._session = f"{url}/v1/completions", None
        self._decode = msgspec.json.Decoder(_Completion).decode

    async def generate(self, prompt_ids, params, request_id=None) -> AsyncIterator[Chunk]:
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), skip_auto_headers=("User-Agent",))
        stream = params.max_tokens >= len(self._long)
        asked = {"model": "tide", "prompt": prompt_ids, "max_tokens": params.max_tokens, "return_token_ids": True,
                 "stream": stream}  # fmt: skip
        try:
            async with self._session.post(self._url, data=msgspec.json.encode(asked)) as response:
                if response.status != 200:
                    raise PolicyError("the upstream refused", status=503)
                if not stream:
                    choice = self._decode(await response.read()).choices[0]
                    yield Chunk(tuple(choice.token_ids), (-0.5,) * len(choice.token_ids), 1, choice.finish_reason)
                    return
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        choice = self._decode(line[6:]).choices[0]
                        yield Chunk(tuple(choice.token_ids), (-0.5,) * len(choice.token_ids), 1, choice.finish_reason)
        except aiohttp.ClientError as error:
            raise PolicyError(f"the upstream broke off: {type(error).__name__}", status=502) from None


def pool(args: argparse.Namespace, template: Template) -> Pool:
    file = args.dir / "upstreams.toml"
    file.write_text(f'[[upstream]]\nname = "local"\nurl = "{args.upstream}/v1"\nkind = "chat"\nmodel = "tide"\n'
                    'max_in_flight = 1000\nprobe = ""\n')  # fmt: skip
    return read_upstreams(file, template).pool


async def run(args: argparse.Namespace) -> None:
    template = get_template("xtml", load_tokenizer(args.tokenizer) if args.tokenizer else ByteTokenizer())
    said = json.loads(args.said.read_text())
    policy = Canned(said)
    if args.upstream:
        policy = Hop(said, args.upstream) if args.by_hand else pool(args, template)
    state = open_state(
        args.dir, policy=policy, template=template, prices=BOOK, model="tide", context_length=131_072, weights_version=1,
        database=args.database, member=args.member,
    )  # fmt: skip
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    ready = args.member.ready_file if args.member else args.dir / "ready"
    async with server.serving(state, port=args.port, ready_file=ready):
        await stop.wait()


def fleet(args: argparse.Namespace) -> None:
    def argv(member: Member, port: int) -> list[str]:
        own = ["--port", str(port), "--member", str(member), "--parent", str(os.getpid())]
        return [sys.executable, __file__, *sys.argv[1:], *own]

    Fleet(argv, args.workers).run("127.0.0.1", args.port, args.dir / "ready", lambda url: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="a directory; without one, ids are bytes")
    parser.add_argument("--said", type=Path, required=True, help='JSON {"short": [ids, text], "long": [ids, text]}')
    parser.add_argument("--database", help="a postgresql:// URL; without one SQLite in --dir")
    parser.add_argument("--upstream", metavar="URL")
    parser.add_argument("--by-hand", action="store_true", help="ask it with one plain request, not through the pool")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--member", type=Member.parse, help="set by the process that has the workers")
    parser.add_argument("--parent", type=int, help="likewise; end with it")
    parser.add_argument("--profile", type=Path, help="write cProfile's statistics of the event loop's thread here")
    args = parser.parse_args()
    if args.parent:
        die_with_parent()
        if os.getppid() != args.parent:
            raise SystemExit("the process that started this one is gone")
    if args.workers > 1 and args.member is None:
        fleet(args)
        return
    if args.profile is None:
        server.run(run(args))
        return
    import cProfile

    profile = cProfile.Profile()
    profile.runcall(server.run, run(args))
    profile.dump_stats(args.profile)


if __name__ == "__main__":
    main()

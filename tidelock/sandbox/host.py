"""The trusted side: starts the confined worker, passes calls to it, and survives its death."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from .level import import_path
from .toolset import SandboxError

LINE_LIMIT = 32 << 20


class ToolCrash(Exception):
    """The worker died or did not answer in time. Nobody's answer is wrong because of it."""


@dataclass(frozen=True)
class ToolResult:
    content: str
    ok: bool


class ToolHost:
    """One confined worker serving many sessions, each with a world of its own. Start it with `ToolHost.start`."""

    def __init__(self, toolset: str, workspace: str, timeout_s: float) -> None:
        self.toolset, self.workspace, self.timeout_s = toolset, workspace, timeout_s
        self.level = "none"
        self._ids = itertools.count()
        self._pending: dict[int, asyncio.Future] = {}
        self._sessions: set[str] = set()
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task | None = None
        self._starting = asyncio.Lock()

    @staticmethod
    async def start(
        toolset: str, *, require_level: str | None = None, workspace: str | None = None, timeout_s: float = 30.0
    ) -> ToolHost:
        """`toolset` is "module:attribute". `require_level` is a prefix the level must have ("landlock"), or a refusal."""
        host = ToolHost(toolset, workspace or tempfile.mkdtemp(prefix="tidelock-tools-"), timeout_s)
        await host._launch()
        if require_level is not None and not host.level.startswith(require_level):
            await host.stop()
            raise SandboxError(f"sandbox level {require_level!r} was required, this machine gives {host.level!r}")
        return host

    async def open(self, session: str, world: dict[str, Any]) -> None:
        """Begin a session. Raises ToolCrash."""
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                await self._launch()
        await self._ask("open", session, world=world)
        self._sessions.add(session)

    async def call(self, session: str, name: str, arguments: dict[str, Any]) -> ToolResult:
        """Run a tool. A wrong call is a result with ok=False; a dead or silent worker raises ToolCrash."""
        if session not in self._sessions:
            raise ToolCrash(f"the worker of session {session} is gone")
        reply = await self._ask("call", session, name=name, arguments=arguments)
        return ToolResult(reply["content"], reply["ok"])

    async def close(self, session: str) -> dict[str, Any]:
        """End a session; returns its final world ({} when the worker died meanwhile)."""
        if session not in self._sessions:
            return {}
        self._sessions.discard(session)
        return (await self._ask("close", session))["world"] or {}

    async def stop(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        if self._reader is not None:
            await self._reader

    async def _launch(self) -> None:
        env = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": import_path(), "HOME": self.workspace, "LANG": "C.UTF-8"}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tidelock.sandbox.worker", self.toolset, self.workspace,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=LINE_LIMIT, env=env, cwd=self.workspace,
        )  # fmt: skip
        hello = await self._process.stdout.readline()
        if not hello:
            raise SandboxError(f"the tool worker for {self.toolset} did not start; see its error above")
        self.level = json.loads(hello)["level"]
        self._reader = asyncio.create_task(self._read(self._process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        while line := await process.stdout.readline():
            reply = json.loads(line)
            future = self._pending.pop(reply["id"], None)
            if future is not None and not future.done():
                future.set_result(reply)
        self._sessions.clear()
        for future in self._pending.values():
            if not future.done():
                future.set_exception(ToolCrash("the tool worker died"))
        self._pending.clear()
        await process.wait()

    async def _ask(self, op: str, session: str, **rest: Any) -> dict[str, Any]:
        process = self._process
        if process is None or process.returncode is not None:
            raise ToolCrash("the tool worker is not running")
        number = next(self._ids)
        future = self._pending[number] = asyncio.get_running_loop().create_future()
        process.stdin.write(json.dumps({"id": number, "op": op, "session": session, **rest}).encode() + b"\n")
        try:
            return await asyncio.wait_for(future, self.timeout_s)
        except TimeoutError:
            self._pending.pop(number, None)
            process.kill()  # one stuck call blocks every session of this worker
            raise ToolCrash(f"the tool did not answer within {self.timeout_s:g} s") from None

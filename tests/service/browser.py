"""A headless Chromium, driven through its own DevTools protocol: what a page shows, what it logs, what its policy blocked."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def binary() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._waiting, self._count = socket, {}, 0
        self.problems: list[str] = []  # console errors, uncaught exceptions, what a policy blocked
        self.requests: list[str] = []
        self.answers: dict[
            str, tuple[int, Any]
        ] = {}  # by a path's end: (status, JSON) instead of the server's, once `replacing`
        self._tasks: list[asyncio.Task] = []
        self._reader = asyncio.create_task(self._read())

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        future = self._waiting[self._count] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._count, "method": method, "params": params})
        return await asyncio.wait_for(future, 20)

    async def _read(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                future = self._waiting.pop(said["id"])
                if "error" in said:
                    future.set_exception(RuntimeError(said["error"]["message"]))
                else:
                    future.set_result(said["result"])
            else:
                self._hear(said["method"], said["params"])

    def _hear(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(" ".join(str(a.get("value") or a.get("description")) for a in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Audits.issueAdded" and "NavigationEntryMarkedSkippable" not in str(
            params
        ):  # nobody clicked: a script did
            self.problems.append(json.dumps(params["issue"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Fetch.requestPaused":
            self._tasks.append(asyncio.create_task(self._answer(params)))
        elif method == "Page.javascriptDialogOpening":
            self.problems.append(f"a dialog: {params['message']}")

    async def replacing(self, answers: dict[str, tuple[int, Any]]) -> None:
        """Answers some requests itself: for what this server does not have, or not yet."""
        self.answers = answers
        await self.call("Fetch.enable", patterns=[{"urlPattern": f"*{end}"} for end in answers])

    async def _answer(self, params: dict[str, Any]) -> None:
        url = params["request"]["url"]
        status, body = next(answer for end, answer in self.answers.items() if url.endswith(end))
        data = base64.b64encode(json.dumps(body).encode()).decode()
        headers = [{"name": "content-type", "value": "application/json"}]
        await self.call(
            "Fetch.fulfillRequest", requestId=params["requestId"], responseCode=status, body=data, responseHeaders=headers
        )

    async def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        answer = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", str(answer)))
        return answer["result"].get("value")

    async def until(self, script: str, patience_s: float = 10.0) -> Any:
        """The first truthy value of an expression."""
        deadline = asyncio.get_running_loop().time() + patience_s
        while True:
            try:
                value = await self.run(script)
            except RuntimeError:  # the page is being replaced
                value = None
            if value:
                return value
            if asyncio.get_running_loop().time() > deadline:
                raise AssertionError(
                    f"{script} did not come true; the page says: {await self.run('document.body.innerText')}"
                )
            await asyncio.sleep(0.03)

    async def go(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def size(self, width: int, height: int, dark: bool = False) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[feature])

    async def picture(self, path: str | Path) -> None:
        data = (await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True))["data"]
        Path(path).write_bytes(base64.b64decode(data))


@asynccontextmanager
async def browser():
    """Yields a new Page; its profile is thrown away. The page must not be used from another event loop."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [
                binary(),
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--mute-audio",
                "--disable-extensions",
                "--disable-background-networking",
                "--disable-component-update",
                "--hide-scrollbars",
                "--remote-debugging-port=0",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port = await _port(Path(profile) / "DevToolsActivePort", process)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    target = next(t for t in await answer.json() if t["type"] == "page")
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    page = Page(socket)
                    for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
                        await page.call(f"{domain}.enable")
                    yield page
        finally:
            process.terminate()
            process.wait(10)


async def _port(file: Path, process: subprocess.Popen) -> int:
    for _ in range(600):
        if file.exists() and (lines := file.read_text().split()):
            return int(lines[0])
        if process.poll() is not None:
            raise RuntimeError(f"Chromium ended with {process.returncode}")
        await asyncio.sleep(0.05)
    raise RuntimeError("Chromium did not start within 30 s")

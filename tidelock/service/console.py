"""Serves the browser's console (`tidelock/web/console`): plain files, read once, under a policy that lets a page run no
script and reach no host but ours. What it shows it asks of the API, with the key of whoever sits there."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

import tidelock

DIRECTORY = Path(tidelock.__file__).parent / "web" / "console"
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8",
         ".svg": "image/svg+xml"}  # fmt: skip
HEADERS = {
    # no inline script or style, no string that becomes markup (trusted types), no frame around us, nothing from elsewhere
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-cache",  # kept, and asked about each time: a new version is seen at once
    "vary": "accept-encoding",
}


@dataclass(frozen=True)
class File:
    body: bytes
    packed: bytes
    etag: str
    media_type: str


def load(directory: Path = DIRECTORY) -> dict[str, File]:
    """By path below the directory. Read before a request comes, so no request can name a file of anybody else's."""
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.suffix in TYPES:
            body = path.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            name = path.relative_to(directory).as_posix()
            files[name] = File(body, gzip.compress(body, 6, mtime=0), etag, TYPES[path.suffix])
    return files


def routes() -> list[Route]:
    files = load()

    def serve(request: Request) -> Response:
        file = files.get(request.path_params.get("path", "index.html"))
        if file is None:
            return Response("there is no such page", 404, HEADERS, "text/plain")
        headers = {**HEADERS, "etag": file.etag}
        if file.etag in [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]:
            return Response(status_code=304, headers=headers)
        packs = "gzip" in request.headers.get("accept-encoding", "")
        body = file.packed if packs else file.body
        return Response(body, 200, {**headers, **({"content-encoding": "gzip"} if packs else {})}, file.media_type)

    def home(request: Request) -> Response:
        return RedirectResponse("/console/")

    table = {"/console": home, "/console/": serve, "/console/{path:path}": serve}
    return [Route(path, answer, methods=["GET"]) for path, answer in table.items()]

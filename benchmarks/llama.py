"""llama.cpp's server as a child process, for the benchmarks that have it as their peer.

It is built from the `llama-cpp-python` source package, outside this repository:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B llama -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF
    cmake --build llama --target llama-server && export TIDELOCK_LLAMA=$PWD/llama
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def find_server(directory: str | None = None) -> Path | None:
    """`llama-server` in a build directory (by default `$TIDELOCK_LLAMA`), else on the PATH."""
    directory = directory or os.environ.get("TIDELOCK_LLAMA")
    for place in ([Path(directory), Path(directory) / "bin"] if directory else []):
        if (place / "llama-server").exists():
            return place / "llama-server"
    found = shutil.which("llama-server")
    return Path(found) if found else None


PLAIN = ("-ctk", "f32", "-ctv", "f32", "-fa", "off")  # fp32 cache, no flash attention: as exact as it gets


@contextmanager
def llama_server(
    binary: Path, gguf: Path, *, threads: int = 1, slots: int = 1, context: int = 2048, options: tuple[str, ...] = ()
) -> Iterator[str]:
    """The base URL of a server over `gguf` with `slots` slots of `context` tokens each, otherwise as it comes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    argv = [str(binary), "-m", str(gguf), "--host", "127.0.0.1", "--port", str(port), "-t", str(threads), "-tb", str(threads),
            "-np", str(slots), "-c", str(context * slots), "--no-webui", *options]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            _wait(process, url, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen, url: str, log) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    log.seek(0)
    raise RuntimeError("llama-server did not start:\n" + "".join(log.readlines()[-8:]))


def complete(url: str, prompt: list[int], tokens: int) -> list[int]:
    """Greedy ids after `prompt`; an id that ends generation is not among them."""
    body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "return_tokens": True, "cache_prompt": False}
    request = urllib.request.Request(f"{url}/completion", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["tokens"]


def logprobs(url: str, ids: list[int], top: int) -> dict[int, float]:
    """Log-probabilities of the `top` likeliest ids after `ids`; none when the likeliest ends the generation."""
    body = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": top, "cache_prompt": False}
    request = urllib.request.Request(f"{url}/completion", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        said = json.load(answer).get("completion_probabilities", [])
        return {t["id"]: t["logprob"] for first in said[:1] for t in first["top_logprobs"]}

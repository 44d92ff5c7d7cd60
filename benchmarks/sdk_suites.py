"""The official clients' own API tests, run against our server; prints which of them pass.

    python -m benchmarks.sdk_suites --python VENV/bin/python --openai CHECKOUT --anthropic CHECKOUT

The checkouts are openai/openai-python and anthropics/anthropic-sdk-python; VENV has their test dependencies and the
checkouts themselves (pip install -e). The server is `benchmarks.conformance`, lenient: the suites send every parameter
there is, of any value. Those of their files are run that concern something this service has; what fails is listed by
name, with the first line of why. Exits with 1 if a file passes less than it should (`NOT_OURS` says what may fail).
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ORGANIZATION = "admin/organization"
OPENAI = (
    "chat", "test_responses.py", "responses", "test_models.py", "test_files.py", "test_batches.py",
    *(f"{ORGANIZATION}/test_{name}.py" for name in ("usage", "spend_limit", "projects", "users", "audit_logs")),
    f"{ORGANIZATION}/projects/test_api_keys.py",
)  # fmt: skip
ANTHROPIC = (
    "test_messages.py", "test_models.py", "messages",
    "beta/test_messages.py", "beta/messages", "beta/test_models.py", "beta/test_files.py",
)  # fmt: skip
# (file, method): why it may fail
NOT_OURS = {
    ("test_models.py", "delete"): "a customer owns no model here that it could delete: 403",
    ("test_users.py", "update_with_all_params"): "the suite makes a member a 'role', which is no role here: 400",
}


def serve(port: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.conformance", "--port", str(port), "--lenient"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    if "serving" not in process.stdout.readline():
        raise SystemExit("the server did not start")
    return process


def run(python: Path, checkout: Path, files: tuple[str, ...], url: str) -> list[ElementTree.Element]:
    """The test cases, as JUnit tells of them."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        tests = [f"tests/api_resources/{name}" for name in files if (checkout / "tests/api_resources" / name).exists()]
        command = [python.absolute(), "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        env = {**os.environ, "TEST_API_BASE_URL": url}
        subprocess.run(command, cwd=checkout, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return list(ElementTree.parse(report).iter("testcase"))


def table(suite: str, cases: list[ElementTree.Element]) -> int:
    """Prints it; returns how many failures are not accounted for."""
    counts: dict[str, Counter[str]] = {}
    failures: dict[tuple[str, str], tuple[int, str]] = {}
    unexplained = 0
    for case in cases:
        place = case.get("classname", "").split("tests.api_resources.")[-1].split(".")
        file = "/".join(place[:-1]) + ".py" if place[-1][:1].isupper() else "/".join(place) + ".py"
        method = re.sub(r"^test_(?:method|raw_response|streaming_response|path_params)?_?|\[.*\]$", "", case.get("name", ""))
        problem = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        outcome = "failed" if problem is not None else "skipped" if case.find("skipped") is not None else "passed"
        counts.setdefault(file, Counter())[outcome] += 1
        if problem is not None:
            reason = NOT_OURS.get((file.rpartition("/")[2], method))
            unexplained += reason is None
            n, _ = failures.get((file, method), (0, ""))
            failures[file, method] = n + 1, reason or (problem.get("message") or "").splitlines()[0][:160]
    print(f"{suite:<62} {'passed':>7} {'failed':>7} {'skipped':>8}")
    for file, seen in sorted(counts.items()):
        print(f"  {file:<60} {seen['passed']:>7} {seen['failed']:>7} {seen['skipped']:>8}")
    for (file, method), (n, reason) in sorted(failures.items()):
        print(f"    {n:>3} x {file.rpartition('/')[2]}: {method}: {reason}")
    total = sum(counts.values(), Counter())
    print(f"  {'in all':<60} {total['passed']:>7} {total['failed']:>7} {total['skipped']:>8}", flush=True)
    return unexplained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    parser.add_argument("--openai", type=Path)
    parser.add_argument("--anthropic", type=Path)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server, began, unexplained = serve(port), time.monotonic(), 0
    url = f"http://127.0.0.1:{port}"
    try:
        if args.openai:
            unexplained += table("openai-python", run(args.python, args.openai, OPENAI, f"{url}/v1"))
        if args.anthropic:
            unexplained += table("anthropic-sdk-python", run(args.python, args.anthropic, ANTHROPIC, url))
    finally:
        server.terminate()
        server.wait()
    print(f"{time.monotonic() - began:.0f} s; {unexplained} failures not accounted for")
    sys.exit(bool(unexplained))


if __name__ == "__main__":
    main()

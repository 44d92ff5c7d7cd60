"""The official clients' own API tests, run against our server; prints which of them pass.

    python -m benchmarks.sdk_suites --python VENV/bin/python --openai CHECKOUT --anthropic CHECKOUT
    python -m benchmarks.sdk_suites --node BIN/node --openai-node CHECKOUT --anthropic-node CHECKOUT

The checkouts are openai/openai-python and anthropics/anthropic-sdk-python, openai/openai-node and
anthropics/anthropic-sdk-typescript. VENV has the Python ones' test dependencies and the checkouts themselves (pip install
-e); in each of the others `npm install --ignore-scripts` was run, and node is 22 or newer. The server is
`benchmarks.conformance`, lenient: the suites send every parameter there is, of any value. Those of their files are run
that concern something this service has; what fails is listed by name, with the first line of why. Exits with 1 if a
file passes less than it should (`NOT_OURS` says what may fail).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ORGANIZATION = "admin/organization"
OPENAI = (
    "chat", "test_responses.py", "responses", "test_conversations.py", "conversations", "test_models.py", "test_files.py", "test_batches.py",
    *(f"{ORGANIZATION}/test_{name}.py" for name in ("usage", "spend_limit", "projects", "users", "audit_logs")),
    f"{ORGANIZATION}/projects/test_api_keys.py",
)  # fmt: skip
ANTHROPIC = (
    "test_messages.py", "test_models.py", "messages",
    "beta/test_messages.py", "beta/messages", "beta/test_models.py", "beta/test_files.py",
)  # fmt: skip
OPENAI_NODE = (
    "responses", "conversations", "chat", "models", "files", "batches",
    *(f"{ORGANIZATION}/{name}.test" for name in ("usage", "spend-limit", "audit-logs")), f"{ORGANIZATION}/users/users",
    *(f"{ORGANIZATION}/projects/{name}.test" for name in ("projects", "api-keys")),
)  # fmt: skip
ANTHROPIC_NODE = ("messages/", "models", "files", "beta/messages/", "beta/models", "beta/files")
# (file, method): why it may fail
NOT_OURS = {
    ("models.test.ts", "models › delete"): "a customer owns no model here that it could delete: 403",
    ("test_models.py", "delete"): "a customer owns no model here that it could delete: 403",
    ("test_users.py", "update_with_all_params"): "the suite makes a member a 'role', which is no role here: 400",
}


@dataclass(frozen=True)
class Case:
    file: str
    method: str
    outcome: str  # "passed" | "failed" | "skipped"
    why: str = ""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def served(*options: str) -> Iterator[str]:
    """The root URL of a `benchmarks.conformance` with these options, while the block runs."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.conformance", "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    if "serving" not in process.stdout.readline():
        raise SystemExit("the server did not start")
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def run_python(python: Path, checkout: Path, files: tuple[str, ...], url: str) -> list[Case]:
    tests = [f"tests/api_resources/{name}" for name in files if (checkout / "tests/api_resources" / name).exists()]
    return pytest_cases(python, checkout, ["-n0", *tests], {"TEST_API_BASE_URL": url})


def pytest_cases(python: Path, directory: Path, words: list[str], env: dict[str, str]) -> list[Case]:
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [python.absolute(), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *words]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(command, cwd=directory, env={**os.environ, **env}, **quiet)
        return [_case(case) for case in ElementTree.parse(report).iter("testcase")]


def _case(case: ElementTree.Element) -> Case:
    """From what JUnit tells of it."""
    place = re.split(r"tests\.(?:api_resources\.)?", case.get("classname", ""))[-1].split(".")
    file = "/".join(place[:-1]) + ".py" if place[-1][:1].isupper() else "/".join(place) + ".py"
    method = re.sub(r"^test_(?:method|raw_response|streaming_response|path_params)?_?|\[.*\]$", "", case.get("name", ""))
    problem = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
    if problem is not None:
        return Case(file, method, "failed", _line(problem.get("message") or ""))
    return Case(file, method, "skipped" if case.find("skipped") is not None else "passed")


def run_node(node: Path, checkout: Path, files: tuple[str, ...], url: str) -> list[Case]:
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        tests = [f"tests/api-resources/{name}" for name in files]
        command = [node.absolute(), "node_modules/.bin/jest", "--runInBand", "--json", f"--outputFile={report}", *tests]
        env = {**os.environ, "TEST_API_BASE_URL": url, "OPENAI_TEST_SUITE": "generated"}
        subprocess.run(command, cwd=checkout, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        suites = json.loads(report.read_text())["testResults"]
    cases = []
    for suite in suites:
        file = suite["name"].split("tests/api-resources/")[-1]
        if not suite["assertionResults"]:  # it could not even be read
            cases.append(Case(file, "-", "failed", _line(suite["message"])))
        for test in suite["assertionResults"]:
            method = " › ".join([*(t.removeprefix("resource ") for t in test["ancestorTitles"]), test["title"]])
            outcome = test["status"] if test["status"] in ("passed", "failed") else "skipped"
            cases.append(Case(file, method, outcome, _line("".join(test["failureMessages"]))))
    return cases


def _line(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", (text.strip().splitlines() or [""])[0])[:160]


def table(suite: str, cases: list[Case], accepted: Mapping[tuple[str, str], str] | None = None) -> int:
    """Prints it; returns how many failures are not accounted for. `accepted`: as `NOT_OURS`."""
    accepted = NOT_OURS if accepted is None else accepted
    counts: dict[str, Counter[str]] = {}
    failures: Counter[tuple[str, str, str]] = Counter()
    unexplained = 0
    for case in cases:
        counts.setdefault(case.file, Counter())[case.outcome] += 1
        if case.outcome == "failed":
            reason = accepted.get((case.file.rpartition("/")[2], case.method))
            unexplained += reason is None
            failures[case.file, case.method, reason or case.why] += 1
    print(f"{suite:<62} {'passed':>7} {'failed':>7} {'skipped':>8}")
    for file, seen in sorted(counts.items()):
        print(f"  {file:<60} {seen['passed']:>7} {seen['failed']:>7} {seen['skipped']:>8}")
    for (file, method, reason), n in sorted(failures.items()):
        print(f"    {n:>3} x {file.rpartition('/')[2]}: {method}: {reason}")
    total = sum(counts.values(), Counter())
    print(f"  {'in all':<60} {total['passed']:>7} {total['failed']:>7} {total['skipped']:>8}", flush=True)
    return unexplained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    parser.add_argument("--openai", type=Path)
    parser.add_argument("--anthropic", type=Path)
    parser.add_argument("--node", type=Path, default=Path(shutil.which("node") or "node"))
    parser.add_argument("--openai-node", type=Path)
    parser.add_argument("--anthropic-node", type=Path)
    args = parser.parse_args()
    began, unexplained = time.monotonic(), 0
    with served("--lenient") as url:
        if args.openai:
            unexplained += table("openai-python", run_python(args.python, args.openai, OPENAI, f"{url}/v1"))
        if args.anthropic:
            unexplained += table("anthropic-sdk-python", run_python(args.python, args.anthropic, ANTHROPIC, url))
        if args.openai_node:
            unexplained += table("openai-node", run_node(args.node, args.openai_node, OPENAI_NODE, f"{url}/v1"))
        if args.anthropic_node:
            unexplained += table("anthropic-sdk-typescript", run_node(args.node, args.anthropic_node, ANTHROPIC_NODE, url))
    print(f"{time.monotonic() - began:.0f} s; {unexplained} failures not accounted for")
    sys.exit(bool(unexplained))


if __name__ == "__main__":
    main()

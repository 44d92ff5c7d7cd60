"""Public conformance suites, run against our server; prints which of their cases pass.

    python -m benchmarks.public_suites --python VENV/bin/python --kimi CHECKOUT --langchain
    python -m benchmarks.public_suites --bun BIN/bun --open-responses CHECKOUT --llmprobe BIN/llmprobe

--kimi: MoonshotAI/Kimi-Vendor-Verifier, those of its suites that need no data of their own and no trained model.
--langchain: LangChain's standard tests (`langchain_cases`). VENV has openai, httpx, jsonschema, pytest,
pytest-rerunfailures, pytest-asyncio, langchain-tests, langchain-openai and langchain-anthropic.
--open-responses: the compliance runner of openresponses/openresponses, whose checkout has zod (`npm install zod@3`).
--llmprobe: the command of that name from npm (0.6.12); of what it finds, its MUST assertions count.
--llm-comply: the command of that name from PyPI (0.5.0), for chat, Responses and Messages.
--compatcanary: the command of that name from npm (0.2.2).

The server is `benchmarks.conformance --able`: Kimi's rules for Kimi's suite, lenient for the rest. Exits with 1 if
a case fails that `ACCEPTED` gives no reason for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.sdk_suites import Case, pytest_cases, served, table
from tidelock.loop.rundir import MODEL

KEY = "sk-test"
KIMI = ("tests/params", "tests/k3_features", "tests/tool_call_json_schema")
ONE_LOOP = [f"asyncio_default_{what}_loop_scope=session" for what in ("fixture", "test")]  # LangChain keeps its HTTP clients
_APART = "it holds the tokens read from the cache against input_tokens, which in that API are all the others"
_SUMMARY = "it knows no event response.reasoning_summary_text.delta, which is in the document that it carries"
_TOKENS = "the exact count of K3's tokenizer and, with a format, of K3's words for it: the model here has others"
# (file, method): why it may fail
ACCEPTED = {
    ("test_response_format.py", "response_format_prompt_tokens_without"): _TOKENS,
    ("test_response_format.py", "response_format_with"): _TOKENS,
    ("llmprobe", "messages-prompt-caching: messages-cache-bound"): _APART,
    ("llmprobe", "messages-prompt-cache-prefix: messages-cache-prefix-bound"): _APART,
    ("llm-comply open-responses", "streaming-response"): _SUMMARY,
    ("llm-comply open-responses", "streaming-usage"): _SUMMARY,
}  # fmt: skip


def kimi(python: Path, checkout: Path, url: str) -> list[Case]:
    with tempfile.TemporaryDirectory() as scratch:
        env = {"KIMI_BASE_URL": f"{url}/v1", "KIMI_API_KEY": KEY, "TOOL_JSON_REPORT": f"{scratch}/report.json"}
        words = ["--smoke-model", MODEL, "--think-mode", "kimi", *KIMI]
        return pytest_cases(python, checkout, words, env)


def langchain(python: Path, url: str) -> list[Case]:
    file = Path(__file__).with_name("langchain_cases.py")
    words = ["-o", "asyncio_mode=auto", *(word for option in ONE_LOOP for word in ("-o", option)), str(file)]
    return pytest_cases(python, file.parent, words, {"TIDELOCK_URL": url})


def open_responses(bun: Path, checkout: Path, url: str) -> list[Case]:
    words = ["--base-url", f"{url}/v1", "--api-key", KEY, "--model", MODEL, "--json"]
    command = [bun.absolute(), "run", "bin/compliance-test.ts", *words]
    told = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    results = json.loads(told.stdout)["results"]
    return [Case("compliance-tests.ts", r["id"], r["status"], "; ".join(r.get("errors") or ())[:160]) for r in results]


def llmprobe(command: Path, url: str) -> list[Case]:
    words = [f"{url}/v1", "-k", KEY, "-m", MODEL, "--full", "--no-bench", "--no-save", "--json"]
    told = subprocess.run([command.absolute(), *words], capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    cases = []
    for result in json.loads(told.stdout)["conformance"]["results"]:
        missed = [failure for failure in result["failures"] if failure["severity"] == "MUST"]
        outcome = "failed" if missed else "passed" if result["outcome"] == "pass" else "skipped"
        method = ": ".join([result["id"], *(failure["id"] for failure in missed)])
        cases.append(Case("llmprobe", method, outcome, "; ".join(failure["message"] for failure in missed)))
    return cases


def llm_comply(command: Path, url: str) -> list[Case]:
    cases = []
    for form in ("openai-chat", "open-responses", "anthropic"):
        words = ["--format", form, "-u", f"{url}/v1", "-k", KEY, "-m", MODEL, "--json"]
        told = subprocess.run([command.absolute(), *words], capture_output=True, text=True)
        for result in json.loads(told.stdout)["results"]:
            why = "; ".join(result.get("errors") or ())[:160]
            cases.append(Case(f"llm-comply {form}", result["id"], result["status"], why))
    return cases


def compatcanary(command: Path, url: str) -> list[Case]:
    words = ["scan", "--base-url", f"{url}/v1", "--model", MODEL, "--api-key", KEY, "--format", "json"]
    told = subprocess.run([command.absolute(), *words], capture_output=True, text=True)
    outcomes = {"pass": "passed", "fail": "failed"}
    results = json.loads(told.stdout)["results"]
    return [Case("compatcanary", r["id"], outcomes.get(r["status"], "skipped"), r["summary"]) for r in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    parser.add_argument("--kimi", type=Path)
    parser.add_argument("--langchain", action="store_true")
    parser.add_argument("--bun", type=Path, default=Path("bun"))
    parser.add_argument("--open-responses", type=Path)
    parser.add_argument("--llmprobe", type=Path)
    parser.add_argument("--llm-comply", type=Path)
    parser.add_argument("--compatcanary", type=Path)
    args = parser.parse_args()
    runs: list[tuple[str, bool, Callable[[str], list[Case]]]] = []  # (name, lenient, how)
    if args.kimi:
        runs.append(("Kimi-Vendor-Verifier", False, lambda url: kimi(args.python, args.kimi, url)))
    if args.open_responses:
        runs.append(("OpenResponses", True, lambda url: open_responses(args.bun, args.open_responses, url)))
    if args.llmprobe:
        runs.append(("llmprobe", True, lambda url: llmprobe(args.llmprobe, url)))
    if args.llm_comply:
        runs.append(("llm-comply", True, lambda url: llm_comply(args.llm_comply, url)))
    if args.compatcanary:
        runs += [("compatcanary", lenient, lambda url: compatcanary(args.compatcanary, url)) for lenient in (False, True)]
    if args.langchain:
        runs.append(("LangChain's standard tests", True, lambda url: langchain(args.python, url)))
    unexplained = 0
    for name, lenient, run in runs:
        with served("--able", *(["--lenient"] if lenient else [])) as url:
            unexplained += table(name, run(url), ACCEPTED)
    print(f"{unexplained} failures not accounted for")
    sys.exit(bool(unexplained))


if __name__ == "__main__":
    main()

"""Coding agents from npm against our server: each does a small repair in a repository, and runs out of money on the way.

    python -m benchmarks.npm_agents                        # all of them, three cases each
    python -m benchmarks.npm_agents --only codex --case cut --show

Installed into a prefix outside the repository (`--prefix`, kept from run to run). The model is `agent_script`; all
else is real: the agents' own tool loops, the surfaces, the template, the ledger. Three cases: the money suffices; it
ends in the middle of an answer (cut); it does not cover a prompt (refused). Of each it is checked that the task is done
or the agent says why not, that nobody keeps asking once the money is gone, that every charge in the ledger is what the
client was told on the wire (a proxy between the two remembers), and that the ledger sums to zero. Exits with 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.agent_script import MENDED, AgentScript, lay_out, task
from benchmarks.recording_proxy import Exchange, recording
from tidelock.loop.rundir import MODEL, PRICES
from tidelock.service.server import serving
from tidelock.service.state import ServiceState, open_state
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer

CONTEXT, ANSWER, PATIENCE_S = 1 << 20, 4096, 150
NODE = ("node@22.23.3", (22, 19))  # for a machine whose own node is older than Kimi Code takes; Qwen Code fails under 26
ENOUGH = 10**12
CASES = ("whole", "cut", "refused")
ALLOWED_AFTER = 2  # an agent may ask something on the side once more; a storm is what follows from trying again
# Pi tries whatever has 429 in its text three times more, and calls itself what every user of OpenAI's client does.
ALLOWED_OF = {"pi": 3}


@dataclass(frozen=True)
class Place:
    """What an agent is started with."""

    prefix: Path
    home: Path
    repository: Path
    url: str  # of the proxy, no trailing slash
    key: str

    def binary(self, name: str) -> str:
        return str(self.prefix / "node_modules/.bin" / name)


def codex(at: Place) -> tuple[list[str], dict[str, str]]:
    provider = f'{{name="tidelock", base_url="{at.url}/v1", env_key="TIDE_KEY", wire_api="responses"}}'
    words = ["exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "-C", str(at.repository)]
    settings = ["-c", "model_provider=tidelock", "-c", f"model_providers.tidelock={provider}", "-m", MODEL]
    return [at.binary("codex"), *words, *settings, task(at.repository)], {"TIDE_KEY": at.key}


def opencode(at: Place) -> tuple[list[str], dict[str, str]]:
    model = {MODEL: {"name": MODEL, "limit": {"context": CONTEXT, "output": ANSWER}}}
    options = {"baseURL": f"{at.url}/v1", "apiKey": at.key}
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "tidelock", "options": options, "models": model}
    config = at.home / "opencode.json"
    config.write_text(json.dumps({"provider": {"tidelock": provider}}))
    words = ["run", "--auto", "--print-logs", "--log-level", "ERROR", "-m", f"tidelock/{MODEL}", "--dir", str(at.repository)]
    off = {f"OPENCODE_DISABLE_{what}": "1" for what in ("AUTOUPDATE", "MODELS_FETCH", "LSP_DOWNLOAD")}
    return [at.binary("opencode"), *words, task(at.repository)], {"OPENCODE_CONFIG": str(config), **off}


def claude(at: Place) -> tuple[list[str], dict[str, str]]:
    env = {
        "ANTHROPIC_BASE_URL": f"{at.url}/anthropic", "ANTHROPIC_AUTH_TOKEN": at.key, "ANTHROPIC_MODEL": MODEL,
        "ANTHROPIC_SMALL_FAST_MODEL": MODEL, "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "IS_SANDBOX": "1",
    }  # fmt: skip
    return [at.binary("claude"), "-p", "--dangerously-skip-permissions", task(at.repository)], env


def kimi(at: Place) -> tuple[list[str], dict[str, str]]:
    directory = at.home / "kimi"
    directory.mkdir()
    (directory / "config.toml").write_text(
        f'default_model = "tide"\n\n[providers.tide]\ntype = "kimi"\nbase_url = "{at.url}/v1"\napi_key = "{at.key}"\n\n'
        f'[models.tide]\nprovider = "tide"\nmodel = "{MODEL}"\nmax_context_size = {CONTEXT}\n'
    )
    return [at.binary("kimi"), "-p", task(at.repository)], {"KIMI_CODE_HOME": str(directory), "KIMI_CODE_NO_AUTO_UPDATE": "1"}


def qwen(at: Place) -> tuple[list[str], dict[str, str]]:
    words = ["--yolo", "--auth-type", "openai", "--openai-api-key", at.key, "--openai-base-url", f"{at.url}/v1", "-m", MODEL]
    return [at.binary("qwen"), *words, task(at.repository)], {"QWEN_TELEMETRY_ENABLED": "0"}


def pi(at: Place) -> tuple[list[str], dict[str, str]]:
    directory = at.home / "pi"
    directory.mkdir()
    model = {"id": MODEL, "name": MODEL, "reasoning": True, "contextWindow": CONTEXT, "maxTokens": ANSWER, "input": ["text"],
             "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0}}  # fmt: skip
    provider = {"baseUrl": f"{at.url}/v1", "api": "openai-completions", "apiKey": at.key, "models": [model]}
    (directory / "models.json").write_text(json.dumps({"providers": {"tidelock": provider}}))
    words = ["-p", "--provider", "tidelock", "--model", MODEL, "--no-session", "--offline"]
    return [at.binary("pi"), *words, task(at.repository)], {"PI_CODING_AGENT_DIR": str(directory), "PI_OFFLINE": "1"}


def continue_(at: Place) -> tuple[list[str], dict[str, str]]:
    config = at.home / "config.yaml"
    config.write_text(
        f"name: tidelock\nversion: 1.0.0\nschema: v1\nmodels:\n  - name: {MODEL}\n    provider: openai\n    model: {MODEL}\n"
        f"    apiBase: {at.url}/v1\n    apiKey: {at.key}\n    roles: [chat]\n    capabilities: [tool_use]\n"
    )
    words = ["-p", "--auto", "--config", str(config), task(at.repository)]
    return [at.binary("cn"), *words], {"CONTINUE_TELEMETRY_ENABLED": "0", "CONTINUE_CLI_ENABLE_TELEMETRY": "0"}


AGENTS = {
    "codex": ("@openai/codex@0.169.0", codex), "opencode": ("opencode-ai@1.18.33", opencode),
    "qwen": ("@qwen-code/qwen-code@0.15.10", qwen), "pi": ("@mariozechner/pi-coding-agent@0.73.1", pi),
    "continue": ("@continuedev/cli@1.5.47", continue_),
    "claude": ("@anthropic-ai/claude-code@2.1.197", claude), "kimi": ("@moonshot-ai/kimi-code@2.1.0", kimi),
}  # fmt: skip


@dataclass
class Result:
    agent: str
    case: str
    requests: int
    after: int  # requests that began after the first refusal
    said: str  # the agent's words for what happened
    faults: list[str] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list, repr=False)


def install(prefix: Path, agents: list[str]) -> None:
    wanted = [AGENTS[agent][0] for agent in agents]
    text = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout
    if tuple(int(part) for part in re.findall(r"\d+", text)[:2]) < NODE[1]:
        wanted.append(NODE[0])
    present = {d.name for d in (prefix / "wanted").glob("*")} if (prefix / "wanted").is_dir() else set()
    missing = [package for package in wanted if package.replace("/", "+") not in present]
    if missing:
        prefix.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--prefix", prefix, *missing], check=True)
        (prefix / "wanted").mkdir(exist_ok=True)
        for package in missing:
            (prefix / "wanted" / package.replace("/", "+")).touch()


async def run_case(agent: str, case: str, prefix: Path, balance: int) -> Result:
    template = get_template("xtml", ByteTokenizer())
    with tempfile.TemporaryDirectory(prefix="agents") as scratch:
        root = Path(scratch)
        state = open_state(
            root / "service", policy=AgentScript(template), template=template, prices=PRICES, model=MODEL,
            context_length=CONTEXT, weights_version=1, default_max_tokens=ANSWER,
        )  # fmt: skip
        _, key = state.keys.create("ann", profile="lenient")
        state.ledger.topup("ann", balance)
        async with serving(state) as running, recording(running.base_url.removesuffix("/v1")) as (url, seen):
            repository, home = root / "repository", root / "home"
            lay_out(repository)
            home.mkdir()
            command, env = AGENTS[agent][1](Place(prefix, home, repository, url, key))
            code, text = await _started(command, env, home, repository, prefix)
        result = _judged(agent, case, seen, text, (repository / "calc.py").read_text(), code)
        result.faults += _books(state, seen, balance)
        state.traces.close()
        state.ledger.db.close()
    return result


async def _started(command: list[str], env: dict[str, str], home: Path, cwd: Path, prefix: Path) -> tuple[int, str]:
    """(exit code, what it printed)."""
    path = f"{prefix / 'node_modules/node/bin'}{os.pathsep}{os.environ['PATH']}"
    env = {"PATH": path, "HOME": str(home), "LANG": "C.UTF-8", "NO_COLOR": "1", **env}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, env=env, cwd=cwd, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=asyncio.subprocess.STDOUT
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    except TimeoutError:
        process.kill()
        out, _ = await process.communicate()
        return -1, out.decode() + f"\n(killed after {PATIENCE_S} s)"
    return process.returncode or 0, re.sub(r"\x1b\[[0-9;]*m", "", out.decode())


def _judged(agent: str, case: str, seen: list[Exchange], text: str, calc: str, code: int) -> Result:
    asked = [e for e in seen if e.method == "POST"]
    refused = [e for e in asked if e.failure]
    after = sum(1 for e in asked if refused and e.began > refused[0].ended)
    wanted = "mended calc.py" if case == "whole" else "balance|quota"  # Codex has words of its own for it
    lines = [line.strip() for line in text.splitlines() if re.search(wanted, line.lower())]
    result = Result(agent, case, len(asked), after, lines[-1] if lines else "", exchanges=asked)
    if code < 0:
        result.faults.append("it did not end by itself")
    if not lines:
        result.faults.append(f"it does not say {wanted!r}: …{text.strip()[-400:]}")
    if case == "whole":
        if MENDED not in calc:
            result.faults.append("calc.py is not mended")
        if refused:
            result.faults.append(f"the server refused: {refused[0].failure}")
    elif not refused:
        result.faults.append("the money did not run out")
    else:
        kind = refused[0].failure.get("type")
        if (refused[0].status == 200) != (case == "cut"):
            result.faults.append(f"the money ran out elsewhere than meant: status {refused[0].status}")
        if kind not in ("exceeded_current_quota_error", "rate_limit_error", "billing_error"):
            result.faults.append(f"the refusal is called {kind}")
        if after > ALLOWED_OF.get(agent, ALLOWED_AFTER):
            result.faults.append(f"{after} requests after the money was gone")
    return result


def _books(state: ServiceState, seen: list[Exchange], balance: int) -> list[str]:
    """Is what was charged what the client was told, request by request, and does everything sum?"""
    charged = dict(state.ledger.db.read("SELECT request_id, nano_usd FROM usage"))
    told = {e.request_id: e.usage["cost_nano_usd"] for e in seen if e.usage and "cost_nano_usd" in e.usage}
    faults = [f"{name}: charged {charged.get(name)}, told {told.get(name)}" for name in sorted(charged.keys() | told.keys())
              if charged.get(name) != told.get(name)]  # fmt: skip
    if sum(charged.values()) != balance - state.ledger.balance("ann"):
        faults.append(f"{sum(charged.values())} charged of {balance}, {state.ledger.balance('ann')} left")
    if not state.ledger.audit().sound:
        faults.append("the ledger is not sound")
    return faults


def _just_short(whole: Result, case: str) -> int:
    """A balance that ends in the last but one answer of the run that had enough: in its middle, or in its prompt."""
    price = PRICES.price(MODEL)
    paid = [e.usage for e in whole.exchanges if e.usage and "cost_nano_usd" in e.usage]
    before, last = paid[:-2], paid[-2]
    said = last.get("completion_tokens", last.get("output_tokens"))
    prompt = last["cost_nano_usd"] - said * price.output_nano
    short = prompt + said // 2 * price.output_nano if case == "cut" else prompt // 2
    return sum(used["cost_nano_usd"] for used in before) + short


async def measure(agents: list[str], cases: list[str], prefix: Path, show: bool) -> list[Result]:
    results = []
    print(f"{'agent':<36} {'case':<8} {'requests':>8} {'after':>5}  {'verdict':<7} it says")
    for agent in agents:
        whole = await run_case(agent, "whole", prefix, ENOUGH)
        runs = [whole] if "whole" in cases else []
        for case in (case for case in CASES[1:] if case in cases and not whole.faults):
            runs.append(await run_case(agent, case, prefix, _just_short(whole, case)))
        for run in runs or [whole]:
            verdict = "FAIL" if run.faults else "ok"
            print(f"{AGENTS[agent][0]:<36} {run.case:<8} {run.requests:>8} {run.after:>5}  {verdict:<7} {run.said[:150]}", flush=True)
            for fault in run.faults:
                print(f"    {fault}")
            for e in run.exchanges if show else ():
                print(f"    {e.path} {e.status} {len(e.body)} bytes, {e.failure or (e.usage or {}).get('cost_nano_usd')}")
        results += runs or [whole]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=Path, default=Path(tempfile.gettempdir()) / "tidelock-npm-agents")
    parser.add_argument("--only", choices=AGENTS, action="append")
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--show", action="store_true", help="every request, too")
    args = parser.parse_args()
    if shutil.which("npm") is None:
        sys.exit("npm is needed to install the agents")
    agents = args.only or list(AGENTS)
    install(args.prefix, agents)
    results = asyncio.run(measure(agents, args.case or list(CASES), args.prefix, args.show))
    sys.exit(any(result.faults for result in results))


if __name__ == "__main__":
    main()

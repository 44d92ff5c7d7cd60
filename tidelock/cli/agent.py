"""`tidelock agent`: one task in the terminal, against any OpenAI-compatible endpoint, or one that takes token ids."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from pathlib import Path

from .main import command


def add(subparsers) -> None:
    p = command(subparsers, "agent", run, "give the agent one task and watch it work",
                'tidelock agent "What is 12 * 7?" --base-url http://127.0.0.1:8000/v1 --api-key sk-... --tools calculator\n'
                '  tidelock agent "What is 12 * 7?" --base-url http://127.0.0.1:8000 --tokenizer demo-run/tokenizer')  # fmt: skip
    p.add_argument("task", help="what to do")
    p.add_argument("--base-url", default=os.environ.get("OPENAI_BASE_URL"), help="default: $OPENAI_BASE_URL")
    p.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: $OPENAI_API_KEY")
    p.add_argument("--model", default="tide-nano")
    p.add_argument("--tokenizer", type=Path, metavar="DIR", help="speak token ids (Tidelock's or vLLM's /inference/v1/generate; an "
                   "admin's key) in this tokenizer's, instead of text: exact ids and log-probabilities")  # fmt: skip
    p.add_argument("--template", default="xtml", help="the model's chat format, where token ids are spoken (default xtml)")
    p.add_argument("--tools", default="calculator,files,shell", help="comma-separated: calculator, files, shell, or none")
    p.add_argument("--workspace", type=Path, help="the only directory tools may write to (default: a new empty one)")
    p.add_argument("--system", help="system prompt (default: the one the demo's model was trained with)")
    p.add_argument("--max-turns", type=int, default=12)
    p.add_argument("--max-tokens", type=int, default=160, help="per turn")
    p.add_argument("--temperature", type=float, default=0.0)


def run(args) -> dict:
    from tidelock.agent.tools import GROUPS
    from tidelock.tokens.errors import UserError

    if not args.base_url:
        raise UserError("no endpoint: give --base-url or set OPENAI_BASE_URL")
    if not args.api_key:
        raise UserError("no API key: give --api-key or set OPENAI_API_KEY")
    groups = [] if args.tools == "none" else args.tools.split(",")
    unknown = [g for g in groups if g not in GROUPS]
    if unknown:
        raise UserError(f"unknown tools {', '.join(unknown)}; choose from {', '.join(GROUPS)}, or none")
    if args.workspace is not None and not args.workspace.is_dir():
        raise UserError(f"workspace {args.workspace} is not a directory")
    episode, usage = asyncio.run(work(args, [t for g in groups for t in GROUPS[g]]))
    if episode.stop_reason == "policy_error":
        raise UserError(episode.error)
    print(f"\n[{episode.stop_reason} · {episode.turns} turns · {episode.tool_calls} tool calls · sandbox {episode.sandbox}"
          f" · last usage {json.dumps(usage)}]")  # fmt: skip
    return {"answer": episode.answer, "stop_reason": episode.stop_reason, "turns": episode.turns, "usage": usage,
            "sandbox": episode.sandbox, "failed": episode.stop_reason != "answered"}  # fmt: skip


async def work(args, tools):
    from tidelock.agent import Agent
    from tidelock.agent.tools import TOOLSET_NAME
    from tidelock.remote import TextPolicy, TokenPolicy
    from tidelock.sandbox import ToolHost
    from tidelock.tokens.message import Message
    from tidelock.tokens.policy import SamplingParams
    from tidelock.tokens.template import get_template
    from tidelock.tokens.tokenizer import ByteTokenizer, load_tokenizer

    workspace = str((args.workspace or Path(tempfile.mkdtemp(prefix="tidelock-workspace-"))).resolve())
    exact = args.tokenizer is not None
    template = get_template(args.template, load_tokenizer(args.tokenizer) if exact else ByteTokenizer())
    host = await ToolHost.start(TOOLSET_NAME, workspace=workspace)
    if exact:
        policy = TokenPolicy(args.base_url, args.api_key, args.model)
    else:
        metadata = {"sandbox_level": host.level, "session_id": os.urandom(8).hex()}
        policy = TextPolicy(args.base_url, args.api_key, args.model, template, metadata)
    params = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature)
    agent = Agent(policy, template, params, args.max_turns)
    system = Message("system", args.system or "You are Tide, an agent. Use tools.", tools=tuple(tools))
    session = "terminal"
    await host.open(session, {})
    try:
        episode = await agent.run(
            system, args.task, lambda name, arguments: host.call(session, name, arguments),
            sandbox_level=host.level, on_event=show,
        )  # fmt: skip
    finally:
        await host.stop()
    return episode, policy.last.get("usage", {})


def show(kind: str, what) -> None:
    """What happens, as it happens."""
    if kind == "delta" and what.kind in ("reasoning", "content"):
        print(what.text, end="", flush=True)
    elif kind == "call":
        print(f"\n-> {what.name}({json.dumps(what.arguments, ensure_ascii=False)})", flush=True)
    elif kind == "result":
        _, result = what
        print(f"<- {result.content}", flush=True)

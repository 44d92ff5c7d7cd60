"""The agent loop: sample a turn, run the tools it asked for, append the results, go round.

The conversation is one growing list of ids. Nothing in it is ever rendered twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from tidelock.sandbox import ToolCrash, ToolResult
from tidelock.tokens.message import Message, ToolCall
from tidelock.tokens.policy import Policy, PolicyError, SamplingParams
from tidelock.tokens.template import Template, count_calls, declared_tools

from .episode import Episode

CallTool = Callable[[str, dict], Awaitable[ToolResult]]
OnEvent = Callable[[str, object], None]  # ("delta", Delta) | ("call", ToolCall) | ("result", (ToolCall, ToolResult))


def turn_seed(seed: int | None, turn: int) -> int | None:
    if seed is None:
        return None
    return int.from_bytes(hashlib.blake2b(f"{seed}/{turn}".encode(), digest_size=7).digest(), "big")


@dataclass(frozen=True)
class Agent:
    """`params` are the sampling parameters of every turn; the template's stop ids are added to them."""

    policy: Policy
    template: Template
    params: SamplingParams = SamplingParams()
    max_turns: int = 8

    async def run(
        self,
        system: Message | None,
        user: str,
        call_tool: CallTool,
        *,
        sandbox_level: str = "none",
        seed: int | None = None,
        on_event: OnEvent = lambda kind, what: None,
    ) -> Episode:
        """One task from first message to last answer. Never raises for what a model, a tool or a provider does."""
        episode = Episode(exact=self.policy.exact, sandbox=sandbox_level)
        opening = [*([system] if system else []), Message("user", user)]
        await self._say(episode, opening)
        for turn in range(self.max_turns):
            reason = await self._turn(episode, turn_seed(seed, turn), on_event)
            if reason is None:
                reason = await self._use_tools(episode, call_tool, on_event)
            if reason is not None:
                episode.stop_reason = reason
                return episode
        episode.stop_reason = "max_turns"
        return episode

    async def _say(self, episode: Episode, messages: Sequence[Message]) -> None:
        episode.append_input(self.template.extend(episode.ids, episode.messages, messages))
        episode.messages += messages

    async def _turn(self, episode: Episode, seed: int | None, on_event: OnEvent) -> str | None:
        """Sample one assistant message. Returns a stop reason when it could not be completed."""
        episode.append_input(self.template.extend(episode.ids, episode.messages, [], generation_prompt=True))
        parser = self.template.parser(count_calls(episode.messages), declared_tools(episode.messages))
        params = replace(self.params, stop_ids=self.template.stop_ids, seed=seed)
        finish = None
        try:
            async for chunk in self.policy.generate(episode.ids, params):
                episode.append_sampled(chunk)
                for delta in parser.feed(chunk.ids, chunk.stop):
                    on_event("delta", delta)
                if chunk.finish_reason is not None:
                    finish = chunk.finish_reason
                    episode.cached_tokens += chunk.cached_tokens
        except PolicyError as e:
            episode.error = str(e)
            return "policy_error"
        message = parser.finish()
        episode.messages.append(message)
        episode.turns += 1
        if finish == "abort":
            return "aborted"
        if finish == "length":
            return "length"
        return None

    async def _use_tools(self, episode: Episode, call_tool: CallTool, on_event: OnEvent) -> str | None:
        """Run the calls of the last message in order. Returns a stop reason when there were none or one crashed."""
        calls = episode.messages[-1].tool_calls
        if not calls:
            return "answered"
        for call in calls:
            on_event("call", call)
            try:
                result = await call_tool(call.name, call.arguments)
            except ToolCrash as e:
                episode.error = str(e)
                return "tool_crash"
            on_event("result", (call, result))
            episode.tool_calls += 1
            await self._say(episode, [tool_message(call, result)])
        return None


def tool_message(call: ToolCall, result: ToolResult) -> Message:
    return Message("tool", result.content, tool_call_id=call.id, name=call.name)

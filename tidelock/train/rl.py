"""Reinforcement learning: episodes gathered by the agent that serves users, trained with the K2.5 / K3 objective.

The only module of `train` that knows environments and the engine. The episodes' ids are trained as they were sampled,
against the log-probabilities the engine recorded while sampling them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import replace

from tidelock.agent import Agent
from tidelock.engine import Engine
from tidelock.engine.sampling import reshaped
from tidelock.envs.run import Scored, run_tasks
from tidelock.envs.task import Task
from tidelock.models import TransformerLM
from tidelock.sandbox import ToolHost
from tidelock.tokens.policy import SamplingParams

from .loop import Recipe, Trainer
from .objectives import KimiRL, group_advantages
from .packing import Sample, pack


@dataclass(frozen=True)
class RLRecipe:
    """One iteration = `prompts` tasks x `group` attempts gathered, then one pass over them."""

    iterations: int
    prompts: int
    group: int
    recipe: Recipe
    objective: KimiRL = field(default_factory=KimiRL)
    tokens_per_step: int = 16384


def rl_sample(scored: Scored, advantage: float, replay: bool = False) -> Sample:
    """The episode's own ids; weight 1 on the tokens that were sampled.

    replay: both log-probabilities of the ratio are those under the cut-offs and constraints the token was drawn with;
    only for episodes sampled at temperature 1 without penalties or bias, which a kept set does not tell.
    """
    episode = scored.episode
    weights = [float(s) for s in episode.sampled]
    old = episode.sampled_logprobs if replay else episode.logprobs
    extras = {
        "advantage": [advantage * w for w in weights],
        "old_logp": [lp * w for lp, w in zip(old, weights)],
    }
    return Sample(list(episode.ids), weights, extras, list(episode.kept) if replay else None)


def replayable(params: SamplingParams) -> bool:
    """Whether tokens sampled so were drawn from the model's own distribution among the ids that were kept."""
    plain = replace(params, top_k=0, top_p=1.0, min_p=0.0, constraint=None)
    return params != plain and not reshaped(plain)


def advantage_samples(scored: Sequence[Scored], replay: bool = False) -> list[Sample]:
    """Group-centred advantages per task. Failed infrastructure is left out of the mean; groups without contrast
    (all right or all wrong) carry no gradient and are dropped."""
    groups: dict[str, list[Scored]] = defaultdict(list)
    for s in scored:
        if s.success is not None and s.episode.exact and any(s.episode.sampled):
            groups[s.task.id].append(s)
    samples = []
    for group in groups.values():
        advantages = group_advantages([s.reward for s in group])
        samples += [rl_sample(s, a, replay) for s, a in zip(group, advantages) if a != 0.0]
    return samples


async def reinforce(
    model: TransformerLM,
    engine: Engine,
    agent: Agent,
    host: ToolHost,
    draw: Callable[[int], list[Task]],
    rl: RLRecipe,
    seed: int,
    on_iteration: Callable[[int, dict], None] = lambda i, figures: None,
) -> list[dict]:
    """`rl.iterations` rounds of gather and train on `model`, which `engine` serves. `draw(i)` gives iteration i's tasks.

    Returns the curve: mean reward, trained and sampled tokens, and the largest |log r| before the step, which is 0
    exactly when training and serving compute the same numbers.
    """
    trainer, curve = Trainer(model, rl.recipe), []
    for i in range(rl.iterations):
        wanted = [(task, attempt) for task in draw(i) for attempt in range(rl.group)]
        scored = await run_tasks(agent, host, wanted, seed=seed * 1_000_003 + i)
        rewards = [s.reward for s in scored if s.reward is not None]
        samples = advantage_samples(scored, replayable(agent.params))
        figures = {
            "step": i,
            "reward": float(np.mean(rewards)) if rewards else 0.0,
            "tokens": sum(len(s.episode.ids) for s in scored),
            "sampled": sum(sum(s.episode.sampled) for s in scored),
            "trained_episodes": len(samples),
        }
        for p in pack(samples, rl.tokens_per_step) if samples else []:
            figures["loss"] = trainer.step(p, rl.objective)["loss"]
        model.eval()
        await engine.adopt(model, engine.version + 1)
        curve.append(figures)
        on_iteration(i, figures)
    return curve

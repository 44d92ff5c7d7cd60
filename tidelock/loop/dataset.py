"""From traces to training data: what may be used, what is left out and why, and never a token rewritten."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from tidelock.tokens.directives import is_of_one_request
from tidelock.tokens.policy import Kept, SamplingParams
from tidelock.tokens.trace import Node, Outcome, Trace
from tidelock.train.objectives import group_advantages
from tidelock.train.packing import Sample
from tidelock.train.rl import replayable


class ConsentError(Exception):
    """Something without consent was about to be used for training."""


@dataclass(frozen=True)
class TraceSample:
    """One finished conversation. All per-token lists run parallel to `ids`, which are the stored ids."""

    outcome: Outcome
    group: str  # same task: same tools and same first user message
    ids: list[int]
    sampled: list[bool]
    logprobs: list[float]  # of the day; under the kept set where there is one, else under the whole vocabulary
    kept: list[Kept]  # ids that cut-offs or a constraint left, where those alone shaped the draw; else None
    masked: list[bool]  # redacted: context, never learned
    exact: bool  # fit for RL: sampled in this very context, with log-probabilities


def work_of(path: Sequence[Node]) -> tuple[list[Node], list[Node], list[Node]]:
    """A conversation taken apart: (up to the request, the turns that used tools with their results, the answer)."""
    asked = next(i for i, n in enumerate(path) if n.message.role == "user") + 1
    return list(path[:asked]), list(path[asked:-1]), [path[-1]]


def stitched(trace: Trace, outcome: Outcome) -> list[Node]:
    """The request that failed, followed by the work that its smaller steps did and the last step's answer.

    What the agent should have done, made of nothing but stored ids: what it really did, in its user's order, without
    the intermediate questions and answers, and without what a step alone was held to. Its log-probabilities belong to other
    contexts, so it is never RL data.
    """
    request, _, _ = work_of(trace.path(outcome.request))
    done: list[Node] = []
    for step in outcome.steps:
        _, turns, answer = work_of(trace.path(step))
        done += [node for node in turns if not is_of_one_request(node.message)]
    return [*request, *done, *answer]


@dataclass(frozen=True)
class Dataset:
    samples: list[TraceSample]
    excluded: dict[str, int]  # conversations left out, by reason


def consents(trace: Trace, path: Sequence[Node]) -> bool:
    """Every message's owner agreed when it was written, and nobody has taken it back since."""
    return all(node.consent and node.scope not in trace.withdrawn for node in path)


def why_not(trace: Trace, path: Sequence[Node], outcome: Outcome | None, require_sandbox: str) -> str | None:
    """The first reason against using this conversation, or None."""
    if not consents(trace, path):
        return "no consent"
    if outcome is None:
        return "no verified outcome"
    if any(not node.sandbox.startswith(require_sandbox) for node in path):
        return "tools ran with less confinement than required"
    if any(node.finish_reason not in (None, "stop") for node in path):
        return "cut or aborted"
    if len({node.template for node in path}) > 1:
        return "template changed midway"
    return None


def sampled_elsewhere(trace: Trace, path: Sequence[Node]) -> list[list[Node]]:
    """The conversations in which the answers that this one repeats were sampled (see `Trace.elsewhere`), in order."""
    out = []
    for node in path:
        if node.parent is not None and node.message.role == "assistant" and not node.sampled:
            same = [n for n in trace.elsewhere(trace.nodes[node.parent], node.message) if n.ids == node.ids]
            out += [trace.path(n.id) for n in same[-1:]]
    return out


def to_sample(trace: Trace, path: Sequence[Node], outcome: Outcome, answer_only: bool = False) -> TraceSample:
    """`answer_only`: of what was sampled, the last node's alone; the rest is another sample's to learn from.
    Raises ConsentError: whoever calls this must have asked first."""
    if not consents(trace, path):
        raise ConsentError(f"conversation {path[-1].id} may not be used for training")
    ids, sampled, logprobs, kept, masked = [], [], [], [], []
    for node in path:
        given = len(node.ids) - node.sampled
        drawn, left = drawn_from(node)
        ids += node.ids
        sampled += [False] * given + [node is path[-1] or not answer_only] * node.sampled
        logprobs += [0.0] * given + drawn
        kept += [None] * given + left
        masked += [any(a <= i < b for a, b in node.redactions) for i in range(len(node.ids))]
    opening = [n.message for n in path]
    first_user = next((i for i, m in enumerate(opening) if m.role == "user"), 0)
    group = repr(opening[: first_user + 1])
    exact = outcome.request is None and all(node.exact for node in path if node.sampled)
    return TraceSample(outcome, group, ids, sampled, logprobs, kept, masked, exact)


def drawn_from(node: Node) -> tuple[list[float], list[Kept]]:
    """(log-probability, kept ids) per sampled token, as training can recompute them: among what cut-offs and a constraint
    left, unless a temperature, penalties or a bias shaped the draw too, which a kept set does not tell."""
    if node.kept and replayable(SamplingParams(**node.sampling)):
        return list(node.sampled_logprobs or node.logprobs), list(node.kept)
    return list(node.logprobs), [None] * node.sampled


def build(trace: Trace, require_sandbox: str = "") -> Dataset:
    """Every conversation that may be used, and with it, each in its own context, the answers of it that were given to
    requests with directives: all of them or none. `require_sandbox` is a prefix the recorded level must have."""
    samples, excluded = [], Counter()
    for leaf in trace.leaves():
        path = trace.path(leaf.id)
        if _goes_on_elsewhere(trace, path):
            continue
        outcome = next(iter(trace.outcomes(leaf.id)[-1:]), None)
        in_steps = outcome is not None and outcome.request is not None
        reason = why_not(trace, path, outcome, require_sandbox)
        if reason is None and in_steps:
            path = stitched(trace, outcome)
            reason = why_not(trace, path, outcome, require_sandbox)
        others = sampled_elsewhere(trace, path) if reason is None else []
        reason = reason or next(filter(None, (why_not(trace, other, outcome, require_sandbox) for other in others)), None)
        if reason is None:
            samples.append(to_sample(trace, path, outcome))
            samples += [to_sample(trace, other, outcome, answer_only=True) for other in others]
        else:
            excluded[reason] += 1
    # The journal's order is the order of arrival; the same conversations must train the same model.
    samples.sort(key=lambda s: (s.outcome.source, s.ids, s.outcome.reward))
    return Dataset(samples, dict(excluded))


def _goes_on_elsewhere(trace: Trace, path: Sequence[Node]) -> bool:
    """Whether the conversation went on without the directives that its last answer was given to: then it counts there."""
    at = len(path) - 1
    while at > 0 and is_of_one_request(path[at - 1].message):
        at -= 1
    if at in (0, len(path) - 1):
        return False
    return any(n.ids == path[-1].ids and not n.sampled for n in trace.children(path[at - 1].id))


def successes(dataset: Dataset) -> dict[str, list[Sample]]:
    """Verified good conversations to imitate, by who verified them: weight 1 on what the agent said, 0 on the rest."""
    out: dict[str, list[Sample]] = defaultdict(list)
    for s in dataset.samples:
        if s.outcome.success:
            out[s.outcome.source].append(Sample(s.ids, [float(g and not m) for g, m in zip(s.sampled, s.masked)]))
    return dict(sorted(out.items()))


def advantages(dataset: Dataset) -> list[Sample]:
    """Attempts at the same task, compared: group-centred rewards with the log-probabilities of the day (RL), and the
    kept sets, so that the ratio is one of the distributions that were drawn from.

    Only exact ids; groups without contrast are dropped. An attempt counts once, in however many samples its turns are.
    """
    groups: dict[str, dict[str, list[TraceSample]]] = defaultdict(lambda: defaultdict(list))
    for s in dataset.samples:
        if s.exact:
            groups[s.group][s.outcome.node].append(s)
    return [
        _rl_sample(s, a)
        for group in groups.values()
        for attempt, a in zip(group.values(), group_advantages([attempt[0].outcome.reward for attempt in group.values()]))
        for s in attempt
        if a != 0
    ]


def _rl_sample(s: TraceSample, advantage: float) -> Sample:
    weights = [float(g and not m) for g, m in zip(s.sampled, s.masked)]
    kept = list(s.kept) if any(k is not None for k in s.kept) else None
    return Sample(s.ids, weights, {"advantage": [advantage * w for w in weights], "old_logp": list(s.logprobs)}, kept)


def balanced(groups: Iterable[list[Sample]], seed: int) -> Iterator[Sample]:
    """Endless samples, one from each group in turn: rare demand counts as much as common. A group is passed over
    whole, in a new order each time, before any of its samples comes again."""
    rng = Random(seed)
    passes = [_passes(g, rng) for g in groups if g]
    while passes:
        yield from (next(p) for p in passes)


def _passes(group: list[Sample], rng: Random) -> Iterator[Sample]:
    while True:
        yield from rng.sample(group, len(group))

"""The doctor: are the stored conversations what they claim to be?

Every conversation is rendered again from its messages and must give the stored ids; every sampled token's
log-probability is computed again from the weights that produced it and must give the stored value; the books must
balance.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tidelock.service.db import Database, service_database
from tidelock.service.ledger import Ledger
from tidelock.tokens.template import Template
from tidelock.tokens.trace import Node, Trace
from tidelock.train.loop import token_logprobs
from tidelock.train.packing import Sample, pack

from .rundir import RunDir

TOLERANCE = 1e-4  # fp32


@dataclass(frozen=True)
class Findings:
    sessions: int
    render_mismatches: int
    verbatim_turns: int  # sampled turns whose text alone would not give their ids: kept as ids
    sampled_tokens: int
    max_abs_dlogp: float
    sampled_elsewhere: int = 0  # tokens of upstreams, whose weights are not here to ask

    @property
    def healthy(self) -> bool:
        return self.render_mismatches == 0 and self.max_abs_dlogp <= TOLERANCE


def check_rendering(trace: Trace, template: Template) -> tuple[int, int]:
    """(conversations, conversations whose messages no longer render to the stored ids)."""
    leaves = trace.leaves()
    wrong = sum(template.render(trace.messages(leaf.id)) != trace.ids(leaf.id) for leaf in leaves)
    return len(leaves), wrong


def check_logprobs(
    trace: Trace, run: RunDir, limit: int | None = None, on_tokens: Callable[[int], None] = lambda n: None
) -> tuple[int, float]:
    """(sampled tokens checked, largest |stored - recomputed|) over all conversations, or the first `limit`.

    Each node is checked once, on the longest conversation that holds it, with the weights version that sampled it. What is
    of no known version, and everything where nothing was ever released, was sampled elsewhere and is left out.
    """
    here = bool(run.registry.list())
    by_version: dict[int, list[list[Node]]] = defaultdict(list)
    for leaf in trace.leaves()[:limit]:
        path = trace.path(leaf.id)
        for version in sorted({v for node in path if node.exact for v, _ in node.weights_versions if here and v >= 0}):
            by_version[version].append(path)
    tokens, worst = 0, 0.0
    for version, paths in sorted(by_version.items()):
        model = run.load(run.registry.checkpoint(version))
        for p in pack([_sample(path, version) for path in paths], 8192):
            with torch.no_grad():
                logp, rows = token_logprobs(model, p)
            tokens += rows.numel()
            if rows.numel():
                worst = max(worst, float((logp - p.extras["stored"][rows]).abs().max()))
            on_tokens(p.ids.numel())
    return tokens, worst


def _sample(path: list[Node], version: int) -> Sample:
    """The conversation with weight 1 on the tokens this version sampled."""
    ids, weights, stored = [], [], []
    for node in path:
        given = len(node.ids) - node.sampled
        owners = [v for v, count in node.weights_versions for _ in range(count)]
        ids += node.ids
        weights += [0.0] * given + [float(node.exact and v == version) for v in owners]
        stored += [0.0] * given + list(node.logprobs)
    return Sample(ids, weights, {"stored": stored})


def examine(
    run: RunDir, limit: int | None = None, on_tokens: Callable[[int], None] = lambda n: None
) -> Findings:
    """Everything about the traces of a run."""
    trace = Trace.read(run.traces)
    sessions, wrong = check_rendering(trace, run.template())
    tokens, worst = check_logprobs(trace, run, limit, on_tokens)
    verbatim = sum(node.message.verbatim is not None for node in trace.nodes.values())
    exact = sum(node.sampled for node in trace.nodes.values() if node.exact)
    return Findings(sessions, wrong, verbatim, tokens, worst, 0 if limit else exact - tokens)


def books(run: RunDir) -> dict:
    """The ledger's audit and who paid what."""
    db = Database(service_database(run.service))
    try:
        ledger = Ledger(db)
        return {"audit": ledger.audit(), "statement": ledger.statement()}
    finally:
        db.close()

"""What a demo's stages amount to: success with intervals, example episodes, and the report's data."""

from __future__ import annotations

import resource
from collections.abc import Sequence

from tidelock.envs.registry import FAMILIES
from tidelock.envs.run import Scored

from .doctor import Findings
from .intervals import wilson
from .rundir import RunDir
from .settings import DemoSettings
from .stages import Stages
from .users import Asked


def summarise(scored: Sequence[Scored | Asked]) -> dict[str, dict]:
    """Success by family with its 95 % Wilson interval; failed infrastructure is left out."""
    out = {}
    for name in FAMILIES:
        verdicts = [x.success for x in scored if x.task.family == name and x.success is not None]
        low, high = wilson(sum(verdicts), len(verdicts))
        out[name] = {"n": len(verdicts), "success": sum(verdicts) / max(1, len(verdicts)), "low": low, "high": high}
    return out


def example(x: Asked) -> dict:
    messages = [
        {"role": m.role, "text": m.content, "calls": [[c.name, c.arguments] for c in m.tool_calls]}
        for m in x.episode.messages
        if m.role in ("assistant", "tool")
    ]
    return {"id": x.task.id, "family": x.task.family, "prompt": x.task.prompt, "success": bool(x.success), "messages": messages}


def thin(curve: list[dict], points: int = 200) -> list[dict]:
    """At most `points` of a curve, each the mean loss of its stretch."""
    width = -(-len(curve) // points)
    stretches = [curve[i : i + width] for i in range(0, len(curve), width)]
    return [{**part[-1], "loss": sum(c["loss"] for c in part) / len(part)} for part in stretches]


def assemble(settings: DemoSettings, stages: Stages, findings: Findings, books: dict, run: RunDir) -> dict:
    """Everything the report shows, as plain data."""
    results = {name: stages.result(name) for name in stages.order if stages.done(name)}
    before, after = results["before"], results["after"]
    # The demo and its largest child (the server) at their peaks, as if both came at once.
    kib = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    afters = {e["id"]: e for e in after["examples"]}
    return {
        "title": "One turn of the loop",
        "seed": settings.seed,
        "wall_s": sum(r["wall_s"] for r in results.values()),
        "peak_rss_bytes": kib * 1024,
        "stages": {name: {"wall_s": r["wall_s"], "tokens": r["tokens"]} for name, r in results.items()},
        "families": {
            name: {"kind": f.kind, "before": before["families"][name], "after": after["families"][name]}
            for name, f in FAMILIES.items()
        },
        "users": {k: results["users"][k] for k in ("episodes", "first_attempt", "solved")},
        "gate": {k: results["gate"][k] for k in ("passed", "reasons", "families")},
        "ledger": {k: getattr(books["audit"], k) for k in ("entries", "sum_nano", "overspend_nano")},
        "accounts": [
            {"name": a["customer"], "paid_in_nano": a["paid_nano"], "spent_nano": a["spent_nano"],
             "balance_nano": a["free_nano"], "requests": a["requests"]}
            for a in books["statement"]
        ],  # fmt: skip
        "exactness": findings.__dict__,
        "dataset": {"used": results["dataset"]["used"], "excluded": results["dataset"]["excluded"]},
        "curves": {name: results[name]["curve"] for name in ("pretrain", "sft", "rl", "candidate")},
        "examples": pick_examples(before["examples"], afters),
        "releases": [{"version": r.version, "checkpoint": r.checkpoint, "status": r.reason} for r in run.registry.list()],
        "swap": results["swap"],
        "settings": settings.to_dict(),
    }


def pick_examples(before: list[dict], after: dict[str, dict]) -> list[dict]:
    """One task per family, one that changed if there is one."""
    out = []
    for name in FAMILIES:
        pairs = [(b, after[b["id"]]) for b in before if b["family"] == name and b["id"] in after]
        pairs.sort(key=lambda pair: pair[0]["success"] or not pair[1]["success"])
        for b, a in pairs[:1]:
            sides = {"before": b, "after": a}
            shown = {k: {"success": v["success"], "messages": v["messages"]} for k, v in sides.items()}
            out.append({"family": name, "prompt": b["prompt"], **shown})
    return out

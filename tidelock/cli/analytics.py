"""`tidelock admin analytics`, `facts` and `synthetic-year`: the founder's numbers in the terminal."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from tidelock import charts
from tidelock.service.analytics import facts, synthetic
from tidelock.service.analytics.calendar import shifted
from tidelock.service.analytics.figures import figures, months_until
from tidelock.service.analytics.replay import replayed
from tidelock.service.analytics.report import report, shown, this_month
from tidelock.service.audit import audit
from tidelock.service.db import Database, service_database
from tidelock.tokens.errors import UserError

from .main import explained


def add(actions: Any, where: argparse.ArgumentParser) -> None:
    numbers = explained(
        actions, "analytics", "payers, revenue, cohorts, margin: a month and how it came about",
        "tidelock admin analytics --month 2026-11 --dir demo-run/service", parents=[where],
    )  # fmt: skip
    numbers.add_argument("--month", metavar="MONTH", help="like 2026-03 (default: this one, so far)")
    numbers.add_argument("--base", metavar="MONTH", help="growth and exchange rates are counted from here (default: three months before)")
    numbers.add_argument("--explain", metavar="METRIC", help="print one metric's definition and the SQL that gives it")
    numbers.add_argument("--verify", action="store_true", help="compute everything again from the raw entries and compare")
    numbers.add_argument("--plots", type=Path, metavar="DIR", help="write the charts as SVG files")
    known = explained(
        actions, "facts", "register billing entities, exchange rates and prices of compute",
        "tidelock admin facts facts.toml --dir demo-run/service", parents=[where],
    )  # fmt: skip
    known.add_argument("file", type=Path, help="TOML; tidelock/service/analytics/facts.py shows one")
    year = explained(
        actions, "synthetic-year", "make up a year of business in new books and find its growth again",
        "tidelock admin synthetic-year --seed 0 --dir year", parents=[where],
    )  # fmt: skip
    year.add_argument("--seed", type=int, default=0)
    year.add_argument("--payers", type=int, default=100, metavar="N", help="paying users before the growth, even (default: 100)")


def analytics(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    name = args.month or this_month()
    with db.snapshot() as read:
        found = report(read, name, args.base)
        if args.verify:
            found["replay"] = compared(read, name, found["base"])
    if args.explain:
        return _explain(found, args.explain)
    if args.plots:
        _write_plots(found["plots"], args.plots)
    if getattr(args, "json", None) != "-":
        _print(found)
    failed = not all(found["checks"].values()) or bool(found.get("replay", {}).get("differences"))
    return {**found, "failed": failed}


def compared(read: Any, name: str, base: str) -> dict[str, Any]:
    """What SQL and replay say differently; nothing, if the books and the queries are right."""
    by_sql, by_replay = figures(read, months_until(read, name), base), replayed(read, name, base)
    keys = {(metric, *key) for found in (by_sql, by_replay) for metric, values in found.items() for key in values}
    values = {key: [found.get(key[0], {}).get(key[1:], 0) for found in (by_sql, by_replay)] for key in sorted(keys)}
    return {"compared": len(keys), "differences": [[*key, *pair] for key, pair in values.items() if pair[0] != pair[1]]}


def _explain(found: dict[str, Any], name: str) -> dict[str, Any]:
    metric = next((metric for metric in found["metrics"] if metric["name"] == name), None)
    if metric is None:
        raise UserError(f"no metric {name!r}; there are {', '.join(metric['name'] for metric in found['metrics'])}")
    print(f"-- {metric['name']}, {metric['unit']}: {metric['definition']}\n{found['with']}{metric['sql']}")
    return {key: metric[key] for key in ("name", "definition", "unit", "sql")} | {"with": found["with"]}


def _print(found: dict[str, Any]) -> None:
    print(f"{found['month']}{'' if found['complete'] else ' (so far)'}, growth from {found['base']}, months in UTC")
    for metric in found["metrics"]:
        for part, value in metric["value"].items():
            print(f"{metric['name']:>26}  {part:<28} {shown(value, metric['unit']):>22}")
    for ratio in found["ratios"]:
        for part, value in ratio["value"].items():
            text = shown(int(value), ratio["unit"]) if ratio["unit"] == "nano-USD" else f"{value:.2%}"
            print(f"{ratio['name']:>26}  {part:<28} {text:>22}")
    for line in found["growth"]["of"]:
        print(f"{line['metric']:>26}  {line['part']:<28} mean {line['mean']:+.1%}, CMGR {line['cmgr']:+.1%}, "
              f"x{line['multiple']:.4g} in {line['steps']} months")  # fmt: skip
    for check, holds in found["checks"].items():
        print(f"{'holds' if holds else 'DOES NOT HOLD':>26}  {check}")
    if "replay" in found:
        told = found["replay"]
        print(f"{'replay':>26}  {told['compared']} numbers computed twice, {len(told['differences'])} differ")


def _write_plots(plots: dict[str, str], directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, svg in plots.items():
            if svg.startswith("<svg"):
                with tempfile.NamedTemporaryFile("w", dir=directory, delete=False) as file:
                    file.write(charts.standalone(svg))
                os.replace(file.name, directory / f"{name}.svg")
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror}") from error


def register(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    known = facts.read_facts(args.file)
    facts.store(db, known)
    counts = {"customers": len(known.billing), "exchange_rates": len(known.fx), "compute_prices": len(known.compute)}
    print(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))
    return counts


def synthetic_year(args: argparse.Namespace) -> dict[str, Any]:
    """Makes the year, audits its books, and asks both paths for the growth that was put in."""
    if not args.database:
        args.dir.mkdir(parents=True, exist_ok=True)
    with closing(Database(args.database or service_database(args.dir))) as db:
        begun = time.perf_counter()
        synthetic.make_year(db, args.seed, args.payers)
        made_s = time.perf_counter() - begun
        sound = audit(db).sound
        base = shifted(synthetic.LAST, -len(synthetic.GROWTH))
        base_abroad = synthetic.months()[synthetic.OVERSEAS_BASE].name
        with db.snapshot() as read:
            requests = read("SELECT COUNT(*) FROM usage")[0][0]
            users = report(read, synthetic.LAST, base)
            abroad = report(read, synthetic.LAST, base_abroad)
            replay = compared(read, synthetic.LAST, base_abroad)
    grown = _growth_of(users, "payers.usage", "")
    revenue = _growth_of(abroad, "revenue.by_region", " ".join(synthetic.OVERSEAS))
    print(f"{requests} requests in {made_s:.0f} s; the books are {'sound' if sound else 'NOT sound'}")
    print(f"paying users {grown['start']} -> {grown['end']} from {base} to {synthetic.LAST}: mean {grown['mean']:+.2%} a month, "
          f"CMGR {grown['cmgr']:+.2%}, x{grown['multiple']:g}")  # fmt: skip
    print(f"overseas usage revenue {shown(revenue['start'], 'nano-USD')} -> {shown(revenue['end'], 'nano-USD')} from {base_abroad}: "
          f"x{revenue['multiple']:g}")  # fmt: skip
    print(f"{replay['compared']} numbers by SQL and by replay, {len(replay['differences'])} differ")
    as_given = abs(grown["mean"] - 1.7) < 1e-12 and revenue["end"] == synthetic.OVERSEAS_MULTIPLE * revenue["start"]
    held = sound and as_given and not replay["differences"] and all(users["checks"].values())
    return {"requests": requests, "made_s": made_s, "payers": grown, "overseas": revenue, "replay": replay, "failed": not held}


def _growth_of(found: dict[str, Any], metric: str, part: str) -> dict[str, Any]:
    return next(line for line in found["growth"]["of"] if (line["metric"], line["part"]) == (metric, part))

"""`tidelock admin reconcile` and `webhook`: whether upstreams, ledger and invoices agree, and who is told when they do not."""

from __future__ import annotations

import argparse
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tidelock.service import notices
from tidelock.service.db import Database
from tidelock.service.prices import format_usd
from tidelock.service.reconciliation.job import reconcile
from tidelock.service.reconciliation.kinds import KINDS
from tidelock.tokens.errors import UserError
from tidelock.tokens.siblings import journals

from .main import explained

SHOWN = 50


def add(actions: Any, where: argparse.ArgumentParser) -> None:
    compare = explained(
        actions, "reconcile", "compare what upstreams, ledger, invoices and payments say",
        "tidelock admin reconcile demo-run/service --since 2026-11-01", parents=[where],
    )  # fmt: skip
    compare.add_argument("directory", nargs="?", type=Path, metavar="DIR", help="the same as --dir")
    compare.add_argument("--since", metavar="TIME", help="2026-11-01 or 2026-11-01T12:00 (UTC); default: everything")
    compare.add_argument("--until", metavar="TIME", help="up to, not including (default: now)")
    compare.add_argument("--text-upstream", action="append", default=[], metavar="NAME",
                         help="this one counts tokens of another tokenizer, so only its sums are shown (as those of kind chat "
                              "in DIR/upstreams.toml)")  # fmt: skip
    compare.set_defaults(act=run)
    hook = explained(
        actions, "webhook", "where notices are sent, signed: the operator's, or an organisation's",
        "tidelock admin webhook https://example.com/alarms --dir demo-run/service", parents=[where],
    )  # fmt: skip
    hook.add_argument("url")
    hook.add_argument("--org", default=notices.OPERATOR, help="whose (default: the operator's)")
    hook.set_defaults(act=webhook)


def run(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    since = _moment(args.since) if args.since else 0.0
    until = _moment(args.until) if args.until else (datetime.now(UTC) + timedelta(minutes=1)).timestamp()
    text = {*args.text_upstream, *_text_upstreams(args.dir / "upstreams.toml")}
    first, *siblings = journals(args.dir / "trace.jsonl")
    found, _ = reconcile(db, since, until, first, inexact=lambda upstream: upstream in text, siblings=siblings)
    for name, count in sorted(found.checked.items()):
        print(f"{name:>20}  {count} compared")
    for name, sums in sorted(found.upstreams.items()):
        print(f"{name or 'the upstream':>20}  {', '.join(f'{count} {what}' for what, count in sorted(sums.items()))}")
    if found.unbacked:
        print(f"{'by hand':>20}  {found.unbacked['topups']} top-ups of {format_usd(found.unbacked['nano_usd'])} USD without a payment")
    for one in found.listed[:SHOWN]:
        unit, words = KINDS[one.kind]
        detail = f" ({one.detail})" if one.detail else ""
        print(f"{one.kind:>20}  {one.id} {one.customer}: expected {one.expected}, found {one.found}, "
              f"difference {one.difference:+} {unit}{detail}")  # fmt: skip
    for kind, count in sorted(found.by_kind.items()):
        print(f"{count:>20}  {kind}: {KINDS[kind][1]}")
    verdict = "everything agrees" if not found.total else f"{found.total} discrepancies worth {format_usd(found.drift_nano)} USD"
    print(f"{'verdict':>20}  {verdict}")
    return {**found.shown(), "failed": bool(found.total)}


def _text_upstreams(path: Path) -> list[str]:
    try:
        return [one["name"] for one in tomllib.loads(path.read_text()).get("upstream", []) if one.get("kind") == "chat"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def webhook(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    secret = notices.set_webhook(db, args.org, args.url)
    print(f"notices of {args.org or 'the service'} go to {args.url}\nthey are signed (tidelock-signature: t=…,v1=…) with: {secret}")
    return {"customer": args.org, "url": args.url, "secret": secret}


def _moment(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{text!r} is no time; write 2026-11-01 or 2026-11-01T12:00") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()

"""`tidelock admin receipts ORG [REQUEST]`: an organisation's requests one by one, or one of them with every ledger entry and
its price computed again."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from typing import Any

from tidelock.service import receipts
from tidelock.service.db import Database
from tidelock.service.prices import format_usd

EXAMPLE = """example:
  tidelock admin receipts ann --outcome refused --dir demo-run/service
  tidelock admin receipts ann req_0123456789abcdef --dir demo-run/service"""


def add(actions: Any, where: argparse.ArgumentParser) -> None:
    summary = "an organisation's requests, newest first, or one in full"
    p = actions.add_parser(
        "receipts",
        parents=[where],
        help=summary,
        description=summary,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("org", metavar="ORG")
    p.add_argument("request", metavar="REQUEST", nargs="?")
    p.add_argument("--limit", type=int, default=20)
    p.add_argument("--outcome", choices=receipts.OUTCOMES)
    p.set_defaults(act=_receipts)


def _receipts(args: argparse.Namespace, db: Database) -> dict[str, Any]:
    if args.request:
        receipt = receipts.one(db, args.org, args.request)
        _print(receipt)
        for line in (receipt["price"] or {"lines": []})["lines"]:
            each, total = format_usd(line["nano_usd_each"]), format_usd(line["nano_usd"])
            print(f"  {line['item']:<24} {line['quantity']:>10} x {each} = {total} USD")
        for t in receipt["transactions"]:
            for e in t["entries"]:
                account = "/".join(filter(None, (e["account"], e["lot"])))
                print(f"  {t['kind']:<8} {t['seq']:>6}  {account:<28} {format_usd(e['nano_usd']):>16} USD")
        print(f"  sum {format_usd(receipt['sum_nano_usd'])} USD")
        return receipt
    found, more = receipts.page(db, args.org, {"outcome": args.outcome}, limit=max(args.limit, 1))
    for receipt in found:
        _print(receipt)
    return {"receipts": found, "has_more": more}


def _print(r: dict[str, Any]) -> None:
    when = f"{datetime.fromtimestamp(r['created_ms'] / 1000, UTC):%Y-%m-%d %H:%M:%S}"
    if r["status"] == "refused":
        print(f"{when}  {r['id']}  {r['model']}  refused with {r['http_status']}: {r['message'] or r['cause']}")
        return
    t, took = r["tokens"], r["latency"]
    first = (
        ""
        if took is None or took["first_ms"] is None
        else f", first token after {took['first_ms']} ms of {took['total_ms']}"
    )
    if took is not None and took["queue_ms"] is not None:
        first += f" ({took['queue_ms']} in the engine's line)"
    prompt = t["fresh"] + t["cached"] + t["cache_write_5m"] + t["cache_write_1h"]
    print(
        f"{when}  {r['id']}  {r['model']}  {prompt} tokens ({t['cached']} cached) -> {t['output']}, "
        f"{format_usd(r['cost_nano_usd'])} USD, {r['finish_reason']}{first}"
    )

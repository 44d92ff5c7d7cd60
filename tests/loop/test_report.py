"""The report: self-contained, escaped, and content with whatever parts there are."""

import json
import re

from tidelock.loop.report import page, usd, write_report

SIDE = {"n": 200, "success": 0.5, "low": 0.43, "high": 0.57}
DATA = {
    "title": "One turn", "seed": 1, "wall_s": 12.5, "peak_rss_bytes": 2**30, "stages": {"sft": {"wall_s": 3.0, "tokens": 1000}},
    "families": {"a": {"kind": "base", "before": SIDE, "after": SIDE}, "b": {"kind": "new", "before": SIDE, "after": SIDE}},
    "gate": {"passed": True, "reasons": ["fine"], "families": {"a": {"kind": "base", "n": 9, "incumbent": 0.5, "candidate": 0.6,
             "difference": 0.1, "low": 0.0, "high": 0.2, "p": 0.04}}},
    "ledger": {"entries": 4, "sum_nano": 0, "overspend_nano": 0},
    "accounts": [{"name": "<i>x</i>", "paid_in_nano": 5 * 10**9, "spent_nano": 1, "balance_nano": 4999999999, "requests": 1}],
    "exactness": {"sessions": 3, "render_mismatches": 0, "max_abs_dlogp": 0.0}, "dataset": {"used": 1, "excluded": {"no consent": 2}},
    "curves": {"sft": [{"step": 0, "tokens": 10, "loss": 2.0}, {"step": 1, "tokens": 20, "loss": 1.0}],
               "rl": [{"step": 0, "reward": 0.5}], "candidate": []},
    "examples": [{"family": "a", "prompt": "<script>alert(1)</script>", **{side: {"success": True, "messages": [
        {"role": "assistant", "text": "<b>", "calls": [["f", {"k": "<img src=x>"}]]}, {"role": "tool", "text": "</div>", "calls": []}]}
        for side in ("before", "after")}}],
}  # fmt: skip


def test_nothing_written_by_a_model_or_user_becomes_markup():
    html = page(DATA)
    assert "<script" not in html and "<img" not in html and "<i>x" not in html
    assert "&lt;script&gt;" in html


def test_the_page_fetches_nothing():
    assert not re.search(r"https?://|<[^>]*(src|href)=|@import|url\(", page(DATA))


def test_any_part_may_be_missing():
    for name in DATA:
        page({k: v for k, v in DATA.items() if k != name})
    assert "Nothing was asked" in page({})


def test_json_carries_the_same_numbers(tmp_path):
    write_report(DATA, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == DATA
    assert (tmp_path / "report.html").read_text() == page(DATA)


def test_money_is_shown_to_the_last_nano():
    assert usd(4999999999) == "4.999999999" and usd(-1) == "-0.000000001" and usd(5 * 10**9) == "5.000000000"

"""The run's report: `report.json` for machines and one self-contained page for people, from the same numbers.

Nothing is fetched when the page opens, and everything a model or a user wrote is escaped.
"""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import Any

from tidelock.charts import bars, before_after, line_chart

from .stages import write_json

STYLE = """
:root { color-scheme: light dark; --bg: #fbfaf7; --fg: #1f2328; --muted: #6d7178; --line: #dfdcd4; --card: #ffffff;
  --before: #b9b4a7; --after: #1f7a8c; --good: #2b7a4b; --bad: #b3402e; --accent: #1f7a8c; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171a; --fg: #e6e4de; --muted: #949aa2; --line: #2c3136;
  --card: #1b1f23; --before: #5b6068; --after: #4fb3c6; --good: #5cb885; --bad: #e0806f; --accent: #4fb3c6; } }
* { box-sizing: border-box } body { margin: 0; background: var(--bg); color: var(--fg);
  font: 16px/1.55 ui-serif, Georgia, "Times New Roman", serif; }
main { max-width: 860px; margin: 0 auto; padding: 56px 20px 96px; }
h1 { font-size: 2.1rem; line-height: 1.2; margin: 0 0 .4rem; font-weight: 600; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 3.2rem 0 .8rem; padding-top: 1.1rem; border-top: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 1.2rem 0 .4rem; } p { margin: .5rem 0; } .lead { font-size: 1.15rem; color: var(--muted); }
svg { width: 100%; height: auto; display: block; font-family: ui-sans-serif, system-ui, sans-serif; }
.muted, .tick { color: var(--muted); fill: var(--muted); } .tick { font-size: 11px; }
.name { font-size: 13px; fill: var(--fg); } .value { font-size: 12px; fill: var(--fg); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); } .bar.before { fill: var(--before); } .bar.after { fill: var(--after); }
.bar.plain { fill: var(--accent); opacity: .75; } .whisker { stroke: var(--fg); stroke-width: 1.2; }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .curve.a { stroke: var(--accent); }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; vertical-align: -1px; margin: 0 .3em 0 1em; }
.grid2 { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 26px; }
table { border-collapse: collapse; width: 100%; font: 13.5px/1.5 ui-sans-serif, system-ui, sans-serif;
  font-variant-numeric: tabular-nums; } .scroll { overflow-x: auto; }
th { text-align: left; font-weight: 500; color: var(--muted); } th, td { padding: .35rem .8rem .35rem 0;
  border-bottom: 1px solid var(--line); } td.n, th.n { text-align: right; }
.good { color: var(--good); } .bad { color: var(--bad); }
.talk { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem;
  font: 13px/1.5 ui-sans-serif, system-ui, sans-serif; overflow-wrap: anywhere; }
.talk p { margin: .25rem 0; } code { font: 12.5px ui-monospace, SFMono-Regular, Menlo, monospace; }
.who { color: var(--muted); } footer { margin-top: 4rem; color: var(--muted); font-size: .9rem; }
"""


def write_report(data: dict[str, Any], directory: Path) -> None:
    """`report.json` and `report.html`, each written whole or not at all."""
    write_json(directory / "report.json", data)
    scratch = directory / ".report.html.tmp"
    scratch.write_text(page(data), encoding="utf-8")
    os.replace(scratch, directory / "report.html")


def page(data: dict[str, Any]) -> str:
    sections = [
        ("Before and after", families(data.get("families"))),
        ("The gate", gate(data.get("gate"))),
        ("The same request, before and after", examples(data.get("examples"))),
        ("What was learned from", dataset(data.get("dataset"))),
        ("Learning", curves(data.get("curves"))),
        ("Where the time and the tokens went", stages(data.get("stages"))),
        ("The ledger", ledger(data.get("ledger"), data.get("accounts"))),
        ("Exactness", exactness(data.get("exactness"))),
    ]
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections if content)
    title = escape(str(data.get("title", "Report")))
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><title>{title}</title><style>{STYLE}</style>"
        f"</head><body><main><h1>{title}</h1><p class='lead'>{headline(data)}</p>{body}{footer(data)}</main></body></html>"
    )


def headline(data: dict[str, Any]) -> str:
    new = [f for f in data.get("families", {}).values() if f["kind"] == "new"]
    if not new:
        return "Nothing was asked of the model that it had not been trained for."
    before, after = (sum(f[side]["success"] for f in new) / len(new) for side in ("before", "after"))
    gate_words = "the gate let it through" if data.get("gate", {}).get("passed") else "the gate kept the old model"
    return (
        f"Users brought {len(new)} kinds of requests nobody had trained for. The model solved {before:.0%} of held-out ones; "
        f"after one cycle on their consented conversations, {after:.0%}; {gate_words}."
    )


def families(rows: dict[str, Any] | None) -> str:
    if not rows:
        return ""
    ordered = sorted(rows.items(), key=lambda item: item[1]["kind"])
    key = "<span class='key' style='background:var(--before)'></span>before<span class='key' style='background:var(--after)'></span>after"
    n = next(iter(rows.values()))["before"]["n"]
    return (
        f"<p class='muted'>Success on {n} held-out tasks per family, through the served API; whiskers are 95 % intervals.{key}</p>"
        + before_after([(name, f["kind"], f["before"], f["after"]) for name, f in ordered])
    )


def gate(decision: dict[str, Any] | None) -> str:
    if not decision:
        return ""
    verdict = "<b class='good'>Passed</b>" if decision["passed"] else "<b class='bad'>Refused</b>"
    rows = [
        (name, v["kind"], v["n"], f"{v['incumbent']:.1%}", f"{v['candidate']:.1%}",
         f"{v['difference']:+.1%} [{v['low']:+.1%}, {v['high']:+.1%}]", f"{v['p']:.2g}")
        for name, v in decision.get("families", {}).items()
    ]  # fmt: skip
    heads = ("family", "kind", "tasks", "incumbent", "candidate", "paired difference, 95 %", "McNemar p")
    return f"<p>{verdict}: {escape('; '.join(decision['reasons']))}.</p>" + table(heads, rows)


def examples(rows: list[dict[str, Any]] | None) -> str:
    parts = []
    for e in rows or []:
        sides = "".join(talk(label, e[label]) for label in ("before", "after"))
        parts.append(f"<h3>{escape(e['family'])}: “{escape(e['prompt'])}”</h3><div class='grid2'>{sides}</div>")
    return "".join(parts)


def talk(label: str, side: dict[str, Any]) -> str:
    verdict = "<span class='good'>right</span>" if side["success"] else "<span class='bad'>wrong</span>"
    lines = []
    for m in side["messages"]:
        for name, arguments in m.get("calls", []):
            shown = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
            lines.append(f"<p><span class='who'>calls</span> <code>{escape(name)}({escape(shown)})</code></p>")
        if m["role"] == "tool":
            lines.append(f"<p><span class='who'>gets</span> <code>{escape(m['text'])}</code></p>")
        elif m["text"] or not m.get("calls"):
            lines.append(f"<p><span class='who'>answers</span> <b>{escape(m['text'])}</b></p>")
    return f"<div class='talk'><p class='who'>{label} · {verdict}</p>{''.join(lines)}</div>"


def dataset(data: dict[str, Any] | None) -> str:
    if not data:
        return ""
    rows = [("used for training", data["used"]), *((f"left out: {k}", v) for k, v in data["excluded"].items())]
    return table(("conversations", "number"), rows)


def curves(data: dict[str, list[dict]] | None) -> str:
    parts = []
    for name, points in (data or {}).items():
        y = "reward" if name == "rl" else "loss"
        label = "mean reward" if name == "rl" else "loss, nats per learned token"
        x = "step" if name == "rl" else "tokens"
        chart = line_chart([(p[x], p[y]) for p in points], "iteration" if name == "rl" else "tokens", label, "a")
        parts.append(f"<div><h3>{escape(name)}</h3>{chart}</div>")
    return f"<div class='grid2'>{''.join(parts)}</div>" if parts else ""


def stages(rows: dict[str, Any] | None) -> str:
    if not rows:
        return ""
    walls = bars([(name, s["wall_s"], f"{s['wall_s']:.1f} s") for name, s in rows.items()])
    tokens = bars([(name, s["tokens"], f"{s['tokens']:,}") for name, s in rows.items() if s["tokens"]])
    return f"<div class='grid2'><div><h3>wall time</h3>{walls}</div><div><h3>tokens</h3>{tokens}</div></div>"


def ledger(totals: dict[str, Any] | None, accounts: list[dict[str, Any]] | None) -> str:
    if not totals:
        return ""
    rows = [
        (a["name"], f"{a['requests']:,}", usd(a["paid_in_nano"]), usd(a["spent_nano"]), usd(a["balance_nano"]))
        for a in accounts or []
    ]
    summary = (
        f"<p>{totals['entries']:,} entries. Sum of all entries: <b>{totals['sum_nano']}</b>. "
        f"Overspend: <b>{totals['overspend_nano']}</b>.</p>"
    )
    return summary + table(("customer", "requests", "paid in, USD", "spent, USD", "balance, USD"), rows)


def exactness(x: dict[str, Any] | None) -> str:
    if not x:
        return ""
    return (
        f"<p>{x['sessions']:,} stored conversations were rendered again from their messages: "
        f"<b>{x['render_mismatches']}</b> differ from the stored ids. Recomputed from their weights, sampled tokens' "
        f"log-probabilities differ from the stored ones by at most <b>{x['max_abs_dlogp']:.1e}</b>.</p>"
    )


def footer(data: dict[str, Any]) -> str:
    seconds, memory = data.get("wall_s", 0.0), data.get("peak_rss_bytes", 0) / 2**30
    return f"<footer>seed {escape(str(data.get('seed')))} · {seconds:.0f} s · {memory:.2f} GiB at most</footer>"


def table(heads: tuple[str, ...], rows: list[tuple]) -> str:
    def cell(tag: str, i: int, value: Any) -> str:
        return f"<{tag}{' class=n' if i else ''}>{escape(str(value))}</{tag}>"

    head = "".join(cell("th", i, h) for i, h in enumerate(heads))
    body = "".join("<tr>" + "".join(cell("td", i, v) for i, v in enumerate(row)) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><tr>{head}</tr>{body}</table></div>"


def usd(nano: int) -> str:
    """Exact: nine decimals are all there are."""
    sign = "-" if nano < 0 else ""
    return f"{sign}{abs(nano) // 10**9}.{abs(nano) % 10**9:09d}"

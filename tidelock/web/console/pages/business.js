// The founder's numbers of a month with the year before it, each with its definition and its query.

import { define, Report, shown } from "../analytics.js";
import { h } from "../dom.js";
import { growth, percent, whole } from "../format.js";
import { exact, rounded } from "../money.js";
import { card, heading, select, stat, table } from "../ui.js";
import { bridge, cohorts, deferred, margin, payers, regions, rejected, revenue, tokens } from "./business_charts.js";

export async function render({ api, query, signal }) {
  const now = new Date().toISOString().slice(0, 7);
  const month = query.get("month") ?? now;
  const base = query.get("base") ?? "";
  const report = new Report(await api.get("/admin/analytics", { month, base }, signal));
  const go = (changes) => {
    location.hash = `#/business?${new URLSearchParams(Object.entries({ month, base, ...changes }).filter(([, v]) => v))}`;
  };
  const last = Array.from({ length: 24 }, (_, n) => shifted(now, -n));
  const before = Array.from({ length: 12 }, (_, n) => shifted(month, -n - 1));
  const year = report.months.slice(-12);
  const broken = Object.entries(report.data.checks).filter(([, holds]) => !holds);
  return [
    heading(
      "Business",
      `${month}${report.data.complete ? "" : ", so far"}. Months are UTC. Every number has a definition and a query.`,
      h(
        "label.check",
        "Month",
        select(
          last.map((m) => [m, m]),
          month,
          (m) => go({ month: m, base: "" }),
          "Month",
        ),
      ),
      h(
        "label.check",
        "Growth since",
        select(
          before.map((m) => [m, m]),
          report.data.base,
          (b) => go({ base: b }),
          "Growth since",
        ),
      ),
    ),
    broken.length > 0 && h("div.failed", { role: "alert" }, `Does not hold: ${broken.map(([name]) => name).join("; ")}.`),
    headline(report),
    h("div.columns", card(null, payers(report, year)), card(null, revenue(report, year))),
    growthCard(report),
    h("div.columns", card(null, bridge(report)), card(null, regions(report, year))),
    card(null, cohorts(report, year)),
    h("div.columns", card(null, margin(report, year)), card(null, rejected(report, year))),
    h("div.columns", card(null, tokens(report, year)), card(null, deferred(report, year))),
    everything(report),
  ];
}

export function shifted(month, by) {
  const [year, number] = month.split("-").map(Number);
  const count = year * 12 + number - 1 + by;
  return `${Math.floor(count / 12)}-${String((count % 12) + 1).padStart(2, "0")}`;
}

const meaning = (report, name, text) =>
  h("button.quiet.name", { type: "button", onclick: () => define(report, name), title: "What it means" }, text);

function headline(report) {
  const ratio = (name) => (report.ratio(name) === null ? "–" : percent(report.ratio(name)));
  return h(
    "dl.stats.four",
    stat(
      meaning(report, "payers.usage", "Paying users (usage)"),
      whole(report.value("payers.usage")),
      [
        meaning(report, "payers.usage_or_plan", `${whole(report.value("payers.usage_or_plan"))} with plans`),
        ", ",
        meaning(report, "payers.cash", `${whole(report.value("payers.cash"))} by cash`),
      ],
    ),
    stat(
      meaning(report, "revenue.usage", "Usage revenue"),
      h("span.money", { title: exact(report.value("revenue.usage")) }, rounded(report.value("revenue.usage"))),
    ),
    stat(meaning(report, "mrr", "MRR"), rounded(report.value("mrr", report.data.month, "end"))),
    stat(
      meaning(report, "gross_margin", "Gross margin"),
      ratio("gross_margin"),
      report.value("compute.milliseconds") && !report.value("compute.cost") ? "compute has no price yet" : null,
    ),
    stat(meaning(report, "nrr_1m", "Net retention"), ratio("nrr_1m"), `gross ${ratio("grr_1m")}, month on month`),
    stat(meaning(report, "payer_churn", "Payer churn"), ratio("payer_churn")),
    stat(meaning(report, "cache_hit_share", "Cache hits"), ratio("cache_hit_share"), "of input tokens"),
    stat(meaning(report, "top_10_share", "Ten largest"), ratio("top_10_share"), "of usage revenue"),
  );
}

function growthCard(report) {
  const { of, from, to, definition } = report.data.growth;
  const unit = (g) => report.metrics.get(g.metric).unit;
  return h(
    "section.card.flush",
    h("div.bar", h("h2", "Growth"), h("span.muted", `${from} to ${to}`)),
    table(
      [
        { name: "Metric", cell: (g) => [meaning(report, g.metric, h("strong", g.metric)), g.part && h("small", g.part)] },
        {
          name: "From",
          right: true,
          class: "w1",
          cell: (g) => (unit(g) === "nano-USD" ? rounded(g.start) : whole(g.start)),
        },
        { name: "To", right: true, class: "w1", cell: (g) => (unit(g) === "nano-USD" ? rounded(g.end) : whole(g.end)) },
        { name: "Mean a month", right: true, cell: (g) => growth(g.mean) },
        { name: "Compound a month", right: true, cell: (g) => growth(g.cmgr) },
        { name: "Multiple", right: true, cell: (g) => h("strong", `×${g.multiple.toFixed(2)}`) },
      ],
      of,
      { caption: "Growth", empty: `Nothing can be compared: ${from} is before the books begin, or had nothing.` },
    ),
    h("p.hint.more", definition),
  );
}

function everything(report) {
  const { month } = report.data;
  const rows = [
    ...report.data.metrics.map((m) => ({
      ...m,
      parts: Object.entries(m.value).map(([part]) => [part, report.value(m.name, month, part)]),
    })),
    ...report.data.ratios.map((r) => ({ ...r, parts: Object.entries(r.value) })),
  ];
  return h(
    "details.card",
    h("summary", h("h2", { style: { display: "inline" } }, "All metrics of the month")),
    table(
      [
        { name: "Metric", cell: (m) => meaning(report, m.name, m.name) },
        {
          name: "Value",
          right: true,
          cell: (m) =>
            m.parts.length
              ? m.parts
                  .slice(0, 12)
                  .map(([part, value]) => h("div", part && h("span.muted", `${part} `), shown(value, m.unit)))
              : h("span.muted", "–"),
        },
      ],
      rows,
      { caption: "All metrics" },
    ),
  );
}

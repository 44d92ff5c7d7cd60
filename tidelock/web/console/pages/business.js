// The founder's numbers of a month with the year before it, each with its definition and its query.

import { define, explain, Report, shown } from "../analytics.js";
import { heat } from "../charts/heat.js";
import { waterfall } from "../charts/waterfall.js";
import { columns, lines } from "../charts/xy.js";
import { h } from "../dom.js";
import { compact, growth, percent, whole } from "../format.js";
import { exact, rounded, toNumber, usd } from "../money.js";
import { card, emptyState, heading, select, stat, table } from "../ui.js";
import { axisUsd } from "./overview.js";

const TONES = ["a", "d", "c", "e", "f", "b", "g", "h"];
const money = { shown: exact, size: (v) => (typeof v === "number" ? v : toNumber(v)), axis: axisUsd };
const counts = { shown: whole, axis: compact, least: 1 };

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
    heading("Business", `${month}${report.data.complete ? "" : ", so far"}. Months are UTC. Every number has a definition and a query.`,
      h("label.check", "Month", select(last.map((m) => [m, m]), month, (m) => go({ month: m, base: "" }), "Month")),
      h("label.check", "Growth since", select(before.map((m) => [m, m]), report.data.base, (b) => go({ base: b }), "Growth since"))),
    broken.length > 0 && h("div.failed", { role: "alert" }, `Does not hold: ${broken.map(([name]) => name).join("; ")}.`),
    headline(report),
    h("div.columns", card(null, payers(report, year)), card(null, revenue(report, year))),
    growthCard(report),
    h("div.columns", card(null, bridge(report)), card(null, regions(report, year))),
    card(null, cohorts(report, year)),
    h("div.columns", card(null, margin(report)), card(null, rejected(report, year))),
    h("div.columns", card(null, tokens(report, year)), card(null, deferred(report, year))),
    everything(report),
  ];
}

export function shifted(month, by) {
  const [year, number] = month.split("-").map(Number);
  const count = year * 12 + number - 1 + by;
  return `${Math.floor(count / 12)}-${String((count % 12) + 1).padStart(2, "0")}`;
}

const meaning = (report, name, text) => h("button.quiet.name", { type: "button", onclick: () => define(report, name), title: "What it means" }, text);

function headline(report) {
  const ratio = (name) => (report.ratio(name) === null ? "–" : percent(report.ratio(name)));
  return h("dl.stats.four",
    stat(meaning(report, "payers.usage", "Paying users (usage)"), whole(report.value("payers.usage")), `${whole(report.value("payers.usage_or_plan"))} with plans, ${whole(report.value("payers.cash"))} by cash`),
    stat(meaning(report, "revenue.usage", "Usage revenue"), h("span.money", { title: exact(report.value("revenue.usage")) }, rounded(report.value("revenue.usage")))),
    stat(meaning(report, "mrr", "MRR"), rounded(report.value("mrr", report.data.month, "end"))),
    stat(meaning(report, "gross_margin", "Gross margin"), ratio("gross_margin"), report.value("compute.milliseconds") && !report.value("compute.cost") ? "compute has no price yet" : null),
    stat(meaning(report, "nrr_1m", "Net retention"), ratio("nrr_1m"), `gross ${ratio("grr_1m")}, month on month`),
    stat(meaning(report, "payer_churn", "Payer churn"), ratio("payer_churn")),
    stat(meaning(report, "cache_hit_share", "Cache hits"), ratio("cache_hit_share"), "of input tokens"),
    stat(meaning(report, "top_10_share", "Ten largest"), ratio("top_10_share"), "of usage revenue"));
}

const payers = (report, year) => lines({
  title: "Paying users", unit: "by three definitions", labels: year, ...counts, actions: [explain(report, "payers.usage")],
  series: [["payers.usage", "used and paid", "a"], ["payers.usage_or_plan", "used or on a plan", "d"], ["payers.cash", "money came in", "c"]]
    .map(([name, said, tone]) => ({ name: said, tone, values: report.series(name, year) })),
});

const revenue = (report, year) => columns({ title: "Usage revenue", unit: "USD, as settled", labels: year, ...money, actions: [explain(report, "revenue.usage")],
  series: [{ name: "Usage revenue", tone: "a", values: report.series("revenue.usage", year) }] });

const byPart = (report, name, year) => report.parts(name, year).slice(0, TONES.length).map((part, n) => ({ name: part, tone: TONES[n], values: report.series(name, year, part) }));

const regions = (report, year) => columns({ title: "Revenue by region", unit: "USD, by billing entity", labels: year, ...money,
  actions: [explain(report, "revenue.by_region")], series: byPart(report, "revenue.by_region", year) });

const deferred = (report, year) => lines({ title: "Prepaid and unused", unit: "USD at the end of the month, a liability", labels: year, ...money,
  actions: [explain(report, "deferred")], series: [{ name: "Deferred", tone: "c", area: true, values: report.series("deferred", year) }] });

const rejected = (report, year) => columns({ title: "Rejected demand", unit: "requests, by cause", labels: year, ...counts,
  note: `Worth about ${usd(report.value("rejected.worth"))} in ${report.data.month}, at the mean price of a settled request.`,
  actions: [explain(report, "rejected")], series: byPart(report, "rejected", year) });

const CLASS = [["fresh", "Input", "a"], ["cached", "Cached input", "b"], ["cache_write_5m", "Cache writes, 5 min", "c"], ["cache_write_1h", "Cache writes, 1 h", "e"], ["output", "Output", "d"]];
const tokens = (report, year) => columns({ title: "Tokens", unit: "settled, by class", labels: year, ...counts, actions: [explain(report, "tokens")],
  series: CLASS.map(([part, name, tone]) => ({ name, tone, values: report.series("tokens", year, part) })).filter((one) => one.values.some(Boolean)) });

function bridge(report) {
  const of = (part) => report.value("mrr", report.data.month, part);
  return waterfall({ title: "MRR", unit: `USD, ${report.data.month}`, ...money, actions: [explain(report, "mrr")], steps: [
    { name: "Start", value: of("start"), total: true }, { name: "New", value: of("new") }, { name: "Returned", short: "Back", value: of("reactivation") },
    { name: "Expansion", short: "More", value: of("expansion") }, { name: "Contraction", short: "Less", value: -of("contraction") }, { name: "Churn", value: -of("churn") },
    { name: "End", value: of("end"), total: true }] });
}

function cohorts(report, year) {
  const rows = year.map((cohort, n) => {
    const size = report.value("cohorts.payers", cohort, cohort);
    return size && { name: cohort, cells: year.slice(n).map((month, lag) => {
      const left = report.value("cohorts.payers", month, cohort);
      return { share: left / size, text: percent(left / size, 0), title: `${cohort}, ${lag} month${lag === 1 ? "" : "s"} later: ${whole(left)} of ${whole(size)}` };
    }) };
  }).filter(Boolean);
  if (!rows.length) return [h("h2", "Cohorts"), emptyState("No cohort yet: nobody has paid.")];
  return heat({ title: "Cohorts", unit: "share that still pays, by month of first payment and months since", columns: year.map((_, n) => String(n)), rows,
    actions: [explain(report, "cohorts.payers")] });
}

function margin(report) {
  const [month, models] = [report.data.month, report.parts("margin", [report.data.month])];
  const rows = models.map((model) => ({ model, revenue: report.value("revenue.by_model", month, model), cost: report.value("compute.cost", month, model),
    margin: report.value("margin", month, model), share: report.ratios.get("gross_margin.by_model").value[model] }));
  return h("div", { style: { display: "grid", gap: "12px" } },
    h("figcaption", h("div", h("h2", "Margin by model"), h("span.muted", month)), h("div.actions", explain(report, "margin"))),
    table([{ name: "Model", cell: (r) => h("strong", r.model) }, { name: "Revenue", right: true, cell: (r) => h("span.money", { title: exact(r.revenue) }, rounded(r.revenue)) },
      { name: "Compute", right: true, cell: (r) => h("span.money", { title: exact(r.cost) }, rounded(r.cost)) },
      { name: "Margin", right: true, cell: (r) => h("strong.money", { title: exact(r.margin) }, rounded(r.margin)) },
      { name: "", right: true, cell: (r) => (r.share === undefined ? "–" : percent(r.share)) }], rows, { caption: "Margin by model", empty: "No model was used in this month." }));
}

function growthCard(report) {
  const { of, from, to, definition } = report.data.growth;
  const unit = (g) => report.metrics.get(g.metric).unit;
  return h("section.card.flush", h("div.bar", h("h2", "Growth"), h("span.muted", `${from} to ${to}`)), table([
    { name: "Metric", cell: (g) => [meaning(report, g.metric, h("strong", g.metric)), g.part && h("small", g.part)] },
    { name: "From", right: true, class: "w1", cell: (g) => (unit(g) === "nano-USD" ? rounded(g.start) : whole(g.start)) },
    { name: "To", right: true, class: "w1", cell: (g) => (unit(g) === "nano-USD" ? rounded(g.end) : whole(g.end)) },
    { name: "Mean a month", right: true, cell: (g) => growth(g.mean) }, { name: "Compound a month", right: true, cell: (g) => growth(g.cmgr) },
    { name: "Multiple", right: true, cell: (g) => h("strong", `×${g.multiple.toFixed(2)}`) },
  ], of, { caption: "Growth", empty: `Nothing can be compared: ${from} is before the books begin, or had nothing.` }), h("p.hint.more", definition));
}

function everything(report) {
  const { month } = report.data;
  const rows = [...report.data.metrics.map((m) => ({ ...m, parts: Object.entries(m.value).map(([part]) => [part, report.value(m.name, month, part)]) })),
    ...report.data.ratios.map((r) => ({ ...r, parts: Object.entries(r.value) }))];
  return h("details.card", h("summary", h("h2", { style: { display: "inline" } }, "All metrics of the month")), table([
    { name: "Metric", cell: (m) => meaning(report, m.name, m.name) },
    { name: "Value", right: true, cell: (m) => (m.parts.length ? m.parts.slice(0, 12).map(([part, value]) => h("div", part && h("span.muted", `${part} `), shown(value, m.unit))) : h("span.muted", "–")) },
  ], rows, { caption: "All metrics" }));
}

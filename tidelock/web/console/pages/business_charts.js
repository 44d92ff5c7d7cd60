// The plots of the founder's numbers.

import { explain } from "../analytics.js";
import { heat } from "../charts/heat.js";
import { waterfall } from "../charts/waterfall.js";
import { columns, lines } from "../charts/xy.js";
import { h } from "../dom.js";
import { compact, percent, whole } from "../format.js";
import { exact, rounded, toNumber, usd } from "../money.js";
import { emptyState, table } from "../ui.js";
import { axisUsd } from "./overview.js";

const TONES = ["a", "d", "c", "e", "f", "b", "g", "h"];
const money = { shown: exact, size: (v) => (typeof v === "number" ? v : toNumber(v)), axis: axisUsd };
const counts = { shown: whole, axis: compact, least: 1 };

export const payers = (report, year) =>
  lines({
    title: "Paying users",
    unit: "by three definitions",
    labels: year,
    ...counts,
    actions: [explain(report, "payers.usage")],
    series: [
      ["payers.usage", "used and paid", "a"],
      ["payers.usage_or_plan", "used or on a plan", "d"],
      ["payers.cash", "money came in", "c"],
    ].map(([name, said, tone]) => ({ name: said, tone, values: report.series(name, year) })),
  });

export const revenue = (report, year) =>
  columns({
    title: "Usage revenue",
    unit: "USD, as settled",
    labels: year,
    ...money,
    actions: [explain(report, "revenue.usage")],
    series: [{ name: "Usage revenue", tone: "a", values: report.series("revenue.usage", year) }],
  });

const byPart = (report, name, year) =>
  report
    .parts(name, year)
    .slice(0, TONES.length)
    .map((part, n) => ({ name: part, tone: TONES[n], values: report.series(name, year, part) }));

export const regions = (report, year) =>
  columns({
    title: "Revenue by region",
    unit: "USD, by billing entity",
    labels: year,
    ...money,
    actions: [explain(report, "revenue.by_region")],
    series: byPart(report, "revenue.by_region", year),
  });

export const deferred = (report, year) =>
  lines({
    title: "Prepaid and unused",
    unit: "USD at the end of the month, a liability",
    labels: year,
    ...money,
    actions: [explain(report, "deferred")],
    series: [{ name: "Deferred", tone: "c", area: true, values: report.series("deferred", year) }],
  });

export const rejected = (report, year) =>
  columns({
    title: "Rejected demand",
    unit: "requests, by cause",
    labels: year,
    ...counts,
    note: `Worth about ${usd(report.value("rejected.worth"))} in ${report.data.month}, at the mean price of a settled request.`,
    actions: [explain(report, "rejected")],
    series: byPart(report, "rejected", year),
  });

const CLASS = [
  ["fresh", "Input", "a"],
  ["cached", "Cached input", "b"],
  ["cache_write_5m", "Cache writes, 5 min", "c"],
  ["cache_write_1h", "Cache writes, 1 h", "e"],
  ["output", "Output", "d"],
];
export const tokens = (report, year) =>
  columns({
    title: "Tokens",
    unit: "settled, by class",
    labels: year,
    ...counts,
    actions: [explain(report, "tokens")],
    series: CLASS.map(([part, name, tone]) => ({ name, tone, values: report.series("tokens", year, part) })).filter(
      (one) => one.values.some(Boolean),
    ),
  });

export function bridge(report) {
  const of = (part) => report.value("mrr", report.data.month, part);
  return waterfall({
    title: "MRR",
    unit: `USD, ${report.data.month}`,
    ...money,
    actions: [explain(report, "mrr")],
    steps: [
      { name: "Start", value: of("start"), total: true },
      { name: "New", value: of("new") },
      { name: "Returned", short: "Back", value: of("reactivation") },
      { name: "Expansion", short: "More", value: of("expansion") },
      { name: "Contraction", short: "Less", value: -of("contraction") },
      { name: "Churn", value: -of("churn") },
      { name: "End", value: of("end"), total: true },
    ],
  });
}

export function cohorts(report, year) {
  const rows = year
    .map((cohort, n) => {
      const size = report.value("cohorts.payers", cohort, cohort);
      return (
        size && {
          name: cohort,
          cells: year.slice(n).map((month, lag) => {
            const left = report.value("cohorts.payers", month, cohort);
            return {
              share: left / size,
              text: percent(left / size, 0),
              title: `${cohort}, ${lag} month${lag === 1 ? "" : "s"} later: ${whole(left)} of ${whole(size)}`,
            };
          }),
        }
      );
    })
    .filter(Boolean);
  if (!rows.length) return [h("h2", "Cohorts"), emptyState("No cohort yet: nobody has paid.")];
  return heat({
    title: "Cohorts",
    unit: "share that still pays, by month of first payment and months since",
    columns: year.map((_, n) => String(n)),
    rows,
    actions: [explain(report, "cohorts.payers")],
  });
}

export function margin(report, year) {
  const [month, models] = [report.data.month, report.parts("margin", [report.data.month])];
  const rows = models.map((model) => ({
    model,
    revenue: report.value("revenue.by_model", month, model),
    cost: report.value("compute.cost", month, model),
    margin: report.value("margin", month, model),
    share: report.ratios.get("gross_margin.by_model").value[model],
  }));
  return [
    columns({
      title: "Margin",
      unit: "USD, by model: revenue less compute",
      labels: year,
      ...money,
      actions: [explain(report, "margin")],
      series: byPart(report, "margin", year),
      height: 150,
    }),
    table(
      [
        { name: month, cell: (r) => h("strong", r.model) },
        { name: "Revenue", right: true, cell: (r) => h("span.money", { title: exact(r.revenue) }, rounded(r.revenue)) },
        { name: "Compute", right: true, cell: (r) => h("span.money", { title: exact(r.cost) }, rounded(r.cost)) },
        { name: "Margin", right: true, cell: (r) => h("strong.money", { title: exact(r.margin) }, rounded(r.margin)) },
        { name: "", right: true, cell: (r) => (r.share === undefined ? "–" : percent(r.share)) },
      ],
      rows,
      { caption: "Margin by model", empty: "No model was used in this month." },
    ),
  ];
}

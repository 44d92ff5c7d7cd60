// The founder's report as the pages read it: numbers by month and part, exact where they are money.

import { copy, h, icon } from "./dom.js";
import { compact, duration, percent, whole } from "./format.js";
import { exact, nano, rounded, sum, usd } from "./money.js";
import { dialog } from "./ui.js";

export class Report {
  constructor(data) {
    this.data = data;
    this.months = data.months;
    this.metrics = new Map(data.metrics.map((m) => [m.name, m]));
    this.ratios = new Map(data.ratios.map((r) => [r.name, r]));
  }

  isMoney(name) {
    return this.metrics.get(name).unit === "nano-USD";
  }

  /** One part of a metric ("" where there are none) in a month; without a part, all of them together. */
  value(name, month = this.data.month, part = null) {
    const parts = this.metrics.get(name).series[month] ?? {};
    const money = this.isMoney(name);
    if (part !== null) return money ? nano(parts[part]) : Number(parts[part] ?? 0);
    return money ? sum(Object.values(parts)) : Object.values(parts).reduce((a, b) => a + Number(b), 0);
  }

  /** Parts of a metric over some months, largest in the last of them first. */
  parts(name, months = this.months) {
    const all = [...new Set(months.flatMap((m) => Object.keys(this.metrics.get(name).series[m] ?? {})))];
    const size = (part) => Number(this.value(name, months.at(-1), part));
    return all.sort((a, b) => size(b) - size(a));
  }

  series(name, months, part = null) {
    return months.map((month) => this.value(name, month, part));
  }

  ratio(name) {
    const value = this.ratios.get(name)?.value ?? {};
    return value[""] ?? null;
  }
}

/** A number of a metric for people. */
export function shown(value, unit) {
  if (unit === "nano-USD") return typeof value === "bigint" ? exact(value) : usd(BigInt(Math.round(value)));
  if (unit === "seconds") return duration(Number(value) * 1000);
  if (unit === "share") return percent(value);
  if (unit === "ms") return duration(Number(value));
  return whole(value);
}

export const atAGlance = (value, unit) =>
  unit === "nano-USD" ? rounded(value) : unit === "share" ? percent(value) : compact(value);

/** What the number means, and the query that gives it. */
export function define(report, name) {
  const metric = report.metrics.get(name) ?? report.ratios.get(name);
  const sql = metric.sql && `${report.data.with}${metric.sql}`;
  const button = h("button.quiet", { type: "button", onclick: () => copy(sql, button) }, icon("copy"), "Copy query");
  const box = dialog(name, [
    h("p", metric.definition),
    h("p.hint", `Unit: ${metric.unit}.`),
    sql
      ? [
          h("div.bar.buttons", button),
          h(
            "details",
            h("summary", "The query"),
            h("pre", metric.sql),
            h("p.hint", "It stands behind these relations:"),
            h("pre", report.data.with),
          ),
        ]
      : h("p.hint", "An exact fraction of two metrics; it has no query of its own."),
  ]);
  box.classList.add("wide");
}

export const explain = (report, name) =>
  h(
    "button.quiet",
    { type: "button", onclick: () => define(report, name), "aria-label": `What ${name} means` },
    "Definition",
  );

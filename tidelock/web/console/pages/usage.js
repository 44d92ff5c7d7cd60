// What was used, by day and by model, key or project: a chart, a table, and the same as CSV.

import { columns } from "../charts/xy.js";
import { download, h } from "../dom.js";
import { compact, csv, isoDay, percent, shortDay, whole } from "../format.js";
import { exact, nano, toNumber, usd } from "../money.js";
import { add, CLASSES, input, ofUsage } from "../tokens.js";
import { amount, card, choice, heading, stat, table } from "../ui.js";
import { axisUsd } from "./overview.js";

const GROUPS = [
  ["model", "Model"],
  ["api_key_id", "Key"],
  ["project_id", "Project"],
];
const TONES = ["a", "d", "c", "e", "f", "b", "g"];
const ROUNDS = [
  ["7", "7 days"],
  ["30", "30 days"],
  ["90", "90 days"],
];

export async function render({ api, me, query, signal }) {
  const [days, group, what] = [query.get("days") ?? "30", query.get("by") ?? "model", query.get("show") ?? "cost"];
  const turn = (name) => (value) => {
    location.hash = `#/usage?${new URLSearchParams({ days, by: group, show: what, [name]: value })}`;
  };
  const now = Math.floor(Date.now() / 1000);
  const first = now - (now % 86_400) - (Number(days) - 1) * 86_400;
  const [usage, names] = await Promise.all([
    api.get(
      "/v1/organization/usage/completions",
      { start_time: first, end_time: now + 1, bucket_width: "1d", limit: 100, group_by: group },
      signal,
    ),
    namesOf(api, me, group, signal),
  ]);
  const rows = usage.data.flatMap((bucket) =>
    bucket.results.map((row) => ({
      day: bucket.start_time,
      id: row[{ model: "model", api_key_id: "api_key_id", project_id: "project_id" }[group]] ?? "",
      cost: nano(row.cost_nano_usd),
      credit: nano(row.credit_nano_usd),
      requests: row.num_model_requests,
      tokens: ofUsage(row),
    })),
  );
  const groups = grouped(rows).map((g) => ({ ...g, name: names.get(g.id) ?? (g.id || "none") }));
  const all = groups.reduce(
    (a, g) => ({
      cost: a.cost + g.cost,
      credit: a.credit + g.credit,
      requests: a.requests + g.requests,
      tokens: add(a.tokens, g.tokens),
    }),
    { cost: 0n, credit: 0n, requests: 0, tokens: add() },
  );
  const save = h(
    "button",
    {
      disabled: !rows.length,
      onclick: () =>
        download(`usage-${isoDay(first)}-${isoDay(now)}-by-${group}.csv`, "text/csv", asCsv(rows, names, group)),
    },
    "Download CSV",
  );
  return [
    heading("Usage", "Settled requests, by UTC day.", choice(ROUNDS, days, turn("days"), "Time"), save),
    h(
      "dl.stats",
      stat(
        "Cost at list price",
        amount(all.cost),
        `${usd(all.cost - all.credit)} in money, ${usd(all.credit)} in credits`,
      ),
      stat("Requests", whole(all.requests)),
      stat(
        "Input tokens",
        compact(input(all.tokens)),
        input(all.tokens) ? `${percent(all.tokens.cached / input(all.tokens))} from the cache` : null,
      ),
      stat("Output tokens", compact(all.tokens.output)),
    ),
    card(
      h(
        "div.filters",
        choice(GROUPS, group, turn("by"), "Group by"),
        choice(
          [
            ["cost", "Cost"],
            ["tokens", "Tokens"],
            ["requests", "Requests"],
          ],
          what,
          turn("show"),
          "Show",
        ),
      ),
      chart(
        usage.data.map((b) => b.start_time),
        rows,
        groups,
        what,
      ),
    ),
    h("section.card.flush", breakdown(groups, all, GROUPS.find(([id]) => id === group)[1])),
  ];
}

/** Totals by group, dearest first. */
function grouped(rows) {
  const found = new Map();
  for (const row of rows) {
    const g = found.get(row.id) ?? { id: row.id, cost: 0n, credit: 0n, requests: 0, tokens: add() };
    found.set(row.id, {
      id: row.id,
      cost: g.cost + row.cost,
      credit: g.credit + row.credit,
      requests: g.requests + row.requests,
      tokens: add(g.tokens, row.tokens),
    });
  }
  return [...found.values()].sort((a, b) => (b.cost > a.cost ? 1 : -1));
}

function chart(days, rows, groups, what) {
  const value = { cost: (r) => r.cost, requests: (r) => r.requests, tokens: (r) => input(r.tokens) + r.tokens.output }[
    what
  ];
  const zero = what === "cost" ? 0n : 0;
  const of = (fits, part = value) =>
    days.map((d) => rows.filter((r) => r.day === d && fits(r)).reduce((total, r) => total + part(r), zero));
  let series;
  if (what === "tokens" && groups.length <= 1)
    series = CLASSES.map((c) => ({
      ...c,
      values: of(
        () => true,
        (r) => r.tokens[c.id],
      ),
    }));
  else {
    const shown = groups.slice(0, TONES.length);
    const rest = new Set(groups.slice(TONES.length).map((g) => g.id));
    series = shown.map((g, n) => ({ name: g.name, tone: TONES[n], values: of((r) => r.id === g.id) }));
    if (rest.size) series.push({ name: `${rest.size} others`, tone: "h", values: of((r) => rest.has(r.id)) });
  }
  if (!series.length) series = [{ name: "", tone: "a", values: days.map(() => zero) }];
  const money = what === "cost";
  return columns({
    title: { cost: "Cost", requests: "Requests", tokens: "Tokens" }[what],
    unit: money ? "USD at list price, by day" : "by day",
    height: 260,
    least: what === "cost" ? 0 : 1,
    labels: days.map(shortDay),
    series,
    shown: money ? exact : whole,
    axis: money ? axisUsd : compact,
    size: money ? (v) => (typeof v === "number" ? v : toNumber(v)) : Number,
  });
}

function breakdown(groups, all, name) {
  const cells = [
    { name, class: "clip", cell: (g) => g.name },
    { name: "Requests", right: true, class: "w1", cell: (g) => whole(g.requests) },
    ...CLASSES.map((c) => ({
      name: c.name,
      right: true,
      class: c.id === "cache_write" ? "w3" : "w2",
      cell: (g) => whole(g.tokens[c.id]),
    })),
    {
      name: "Cache hits",
      right: true,
      class: "w2",
      cell: (g) => (input(g.tokens) ? percent(g.tokens.cached / input(g.tokens)) : "–"),
    },
    { name: "Cost", right: true, cell: (g) => h("span.money", exact(g.cost)) },
  ];
  const rows = groups.length > 1 ? [...groups, { ...all, name: "Total" }] : groups;
  const shown = table(cells, rows, {
    caption: `Usage by ${name.toLowerCase()}`,
    empty: "Nothing was used in this time.",
  });
  if (groups.length > 1) shown.querySelector("tbody").lastElementChild.classList.add("total");
  return shown;
}

function asCsv(rows, names, group) {
  return csv([
    [
      "day",
      group,
      "name",
      "requests",
      ...CLASSES.map((c) => `${c.id}_tokens`),
      "cost_usd",
      "credit_usd",
      "cost_nano_usd",
    ],
    ...rows.map((r) => [
      isoDay(r.day),
      r.id,
      names.get(r.id) ?? "",
      r.requests,
      ...CLASSES.map((c) => r.tokens[c.id]),
      exact(r.cost).slice(1),
      exact(r.credit).slice(1),
      r.cost,
    ]),
  ]);
}

/** What the ids are called, as far as the key may know. */
async function namesOf(api, me, group, signal) {
  if (group === "model" || !me.api_key.scopes.includes("admin")) return new Map();
  const projects = (await api.get("/v1/organization/projects", { include_archived: true }, signal)).data;
  if (group === "project_id") return new Map(projects.map((p) => [p.id, p.name]));
  const lists = await Promise.all(projects.map((p) => api.get(`/v1/organization/projects/${p.id}/api_keys`, {}, signal)));
  return new Map(lists.flatMap((list) => list.data.map((k) => [k.id, k.name || k.redacted_value])));
}

// Where the account stands: what is left, what this month cost, what it bought, and the newest receipts.

import { columns, lines } from "../charts/xy.js";
import { h } from "../dom.js";
import { compact, day, monthStart, percent, shortDay, until, whole } from "../format.js";
import { exact, nano, rounded, share, sum, toNumber, usd } from "../money.js";
import { BRIEF, link } from "../receipts.js";
import { add, CLASSES, input, ofUsage } from "../tokens.js";
import { amount, card, heading, later, stat, table } from "../ui.js";

const POCKETS = [
  ["cash", "Cash", "a"],
  ["voucher", "Vouchers", "c"],
  ["plan", "Plan credits", "d"],
  ["extra", "Extra usage", "f"],
];

export async function render({ api, me, signal }) {
  const now = Math.floor(Date.now() / 1000);
  const start = monthStart(now, -1);
  const [balance, usage] = await Promise.all([
    api.get("/v1/organization/balance", {}, signal),
    api.get(
      "/v1/organization/usage/completions",
      { start_time: start, end_time: now + 1, bucket_width: "1d", limit: 70 },
      signal,
    ),
  ]);
  const days = usage.data.map(({ start_time, results: [row] }) => ({
    start: start_time,
    cost: nano(row?.cost_nano_usd),
    requests: row?.num_model_requests ?? 0,
    tokens: row ? ofUsage(row) : add(),
  }));
  const month = days.filter((d) => d.start >= monthStart(now));
  const before = days.filter((d) => d.start < monthStart(now));
  const recent = days.slice(-30);
  return [
    heading("Overview", me.name),
    h("div.columns.wide-first", balanceCard(balance), monthCard(month, before, now)),
    usage.data.some((b) => b.results.length)
      ? [
          card(null, spendCurve(month, before)),
          h(
            "div.columns.three",
            card(null, tokenChart(recent)),
            card(null, requestChart(recent)),
            card(null, cacheChart(recent)),
          ),
        ]
      : h(
          "div.notice",
          "No request has been settled in the last two months. The first one will be here within a second or two of its end.",
        ),
    newest(api, signal),
  ];
}

function balanceCard(balance) {
  const pockets = POCKETS.map(([id, name, tone]) => ({ name, tone, value: nano(balance[`${id}_nano_usd`]) }));
  const next = balance.lots.filter((lot) => lot.expires_at).sort((a, b) => a.expires_at - b.expires_at)[0];
  return card(
    h(
      "div.bar",
      h("h2", "Available"),
      nano(balance.held_nano_usd) > 0n &&
        h("span.muted", "and ", amount(balance.held_nano_usd), " held for running requests"),
    ),
    h("div.big.money", { title: exact(balance.available_nano_usd) }, rounded(balance.available_nano_usd)),
    h(
      "div.split",
      { "aria-hidden": "true" },
      pockets
        .filter((p) => p.value > 0n)
        .map((p) =>
          h("span.swatch", {
            class: `bg-${p.tone}`,
            style: { flex: String(Math.max(0.012, share(p.value, balance.available_nano_usd))) },
          }),
        ),
    ),
    h(
      "dl.pairs",
      pockets.map((p) => [
        h(
          "dt",
          h("span.swatch", { class: `bg-${p.tone}`, style: { display: "inline-block", "margin-right": "8px" } }),
          p.name,
        ),
        h("dd", amount(p.value)),
      ]),
    ),
    nano(balance.owed_nano_usd) > 0n &&
      h("p.notice.warn", amount(balance.owed_nano_usd), " is owed and is taken from the next payment."),
    next &&
      h(
        "p.hint",
        `${usd(next.nano_usd)} of ${next.kind === "plan" ? "plan credits" : `the voucher ${next.lot}`} expires on ${day(next.expires_at)}, in ${until(next.expires_at)}.`,
      ),
  );
}

function monthCard(month, before, now) {
  const spent = sum(month.map((d) => d.cost));
  const same = sum(before.slice(0, month.length).map((d) => d.cost));
  const tokens = month.reduce((all, d) => add(all, d.tokens), add());
  const requests = month.reduce((all, d) => all + d.requests, 0);
  const days = (now - monthStart(now)) / 86_400;
  return h(
    "dl.stats",
    { style: { "grid-template-columns": "1fr 1fr" } },
    stat(
      "Spent this month",
      amount(spent),
      same ? `${usd(same)} by this day last month` : "nothing by this day last month",
    ),
    stat("Requests", compact(requests), requests ? `${usd(spent / BigInt(requests))} on average` : null),
    stat("Tokens", compact(input(tokens) + tokens.output), `${compact(input(tokens))} in, ${compact(tokens.output)} out`),
    stat("Cache hits", input(tokens) ? percent(tokens.cached / input(tokens)) : "–", "of input tokens"),
    stat("A day", amount(days >= 1 ? spent / BigInt(Math.ceil(days)) : spent), "on average"),
    stat("At this pace", amount(days > 0.2 ? (spent * 3000n) / BigInt(Math.round(days * 100)) : spent), "in 30 days"),
  );
}

function spendCurve(month, before) {
  const running = (days) => days.reduce((all, d) => [...all, (all.at(-1) ?? 0n) + d.cost], []);
  const length = Math.max(month.length, before.length);
  const padded = (values) => Array.from({ length }, (_, n) => values[n] ?? null);
  return lines({
    title: "Spend so far",
    unit: "USD, running total by day of the month",
    labels: Array.from({ length }, (_, n) => String(n + 1)),
    titles: Array.from({ length }, (_, n) => `Day ${n + 1}`),
    series: [
      { name: "This month", tone: "a", area: true, values: padded(running(month)) },
      { name: "Last month", tone: "h", dashed: true, values: padded(running(before)) },
    ].filter((one, n) => !n || before.some((d) => d.cost)),
    shown: (v) => exact(v),
    size: (v) => (typeof v === "number" ? v : toNumber(v)),
    axis: axisUsd,
    height: 230,
  });
}

export function axisUsd(v) {
  const size = Math.abs(v);
  return `${v < 0 ? "−" : ""}$${size >= 1000 ? compact(size) : Number(size.toPrecision(3))}`;
}

const axes = (days) => ({ labels: days.map((d) => shortDay(d.start)) });

const tokenChart = (days) =>
  columns({
    title: "Tokens",
    unit: "by class, 30 days",
    ...axes(days),
    shown: whole,
    axis: compact,
    series: CLASSES.map((c) => ({ ...c, values: days.map((d) => d.tokens[c.id]) })).filter((c) => c.values.some(Boolean)),
  });

const requestChart = (days) =>
  columns({
    title: "Requests",
    unit: "settled, 30 days",
    ...axes(days),
    least: 1,
    shown: whole,
    axis: compact,
    series: [{ name: "Requests", tone: "a", values: days.map((d) => d.requests) }],
  });

const cacheChart = (days) =>
  lines({
    title: "Cache hits",
    unit: "share of input tokens read from the cache",
    ...axes(days),
    shown: (v) => percent(v),
    axis: (v) => percent(v, 0),
    series: [
      {
        name: "Cache hits",
        tone: "b",
        area: true,
        values: days.map((d) => (input(d.tokens) ? d.tokens.cached / input(d.tokens) : null)),
      },
    ],
  });

function newest(api, signal) {
  return h(
    "section.card.flush",
    h("div.bar", h("h2", "Newest receipts"), h("a", { href: "#/receipts" }, "All, live")),
    later(async () => {
      const { data } = await api.get("/v1/organization/receipts", { limit: 8 }, signal);
      return table(BRIEF, data, {
        onrow: link,
        empty: "Requests appear here as they settle.",
        caption: "Newest receipts",
      });
    }, 5),
  );
}

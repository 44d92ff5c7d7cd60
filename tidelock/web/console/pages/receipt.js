// One receipt in full: the price computed again, the hold, and every entry the books made for it.

import { copy, h, icon } from "../dom.js";
import { day, duration, moment, whole } from "../format.js";
import { exact, nano, sum } from "../money.js";
import { CAUSES, outcome } from "../receipts.js";
import { badge, card, exactAmount, heading, stat, table } from "../ui.js";

export async function detail({ api, signal }, id) {
  const r = await api.get(`/v1/organization/receipts/${encodeURIComponent(id)}`, {}, signal);
  const copying = h("button", { onclick: () => copy(r.id, copying) }, icon("copy"), "Copy id");
  const head = [
    h("p.crumb", h("a", { href: "#/receipts" }, "Receipts"), " / ", h("code", r.id)),
    heading(
      h("span", r.model, " ", outcome(r)),
      `${day(r.created_at)}, ${moment(r.created_ms).split(" ").at(-1)} UTC`,
      copying,
    ),
  ];
  if (r.status === "refused") return [...head, refused(r)];
  return [
    ...head,
    numbers(r),
    h("div.columns", priceCard(r), h("div", { style: { display: "grid", gap: "18px" } }, whoCard(r), holdCard(r))),
    ledgerCard(r),
  ];
}

function refused(r) {
  return card(
    "Why it was refused",
    h("p", r.message ?? `${(CAUSES[r.cause] ?? r.cause)[0].toUpperCase()}${(CAUSES[r.cause] ?? r.cause).slice(1)}.`),
    h(
      "dl.pairs.left",
      pair("HTTP status", r.http_status),
      pair("Cause", r.cause),
      pair("Key", r.api_key_name || r.api_key_id),
      pair("Project", r.project_name ?? "–"),
    ),
    h("p.hint", "Nothing was charged, so there is no price and no ledger entry."),
  );
}

const pair = (name, value) => [h("dt", name), h("dd", value)];

function numbers(r) {
  return h(
    "dl.stats",
    stat(
      "Cost",
      h("span.money", exact(r.cost_nano_usd)),
      nano(r.credit_nano_usd) > 0n ? `${exact(r.credit_nano_usd)} of it from credits` : "paid in money",
    ),
    stat(
      "Input tokens",
      whole(r.tokens.fresh + r.tokens.cached + r.tokens.cache_write_5m + r.tokens.cache_write_1h),
      `${whole(r.tokens.cached)} from the cache`,
    ),
    stat(
      "Output tokens",
      whole(r.tokens.output),
      r.latency?.total_ms && r.latency.first_ms !== null && r.latency.total_ms > r.latency.first_ms
        ? `${whole(Math.round((r.tokens.output / Math.max(1, r.latency.total_ms - r.latency.first_ms)) * 1000))} a second`
        : null,
    ),
    stat(
      "First token",
      duration(r.latency?.first_ms),
      r.latency ? `${duration(r.latency.wait_ms)} before the model was asked${engine(r.latency)}` : "not measured",
    ),
    stat("Total", duration(r.latency?.total_ms), "from arrival to bill"),
  );
}

/** What the engine says of its own part, where it does. */
function engine({ queue_ms: queued, prefill_ms: prefill }) {
  return queued === null ? "" : `, ${duration(queued)} in the engine's line${prefill === null ? "" : `, ${duration(prefill)} reading`}`;
}

function priceCard({ price, cost_nano_usd: cost }) {
  const [up, down] = price.factor;
  const rows = [
    ...price.lines.map((l) => ({ name: l.item, quantity: whole(l.quantity), each: l.nano_usd_each, total: l.nano_usd })),
    ...(up === down
      ? []
      : [
          { name: "list price", total: price.list_nano_usd, strong: true },
          { name: `factor ${up}/${down}`, quantity: "", total: nano(price.total_nano_usd) - nano(price.list_nano_usd) },
        ]),
    { name: "Total", total: price.total_nano_usd, strong: true },
  ];
  const columns = [
    { name: "", cell: (row) => row.name },
    { name: "Quantity", right: true, cell: (row) => row.quantity ?? "" },
    { name: "Each", right: true, class: "w1", cell: (row) => (row.each === undefined ? "" : exactAmount(row.each)) },
    {
      name: "Amount",
      right: true,
      cell: (row) => (row.strong ? h("strong", exactAmount(row.total)) : exactAmount(row.total)),
    },
  ];
  return card(
    h(
      "div.bar",
      h("h2", "Price, computed again"),
      badge(price.agrees ? "agrees with the bill" : `bill was ${exact(cost)}`, price.agrees ? "good" : "bad"),
    ),
    table(columns, rows, { caption: "Price by line" }),
    h("p.hint", "Price version ", h("code", price.version), ". A version never changes its numbers."),
  );
}

function whoCard(r) {
  return card(
    "Request",
    h(
      "dl.pairs.left",
      pair("Key", r.api_key_name || h("code", r.api_key_id)),
      pair("Project", r.project_name ?? "–"),
      pair("Model", r.model),
      pair("Mode", r.mode ?? "standard"),
      pair("Ended", r.cause ? CAUSES[r.cause] : r.finish_reason),
      r.message && pair("Said", r.message),
    ),
  );
}

function holdCard({ hold, cost_nano_usd: cost }) {
  if (!hold) return null;
  return card(
    "Hold",
    h(
      "dl.pairs",
      pair("Set aside", exactAmount(hold.nano_usd)),
      pair("Charged", exactAmount(cost)),
      pair("Given back", exactAmount(nano(hold.nano_usd) - nano(cost))),
      pair("Covered", `${whole(hold.max_tokens)} tokens of answer, in ${hold.steps} step${hold.steps > 1 ? "s" : ""}`),
      pair("From", hold.from.map((f) => `${f.account}${f.lot ? ` ${f.lot}` : ""} ${exact(f.nano_usd)}`).join(", ")),
    ),
  );
}

function ledgerCard({ transactions, sum_nano_usd: total, adjustments }) {
  const rows = transactions.flatMap((t) => t.entries.map((e, n) => ({ ...e, t: n ? null : t })));
  const columns = [
    {
      name: "Transaction",
      cell: ({ t }) => t && [h("strong", t.kind), h("small", `no. ${t.seq} · ${moment(t.created_ms)}`)],
    },
    { name: "Hash", class: "w2", cell: ({ t }) => t && h("code", { title: t.hash }, t.hash.slice(0, 12)) },
    { name: "Account", cell: (e) => [e.account, e.lot && h("small", e.lot)] },
    { name: "Amount", right: true, cell: (e) => exactAmount(e.nano_usd) },
  ];
  const settles = sum(rows.map((e) => e.nano_usd));
  return h(
    "section.card.flush",
    h(
      "div.bar",
      h("h2", "Ledger entries"),
      badge(`sum ${exact(settles)}`, settles === 0n && nano(total) === 0n ? "good" : "bad"),
    ),
    table(columns, rows, { caption: "Ledger entries" }),
    adjustments.length > 0 &&
      h(
        "p.hint.more",
        `Re-rated ${adjustments.length} time${adjustments.length > 1 ? "s" : ""}: ${adjustments.map((a) => `${a.price_version} ${exact(a.nano_usd)}`).join(", ")}`,
      ),
  );
}

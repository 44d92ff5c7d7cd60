// The subscription with its windows, plans and what changing to one costs, invoices, payments, what is left of vouchers.

import { h } from "../dom.js";
import { day, seats, span, until } from "../format.js";
import { exact, nano, share, usd } from "../money.js";
import { amount, badge, card, confirm, dialog, emptyState, exactAmount, heading, later, meter, table } from "../ui.js";
import { owns, plansCard } from "./plans.js";

const SPANS = { "5h": "5-hour window", "7d": "7-day window" };

export async function render({ api, me, signal, again }) {
  const plans = await api.get("/v1/organization/plans", {}, signal);
  const subscription = plans.subscribed && (await api.get("/v1/organization/subscription", {}, signal));
  return [
    heading("Billing", me.tax_id ? `${me.name}, tax number ${me.tax_id}` : me.name),
    h("div.columns", subscriptionCard(api, me, subscription, plans.data, again), lotsCard(api, me, signal)),
    plans.data.length > 0 && plansCard(api, me, subscription, plans.data, again),
    h(
      "section.card.flush",
      h("h2", "Invoices"),
      later(async () => invoices((await api.get("/v1/organization/invoices", {}, signal)).data)),
    ),
    h(
      "section.card.flush",
      h("h2", "Payments"),
      later(async () => payments((await api.get("/v1/organization/payments", {}, signal)).data)),
    ),
  ];
}

function subscriptionCard(api, me, sub, plans, again) {
  if (!sub)
    return card(
      "Subscription",
      emptyState(
        plans.length
          ? "No plan. Requests are paid from the prepaid balance."
          : "No plans are on sale. Requests are paid from the prepaid balance.",
      ),
    );
  const left = nano(sub.credits_left_nano_usd);
  const then =
    sub.next_plan === null
      ? badge("ends", "warn")
      : sub.next_plan === sub.plan
        ? sub.next_quantity === sub.quantity
          ? badge("renews", "good")
          : badge(`becomes ${seats(sub.next_quantity)}`, "warn")
        : badge(`becomes ${sub.next_plan}`, "warn");
  const same = sub.next_plan === sub.plan && sub.next_quantity === sub.quantity;
  const cancel =
    owns(me) &&
    sub.next_plan !== null &&
    h(
      "button.quiet",
      {
        onclick: () =>
          confirm(
            "End the plan?",
            `It stays until ${day(sub.current_period_end)}, and so do its credits. Nothing is charged after that.`,
            "End plan",
            async () => {
              await api.delete("/v1/organization/subscription");
              again();
            },
          ),
      },
      "End the plan",
    );
  return card(
    h("div.bar", h("h2", "Subscription"), h("div", then)),
    h(
      "div.bar",
      h("span.big", sub.plan),
      h(
        "span.muted",
        amount(sub.price_nano_usd),
        ` ${span(sub.months)}`,
        sub.quantity > 1 && [`, ${seats(sub.quantity)} at `, amount(sub.seat_price_nano_usd)],
      ),
    ),
    gauge(
      "Credits of this month",
      left > nano(sub.credits_nano_usd) ? 0n : nano(sub.credits_nano_usd) - left,
      nano(sub.credits_nano_usd),
      `until ${day(sub.next_credits_at)}, ${until(sub.next_credits_at)}`,
    ),
    sub.windows.map((w) =>
      gauge(
        SPANS[w.span] ?? w.span,
        w.used_nano_usd,
        w.limit_nano_usd,
        w.ends_at ? `free again in ${until(w.ends_at)}` : "begins with the next request",
      ),
    ),
    h(
      "dl.pairs",
      h("dt", "Paid until"),
      h("dd", day(sub.current_period_end)),
      nano(sub.next_credits_nano_usd) > 0n && [
        h("dt", "Next credits"),
        h("dd", amount(sub.next_credits_nano_usd), ` on ${day(sub.next_credits_at)}`),
      ],
      sub.renewal_nano_usd !== null && [
        h("dt", same ? "Renewal" : `Then ${sub.next_plan}, ${seats(sub.next_quantity)}`),
        h("dd", amount(sub.renewal_nano_usd), ` on ${day(sub.current_period_end)}`),
      ],
    ),
    cancel && h("div.buttons", cancel),
  );
}

function gauge(name, used, limit, hint) {
  const part = share(used, limit);
  return h(
    "div.gauge",
    h("div.bar", h("span", name), h("span.money", `${usd(used)} of ${usd(limit)}`)),
    meter(part, `${name}: ${usd(used)} of ${usd(limit)} used`, part > 0.95 ? "bad" : part > 0.8 ? "warn" : ""),
    h("span.hint", hint),
  );
}

function lotsCard(api, me, signal) {
  return h(
    "section.card.flush",
    h("h2", "Balance"),
    me.api_key.scopes.includes("usage")
      ? later(async () => {
          const b = await api.get("/v1/organization/balance", {}, signal);
          const rows = [
            ["Cash", b.cash_nano_usd],
            ["Extra usage", b.extra_nano_usd],
            ...b.lots.map((lot) => [
              lot.kind === "plan" ? "Plan credits" : `Voucher ${lot.lot}`,
              lot.nano_usd,
              lot.expires_at,
            ]),
            ["Held now", b.held_nano_usd, null],
          ];
          return table(
            [
              { name: "Pocket", class: "clip", cell: ([name]) => name },
              { name: "Expires", class: "nowrap", cell: ([, , at]) => (at ? day(at) : h("span.muted", "never")) },
              { name: "Amount", right: true, cell: ([, value]) => exactAmount(value) },
            ],
            rows,
            { caption: "Balance by pocket" },
          );
        })
      : emptyState("Reading the balance needs the scope usage."),
  );
}

const KINDS = { topup: "Top-up", credit: "Credit note", usage: "Usage" };

function invoices(data) {
  const open = (i) =>
    dialog(`Invoice ${i.number}`, [
      h(
        "dl.pairs.left",
        h("dt", "Billed to"),
        h("dd", i.billed_to),
        i.tax_id && [h("dt", "Tax number"), h("dd", i.tax_id)],
        h("dt", "Date"),
        h("dd", day(i.created_at)),
        h("dt", "Reference"),
        h("dd", h("code", i.reference)),
      ),
      table(
        [
          { name: "", cell: (l) => l.text },
          { name: "Quantity", right: true, cell: (l) => l.quantity },
          { name: "USD", right: true, cell: (l) => exactAmount(l.nano_usd) },
        ],
        [
          ...i.lines,
          { text: "Tax", quantity: "", nano_usd: i.tax_nano_usd },
          { text: "Total", quantity: "", nano_usd: i.total_nano_usd },
        ],
        { caption: "Lines" },
      ),
    ]);
  return table(
    [
      {
        name: "No.",
        cell: (i) =>
          h("button.open", { onclick: () => open(i), "aria-label": `Open invoice ${i.number}` }, String(i.number)),
      },
      { name: "Date", class: "nowrap", cell: (i) => day(i.created_at) },
      { name: "For", cell: (i) => [KINDS[i.kind] ?? i.kind, h("small", i.reference)] },
      { name: "Net", right: true, class: "w1", cell: (i) => exact(i.net_nano_usd) },
      { name: "Tax", right: true, class: "w1", cell: (i) => exact(i.tax_nano_usd) },
      { name: "Total", right: true, cell: (i) => h("strong", exact(i.total_nano_usd)) },
    ],
    data,
    { caption: "Invoices", empty: "No invoice yet. Each payment makes one." },
  );
}

function payments(data) {
  return table(
    [
      { name: "Date", class: "nowrap", cell: (p) => day(p.created_at) },
      { name: "Reference", class: "clip", cell: (p) => h("code", p.id) },
      { name: "Into", class: "w1", cell: (p) => (p.pocket === "extra" ? "extra usage" : p.pocket) },
      { name: "Status", cell: (p) => badge(p.status) },
      { name: "Net", right: true, cell: (p) => exact(p.net_nano_usd) },
      { name: "Tax", right: true, class: "w1", cell: (p) => exact(p.tax_nano_usd) },
      {
        name: "Returned",
        right: true,
        class: "w2",
        cell: (p) => (nano(p.returned_nano_usd) ? exact(p.returned_nano_usd) : "–"),
      },
    ],
    data,
    { caption: "Payments", empty: "No payment yet." },
  );
}

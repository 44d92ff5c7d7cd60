// What is on sale, and what changing to it costs, for how many seats: said before it is done.

import { h, replace } from "../dom.js";
import { day, seats, span } from "../format.js";
import { nano } from "../money.js";
import { amount, badge, dialog, exactAmount, field, later, table } from "../ui.js";

/** Whether the key may spend the organisation's cash on a plan. */
export const owns = (me) => me.api_key.scopes.includes("admin") && me.api_key.scopes.includes("billing");

export function plansCard(api, me, sub, plans, again) {
  const window = (value) => (value === null ? h("span.muted", "no limit") : amount(value));
  const each = (p) => p.most_quantity > 1 && h("small", `each of ${p.least_quantity} to ${seats(p.most_quantity)}`);
  const columns = [
    { name: "Plan", cell: (p) => [h("strong", p.id), p.id === sub?.plan && [" ", badge("yours", "good")]] },
    { name: "Price", right: true, cell: (p) => [amount(p.price_nano_usd), ` ${span(p.months)}`, each(p)] },
    { name: "Credits a month", right: true, cell: (p) => amount(p.credits_nano_usd) },
    { name: "In 5 hours", right: true, class: "w1", cell: (p) => window(p.five_hours_nano_usd) },
    { name: "In 7 days", right: true, class: "w1", cell: (p) => window(p.week_nano_usd) },
    {
      name: "",
      right: true,
      cell: (p) =>
        p.id === sub?.plan && sub.next_plan === sub.plan && sub.next_quantity === sub.quantity && p.most_quantity === 1
          ? ""
          : p.available || p.id === sub?.plan
            ? h(
                "button",
                {
                  onclick: () => preview(api, me, p, sub, again),
                  "aria-label": p.id === sub?.plan ? `Change ${p.id}` : `${sub ? "Change to" : "Subscribe to"} ${p.id}`,
                },
                sub ? "Change…" : "Subscribe…",
              )
            : badge("sold out", "warn"),
    },
  ];
  const shown = table(columns, plans, { caption: "Plans" });
  [...shown.querySelectorAll("tbody tr")].forEach((row, n) => row.classList.toggle("here", plans[n].id === sub?.plan));
  return h("section.card.flush", h("h2", "Plans"), shown);
}

function preview(api, me, plan, sub, again) {
  const least = plan.least_quantity;
  const now = Math.max(least, Math.min(sub?.quantity ?? least, plan.most_quantity));
  const place = h("div");
  const limits = { min: least, max: plan.most_quantity };
  const count = h("input", { name: "quantity", type: "number", ...limits, value: now, required: true });
  const show = () => count.checkValidity() && replace(place, later(() => costs(api, plan, sub, Number(count.value))));
  count.addEventListener("input", show);
  show();
  const may = owns(me);
  dialog(
    sub?.plan === plan.id ? `Change ${plan.id}` : `${sub ? "Change to" : "Subscribe to"} ${plan.id}`,
    [
      plan.most_quantity > 1 &&
        field("Seats", count, `From ${least} to ${plan.most_quantity}; price and credits are for each.`),
      place,
      !may && h("p.hint", "Doing it needs a key with the scopes billing and admin."),
    ],
    {
      action: sub ? "Change plan" : "Subscribe",
      submit: may
        ? async () => {
            await api.post("/v1/organization/subscription", { plan: plan.id, quantity: Number(count.value) });
            again();
          }
        : undefined,
    },
  );
}

/** What so many seats would cost now, by the server's arithmetic. */
async function costs(api, plan, sub, quantity) {
  const p = await api.get(`/v1/organization/plans/${encodeURIComponent(plan.id)}/preview`, { quantity });
  const rest = nano(p.unused_nano_usd);
  const words = {
    subscribe: "It begins at once and is paid from the cash balance.",
    upgrade: "It begins at once, with fresh credits and windows. What is left of the present term is taken off the price.",
    downgrade: `It begins with the next term, on ${day(p.effective_at)}. Nothing is charged until then.`,
    keep: "The plan stays as it is, and a change that was planned is taken back.",
  }[p.kind];
  const term = nano(plan.price_nano_usd) * BigInt(p.quantity);
  const name = `${plan.id}, ${plan.months === 12 ? "one year" : "one month"}`;
  return h(
    "div",
    { style: { display: "grid", gap: "14px" } },
    h("p", words),
    h(
      "dl.pairs",
      p.quantity > 1 && [h("dt", "Each seat"), h("dd", exactAmount(plan.price_nano_usd))],
      h("dt", p.quantity > 1 ? `${name}, ${seats(p.quantity)}` : name),
      h("dd", exactAmount(term)),
      rest > 0n && [h("dt", `Unused part of ${sub.plan}`), h("dd", exactAmount(-rest))],
      h("dt", "Credits a month"),
      h("dd", exactAmount(nano(plan.credits_nano_usd) * BigInt(p.quantity))),
      h("dt", "Runs until"),
      h("dd", day(p.ends_at)),
      h("dt", h("strong", "Charged now")),
      h("dd", h("strong", exactAmount(p.charge_nano_usd))),
    ),
  );
}

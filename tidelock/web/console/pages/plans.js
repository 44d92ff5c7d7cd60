// What is on sale, and what changing to it costs: said before it is done.

import { h } from "../dom.js";
import { day } from "../format.js";
import { nano } from "../money.js";
import { amount, badge, dialog, exactAmount, later, table } from "../ui.js";

/** Whether the key may spend the organisation's cash on a plan. */
export const owns = (me) => me.api_key.scopes.includes("admin") && me.api_key.scopes.includes("billing");

export function plansCard(api, me, sub, plans, again) {
  const window = (value) => (value === null ? h("span.muted", "no limit") : amount(value));
  const columns = [
    { name: "Plan", cell: (p) => [h("strong", p.id), p.id === sub?.plan && [" ", badge("yours", "good")]] },
    { name: "A month", right: true, cell: (p) => amount(p.price_nano_usd) },
    { name: "Credits", right: true, cell: (p) => amount(p.credits_nano_usd) },
    { name: "In 5 hours", right: true, class: "w1", cell: (p) => window(p.five_hours_nano_usd) },
    { name: "In 7 days", right: true, class: "w1", cell: (p) => window(p.week_nano_usd) },
    {
      name: "",
      right: true,
      cell: (p) =>
        p.id === sub?.plan && sub.next_plan === sub.plan
          ? ""
          : p.available || p.id === sub?.plan
            ? h(
                "button",
                {
                  onclick: () => preview(api, me, p, sub, again),
                  "aria-label": `${sub ? "Change to" : "Subscribe to"} ${p.id}`,
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

async function preview(api, me, plan, sub, again) {
  const said = later(async () => {
    const p = await api.get(`/v1/organization/plans/${encodeURIComponent(plan.id)}/preview`);
    const rest = nano(p.unused_nano_usd);
    const words = {
      subscribe: "It begins at once and is paid from the cash balance.",
      upgrade:
        "It begins at once, with fresh credits and windows. What is left of the present month is taken off the price.",
      downgrade: `It begins with the next period, on ${day(p.effective_at)}. Nothing is charged until then.`,
      keep: "The plan stays as it is, and a change that was planned is taken back.",
    }[p.kind];
    return h(
      "div",
      { style: { display: "grid", gap: "14px" } },
      h("p", words),
      h(
        "dl.pairs",
        h("dt", `${plan.id}, one month`),
        h("dd", exactAmount(plan.price_nano_usd)),
        rest > 0n && [h("dt", `Unused part of ${sub.plan}`), h("dd", exactAmount(-rest))],
        h("dt", h("strong", "Charged now")),
        h("dd", h("strong", exactAmount(p.charge_nano_usd))),
      ),
    );
  });
  const may = owns(me);
  dialog(
    `${sub ? "Change to" : "Subscribe to"} ${plan.id}`,
    [said, !may && h("p.hint", "Doing it needs a key with the scopes billing and admin.")],
    {
      action: sub ? "Change plan" : "Subscribe",
      submit: may
        ? async () => {
            await api.post("/v1/organization/subscription", { plan: plan.id });
            again();
          }
        : undefined,
    },
  );
}

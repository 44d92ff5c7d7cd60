// The price book, version by version, and the plans with their seats.

import { h } from "../dom.js";
import { day, seats, span, whole } from "../format.js";
import { exact, perMillion } from "../money.js";
import { amount, badge, heading, meter, table } from "../ui.js";

const COLUMNS = [
  ["input", "Input"],
  ["cached_input", "Cached input"],
  ["cache_write_5m", "Cache write, 5 min"],
  ["cache_write_1h", "Cache write, 1 h"],
  ["output", "Output"],
];

export async function render({ api, signal }) {
  const [prices, plans] = await Promise.all([api.get("/admin/prices", {}, signal), api.get("/admin/plans", {}, signal)]);
  return [
    heading(
      "Prices & plans",
      "USD for a million tokens. A version that was used never changes its numbers; `tidelock admin prices` registers a new one.",
    ),
    prices.data.map(version),
    h(
      "section.card.flush",
      h("h2", "Plans"),
      table(
        [
          { name: "Plan", cell: (p) => h("strong", p.id) },
          {
            name: "Price",
            right: true,
            cell: (p) => [
              amount(p.price_nano_usd),
              ` ${span(p.months)}`,
              p.most_quantity > 1 && h("small", `each of ${p.least_quantity} to ${seats(p.most_quantity)}`),
            ],
          },
          { name: "Credits a month", right: true, cell: (p) => amount(p.credits_nano_usd) },
          {
            name: "In 5 hours",
            right: true,
            class: "w1",
            cell: (p) => (p.five_hours_nano_usd === null ? "–" : amount(p.five_hours_nano_usd)),
          },
          {
            name: "In 7 days",
            right: true,
            class: "w1",
            cell: (p) => (p.week_nano_usd === null ? "–" : amount(p.week_nano_usd)),
          },
          {
            name: "Seats sold",
            right: true,
            cell: (p) => [
              `${whole(p.sold)} of ${whole(p.seats)}`,
              meter(p.seats ? p.sold / p.seats : 1, `${p.id}: ${p.sold} of ${p.seats} seats sold`),
            ],
          },
          { name: "Waiting", right: true, cell: (p) => whole(p.waiting) },
        ],
        plans.data,
        { caption: "Plans", empty: "No plan is on sale. `tidelock admin plans define` makes one." },
      ),
    ),
  ];
}

function version(v) {
  const models = Object.entries(v.models).map(([model, price]) => ({ model, price }));
  const modes = Object.entries(v.modes).map(([mode, [up, down]]) => `${mode} ×${up}/${down}`);
  const tools = Object.entries(v.tools).map(([tool, each]) => `${tool} ${exact(each)} a call`);
  return h(
    "section.card.flush",
    h(
      "div.bar",
      h("h2", v.id, " ", v.current && badge("in force", "good")),
      h("span.muted", v.effective_at ? `from ${day(v.effective_at)}` : "from the beginning"),
    ),
    table(
      [
        { name: "Model", cell: ({ model }) => h("strong", model) },
        ...COLUMNS.map(([id, name], n) => ({
          name,
          right: true,
          class: n === 2 || n === 3 ? "w2" : null,
          cell: ({ price }) => (price[id] === undefined ? h("span.muted", "as input") : perMillion(price[id])),
        })),
      ],
      models,
      { caption: `Prices of ${v.id}` },
    ),
    (modes.length > 0 || tools.length > 0) && h("p.hint.more", [...modes, ...tools].join(" · ")),
  );
}

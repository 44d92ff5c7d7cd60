// The operator's list of organisations.

import { h } from "../dom.js";
import { ago, day, whole } from "../format.js";
import { amount, badge, heading, table } from "../ui.js";
import { detail } from "./organization.js";

export async function render(context) {
  if (context.params[0]) return detail(context, context.params[0]);
  const { api, query, signal } = context;
  const [q, after] = [query.get("q") ?? "", query.get("after") ?? ""];
  const page = await api.get("/admin/organizations", { q, after, limit: 50 }, signal);
  const to = (changes) => {
    const next = new URLSearchParams(Object.entries({ q, after, ...changes }).filter(([, v]) => v));
    return `#/organizations${next.size ? `?${next}` : ""}`;
  };
  const search = h(
    "form",
    {
      role: "search",
      onsubmit: (event) => {
        event.preventDefault();
        location.hash = to({ q: new FormData(event.target).get("q"), after: "" });
      },
    },
    h("input", {
      name: "q",
      type: "search",
      value: q,
      placeholder: "Find by id or name",
      "aria-label": "Find an organisation",
    }),
  );
  return [
    heading("Organisations", "Balances as of now; requests and spending of the last 30 days.", search),
    h(
      "section.card.flush",
      table(
        [
          {
            name: "Organisation",
            class: "clip",
            cell: (o) => [
              h("strong", o.name),
              o.suspended_at !== null && [" ", badge("suspended", "bad")],
              h("small", o.id),
            ],
          },
          { name: "Plan", class: "w1", cell: (o) => (o.plan ? badge(o.plan) : h("span.muted", "–")) },
          { name: "Available", right: true, cell: (o) => amount(o.available_nano_usd) },
          { name: "Spent", right: true, cell: (o) => amount(o.spent_30d_nano_usd) },
          { name: "Requests", right: true, class: "w1", cell: (o) => whole(o.requests_30d) },
          {
            name: "Last request",
            class: "w2 nowrap",
            cell: (o) => (o.last_request_at ? ago(o.last_request_at) : h("span.muted", "–")),
          },
          { name: "Since", class: "w2 nowrap", cell: (o) => (o.created_at ? day(o.created_at) : h("span.muted", "–")) },
        ],
        page.data,
        {
          caption: "Organisations",
          onrow: (o) => `#/organizations/${encodeURIComponent(o.id)}`,
          empty: q
            ? `No organisation with “${q}” in its id or name.`
            : "No organisation yet. The first key of a customer makes one.",
        },
      ),
      (page.has_more || after) &&
        h(
          "div.more",
          h(
            "div.actions",
            after && h("a", { href: to({ after: "" }) }, "First page"),
            page.has_more && h("a", { href: to({ after: page.last_id }) }, "Next page"),
          ),
        ),
    ),
  ];
}

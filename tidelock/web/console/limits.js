// Limits as bars and as a ladder, for a customer's page and the operator's.

import { h } from "./dom.js";
import { compact, duration, whole } from "./format.js";
import { nano, share, usd } from "./money.js";
import { meter, table } from "./ui.js";

export const KINDS = [
  ["concurrency", "Requests at the same time"],
  ["requests", "Requests a minute"],
  ["tokens", "Tokens a minute"],
  ["day_tokens", "Tokens a day"],
];

/** The bars of one scope of `now`. */
export function bars(now) {
  return h(
    "div.gauges",
    KINDS.map(([id, name]) => {
      const { limit, used, reset_ms: reset } = now[id];
      if (limit === null)
        return h(
          "div.gauge",
          h("div.bar", h("span", name), h("span.muted", used === null ? "no limit" : `${whole(used)}, no limit`)),
        );
      const part = limit ? used / limit : 1;
      return h(
        "div.gauge",
        h(
          "div.bar",
          h("span", name),
          h("span.money", h("strong", whole(Math.max(0, limit - used))), ` of ${whole(limit)} left`),
        ),
        meter(part, `${name}: ${used} of ${limit} used`, part > 0.95 ? "bad" : part > 0.8 ? "warn" : ""),
        h(
          "span.hint",
          reset ? `all free again in ${duration(reset)}` : used ? "frees with the end of a request" : "all of it is free",
        ),
      );
    }),
  );
}

export function ladder({ ladder: { name, tiers }, tier, recharged_nano_usd: recharged }) {
  if (!tiers.length)
    return h("p.muted", { style: { padding: "0 20px 18px" } }, "This service limits nobody: no ladder is in force.");
  const value = (limit) => (limit === null ? h("span.muted", "no limit") : compact(limit));
  const shown = table(
    [
      { name: "Tier", cell: (t) => [h("strong", t.tier), t.tier === tier && h("span.muted", " you are here")] },
      { name: "From recharges of", right: true, cell: (t) => usd(t.from_nano_usd) },
      ...KINDS.map(([id, title], n) => ({
        name: title,
        right: true,
        class: n === 1 ? null : n === 2 ? "w1" : "w2",
        cell: (t) => value(t.limits[id]),
      })),
    ],
    tiers,
    { caption: `The ladder ${name}` },
  );
  [...shown.querySelectorAll("tbody tr")].forEach((row, n) => row.classList.toggle("here", tiers[n].tier === tier));
  const next = tiers.find((t) => t.tier === tier + 1);
  const missing = next && nano(next.from_nano_usd) - nano(recharged);
  return [
    shown,
    missing > 0n &&
      h(
        "div.gauge",
        { style: { padding: "14px 20px 18px" } },
        h(
          "div.bar",
          h("span", `To tier ${next.tier}`),
          h("span.money", `${usd(recharged)} of ${usd(next.from_nano_usd)} recharged, ${usd(missing)} to go`),
        ),
        meter(share(recharged, next.from_nano_usd), `Way to tier ${next.tier}`),
      ),
  ];
}

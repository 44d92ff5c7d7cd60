// Whether the books are sound: everything recomputed from the entries, and other records compared with them.

import { h, replace } from "../dom.js";
import { day, duration, moment, whole } from "../format.js";
import { log } from "../log.js";
import { exact, nano } from "../money.js";
import { badge, card, emptyState, errorState, heading, later, loading, stat, table } from "../ui.js";

const CHECKS = [
  ["sum_nano", "Sum of all entries", true],
  ["unbalanced", "Transactions that do not sum to zero"],
  ["wrong_balances", "Balances that are not the sum of their entries"],
  ["overspend_nano", "Spent beyond what was paid in or given", true],
  ["unmetered", "Settlements and usage that do not match"],
  ["held_nano", "Held, minus the open holds", true],
  ["broken_links", "Broken links of the hash chains"],
];

export async function render({ api, signal }) {
  const place = h("div");
  const verify = async () => {
    button.disabled = true;
    replace(place, card(null, loading(4)));
    try {
      replace(place, audit(await api.get("/admin/ledger", {}, signal)));
    } catch (error) {
      if (error.name !== "AbortError") replace(place, errorState(error, verify));
    }
    button.disabled = false;
  };
  const button = h("button.primary", { onclick: verify }, "Verify again");
  verify();
  return [
    heading("Ledger", "Recomputed from the entries on this page's opening; no stored balance is believed.", button),
    place,
    h(
      "section.card.flush",
      h("h2", "Reconciliation"),
      later(() => reconciled(api, signal)),
    ),
    h("h2", "What was done to the whole service"),
    later(() => log((after) => api.get("/admin/audit_logs", { after, limit: 20 }, signal)), 4),
  ];
}

function audit(a) {
  const rows = CHECKS.map(([id, name, money]) => ({ name, value: a[id], money }));
  return h(
    "div",
    { style: { display: "grid", gap: "18px" } },
    h(
      "dl.stats",
      stat("Verdict", badge(a.sound ? "sound" : "not sound", a.sound ? "good" : "bad")),
      stat("Transactions", whole(a.transactions)),
      stat("Entries", whole(a.entries)),
      stat(
        "Verified",
        duration(a.took_ms),
        `${day(a.verified_at)}, ${moment(a.verified_at * 1000)
          .split(" ")
          .at(-1)} UTC`,
      ),
    ),
    h(
      "section.card.flush",
      table(
        [
          { name: "Check", cell: (r) => r.name },
          { name: "Found", right: true, cell: (r) => (r.money ? exact(r.value) : whole(r.value)) },
          {
            name: "",
            right: true,
            cell: (r) => (nano(r.value) === 0n ? badge("holds", "good") : badge("broken", "bad")),
          },
        ],
        rows,
        { caption: "Checks" },
      ),
      h("p.hint.more", "Root of all chains: ", h("code", { style: { "overflow-wrap": "anywhere" } }, a.root)),
    ),
  );
}

async function reconciled(api, signal) {
  let r;
  try {
    r = await api.get("/admin/reconciliation", {}, signal);
  } catch (error) {
    if (error.status === 404) return emptyState("Not available on this server.");
    throw error;
  }
  const facts = [
    h("dt", "Verdict"),
    h(
      "dd",
      badge(r.sound ? "all records agree" : `${whole(r.discrepancies ?? 0)} discrepancies`, r.sound ? "good" : "bad"),
    ),
    r.since && [h("dt", "Time compared"), h("dd", `${moment(r.since * 1000)} to ${moment(r.until * 1000)} UTC`)],
    r.last && [
      h("dt", "Last periodic run"),
      h("dd", `${moment(r.last.finished * 1000)} UTC, ${whole(r.last.discrepancies)} discrepancies`),
    ],
    r.drift_nano_usd !== undefined && [h("dt", "Drift"), h("dd", exact(r.drift_nano_usd))],
    r.rows_missing !== undefined && [h("dt", "Rows missing"), h("dd", whole(r.rows_missing))],
    Object.entries(r.checked ?? {}).map(([what, count]) => [
      h("dt", `Looked at: ${what.replaceAll("_", " ")}`),
      h("dd", whole(count)),
    ]),
    Object.entries(r.by_kind ?? {}).map(([what, count]) => [
      h("dt", what.replaceAll("_", " ")),
      h("dd", badge(whole(count), "bad")),
    ]),
  ];
  const upstreams = Object.entries(r.upstreams ?? {}).map(([name, counts]) => ({ name, counts }));
  return h(
    "div",
    { style: { padding: "0 20px 18px", display: "grid", gap: "16px" } },
    h("dl.pairs", facts),
    upstreams.length > 0 &&
      upstreams.map(({ name, counts }) =>
        h(
          "p.hint",
          h("strong", name),
          ": ",
          Object.entries(counts)
            .map(([k, v]) => `${k.replaceAll("_", " ")} ${whole(v)}`)
            .join(", "),
        ),
      ),
    r.listed?.length > 0 &&
      table(
        [
          { name: "Kind", cell: (d) => d.kind },
          { name: "Id", class: "clip", cell: (d) => h("code", d.id) },
          { name: "Customer", class: "clip w1", cell: (d) => d.customer },
          { name: "Expected", right: true, cell: (d) => whole(d.expected) },
          { name: "Found", right: true, cell: (d) => whole(d.found) },
          { name: "Worth", right: true, cell: (d) => exact(d.nano_usd) },
        ],
        r.listed.slice(0, 50),
        { caption: "Discrepancies" },
      ),
  );
}

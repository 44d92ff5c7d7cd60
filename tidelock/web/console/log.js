// The audit log as a list that grows downwards, for a customer's page and the operator's.

import { h, replace } from "./dom.js";
import { day, moment } from "./format.js";
import { errorState, table, tableRow } from "./ui.js";

const COLUMNS = [
  {
    name: "When (UTC)",
    class: "nowrap",
    cell: (e) => h("span", { title: day(e.effective_at) }, moment(e.effective_at * 1000)),
  },
  { name: "What", cell: (e) => h("strong", e.action ?? e.type) },
  { name: "Who", class: "clip w1", cell: (e) => (e.actor.type === "api_key" ? h("code", e.actor.id) : e.actor.id) },
  { name: "To what", class: "clip w1", cell: (e) => h("code", e.target) },
  { name: "Details", class: "clip w2", cell: (e) => details(e.detail) },
];

const details = (detail) =>
  Object.entries(detail)
    .filter(([, v]) => v !== null && v !== "" && !(Array.isArray(v) && !v.length))
    .map(([name, v]) => `${name}: ${Array.isArray(v) ? v.join(" ") : typeof v === "object" ? JSON.stringify(v) : v}`)
    .join(" · ");

/** `load(after)` gives a page of entries. */
export async function log(load) {
  const first = await load();
  let cursor = first.has_more ? first.last_id : null;
  const node = h("div", table(COLUMNS, first.data, { caption: "Audit log", empty: "Nothing was done yet." }));
  const button = h("button", { onclick: older }, "Older entries");
  const more = h("div.more", { hidden: !cursor }, button);
  async function older() {
    try {
      const page = await load(cursor);
      node.querySelector("tbody").append(...page.data.map((e) => tableRow(COLUMNS, e)));
      cursor = page.has_more ? page.last_id : null;
      replace(more, button);
      more.hidden = !cursor;
    } catch (error) {
      replace(more, errorState(error, older));
    }
  }
  return h("section.card.flush", node, more);
}

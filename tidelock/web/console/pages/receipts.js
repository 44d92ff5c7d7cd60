// Every request as it settles: a list that is live, filters, and one receipt in full.

import { h, replace } from "../dom.js";
import { COLUMNS, follow, link, startOf } from "../receipts.js";
import { errorState, heading, loading, select, table, tableRow } from "../ui.js";
import { detail } from "./receipt.js";

const PAGE = 50;
const MOST = 400; // rows kept on the page while it is live
const OUTCOMES = [
  ["", "Any outcome"],
  ["stop", "Finished"],
  ["length", "Length limit"],
  ["abort", "Cut short"],
  ["lost", "Server died"],
  ["refused", "Refused"],
];

export async function render(context) {
  const { api, me, params, query, signal } = context;
  if (params[0]) return detail(context, params[0]);
  const wanted = Object.fromEntries(
    ["outcome", "model", "api_key_id", "project_id"].map((name) => [name, query.get(name) ?? ""]),
  );
  const filter = (name) => (value) => {
    const next = new URLSearchParams(Object.entries({ ...wanted, [name]: value }).filter(([, said]) => said));
    location.hash = `#/receipts${next.size ? `?${next}` : ""}`;
  };
  const [first, choices] = await Promise.all([
    api.get("/v1/organization/receipts", { ...wanted, limit: PAGE }, signal),
    filters(api, me, signal),
  ]);
  const state = h("span.live", { role: "status" }, "Connecting");
  const pause = h("button", { type: "button", "aria-pressed": "false" }, "Pause");
  const controls = h(
    "div.filters",
    select(OUTCOMES, wanted.outcome, filter("outcome"), "Outcome"),
    choices.models.length > 1 && select([["", "All models"], ...choices.models], wanted.model, filter("model"), "Model"),
    choices.keys.length > 1 &&
      select([["", "All keys"], ...choices.keys], wanted.api_key_id, filter("api_key_id"), "Key"),
    choices.projects.length > 1 &&
      select([["", "All projects"], ...choices.projects], wanted.project_id, filter("project_id"), "Project"),
  );
  const list = listOf(api, wanted, first, signal);
  live(api, list, wanted, startOf(first), state, pause, signal);
  return [
    heading("Receipts", "One line per request, as it settles. Costs are exact to the nano-dollar.", state, pause),
    controls,
    h("section.card.flush", list.node),
  ];
}

/** The table with what is on it, and the way to more. */
function listOf(api, wanted, first, signal) {
  const known = new Set(first.data.map((r) => r.id));
  const node = h("div");
  let cursor = first.has_more ? first.last_id : null;
  const more = h("div.more", h("button", { type: "button", onclick: older }, "Older receipts"));
  const draw = () =>
    replace(
      node,
      table(COLUMNS, first.data, {
        onrow: link,
        caption: "Receipts",
        empty: Object.values(wanted).some(Boolean)
          ? "No receipt fits these filters."
          : "No request yet. They appear here as they settle.",
      }),
      more,
    );
  more.hidden = !cursor;
  draw();

  async function older() {
    replace(more, loading(1));
    try {
      const page = await api.get("/v1/organization/receipts", { ...wanted, limit: PAGE, after: cursor }, signal);
      const fresh = page.data.filter((r) => !known.has(r.id));
      fresh.forEach((r) => known.add(r.id));
      node.querySelector("tbody").append(...fresh.map((r) => tableRow(COLUMNS, r, link)));
      cursor = page.has_more ? page.last_id : null;
      replace(more, h("button", { type: "button", onclick: older }, "Older receipts"));
      more.hidden = !cursor;
    } catch (error) {
      replace(more, errorState(error, older));
    }
  }

  const put = (receipt) => {
    if (known.has(receipt.id)) return;
    known.add(receipt.id);
    if (!node.querySelector("tbody")) {
      first.data.push(receipt);
      draw();
      return;
    }
    const row = tableRow(COLUMNS, receipt, link);
    row.classList.add("fresh");
    const body = node.querySelector("tbody");
    body.prepend(row);
    if (body.rows.length > MOST) body.lastElementChild.remove();
  };
  return { node, put };
}

function live(api, list, wanted, startMs, state, pause, signal) {
  const held = [];
  let paused = false;
  const fits = (r) =>
    (!wanted.outcome || (r.status === "refused" ? "refused" : r.finish_reason) === wanted.outcome) &&
    (!wanted.model || r.model === wanted.model) &&
    (!wanted.api_key_id || r.api_key_id === wanted.api_key_id) &&
    (!wanted.project_id || r.project_id === wanted.project_id);
  pause.addEventListener("click", () => {
    paused = !paused;
    pause.setAttribute("aria-pressed", String(paused));
    pause.textContent = paused ? "Continue" : "Pause";
    if (!paused) held.splice(0).forEach(list.put);
  });
  follow(
    api,
    startMs,
    {
      onNew: (receipt) => {
        if (!fits(receipt)) return;
        if (paused) pause.textContent = `Continue (${held.push(receipt)} new)`;
        else list.put(receipt);
      },
      onState: (on) => {
        state.classList.toggle("on", on);
        state.textContent = on ? "Live" : "Connecting again";
      },
      onSkipped: () => {
        if (!list.node.querySelector(".notice"))
          list.node.prepend(h("p.notice.warn", "More came than is shown live; reload the page for all of them."));
      },
    },
    signal,
  );
}

/** What can be filtered by, as far as the key may know it. */
async function filters(api, me, signal) {
  const list = async (scope, path) => (me.api_key.scopes.includes(scope) ? (await api.get(path, {}, signal)).data : []);
  const models = (await list("model", "/v1/models")).map((m) => [m.id, m.id]);
  const projects = (await list("admin", "/v1/organization/projects")).map((p) => [p.id, p.name]);
  const keys = await Promise.all(
    projects.map(async ([id]) =>
      (await list("admin", `/v1/organization/projects/${id}/api_keys`)).map((k) => [k.id, k.name || k.redacted_value]),
    ),
  );
  return { models, projects, keys: keys.flat() };
}

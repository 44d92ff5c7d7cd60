// What a receipt looks like in a list, wherever one is shown; and the stream of new ones.

import { h } from "./dom.js";
import { clock, duration, moment, whole } from "./format.js";
import { ofReceipt } from "./tokens.js";
import { badge, exactAmount } from "./ui.js";

export const CAUSES = {
  balance: "the balance did not cover it",
  limit_rpm: "requests per minute",
  limit_tpm: "tokens per minute",
  limit_tpd: "tokens per day",
  limit_concurrency: "requests at the same time",
  limit: "a rate limit",
  overloaded: "the engine was full",
  bad_request: "the request was not valid",
  not_found: "no such model or object",
  permission: "the key may not do this",
  timeout: "it took too long",
  storage: "the books could not be reached",
  server: "the server failed",
  client_left: "the client left",
  conflict: "a conflict with another request",
  too_large: "the request was too large",
  key: "a wrong key",
};
const SHORT = {
  limit_rpm: "RPM limit",
  limit_tpm: "TPM limit",
  limit_tpd: "TPD limit",
  limit_concurrency: "concurrency limit",
  bad_request: "bad request",
};
const ENDS = { stop: "finished", length: "length limit", abort: "cut short", lost: "server died" };

export function outcome(r) {
  if (r.status === "refused") {
    const why = SHORT[r.cause] ?? r.cause.replaceAll("_", " ");
    return badge(`${r.http_status} ${why}`, "bad", r.message ?? CAUSES[r.cause]);
  }
  return badge(
    r.cause ? `cut: ${SHORT[r.cause] ?? r.cause}` : (ENDS[r.finish_reason] ?? r.finish_reason),
    r.finish_reason === "stop" ? "good" : "warn",
    r.message ?? (r.cause ? CAUSES[r.cause] : null),
  );
}

export const shortId = (id) => (id.length > 14 ? `${id.slice(0, 8)}…${id.slice(-4)}` : id);

const count = (part) => (r) => (r.tokens ? whole(ofReceipt(r)[part]) : "–");

export const COLUMNS = [
  {
    name: "Time (UTC)",
    class: "nowrap",
    cell: (r) =>
      h(
        "span",
        { title: `${moment(r.created_ms)} UTC · ${r.id}` },
        new Date(r.created_ms).toDateString() === new Date().toDateString() ? clock(r.created_ms) : moment(r.created_ms),
      ),
  },
  {
    name: "Model",
    class: "clip",
    cell: (r) => [
      r.model,
      r.price_version && h("small", { title: "price version" }, [r.price_version, r.mode].filter(Boolean).join(" · ")),
    ],
  },
  {
    name: "Key",
    class: "clip w2",
    cell: (r) => [r.api_key_name || h("code", shortId(r.api_key_id)), r.project_name && h("small", r.project_name)],
  },
  { name: "Input", right: true, class: "w1", cell: count("fresh") },
  { name: "Cached", right: true, class: "w2", cell: count("cached") },
  { name: "Writes", right: true, class: "w3", cell: count("cache_write") },
  { name: "Output", right: true, class: "w1", cell: count("output") },
  {
    name: "Cost",
    right: true,
    cell: (r) =>
      r.tokens
        ? [
            exactAmount(r.cost_nano_usd),
            r.held_nano_usd !== null && h("small", { title: "held while it ran" }, "of ", exactAmount(r.held_nano_usd)),
          ]
        : "–",
  },
  {
    name: "First token",
    right: true,
    class: "w3",
    cell: (r) => [
      duration(r.latency?.first_ms),
      r.latency && h("small", { title: "until the model was asked" }, `${duration(r.latency.wait_ms)} wait`),
    ],
  },
  { name: "Total", right: true, class: "w2", cell: (r) => duration(r.latency?.total_ms) },
  { name: "Outcome", cell: outcome },
];
export const BRIEF = COLUMNS.filter(({ name }) => !["Writes", "First token"].includes(name));
export const link = (r) => `#/receipts/${encodeURIComponent(r.id)}`;

const OVERLAP_MS = 5000; // what is written late may carry a time this long before what was already seen

/** Where to listen from, so that what settled late is heard, but nothing from before the oldest that `page` shows. */
export function startOf(page) {
  const [newest, oldest] = [page.data[0]?.created_ms ?? Date.now(), page.data.at(-1)?.created_ms];
  return Math.max(0, newest - OVERLAP_MS, page.has_more ? oldest : 0);
}

/** Calls `onNew` for receipts as they settle, until `signal`; `onState` says whether we hear. Comes back after every cut. */
export async function follow(api, startMs, { onNew, onSkipped = () => {}, onState = () => {} }, signal) {
  let since = startMs;
  let newest = startMs;
  const seen = new Set();
  while (!signal.aborted) {
    try {
      onState(true);
      await api.stream(
        "/v1/organization/receipts/stream",
        { since_ms: Math.floor(since) },
        (name, data) => {
          if (name === "skipped") onSkipped();
          if (name !== "receipt" || seen.has(data.id)) return;
          seen.add(data.id);
          newest = Math.max(newest, data.created_ms);
          since = Math.max(since, newest - OVERLAP_MS);
          onNew(data);
        },
        signal,
      );
    } catch (error) {
      if (error.name === "AbortError" || error.status === 401 || error.status === 403) return;
    }
    onState(false);
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

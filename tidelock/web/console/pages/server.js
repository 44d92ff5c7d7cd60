// What the server does this second: requests, tokens, latencies, and the upstreams behind it.

import { lines } from "../charts/xy.js";
import { h, replace } from "../dom.js";
import { clock, compact, duration, percent, whole } from "../format.js";
import { parse, quantile, total } from "../prometheus.js";
import { badge, card, emptyState, errorState, heading, stat, table } from "../ui.js";

const EVERY_MS = 2000;
const KEPT = 90; // points of the curves: three minutes

export async function render({ api, signal }) {
  const [state, now, curves, upstreams, about] = [
    h("span.live.on", { role: "status" }, "Live"),
    h("div"),
    h("div.columns"),
    h("div"),
    h("div"),
  ];
  const seen = [];
  const look = async () => {
    const [health, text] = await Promise.all([api.get("/health", {}, signal), api.text("/metrics", signal)]);
    seen.push({ at: Date.now(), metrics: parse(text) });
    if (seen.length > KEPT) seen.shift();
    replace(now, numbers(seen));
    replace(upstreams, upstreamCard(health, seen.at(-1).metrics));
    if (!about.firstChild) replace(about, aboutCard(health, seen.at(-1).metrics));
    if (seen.length > 1) draw(curves, seen);
  };
  await look();
  (async () => {
    while (!signal.aborted) {
      await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
      if (signal.aborted || document.hidden) continue;
      try {
        await look();
        state.classList.add("on");
        state.textContent = "Live";
      } catch (error) {
        if (error.name === "AbortError") return;
        state.classList.remove("on");
        state.textContent = "Connecting again";
        if (error.status) replace(now, errorState(error));
      }
    }
  })();
  return [
    heading(
      "Server",
      "The worker that answered this page, every two seconds. Other workers have numbers of their own.",
      state,
    ),
    now,
    curves,
    upstreams,
    about,
  ];
}

const rate = (a, b, name, wanted) => {
  const [before, after] = [total(a.metrics, name, wanted), total(b.metrics, name, wanted)];
  return after === null ? 0 : Math.max(0, after - (before ?? 0)) / ((b.at - a.at) / 1000);
};

function numbers(seen) {
  const last = seen.at(-1);
  const m = last.metrics;
  const back = seen[Math.max(0, seen.length - 6)];
  const prompt = total(m, "tidelock_prompt_tokens_total") ?? 0;
  const q = (name, share) => duration((quantile(m, name, share) ?? NaN) * 1000);
  const said = (text) => (text.startsWith("NaN") ? "–" : text);
  return h(
    "dl.stats.four",
    stat(
      "Running",
      whole(total(m, "tidelock_requests", { state: "running" }) ?? 0),
      `${whole(total(m, "tidelock_requests", { state: "waiting" }) ?? 0)} waiting`,
    ),
    stat(
      "Tokens a second",
      seen.length > 1 ? compact(rate(back, last, "tidelock_generated_tokens_total")) : "…",
      `${compact(total(m, "tidelock_generated_tokens_total") ?? 0)} since the start`,
    ),
    stat(
      "Requests a second",
      seen.length > 1 ? compact(rate(back, last, "tidelock_requests_finished_total")) : "…",
      `${compact(total(m, "tidelock_requests_finished_total") ?? 0)} finished`,
    ),
    stat(
      "First token",
      said(q("tidelock_time_to_first_token_seconds", 0.5)),
      `p99 ${said(q("tidelock_time_to_first_token_seconds", 0.99))}`,
    ),
    stat("Whole request", said(q("tidelock_request_seconds", 0.5)), `p99 ${said(q("tidelock_request_seconds", 0.99))}`),
    stat(
      "Cache hits",
      prompt ? percent((total(m, "tidelock_cached_tokens_total") ?? 0) / prompt) : "–",
      "of prompt tokens",
    ),
    stat("Errors", whole(total(m, "tidelock_policy_errors_total") ?? 0), "the model could not answer"),
    stat("Memory", memory(total(m, "process_resident_memory_bytes")), "resident"),
  );
}

const memory = (bytes) =>
  bytes === null ? "–" : bytes > 1e9 ? `${(bytes / 2 ** 30).toFixed(1)} GiB` : `${Math.round(bytes / 2 ** 20)} MiB`;

function draw(place, seen) {
  if (place.contains(document.activeElement) || place.matches(":hover")) return; // somebody reads it
  const labels = seen.map(({ at }) => clock(at));
  const over = (name) => seen.map((s, n) => (n ? rate(seen[Math.max(0, n - 3)], s, name) : null));
  const state = (word) => seen.map(({ metrics }) => total(metrics, "tidelock_requests", { state: word }) ?? 0);
  replace(
    place,
    card(
      null,
      lines({
        title: "Tokens a second",
        unit: "sampled",
        labels,
        shown: (v) => compact(v),
        series: [{ name: "Tokens a second", tone: "a", area: true, values: over("tidelock_generated_tokens_total") }],
      }),
    ),
    card(
      null,
      lines({
        title: "Requests",
        unit: "now",
        labels,
        least: 1,
        shown: whole,
        axis: compact,
        series: [
          { name: "Running", tone: "a", values: state("running") },
          { name: "Waiting", tone: "c", values: state("waiting") },
        ],
      }),
    ),
  );
}

// What a circuit's states mean to whoever looks.
const STATES = {
  closed: ["working", "good"],
  "half-open": ["being tried", "warn"],
  open: ["out", "bad"],
  "held back": ["held back", "warn"],
};

function upstreamCard({ upstreams }, metrics) {
  if (!upstreams?.length) return null;
  const of = (u, name) => total(metrics, `tidelock_upstream_${name}_total`, { upstream: u.name });
  const count = (name) => (u) => (of(u, name) === null ? "–" : whole(of(u, name)));
  const busy = (u) => `${whole(u.in_flight ?? 0)}${u.max_in_flight ? ` of ${whole(u.max_in_flight)}` : ""}`;
  const columns = [
    { name: "Name", cell: (u) => h("strong", u.name) },
    { name: "Kind", class: "w1", cell: (u) => u.kind ?? "–" },
    { name: "State", cell: (u) => badge(...(STATES[u.state] ?? [String(u.state), "warn"])) },
    { name: "In flight", right: true, cell: busy },
    { name: "Requests", right: true, class: "w1", cell: count("requests") },
    { name: "Failures", right: true, class: "w1", cell: count("failures") },
    { name: "Weights", right: true, class: "w2", cell: (u) => u.weights_version ?? "–" },
  ];
  return h("section.card.flush", h("h2", "Upstreams"), table(columns, upstreams, { caption: "Upstreams" }));
}

function aboutCard(health, metrics) {
  const routes = [...(metrics.get("tidelock_http_responses_total") ?? [])]
    .filter(({ labels }) => labels.status >= "400")
    .sort((a, b) => b.value - a.value)
    .slice(0, 8);
  return h(
    "div.columns",
    card(
      "Serving",
      h(
        "dl.pairs",
        h("dt", "Status"),
        h("dd", badge(health.status, health.status === "ok" ? "good" : "bad")),
        h("dt", "Model"),
        h("dd", health.model),
        h("dt", "Weights version"),
        h("dd", String(health.weights_version)),
        h("dt", "Exact token ids"),
        h("dd", health.exact ? "yes" : "no: text went in between"),
        health.numerics && [h("dt", "Numerics"), h("dd", health.numerics)],
        health.max_abs_dlogp !== undefined && [h("dt", "max |Δ log p|"), h("dd", String(health.max_abs_dlogp))],
      ),
    ),
    h(
      "section.card.flush",
      h("h2", "Answers that were errors"),
      routes.length
        ? table(
            [
              { name: "Route", cell: ({ labels }) => h("code", labels.route) },
              { name: "Status", cell: ({ labels }) => badge(labels.status, labels.status >= "500" ? "bad" : "warn") },
              { name: "Times", right: true, cell: ({ value }) => whole(value) },
            ],
            routes,
            { caption: "Errors" },
          )
        : emptyState("None since the start."),
    ),
  );
}

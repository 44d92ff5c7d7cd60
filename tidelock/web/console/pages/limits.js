// Where the organisation stands on the ladder, and how much of each limit is free this second.

import { h, replace } from "../dom.js";
import { shortId } from "../receipts.js";
import { bars, ladder } from "../limits.js";
import { usd } from "../money.js";
import { card, heading } from "../ui.js";

const EVERY_MS = 2000;

export async function render({ api, signal }) {
  const limits = await api.get("/v1/organization/limits", {}, signal);
  const state = h("span.live.on", { role: "status" }, "Live");
  const places = new Map();
  const scopes = (now) => Object.keys(now);
  const cards = scopes(limits.now).map((scope) => {
    const place = h("div", bars(limits.now[scope]));
    places.set(scope, place);
    return card(
      scope === ""
        ? "Whole organisation"
        : h("h2", scope.startsWith("proj") ? "Project " : "Key ", h("code", shortId(scope))),
      place,
    );
  });
  follow(api, places, state, signal);
  return [
    heading(
      "Limits",
      "A request counts with its prompt and the most it may answer; what it does not use is given back at its end.",
      state,
    ),
    h("div.columns", cards),
    h(
      "section.card.flush",
      h(
        "div.bar",
        h("h2", limits.tier === null ? "Tiers" : `Tier ${limits.tier}`),
        h("span.muted", `${usd(limits.recharged_nano_usd)} recharged in all`),
      ),
      ladder(limits),
    ),
  ];
}

async function follow(api, places, state, signal) {
  while (!signal.aborted) {
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
    if (signal.aborted || document.hidden) continue;
    try {
      const { now } = await api.get("/v1/organization/limits", {}, signal);
      for (const [scope, place] of places) if (now[scope]) replace(place, bars(now[scope]));
      state.classList.add("on");
      state.textContent = "Live";
    } catch (error) {
      if (error.name === "AbortError" || error.status === 401) return;
      state.classList.remove("on");
      state.textContent = "Connecting again";
    }
  }
}

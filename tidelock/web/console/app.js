// Signing in, the list of pages, and which one is shown. The key lives in this tab's sessionStorage and in request headers.

import { Api } from "./api.js";
import { h, icon, replace } from "./dom.js";
import { errorState, loading } from "./ui.js";

const STORED = "tidelock.key";
const root = document.getElementById("app");
let [api, me, leaving, frame, shownPath] = [null, null, new AbortController(), null, null];

// id, name, who may (a scope of the key, or "operator")
const PAGES = [
  ["overview", "Overview", "usage"],
  ["receipts", "Receipts", "usage"],
  ["keys", "API keys", "model"],
  ["usage", "Usage", "usage"],
  ["billing", "Billing", "billing"],
  ["limits", "Limits", "usage"],
  ["members", "Members & projects", "admin"],
  ["audit", "Audit log", "admin"],
];
const OPERATOR = [
  ["business", "Business"],
  ["organizations", "Organisations"],
  ["ledger", "Ledger"],
  ["server", "Server"],
  ["prices", "Prices & plans"],
];
const may = (scope) => (scope === "model" ? true : me.api_key.scopes.includes(scope));

async function start() {
  const key = sessionStorage.getItem(STORED);
  if (!key) return gate();
  api = new Api(key, (error) => signOut(error.message));
  replace(root, h("div.gate", loading()));
  try {
    me = await api.get("/v1/organization");
  } catch (error) {
    return error.status === 401 ? undefined : gate(error.message);
  }
  build();
  await show();
}

function gate(failed = "") {
  document.title = "Sign in · Tidelock console";
  frame = null;
  const input = h("input", {
    type: "password",
    name: "key",
    autocomplete: "off",
    spellcheck: "false",
    required: true,
    placeholder: "sk-…",
    "aria-describedby": "why",
  });
  const form = h(
    "form",
    {
      onsubmit: (event) => {
        event.preventDefault();
        sessionStorage.setItem(STORED, input.value.trim());
        if (!location.hash) history.replaceState(null, "", "#/overview");
        start();
      },
    },
    h("span.brand", h("img", { src: "mark.svg", alt: "" }), "Tidelock"),
    h(
      "div",
      h("h1", "Sign in with an API key"),
      h("p", "What the key may see is what you will see. An operator's key also opens the service's own pages."),
    ),
    failed && h("p.failed", { role: "alert" }, failed),
    h("label.field", h("span.name", "API key"), input),
    h("button.primary", "Continue"),
    h("p.small", { id: "why" }, "The key stays in this tab and is forgotten when you close it."),
  );
  replace(root, h("main.gate", form));
  input.focus();
}

function signOut(failed = "") {
  leaving.abort();
  sessionStorage.removeItem(STORED);
  [api, me] = [null, null];
  gate(failed);
}

function build() {
  const link = ([id, name]) =>
    h("a", { href: `#/${id}`, "data-page": id, onclick: () => side.classList.remove("open") }, icon(id), name);
  const own = PAGES.filter(([, , scope]) => may(scope));
  const menu = h(
    "button.menu",
    {
      "aria-label": "Pages",
      "aria-expanded": "false",
      onclick: () => {
        menu.setAttribute("aria-expanded", String(side.classList.toggle("open")));
      },
    },
    icon("menu"),
  );
  const side = h(
    "aside.side",
    h("a.brand", { href: `#/${own[0][0]}` }, h("img", { src: "mark.svg", alt: "" }), "Tidelock"),
    menu,
    h("nav", { "aria-label": "Organisation" }, own.map(link)),
    me.operator && [h("h3", "Operator"), h("nav", { "aria-label": "Operator" }, OPERATOR.map(link))],
    h(
      "div.who",
      h("strong", me.name),
      h("span", me.api_key.name || "key", " ", h("code", me.api_key.redacted_value)),
      h("button.quiet", { onclick: () => signOut() }, icon("out"), "Sign out"),
    ),
  );
  const main = h("main", { id: "page", tabindex: "-1" });
  frame = { side, main };
  const skip = h(
    "a.skip",
    {
      href: "#page",
      onclick: (event) => {
        event.preventDefault();
        main.focus();
      },
    },
    "Skip to the page",
  );
  replace(root, skip, h("div.frame", side, main));
}

async function show() {
  if (!frame) return;
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const [path, search] = location.hash.replace(/^#\/?/, "").split("?");
  const [id, ...params] = path.split("/").map(decodeURIComponent);
  const all = [...PAGES.filter(([, , scope]) => may(scope)), ...(me.operator ? OPERATOR : [])];
  const page = all.find(([name]) => name === id) ?? all[0];
  for (const link of frame.side.querySelectorAll("[data-page]")) {
    if (link.dataset.page === page[0]) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${page[1]} · Tidelock console`;
  // what is there stays until the new page is ready, unless that takes long
  const waiting = setTimeout(() => !signal.aborted && frame && replace(frame.main, h("div", loading(6))), 250);
  const run = async () => {
    try {
      const { render } = await import(`./pages/${page[0]}.js`);
      const shown = await render({ api, me, params, query: new URLSearchParams(search), signal, again: show });
      if (!signal.aborted) replace(frame.main, h("div", shown));
    } catch (error) {
      if (!signal.aborted && error.name !== "AbortError" && frame) replace(frame.main, h("div", errorState(error, run)));
    }
  };
  await run();
  clearTimeout(waiting);
  if (!signal.aborted && frame) {
    if (path !== shownPath) {
      window.scrollTo(0, 0);
      frame.main.focus({ preventScroll: true });
      shownPath = path;
    }
    frame.main.dataset.ready = page[0];
  }
}

window.addEventListener("hashchange", () => {
  if (frame) delete frame.main.dataset.ready;
  show();
});
start();

// The parts every page is put together from: headings, cards, tables, states, dialogs.

import { h, replace } from "./dom.js";
import { digits, exact, usd } from "./money.js";

export function heading(title, about, ...actions) {
  return h("header.heading", h("div", h("h1", title), about && h("p.about", about)), h("div.actions", actions));
}

export function card(title, ...children) {
  return h("section.card", title && (title instanceof Node ? title : h("h2", title)), children);
}

/** One number with its name; `hint` under it. */
export function stat(name, value, hint) {
  return h("div.stat", h("dt", name), h("dd", value), hint && h("dd.hint", hint));
}

/** An amount at a glance; the exact one is its title. */
export const amount = (value) => h("span.money", { title: exact(value) }, usd(value));

/** All nine digits, the zeros at the end pale, so that columns line up. */
export function exactAmount(value) {
  const [sign, whole, fraction] = digits(value);
  const kept = Math.max(2, fraction.replace(/0+$/, "").length);
  return h("span.money", `${sign}$${whole}.${fraction.slice(0, kept)}`, h("span.pale", fraction.slice(kept)));
}

/** columns: {name, cell(row), right, class}; `onrow` makes rows links. */
export function table(columns, rows, { empty = "Nothing here yet.", onrow, caption } = {}) {
  if (!rows.length) return emptyState(empty);
  const head = h(
    "thead",
    h(
      "tr",
      columns.map((c) => h("th", { scope: "col", class: classes(c) }, c.name)),
    ),
  );
  const body = h(
    "tbody",
    rows.map((row) => tableRow(columns, row, onrow)),
  );
  return h("div.scroll", { tabindex: "0", role: "region", "aria-label": caption ?? "Table" }, h("table", head, body));
}

export function tableRow(columns, row, onrow) {
  const href = onrow?.(row);
  const cells = columns.map((c, n) => {
    const shown = c.cell(row);
    return h("td", { class: classes(c) }, href && n === 0 ? h("a.row", { href }, shown) : shown);
  });
  return h(
    href ? "tr.link" : "tr",
    { onclick: href ? (event) => event.target.closest("a, button") || (location.hash = href) : null },
    cells,
  );
}

const classes = (column) => [column.right && "right", column.class].filter(Boolean).join(" ") || null;

export function emptyState(said, action) {
  return h("div.empty", typeof said === "string" ? h("p", said) : said, action);
}

export function errorState(error, retry) {
  return h("div.failed", { role: "alert" }, h("p", error.message), retry && h("button", { onclick: retry }, "Try again"));
}

export const loading = (lines = 3) =>
  h(
    "div.loading",
    { role: "status", "aria-label": "Loading" },
    Array.from({ length: lines }, () => h("span.bone")),
  );

/** A place that shows bones, then what `load` resolves to, or one line about what went wrong with a way to try again. */
export function later(load, lines) {
  const place = h("div.later");
  const run = async () => {
    replace(place, loading(lines));
    try {
      replace(place, await load());
    } catch (error) {
      if (error.name !== "AbortError") replace(place, errorState(error, run));
    }
  };
  run();
  return place;
}

const TONES = {
  stop: "good",
  length: "good",
  paid: "good",
  active: "good",
  sound: "good",
  settled: "good",
  abort: "warn",
  lost: "warn",
  waiting: "warn",
  refunded: "warn",
  refused: "bad",
  revoked: "bad",
  disputed: "bad",
  archived: "",
  ok: "good",
};

export const badge = (word, tone = TONES[word] ?? "", title) => h("span.badge", { class: tone, title }, word);

/** A bar from 0 to 1 with words for those who do not see it. */
export function meter(share, label, tone = "") {
  const width = `${Math.round(Math.min(1, Math.max(0, share)) * 1000) / 10}%`;
  const bar = h("span.fill", { class: tone, style: { width } });
  return h(
    "span.meter",
    {
      role: "meter",
      "aria-label": label,
      "aria-valuenow": Math.round(share * 100),
      "aria-valuemin": 0,
      "aria-valuemax": 100,
    },
    bar,
  );
}

export function field(name, input, hint) {
  return h("label.field", h("span.name", name), input, hint && h("span.hint", hint));
}

export function select(options, value, onchange, label) {
  return h(
    "select",
    {
      onchange: (event) => onchange?.(event.target.value),
      "aria-label": label,
      name: label.toLowerCase().replaceAll(" ", "_"),
    },
    options.map(([id, name]) => h("option", { value: id, selected: id === value }, name)),
  );
}

/** Buttons of which one is on. */
export function choice(options, value, onchange, label) {
  const group = h("div.choice", { role: "group", "aria-label": label });
  replace(
    group,
    options.map(([id, name]) =>
      h(
        "button",
        {
          type: "button",
          "aria-pressed": String(id === value),
          onclick: (event) => {
            for (const button of group.children)
              button.setAttribute("aria-pressed", String(button === event.currentTarget));
            onchange(id);
          },
        },
        name,
      ),
    ),
  );
  return group;
}

/** A modal form. `submit` gets the form's data; what it throws is shown in one line; what it returns replaces the form. */
export function dialog(title, content, { action = "Save", danger = false, submit } = {}) {
  const failed = h("p.failed", { role: "alert", hidden: true });
  const close = () => box.close();
  const button = submit && h("button", { class: danger ? "danger" : "primary" }, action);
  const buttons = h("div.buttons", h("button", { type: "button", onclick: close }, submit ? "Cancel" : "Close"), button);
  const form = h(
    "form",
    {
      method: "dialog",
      onsubmit: async (event) => {
        event.preventDefault();
        failed.hidden = true;
        button.disabled = true;
        try {
          const then = await submit(new FormData(form));
          if (then instanceof Node)
            replace(
              form,
              h("h2", title),
              then,
              h("div.buttons", h("button", { type: "button", onclick: close }, "Done")),
            );
          else close();
        } catch (error) {
          failed.textContent = error.message;
          failed.hidden = false;
        }
        button.disabled = false;
      },
    },
    h("h2", title),
    content,
    failed,
    buttons,
  );
  const box = h("dialog", { "aria-label": title, onclose: () => box.remove() }, form);
  document.body.append(box);
  box.showModal();
  return box;
}

export function confirm(title, said, action, act) {
  return dialog(title, h("p", said), { action, danger: true, submit: act });
}

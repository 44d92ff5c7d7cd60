// Elements, made without a string ever becoming markup: whatever a name contains, it is shown as text.

const SVG = "http://www.w3.org/2000/svg";

/** h("a.button", {href, onclick}, ...children): nullish and false children are left out. */
export function h(what, props = {}, ...children) {
  const [tag, ...classes] = what.split(".");
  return fill(document.createElement(tag || "div"), classes, props, children);
}

export function s(what, props = {}, ...children) {
  const [tag, ...classes] = what.split(".");
  return fill(document.createElementNS(SVG, tag), classes, props, children);
}

function fill(element, classes, props, children) {
  if (props === null || typeof props !== "object" || props instanceof Node || Array.isArray(props)) {
    children.unshift(props);
    props = {};
  }
  if (classes.length) element.setAttribute("class", classes.join(" "));
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.setAttribute("class", [...classes, value].join(" "));
    else if (name === "style") for (const [rule, said] of Object.entries(value)) element.style.setProperty(rule, said);
    else if (["value", "checked", "disabled", "selected", "open"].includes(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(
    ...children
      .flat(4)
      .filter((c) => c !== null && c !== undefined && c !== false)
      .map(text),
  );
  return element;
}

const text = (child) => (child instanceof Node ? child : String(child));

export function replace(parent, ...children) {
  parent.replaceChildren(
    ...children
      .flat()
      .filter((c) => c !== null && c !== undefined && c !== false)
      .map(text),
  );
  return parent;
}

export async function copy(value, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(value);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Select and copy it by hand";
  }
  setTimeout(() => (button.textContent = before), 1600);
}

export function download(name, type, content) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  const link = h("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

const ICONS = {
  overview: "M3 12a9 9 0 1 1 18 0M12 12l4-4M3 16h18",
  receipts: "M6 3h12v18l-3-2-3 2-3-2-3 2zM9 8h6M9 12h6",
  keys: "M8.5 13a4.5 4.5 0 1 0 0-9 4.5 4.5 0 0 0 0 9zM11.7 11.7L20 20M16.5 16.5l2.3-2.3M13.8 13.8l1.6-1.6",
  usage: "M4 20V10M10 20V4M16 20v-7M21 20H3",
  billing: "M3 6h18v12H3zM3 10h18M7 15h4",
  limits: "M12 13l4-5M4 18a9 9 0 1 1 16 0",
  members:
    "M9 11a3.5 3.5 0 1 0 0-7 3.5 3.5 0 0 0 0 7zM2.5 20a6.5 6.5 0 0 1 13 0M16 4.5a3.5 3.5 0 0 1 0 6.5M18 14a6.5 6.5 0 0 1 3.5 6",
  audit: "M4 5h16M4 10h16M4 15h10M4 20h7",
  business: "M3 17l6-6 4 4 8-9M15 6h6v6",
  organizations: "M4 21V5l8-2v18M12 9h8v12M7 9h2M7 13h2M7 17h2M15 13h2M15 17h2",
  ledger: "M5 3h13a1 1 0 0 1 1 1v16a1 1 0 0 1-1 1H5zM5 3v18M9 8h6M9 12l2 2 4-4",
  server: "M4 4h16v7H4zM4 13h16v7H4zM8 7.5h.01M8 16.5h.01",
  prices: "M4 4h8l8 8-8 8-8-8zM8.5 8.5h.01",
  menu: "M4 7h16M4 12h16M4 17h16",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  out: "M10 4H4v16h6M14 8l4 4-4 4M18 12H9",
};

export function icon(name) {
  return s("svg.icon", { viewBox: "0 0 24 24", "aria-hidden": "true" }, s("path", { d: ICONS[name] }));
}

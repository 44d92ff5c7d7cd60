// What every chart has around it: a name with its unit, a legend, a tooltip that also the arrow keys move, and the same
// numbers as a table for whoever prefers one or does not see.

import { h, replace, s } from "../dom.js";
import { table } from "../ui.js";

/**
 * `draw(width)` returns {svg, points}: points are what the tooltip stops at, {x, y, title, lines: [[name, text, tone]]}.
 * `rows` and `columns` make the table.
 */
export function frame({ title, unit, note, legend = [], draw, columns, rows, height, actions = [] }) {
  const plot = h("div.plot", { style: { height: `${height}px` } });
  const tip = h("div.tip", { hidden: true });
  const said = h("div.unseen", { "aria-live": "polite" });
  const numbers = h("div.numbers", { hidden: true });
  const toggle = h(
    "button.quiet",
    {
      type: "button",
      "aria-pressed": "false",
      onclick: () => {
        numbers.hidden = !numbers.hidden;
        plot.hidden = !numbers.hidden;
        toggle.setAttribute("aria-pressed", String(!numbers.hidden));
        toggle.textContent = numbers.hidden ? "Table" : "Chart";
        if (!numbers.hidden && !numbers.firstChild) replace(numbers, table(columns, rows, { caption: title }));
      },
    },
    "Table",
  );
  const head = h("figcaption", h("div", h("h2", title), unit && h("span.unit", unit)), h("div.actions", actions, toggle));
  const keys =
    legend.length > 1 &&
    h(
      "ul.legend",
      legend.map(({ name, tone, dashed }) =>
        h("li", h("span.swatch", { class: `bg-${tone}${dashed ? " dashed" : ""}` }), name),
      ),
    );
  const figure = h("figure.chart", head, keys, plot, numbers, note && h("p.note", note), said);
  let [points, at, svg] = [[], -1, null];

  const show = (n, speak = false) => {
    at = n;
    const point = points[n];
    tip.hidden = !point;
    if (!point) return;
    replace(
      tip,
      h("strong", point.title),
      point.lines.map(([name, value, tone]) =>
        h("div", tone && h("span.swatch", { class: `bg-${tone}` }), h("span", name), h("b", value)),
      ),
    );
    const room = plot.clientWidth - tip.offsetWidth;
    tip.style.setProperty("transform", `translate(${Math.max(0, Math.min(room, point.x - tip.offsetWidth / 2))}px, 0)`);
    svg.querySelector(".guide")?.setAttribute("transform", `translate(${point.x} 0)`);
    svg.classList.toggle("active", true);
    if (speak) said.textContent = `${point.title}: ${point.lines.map(([name, value]) => `${name} ${value}`).join(", ")}`;
  };
  const hide = () => {
    tip.hidden = true;
    svg?.classList.remove("active");
  };
  const render = () => {
    const width = plot.clientWidth;
    if (!width) return;
    ({ svg, points } = draw(width, height));
    for (const [name, value] of Object.entries({
      role: "img",
      tabindex: 0,
      "aria-label": `${title}. Arrow keys read the values.`,
    })) {
      svg.setAttribute(name, value);
    }
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const [x, y] = [event.clientX - box.left, event.clientY - box.top];
      const distance = (p) => Math.abs(p.x - x) + (p.row ? Math.abs(p.y - y) : 0);
      show(points.reduce((best, p, n) => (best < 0 || distance(p) < distance(points[best]) ? n : best), -1));
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step || !points.length) return;
      event.preventDefault();
      show(at < 0 ? points.length - 1 : Math.max(0, Math.min(points.length - 1, at + step)), true);
    });
    replace(plot, svg, tip);
  };
  new ResizeObserver(render).observe(plot);
  return figure;
}

/** Horizontal lines with their values. */
export function grid(marks, y, left, right, label) {
  return s(
    "g.grid",
    marks.map((mark) =>
      s(
        "g",
        { transform: `translate(0 ${y(mark).toFixed(1)})` },
        s("line", { x1: left, x2: right, class: mark === 0 ? "zero" : null }),
        s("text", { x: left - 8, y: 4, "text-anchor": "end" }, label(mark)),
      ),
    ),
  );
}

/** Said in a chart where there is nothing to draw. */
export const nothing = (x, y) => s("text.name", { x, y, "text-anchor": "middle" }, "nothing in this time");

/** Room that the labels of the vertical axis need. */
export const gutter = (marks, label) => 16 + 6.6 * Math.max(...marks.map((m) => label(m).length));

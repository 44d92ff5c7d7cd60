// From one total to another by the steps between them.

import { s } from "../dom.js";
import { frame, grid, gutter, nothing } from "./frame.js";
import { bridge, linear, ticks } from "./scale.js";

const [TOP, BOTTOM] = [22, 26];

/** steps: {name, value, total}; `total` ones stand on zero. */
export function waterfall({ title, unit, note, steps, shown, size = Number, axis = shown, height = 240, actions }) {
  const drawn = steps.map((step) => ({ ...step, value: size(step.value) }));
  const spans = bridge(drawn);
  const marks = ticks(Math.min(0, ...spans.flat()), Math.max(...spans.flat()));
  const tone = (step) => (step.total ? "a" : step.value >= 0 ? "good" : "bad");

  const draw = (width, tall) => {
    const left = gutter(marks, axis);
    const y = linear(marks[0], marks.at(-1), tall - BOTTOM, TOP);
    const band = (width - left - 8) / steps.length;
    const x = (n) => left + band * (n + 0.5);
    const wide = Math.min(band * 0.66, 72);
    const level = (n) => (drawn[n].total || drawn[n].value >= 0 ? spans[n][1] : spans[n][0]);
    const svg = s(
      "svg.xy",
      { width, height: tall, viewBox: `0 0 ${width} ${tall}` },
      grid(marks, y, left, width - 8, axis),
      drawn.some((step) => step.value) ? null : nothing((left + width) / 2, tall / 2),
      spans.map(([low, high], n) =>
        s(
          "g",
          s("rect", {
            class: `fill-${tone(drawn[n])}`,
            x: (x(n) - wide / 2).toFixed(1),
            width: wide.toFixed(1),
            y: y(high).toFixed(1),
            height: Math.max(1, y(low) - y(high)).toFixed(1),
            rx: 2,
          }),
          n + 1 < spans.length &&
            s("line.joint", { x1: x(n) + wide / 2, x2: x(n + 1) - wide / 2, y1: y(level(n)), y2: y(level(n)) }),
          s("text.value", { x: x(n), y: y(high) - 6, "text-anchor": "middle" }, axis(drawn[n].value)),
        ),
      ),
      s(
        "g.labels",
        steps.map((step, n) =>
          s(
            "text",
            { x: x(n), y: tall - 6, "text-anchor": "middle" },
            band < 62 ? (step.short ?? step.name.slice(0, 5)) : step.name,
          ),
        ),
      ),
    );
    const points = steps.map((step, n) => ({
      x: x(n),
      y: y(0),
      title: step.name,
      lines: [["", shown(step.value), tone(drawn[n])]],
    }));
    return { svg, points };
  };
  const columns = [
    { name: "", cell: (step) => step.name },
    { name: unit ?? "", right: true, cell: (step) => shown(step.value) },
  ];
  return frame({ title, unit, note, draw, height, columns, rows: steps, actions });
}

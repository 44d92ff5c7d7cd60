// Lines and stacked columns over the same labels.

import { s } from "../dom.js";
import { frame, grid, gutter, nothing } from "./frame.js";
import { linear, stacked, thinned, ticks } from "./scale.js";

const [TOP, BOTTOM, RIGHT] = [10, 26, 10];

/**
 * {title, unit, labels, least, series: [{name, values, tone, dashed, area}], shown(raw) -> text, size(raw) -> Number,
 * axis(Number) -> text}. `least`: how far the marks of the axis are apart at least (1 for what is counted). Values may be
 * BigInt or null (no value); `size` turns one into what is drawn, `shown` into what is read.
 */
export function lines(options) {
  return xy({ ...options, kind: "lines" });
}

export function columns(options) {
  return xy({ ...options, kind: "columns" });
}

function xy({
  kind,
  title,
  unit,
  note,
  labels,
  series,
  shown,
  size = Number,
  axis = shown,
  height = 220,
  least = 0,
  actions,
  titles = labels,
}) {
  const drawn = series.map((one) => ({ ...one, values: one.values.map((v) => (v === null ? null : size(v))) }));
  const stacks = kind === "columns" ? stacked(drawn, labels.length) : null;
  const flat = (stacks ? stacks.flat(2) : drawn.flatMap((one) => one.values.filter((v) => v !== null))).concat([0]);
  const marks = ticks(Math.min(...flat), Math.max(...flat), 4, least);
  const total = series.length > 1 && kind === "columns";

  const points = (x, y) =>
    labels.map((_, n) => {
      const said = series.filter(
        (one) => one.values[n] !== null && (kind === "lines" || one.values[n] || series.length === 1),
      );
      const lines = said.map((one) => [one.name, shown(one.values[n]), one.tone]);
      if (total && said.length > 1)
        lines.push(["Total", shown(said.map((one) => one.values[n]).reduce((a, b) => a + b))]);
      return { x: x(n), y: y(0), title: titles[n], lines };
    });

  const draw = (width, tall) => {
    const left = gutter(marks, axis);
    const y = linear(marks[0], marks.at(-1), tall - BOTTOM, TOP);
    const band = (width - left - RIGHT) / Math.max(labels.length, 1);
    const x = kind === "columns" ? (n) => left + band * (n + 0.5) : along(labels.length, left + 4, width - RIGHT - 4);
    const svg = s(
      "svg.xy",
      { width, height: tall, viewBox: `0 0 ${width} ${tall}` },
      grid(marks, y, left, width - RIGHT, axis),
      s("line.guide", { y1: TOP, y2: tall - BOTTOM }),
      stacks ? bars(stacks, series, x, y, band) : drawn.map((one) => line(one, x, y)),
      flat.some(Boolean) ? null : nothing((left + width) / 2, tall / 2),
      s(
        "g.labels",
        thinned(labels.length, width - left, 64).map((n) =>
          s("text", { x: Math.min(x(n), width - 26), y: tall - 6, "text-anchor": "middle" }, labels[n]),
        ),
      ),
    );
    return { svg, points: points(x, y) };
  };
  const text = (value) => (value === null || value === undefined ? "–" : shown(value));
  const cells = [
    { name: "", cell: (n) => titles[n] },
    ...series.map((one) => ({ name: one.name, right: true, cell: (n) => text(one.values[n]) })),
  ];
  return frame({
    title,
    unit,
    note,
    legend: series,
    draw,
    height,
    columns: cells,
    rows: labels.map((_, n) => n),
    actions,
  });
}

/** Places side by side from one end to the other; a single one is in the middle. */
const along = (count, start, end) => (count > 1 ? linear(0, count - 1, start, end) : () => (start + end) / 2);

function bars(stacks, series, x, y, band) {
  const wide = Math.max(1, Math.min(band * 0.72, 44));
  return s(
    "g.bars",
    stacks.map((parts, n) =>
      parts.map(
        ([low, high], i) =>
          high > low &&
          s("rect", {
            class: `fill-${series[i].tone}`,
            x: (x(n) - wide / 2).toFixed(1),
            width: wide.toFixed(1),
            y: y(high).toFixed(1),
            height: Math.max(0.75, y(low) - y(high)).toFixed(1),
            rx: Math.min(2, wide / 4),
          }),
      ),
    ),
  );
}

function line({ values, tone, dashed, area }, x, y) {
  let path = "";
  const known = [];
  values.forEach((value, n) => {
    if (value === null) return;
    path += `${known.at(-1) === n - 1 && known.length ? "L" : "M"}${x(n).toFixed(1)} ${y(value).toFixed(1)}`;
    known.push(n);
  });
  if (!known.length) return null;
  const dot =
    known.length === 1 && s("circle", { class: `fill-${tone}`, cx: x(known[0]), cy: y(values[known[0]]), r: 3 });
  const under =
    area &&
    known.length > 1 &&
    s("path.area", {
      class: `fill-${tone}`,
      d: `${path}L${x(known.at(-1)).toFixed(1)} ${y(0)}L${x(known[0]).toFixed(1)} ${y(0)}Z`,
    });
  return [under, s("path.line", { class: `stroke-${tone}${dashed ? " dashed" : ""}`, d: path }), dot];
}

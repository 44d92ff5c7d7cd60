// A table of shares, darker for more: cohorts.

import { s } from "../dom.js";
import { frame } from "./frame.js";

const [LEFT, TOP, CELL] = [74, 22, 26];

/** rows: {name, cells: [{share: 0..1, text, title}]}; `columns`: names above. */
export function heat({ title, unit, note, rows, columns, actions }) {
  const draw = (width) => {
    const wide = Math.min(96, (width - LEFT) / columns.length);
    const points = [];
    const svg = s(
      "svg.heat",
      { width, height: TOP + rows.length * CELL, viewBox: `0 0 ${width} ${TOP + rows.length * CELL}` },
      s(
        "g.labels",
        columns.map((name, n) => s("text", { x: LEFT + wide * (n + 0.5), y: 13, "text-anchor": "middle" }, name)),
      ),
      rows.map((row, i) =>
        s(
          "g",
          s("text.name", { x: LEFT - 10, y: TOP + i * CELL + 17, "text-anchor": "end" }, row.name),
          row.cells.map((cell, n) => {
            const [x, y] = [LEFT + wide * n, TOP + i * CELL];
            points.push({ x: x + wide / 2, y: y + CELL / 2, row: i + 1, title: cell.title, lines: [["", cell.text]] });
            return s(
              "g",
              s("rect.fill-a", {
                x: x + 1,
                y: y + 1,
                width: wide - 2,
                height: CELL - 2,
                rx: 3,
                "fill-opacity": (0.06 + 0.84 * Math.min(1, cell.share)).toFixed(3),
              }),
              wide > 30 &&
                s(
                  "text",
                  { class: cell.share > 0.55 ? "on" : null, x: x + wide / 2, y: y + 17, "text-anchor": "middle" },
                  cell.text,
                ),
            );
          }),
        ),
      ),
    );
    return { svg, points };
  };
  const table = [
    { name: "", cell: (row) => row.name },
    ...columns.map((name, n) => ({ name, right: true, cell: (row) => row.cells[n]?.text ?? "" })),
  ];
  return frame({ title, unit, note, draw, height: TOP + rows.length * CELL, columns: table, rows, actions });
}

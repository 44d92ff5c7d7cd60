import assert from "node:assert/strict";
import { test } from "node:test";
import { parseExact } from "../../tidelock/web/console/api.js";
import {
  compact,
  csv,
  duration,
  growth,
  isoDay,
  monthStart,
  percent,
  until,
  whole,
} from "../../tidelock/web/console/format.js";
import { parse, quantile, total } from "../../tidelock/web/console/prometheus.js";

test("JSON keeps whole numbers that a double cannot hold, and everything else as it is", () => {
  const text =
    '{"a": 9223372036854775807, "b": -1234567890123456, "c": "9223372036854775807 \\" 12345678901234567890", "d": 0.12345678901234567890,' +
    ' "e": 1e30, "f": 12, "g": [1234567890123456789, null], "12345678901234567": 1}';
  const found = parseExact(text);
  assert.equal(found.a, "9223372036854775807");
  assert.equal(found.b, "-1234567890123456");
  assert.equal(found.c, '9223372036854775807 " 12345678901234567890');
  assert.equal(found.d, 0.1234567890123456789);
  assert.equal(found.e, 1e30);
  assert.equal(found.f, 12);
  assert.deepEqual(found.g, ["1234567890123456789", null]);
  assert.equal(found["12345678901234567"], 1);
});

test("numbers for people", () => {
  assert.equal(whole(1234567), "1,234,567");
  assert.equal(whole(-1000n), "-1,000");
  assert.deepEqual([0, 7, 999, 999.6, 1000, 12_345, 2.65e9, 0.397].map(compact), [
    "0",
    "7",
    "999",
    "1k",
    "1k",
    "12.3k",
    "2.65G",
    "0.397",
  ]);
  assert.equal(percent(0.525), "52.5%");
  assert.deepEqual([1.7, -0.25].map(growth), ["+170.0%", "−25.0%"]);
  assert.deepEqual([null, 3, 1500, 15_700, 75_000].map(duration), ["–", "3 ms", "1.50 s", "15.7 s", "1 min 15 s"]);
});

test("months and days are UTC", () => {
  const end = Date.UTC(2026, 0, 31, 23, 59, 59) / 1000;
  assert.equal(isoDay(monthStart(end)), "2026-01-01");
  assert.equal(isoDay(monthStart(end, 1)), "2026-02-01");
  assert.equal(isoDay(monthStart(end, -1)), "2025-12-01");
  assert.equal(until(100 + 90_061, 100), "1 d 1 h");
  assert.equal(until(100, 100), "0 s");
});

test("CSV survives separators, and no cell is a formula", () => {
  assert.equal(
    csv([
      ["a,b", 'say "x"', 1n],
      ["=SUM(A1)", "-1", -1],
    ]),
    '"a,b","say ""x""",1\r\n\'=SUM(A1),\'-1,-1\r\n',
  );
});

const METRICS = `# HELP x y
requests{state="running"} 3.0
requests{state="waiting"} 2.0
tokens_total 1.5e3
odd{a="x\\"y",b="z"} 1
seconds_bucket{le="0.1"} 50
seconds_bucket{le="1.0"} 90
seconds_bucket{le="+Inf"} 100
`;

test("Prometheus' text is read by name and label", () => {
  const metrics = parse(METRICS);
  assert.equal(total(metrics, "requests"), 5);
  assert.equal(total(metrics, "requests", { state: "running" }), 3);
  assert.equal(total(metrics, "tokens_total"), 1500);
  assert.equal(total(metrics, "nothing"), null);
  assert.deepEqual(metrics.get("odd")[0].labels, { a: 'x\\"y', b: "z" });
  assert.equal(quantile(metrics, "seconds", 0.5), 0.1);
  assert.ok(Math.abs(quantile(metrics, "seconds", 0.7) - 0.55) < 1e-9);
  assert.equal(quantile(metrics, "seconds", 0.99), 1.0);
  assert.equal(quantile(metrics, "nothing", 0.5), null);
  assert.equal(quantile(metrics, "seconds", 0.5, metrics), null);
});

import assert from "node:assert/strict";
import { test } from "node:test";
import { bridge, linear, stacked, thinned, ticks } from "../../tidelock/web/console/charts/scale.js";

function* pairs(count) {
  let state = 7;
  const next = () => (state = (state * 48271) % 2147483647) / 2147483647;
  for (let n = 0; n < count; n++) {
    const size = 10 ** (next() * 14 - 5);
    yield [(next() - 0.5) * size, (next() - 0.5) * size].sort((a, b) => a - b);
  }
}

test("ticks enclose what is shown, are evenly spaced and few", () => {
  for (const [low, high] of pairs(3000)) {
    const marks = ticks(low, high);
    const step = marks[1] - marks[0];
    assert.ok(marks[0] <= low + step * 1e-6 && marks.at(-1) >= high - step * 1e-6, `${low} ${high}: ${marks}`);
    assert.ok(marks.length >= 2 && marks.length <= 7, `${marks}`);
    marks.forEach((mark, n) => assert.ok(Math.abs(mark - (marks[0] + n * step)) < step * 1e-6));
    if (low < 0 && high > 0) assert.ok(marks.includes(0), `${marks}`);
  }
  assert.deepEqual(ticks(0, 0), [0, 0.25, 0.5, 0.75, 1]);
  assert.deepEqual(ticks(0, 1, 4, 1), [0, 1]);
});

test("a scale maps its ends to its ends", () => {
  const y = linear(10, 20, 200, 0);
  assert.deepEqual([y(10), y(15), y(20)], [200, 100, 0]);
  assert.equal(linear(5, 5, 0, 100)(5), 0);
});

test("stacks lie upon each other and their height is the sum; what is negative grows downwards", () => {
  const columns = stacked([{ values: [1, 2] }, { values: [3, -1] }, { values: [5, 4] }], 2);
  assert.deepEqual(columns[0], [
    [0, 1],
    [1, 4],
    [4, 9],
  ]);
  assert.deepEqual(columns[1], [
    [0, 2],
    [-1, 0],
    [2, 6],
  ]);
});

test("a bridge that closes ends where its last total stands", () => {
  const steps = [{ value: 10, total: true }, { value: 5 }, { value: -3 }, { value: 12, total: true }];
  assert.deepEqual(bridge(steps), [
    [0, 10],
    [10, 15],
    [12, 15],
    [0, 12],
  ]);
});

test("labels are thinned to their room, and the last is written", () => {
  for (const [count, width] of [
    [30, 300],
    [12, 1000],
    [90, 50],
    [1, 10],
  ]) {
    const kept = thinned(count, width, 64);
    assert.equal(kept.at(-1), count - 1);
    assert.ok(kept.length === 1 || (width / count) * (kept[1] - kept[0]) >= 63.9);
  }
});

import assert from "node:assert/strict";
import { test } from "node:test";

import { follow, startOf } from "../../tidelock/web/console/receipts.js";

const page = (times, more) => ({ data: times.map((created_ms, n) => ({ id: `r${n}`, created_ms })), has_more: more });

test("a page in a burst is not followed by what is older than its oldest line", () => {
  assert.equal(startOf(page([100_300, 100_200, 100_100], true)), 100_100);
});

test("what was written late is heard as long as the page reaches back so far", () => {
  assert.equal(startOf(page([100_000, 50_000], true)), 95_000);
  assert.equal(startOf(page([100_000, 99_000], false)), 95_000);
});

test("after a cut the stream is asked again from a little before the newest that was heard, and each receipt is told once", async () => {
  const asked = [];
  const told = [];
  const stop = new AbortController();
  const api = {
    async stream(path, { since_ms }, hear) {
      asked.push(since_ms);
      hear("receipt", { id: "a", created_ms: 120_000 });
      hear("receipt", { id: `b${asked.length}`, created_ms: 121_000 });
      if (asked.length === 2) stop.abort();
    },
  };
  await follow(api, 100_000, { onNew: (r) => told.push(r.id) }, stop.signal);
  assert.deepEqual(asked, [100_000, 116_000]);
  assert.deepEqual(told, ["a", "b1", "b2"]);
});

import assert from "node:assert/strict";
import { test } from "node:test";
import { digits, exact, nano, parse, perMillion, rounded, share, sum, usd } from "../../tidelock/web/console/money.js";

const plain = (text) => text.replaceAll(",", "").replace("$", "").replace("−", "-");

/** Seeded amounts of every size, both signs. */
function* amounts(count) {
  let state = 12345n;
  for (let n = 0; n < count; n++) {
    state = (state * 6364136223846793005n + 1442695040888963407n) % 2n ** 64n;
    const value = state >> BigInt(n % 63);
    yield n % 2 ? -value : value;
  }
}

test("what is written exactly is read back as the same amount", () => {
  for (const value of amounts(2000)) {
    const text = plain(exact(value));
    const [whole, fraction] = text.replace("-", "").split(".");
    const back = BigInt(whole) * 10n ** 9n + BigInt(fraction.padEnd(9, "0"));
    assert.equal(value < 0n ? -back : back, value, text);
    assert.ok(fraction.length >= 2 && (fraction.length === 2 || !fraction.endsWith("0")), text);
  }
});

test("rounding goes to the nearest, half away from zero, and shows the places asked for", () => {
  for (const value of amounts(2000)) {
    for (const places of [0, 2, 6, 9]) {
      const text = plain(rounded(value, places));
      const unit = 10n ** BigInt(9 - places);
      const shown = BigInt(text.replace(".", "")) * unit;
      const off = shown > value ? shown - value : value - shown;
      assert.ok(off * 2n <= unit, `${value} as ${text}`);
      if (off * 2n === unit) assert.ok((shown < 0n ? -shown : shown) > (value < 0n ? -value : value), text);
      assert.equal((text.split(".")[1] ?? "").length, places);
    }
  }
  assert.equal(rounded(-1n), "$0.00");
});

test("amounts of any size keep every digit", () => {
  const huge = 9_223_372_036_854_775_807n;
  assert.equal(exact(huge), "$9,223,372,036.854775807");
  assert.equal(exact(String(huge)), exact(huge));
  assert.equal(sum([huge, 1n, "-1"]), huge);
  assert.deepEqual(digits(-1n), ["−", "0", "000000001"]);
});

test("a number that is no exact amount is refused", () => {
  for (const wrong of [0.1, 2 ** 53, NaN, Infinity]) assert.throws(() => nano(wrong), RangeError);
  assert.throws(() => nano("1.5"), SyntaxError);
  assert.equal(nano(null), 0n);
});

test("at a glance: cents, and for small amounts three digits", () => {
  const cases = [
    [0n, "$0.00"],
    [1n, "$0.000000001"],
    [12_345n, "$0.0000123"],
    [123_450_000n, "$0.12"],
    [99_900_000n, "$0.0999"],
    [5_000_000_000n, "$5.00"],
    [-2_500_000n, "−$0.0025"],
    [1_234_567_890_123n, "$1,234.57"],
  ];
  for (const [value, text] of cases) assert.equal(usd(value), text);
});

test("what a person types is an amount or it is not", () => {
  assert.equal(parse("12.50"), 12_500_000_000n);
  assert.equal(parse(" $0.000000001 "), 1n);
  for (const wrong of ["", "-1", "1e3", "1,000", "0.0000000001", "x", "1."]) assert.equal(parse(wrong), null, wrong);
});

test("a price per token is shown for a million, and shares are for drawing", () => {
  assert.equal(perMillion(300), "$0.30");
  assert.equal(share(1n, 4n), 0.25);
  assert.equal(share(1n, 0n), 0);
});

// Money as it is in the books: whole nano-USD in a BigInt, never a float. Everything that adds, compares, rounds or writes
// an amount is here.

export const NANO_PER_USD = 1_000_000_000n;

/** A whole number of nano-USD from what the API sends (number, decimal string of a whole number, BigInt; null is 0n). */
export function nano(value) {
  if (typeof value === "bigint") return value;
  if (value === null || value === undefined) return 0n;
  if (typeof value === "number" && !Number.isSafeInteger(value)) throw new RangeError(`${value} is no exact amount`);
  return BigInt(value);
}

export function sum(values) {
  return values.reduce((total, value) => total + nano(value), 0n);
}

const grouped = (digits) => digits.replace(/\B(?=(\d{3})+$)/g, ",");

/** [sign, whole dollars with separators, exactly nine digits behind the point] */
export function digits(value) {
  const n = nano(value);
  const size = n < 0n ? -n : n;
  return [n < 0n ? "−" : "", grouped(String(size / NANO_PER_USD)), String(size % NANO_PER_USD).padStart(9, "0")];
}

/** Every nano digit that is not a zero at the end, but at least cents: "$0.00001203", "$5.00". */
export function exact(value) {
  const [sign, whole, fraction] = digits(value);
  return `${sign}$${whole}.${fraction.slice(0, 2)}${fraction.slice(2).replace(/0+$/, "")}`;
}

/** To `places` decimals, rounded half away from zero: "$1,234.57". */
export function rounded(value, places = 2) {
  const n = nano(value);
  const unit = 10n ** BigInt(9 - places);
  const size = (((n < 0n ? -n : n) + unit / 2n) / unit) * unit;
  const [, whole, fraction] = digits(size);
  return `${n < 0n && size ? "−" : ""}$${whole}${places ? "." + fraction.slice(0, places) : ""}`;
}

/** For people at a glance: cents, or for less than ten cents as many decimals as show three digits. */
export function usd(value) {
  const n = nano(value);
  const size = n < 0n ? -n : n;
  if (size === 0n || size >= NANO_PER_USD / 10n) return rounded(n);
  const zeros = 9 - String(size).length;
  return rounded(n, Math.min(9, zeros + 3)).replace(/(\.\d\d\d*?)0+$/, "$1");
}

/** The amount of a decimal text such as "12.50", as nano-USD; null if it is none, or finer than a nano. */
export function parse(text) {
  const match = /^\s*\$?(\d{1,9})(?:\.(\d{1,9}))?\s*$/.exec(text);
  return match ? BigInt(match[1]) * NANO_PER_USD + BigInt((match[2] ?? "").padEnd(9, "0")) : null;
}

/** `part` of `whole` as a number from 0 to 1, for drawing only. */
export function share(part, whole) {
  const [p, w] = [nano(part), nano(whole)];
  return w === 0n ? 0 : Number((p * 1_000_000n) / w) / 1_000_000;
}

/** nano-USD as a number of dollars, for drawing only. */
export function toNumber(value) {
  return Number(nano(value)) / 1e9;
}

/** The price of a million tokens at so many nano-USD each: "$0.30". */
export function perMillion(each) {
  return exact(nano(each) * 1_000_000n);
}

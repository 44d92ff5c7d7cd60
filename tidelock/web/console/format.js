// Numbers and times for people. Times are UTC, as in the books and on invoices.

export const whole = (value) => String(value).replace(/\B(?=(\d{3})+(?!\d))/g, ",");

/** Three digits: 2.65 G, 1.07 k. */
export function compact(value) {
  const n = Number(value);
  const size = Math.abs(n);
  for (const [unit, suffix] of [
    [1e12, "T"],
    [1e9, "G"],
    [1e6, "M"],
    [1e3, "k"],
  ]) {
    if (size >= unit * 0.9995) return `${trim((n / unit).toPrecision(3))}${suffix}`;
  }
  return size >= 100 || Number.isInteger(n) ? String(Math.round(n)) : trim(n.toPrecision(3));
}

const trim = (text) => (text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text);

export const percent = (share, places = 1) => `${(share * 100).toFixed(places)}%`;

/** A growth rate with its sign: +170.0% */
export const growth = (rate) => `${rate < 0 ? "−" : "+"}${(Math.abs(rate) * 100).toFixed(1)}%`;

export function duration(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;
  return `${Math.floor(ms / 60_000)} min ${Math.round((ms % 60_000) / 1000)} s`;
}

/** How a plan's price is said: "a month", "a year". */
export const span = (months) => (months === 12 ? "a year" : months === 1 ? "a month" : `for ${months} months`);

export const seats = (count) => (count === 1 ? "1 seat" : `${whole(count)} seats`);

const two = (n) => String(n).padStart(2, "0");
const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/** 25 Nov 2026 */
export function day(seconds) {
  const d = new Date(seconds * 1000);
  return `${d.getUTCDate()} ${MONTHS[d.getUTCMonth()]} ${d.getUTCFullYear()}`;
}

/** 25 Nov */
export function shortDay(seconds) {
  const d = new Date(seconds * 1000);
  return `${d.getUTCDate()} ${MONTHS[d.getUTCMonth()]}`;
}

/** 2026-11-25 */
export const isoDay = (seconds) => new Date(seconds * 1000).toISOString().slice(0, 10);

export function clock(ms) {
  const d = new Date(ms);
  return `${two(d.getUTCHours())}:${two(d.getUTCMinutes())}:${two(d.getUTCSeconds())}`;
}

/** 25 Nov 14:03:59 */
export const moment = (ms) => `${shortDay(ms / 1000)} ${clock(ms)}`;

export function ago(seconds, now = Date.now() / 1000) {
  const s = Math.max(0, Math.round(now - seconds));
  for (const [unit, name] of [
    [86_400, "day"],
    [3600, "hour"],
    [60, "minute"],
  ]) {
    const n = Math.floor(s / unit);
    if (n >= 1) return `${n} ${name}${n > 1 ? "s" : ""} ago`;
  }
  return s < 5 ? "just now" : `${s} seconds ago`;
}

/** How long until a moment, in its two largest units: 3 d 4 h */
export function until(seconds, now = Date.now() / 1000) {
  const s = Math.max(0, Math.round(seconds - now));
  const parts = [
    [86_400, "d"],
    [3600, "h"],
    [60, "min"],
    [1, "s"],
  ].map(([unit, name], i, all) => [Math.floor((i ? s % all[i - 1][0] : s) / unit), name]);
  const first = parts.findIndex(([n]) => n > 0);
  return first < 0
    ? "0 s"
    : parts
        .slice(first, first + 2)
        .filter(([n]) => n > 0)
        .map(([n, name]) => `${n} ${name}`)
        .join(" ");
}

/** First second of the UTC month `by` months from the one `seconds` is in. */
export function monthStart(seconds, by = 0) {
  const d = new Date(seconds * 1000);
  return Date.UTC(d.getUTCFullYear(), d.getUTCMonth() + by, 1) / 1000;
}

/** Rows of cells as CSV that no spreadsheet takes for a formula. */
export function csv(rows) {
  const cell = (value) => {
    const text = String(value ?? "");
    const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  return rows.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

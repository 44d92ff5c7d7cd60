// The classes tokens are priced in: their names and colours, the same on every page.

import { h } from "./dom.js";
import { compact, whole } from "./format.js";

export const CLASSES = [
  { id: "fresh", name: "Input", tone: "a" },
  { id: "cached", name: "Cached input", tone: "b" },
  { id: "cache_write", name: "Cache writes", tone: "c" },
  { id: "output", name: "Output", tone: "d" },
];

/** {fresh, cached, cache_write, output} of a row of the usage API. */
export const ofUsage = (row) => ({
  fresh: row.input_tokens - row.input_cached_tokens - row.input_cache_write_tokens,
  cached: row.input_cached_tokens,
  cache_write: row.input_cache_write_tokens,
  output: row.output_tokens,
});

/** The same of a receipt. */
export const ofReceipt = ({ tokens }) => ({
  fresh: tokens.fresh,
  cached: tokens.cached,
  cache_write: tokens.cache_write_5m + tokens.cache_write_1h,
  output: tokens.output,
});

export function add(a, b) {
  return Object.fromEntries(CLASSES.map(({ id }) => [id, (a?.[id] ?? 0) + (b?.[id] ?? 0)]));
}

export const input = (counts) => counts.fresh + counts.cached + counts.cache_write;

/** Numbers of one request, in small. */
export const inWords = (counts) =>
  h(
    "span",
    { title: CLASSES.map(({ id, name }) => `${name} ${whole(counts[id])}`).join(" · ") },
    compact(input(counts)),
    h("span.pale", " → "),
    compact(counts.output),
  );

// What /metrics says, as numbers: the text format of Prometheus, as far as the console reads it.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;

/** Map of name -> [{labels, value}]. */
export function parse(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = line[0] !== "#" && LINE.exec(line);
    if (!match) continue;
    const [, name, inside, value] = match;
    const labels = Object.fromEntries(
      [...(inside ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, label, said]) => [label, said]),
    );
    if (!found.has(name)) found.set(name, []);
    found.get(name).push({ labels, value: Number(value) });
  }
  return found;
}

/** Sum of a metric over the samples whose labels fit; null if there is none. */
export function total(metrics, name, wanted = {}) {
  const fitting = (metrics.get(name) ?? []).filter(({ labels }) =>
    Object.entries(wanted).every(([label, value]) => labels[label] === value),
  );
  return fitting.length ? fitting.reduce((sum, { value }) => sum + value, 0) : null;
}

/** The value below which `share` of a histogram's observations since `before` lie, by its buckets; null without any. */
export function quantile(metrics, name, share, before = null) {
  const buckets = (m) =>
    (m?.get(`${name}_bucket`) ?? [])
      .map(({ labels, value }) => [labels.le === "+Inf" ? Infinity : Number(labels.le), value])
      .sort((a, b) => a[0] - b[0]);
  const earlier = new Map(buckets(before));
  const counts = buckets(metrics).map(([edge, count]) => [edge, count - (earlier.get(edge) ?? 0)]);
  const all = counts.at(-1)?.[1] ?? 0;
  if (!all) return null;
  const n = counts.findIndex(([, count]) => count >= share * all);
  const [edge, count] = counts[n];
  const [low, under] = n ? counts[n - 1] : [0, 0];
  return edge === Infinity ? low : low + ((share * all - under) / Math.max(count - under, 1e-9)) * (edge - low);
}

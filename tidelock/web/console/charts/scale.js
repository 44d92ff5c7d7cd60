// From numbers to places: the arithmetic of the charts, without a document.

/** Round values from at or below `low` to at or above `high`, about `count` of them, at least `least` apart; 0 is one if it
 * lies between. */
export function ticks(low, high, count = 4, least = 0) {
  if (!(high > low)) high = low + (Math.abs(low) || 1);
  const rough = Math.max((high - low) / count, least);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((candidate) => candidate >= rough * 0.999);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, n) => Number(((first + n) * step).toPrecision(12)));
}

/** value -> place, linear from [from, to] onto [start, end] */
export function linear(from, to, start, end) {
  const span = to - from || 1;
  return (value) => start + ((value - from) / span) * (end - start);
}

/** Which of `count` labels to write so that each has `room` of `width`; the last one always is. */
export function thinned(count, width, room) {
  const every = Math.max(1, Math.ceil((count * room) / Math.max(width, 1)));
  return Array.from({ length: count }, (_, n) => n).filter((n) => (count - 1 - n) % every === 0);
}

/** For every label the [low, high] of each series, stacked upon those before; negative ones grow downwards. */
export function stacked(series, count) {
  return Array.from({ length: count }, (_, n) => {
    let [up, down] = [0, 0];
    return series.map(({ values }) => {
      const value = values[n] ?? 0;
      if (value >= 0) return [up, (up += value)];
      return [(down += value), down - value];
    });
  });
}

/** [low, high] of each step of a bridge from the first total to the last; totals stand on zero. */
export function bridge(steps) {
  let level = 0;
  return steps.map(({ value, total }) => {
    const before = total ? 0 : level;
    level = total ? value : level + value;
    return [Math.min(before, level), Math.max(before, level)];
  });
}

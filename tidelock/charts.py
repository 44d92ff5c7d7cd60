"""Charts as inline SVG, drawn by hand so that a page needs nothing from anywhere. Colours come from the page's CSS.

They stand outside the parts, because both the run's report and the founder's analytics draw with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Point = tuple[float, float]
NOTHING = "<p class='muted'>nothing was measured here</p>"


def _ticks(low: float, high: float, n: int = 4) -> list[float]:
    """Round numbers that cover [low, high]."""
    if high <= low:
        high = low + 1
    raw = (high - low) / n
    step = 10 ** math.floor(math.log10(raw))
    step *= next(f for f in (1, 2, 5, 10) if f * step >= raw)
    first = math.floor(low / step)
    return [round(i * step, 10) for i in range(first, math.ceil(high / step) + 1)]


def _number(x: float) -> str:
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:g}{suffix}"
    return f"{x:g}"


def line_chart(points: Sequence[Point], x_label: str, y_label: str, colour: str) -> str:
    """One curve with labelled axes."""
    return curves([("", points, colour)], x_label, y_label)


def curves(lines: Sequence[tuple[str, Sequence[Point], str]], x_label: str, y_label: str) -> str:
    """(name, points, colour class) in one frame with labelled axes; names make a legend."""
    everything = [point for _, points, _ in lines for point in points]
    if not everything:
        return NOTHING
    width, height, left, bottom, top = 360, 200, 44, 34, 24
    xs = _ticks(0, max(x for x, _ in everything))
    ys = _ticks(min(0, min(y for _, y in everything)), max(y for _, y in everything))

    def sx(x: float) -> float:
        return left + (x - xs[0]) / (xs[-1] - xs[0]) * (width - left - 22)

    def sy(y: float) -> float:
        return height - bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (height - bottom - top)

    grid = "".join(
        f"<line class='grid' x1='{left}' x2='{width - 22}' y1='{sy(y):.1f}' y2='{sy(y):.1f}'/>"
        f"<text class='tick' x='{left - 6}' y='{sy(y) + 4:.1f}' text-anchor='end'>{_number(y)}</text>"
        for y in ys
    ) + "".join(f"<text class='tick' x='{sx(x):.1f}' y='{height - bottom + 15}' text-anchor='middle'>{_number(x)}</text>" for x in xs)
    drawn = ""
    for i, (name, points, colour) in enumerate(lines):
        path = " ".join(f"{sx(x):.1f},{sy(y):.1f}" for x, y in points)
        drawn += f"<polyline class='curve {colour}' points='{path}'/>"
        if name:
            y = height - bottom - 8 - 15 * (len(lines) - 1 - i)
            drawn += f"<text class='tick name {colour}' x='{width - 26}' y='{y}' text-anchor='end'>{escape(name)}</text>"
    labels = (
        f"<text class='tick' x='{(left + width) / 2:.0f}' y='{height - 3}' text-anchor='middle'>{escape(x_label)}</text>"
        f"<text class='tick' x='4' y='11'>{escape(y_label)}</text>"
    )
    return f"<svg viewBox='0 0 {width} {height}' role='img'>{grid}{drawn}{labels}</svg>"


def standalone(svg: str) -> str:
    """A chart as a file of its own: with the namespace and the colours that a page would give it."""
    style = (
        "<style>text{font:11px system-ui,sans-serif;fill:#667}.grid{stroke:#dde}.curve{fill:none;stroke-width:1.8;"
        "stroke-linejoin:round}.curve.a{stroke:#0a6}.curve.b{stroke:#d60}.curve.c{stroke:#36c}.curve.d{stroke:#a3a}"
        ".name.a{fill:#0a6}.name.b{fill:#d60}.name.c{fill:#36c}.name.d{fill:#a3a}.bar.plain{fill:#0a6;opacity:.75}.bar.after{fill:#0a6}"
        ".bar.before{fill:#bbc}</style>"
        "<rect width='100%' height='100%' fill='#fff'/>"
    )
    head, _, body = svg.partition(">")
    return f"{head} xmlns='http://www.w3.org/2000/svg' width='720'>{style}{body}"


def before_after(rows: Sequence[tuple[str, str, dict, dict]]) -> str:
    """(family, kind, before, after) as pairs of bars with 95 % whiskers; values are shares of 1."""
    width, row, left, right, top = 760, 46, 140, 60, 22
    span = width - left - right
    out = [
        f"<line class='grid' x1='{left + span * t:.0f}' x2='{left + span * t:.0f}' y1='{top - 6}' y2='{top + row * len(rows)}'/>"
        f"<text class='tick' x='{left + span * t:.0f}' y='{top - 10}' text-anchor='middle'>{t:.0%}</text>"
        for t in (0, 0.25, 0.5, 0.75, 1)
    ]
    for i, (name, kind, before, after) in enumerate(rows):
        y = top + i * row
        out.append(f"<text class='name' x='{left - 10}' y='{y + 20}' text-anchor='end'>{escape(name)}</text>")
        out.append(f"<text class='tick' x='{left - 10}' y='{y + 34}' text-anchor='end'>{'new demand' if kind == 'new' else 'base skill'}</text>")
        for j, (side, colour) in enumerate(((before, "before"), (after, "after"))):
            by, end = y + 6 + j * 16, left + span * side["success"]
            low, high = left + span * side["low"], left + span * side["high"]
            out.append(
                f"<rect class='bar {colour}' x='{left}' y='{by}' width='{max(1.0, end - left):.1f}' height='13' rx='2'/>"
                f"<line class='whisker' x1='{low:.1f}' x2='{high:.1f}' y1='{by + 6.5}' y2='{by + 6.5}'/>"
                f"<line class='whisker' x1='{low:.1f}' x2='{low:.1f}' y1='{by + 3}' y2='{by + 10}'/>"
                f"<line class='whisker' x1='{high:.1f}' x2='{high:.1f}' y1='{by + 3}' y2='{by + 10}'/>"
                f"<text class='value' x='{width - right + 12}' y='{by + 11}'>{side['success']:.1%}</text>"
            )
    return f"<svg viewBox='0 0 {width} {top + row * len(rows) + 4}' role='img'>{''.join(out)}</svg>"


def bars(rows: Sequence[tuple[str, float, str]], left: int = 82) -> str:
    """(label, size, text) as horizontal bars; `left`: room for the labels."""
    width, row, right = 278 + left, 20, 74
    largest = max((size for _, size, _ in rows), default=0) or 1
    out = []
    for i, (label, size, text) in enumerate(rows):
        y, length = i * row, (width - left - right) * size / largest
        out.append(
            f"<text class='tick' x='{left - 8}' y='{y + 14}' text-anchor='end'>{escape(label)}</text>"
            f"<rect class='bar plain' x='{left}' y='{y + 4}' width='{max(1.0, length):.1f}' height='12' rx='2'/>"
            f"<text class='tick' x='{left + length + 6:.1f}' y='{y + 14}'>{escape(text)}</text>"
        )
    return f"<svg viewBox='0 0 {width} {row * len(rows) + 4}' role='img'>{''.join(out)}</svg>"


def columns(rows: Sequence[tuple[str, float]], label: str) -> str:
    """(name, size >= 0) as upright columns, each with its number on top."""
    if not rows:
        return NOTHING
    width, height, top, bottom = 560, 200, 34, 22
    largest, step = max(size for _, size in rows) or 1, width / len(rows)
    out = [f"<text class='tick' x='4' y='11'>{escape(label)}</text>"]
    for i, (name, size) in enumerate(rows):
        x, tall = i * step, (height - top - bottom) * size / largest
        out.append(
            f"<rect class='bar plain' x='{x + step * 0.12:.1f}' y='{height - bottom - tall:.1f}' width='{step * 0.76:.1f}' "
            f"height='{tall:.1f}' rx='2'/>"
            f"<text class='tick' x='{x + step / 2:.1f}' y='{height - bottom - tall - 4:.1f}' text-anchor='middle'>{short(size)}</text>"
            f"<text class='tick' x='{x + step / 2:.1f}' y='{height - 6}' text-anchor='middle'>{escape(name)}</text>"
        )
    return f"<svg viewBox='0 0 {width} {height}' role='img'>{''.join(out)}</svg>"


def bridge(rows: Sequence[tuple[str, float]], label: str) -> str:
    """From the first number to the last by the signed steps between them."""
    if not rows:
        return NOTHING
    width, height, top, bottom = 560, 200, 34, 22
    step, level, spans = width / len(rows), 0.0, []
    for i, (name, size) in enumerate(rows):
        whole = i in (0, len(rows) - 1)
        low, high = (0.0, size) if whole else (min(level, level + size), max(level, level + size))
        spans.append((name, size, low, high, "plain" if whole else "after" if size >= 0 else "before"))
        level = size if whole else level + size
    largest = max(high for _, _, _, high, _ in spans) or 1
    out = [f"<text class='tick' x='4' y='11'>{escape(label)}</text>"]
    for i, (name, size, low, high, colour) in enumerate(spans):
        x, y, tall = i * step, height - bottom - (height - top - bottom) * high / largest, (height - top - bottom) * (high - low) / largest
        out.append(
            f"<rect class='bar {colour}' x='{x + step * 0.12:.1f}' y='{y:.1f}' width='{step * 0.76:.1f}' height='{max(tall, 0.5):.1f}'/>"
            f"<text class='tick' x='{x + step / 2:.1f}' y='{y - 4:.1f}' text-anchor='middle'>{short(size)}</text>"
            f"<text class='tick' x='{x + step / 2:.1f}' y='{height - 6}' text-anchor='middle'>{escape(name)}</text>"
        )
    return f"<svg viewBox='0 0 {width} {height}' role='img'>{''.join(out)}</svg>"


def triangle(rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Cohorts: (name, shares of 1 from its first period on), darker for more."""
    if not rows:
        return NOTHING
    left, cell, tall = 64, 42, 20
    most = max(len(shares) for _, shares in rows)
    out = [f"<text class='tick' x='{left + n * cell + cell / 2:.0f}' y='12' text-anchor='middle'>{n}</text>" for n in range(most)]
    for i, (name, shares) in enumerate(rows):
        y = 18 + i * tall
        out.append(f"<text class='tick' x='{left - 8}' y='{y + 14}' text-anchor='end'>{escape(name)}</text>")
        for n, share in enumerate(shares):
            x = left + n * cell
            out.append(
                f"<rect class='bar after' x='{x}' y='{y}' width='{cell - 2}' height='{tall - 2}' opacity='{min(1.0, 0.1 + 0.6 * share):.2f}'/>"
                f"<text class='value' x='{x + cell / 2 - 1:.0f}' y='{y + 13}' text-anchor='middle'>{share:.0%}</text>"
            )
    return f"<svg viewBox='0 0 {left + most * cell} {20 + len(rows) * tall}' role='img'>{''.join(out)}</svg>"


def short(x: float) -> str:
    """Three digits: 2.65G, 1.07k, -12."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.3g}{suffix}"
    return f"{x:.3g}"

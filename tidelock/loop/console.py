"""What a person sees while a stage runs: one bar with an honest time left, or plain lines where nobody watches.

The time left is what remains divided by the rate measured so far; before there is a rate, none is shown. For all stages
together, what remains is told from their usual shares.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 15.0


class Bar:
    """Counts up to `total`. `advance(n, loss=...)` shows the figures beside it."""

    def __init__(self, name: str, total: int, unit: str, progress: Progress | None) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, 0
        self._progress, self._begun, self._said = progress, time.monotonic(), time.monotonic()
        self._task = progress.add_task(name, total=total, figures="") if progress else None

    def retotal(self, total: int) -> None:
        """For work whose size is only known once it has begun."""
        self.total = total
        if self._progress is not None:
            self._progress.update(self._task, total=total)

    def advance(self, n: int, **figures: float) -> None:
        self.done += n
        shown = "  ".join(f"{key} {value:.3f}" for key, value in figures.items())
        if self._progress is not None:
            self._progress.update(self._task, advance=n, figures=shown)
        elif time.monotonic() - self._said > LINE_EVERY_S:
            self._said = time.monotonic()
            left = (self._said - self._begun) / max(1, self.done) * (self.total - self.done)
            print(f"{self.name}: {self.done}/{self.total} {self.unit}, {left:.0f} s left  {shown}", file=sys.stderr, flush=True)


class Console:
    """Progress on stderr, so that results on stdout stay clean."""

    def __init__(self, quiet: bool = False, shares: Mapping[str, float] = {}) -> None:
        self.quiet, self.shares = quiet, shares
        self._took: dict[str, float] = {}
        self._rich = RichConsole(stderr=True, highlight=False)

    @contextmanager
    def progress(self, name: str, total: int, unit: str) -> Iterator[Bar]:
        if self.quiet or not self._rich.is_terminal:
            yield Bar(name, total, unit, None)
            return
        columns = [
            TextColumn("{task.description:>10}"), BarColumn(bar_width=32), MofNCompleteColumn(), TextColumn(unit),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
        ]  # fmt: skip
        with Progress(*columns, console=self._rich, transient=True) as progress:
            yield Bar(name, total, unit, progress)

    @contextmanager
    def status(self, name: str) -> Iterator[None]:
        if self.quiet or not self._rich.is_terminal:
            yield
            return
        with self._rich.status(name):
            yield

    def finished(self, name: str, wall_s: float, skipped: bool) -> None:
        self._took[name] = wall_s
        if not self.quiet:
            note, left = "done before" if skipped else "done", self.left_s()
            ahead = f"   about {_minutes(left)} left in all" if left else ""
            self._rich.print(f"{name:>10}  {note}  {wall_s:6.1f} s{ahead}")

    def left_s(self) -> float:
        """Seconds that the stages still to come will take, if they keep to their shares at the pace measured so far."""
        done = sum(self.shares.get(name, 0) for name in self._took)
        ahead = sum(share for name, share in self.shares.items() if name not in self._took)
        return ahead * sum(self._took.values()) / done if done else 0.0

    def line(self, text: str) -> None:
        if not self.quiet:
            self._rich.print(text)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"

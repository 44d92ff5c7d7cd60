"""Which worker a process is, of a server that has several (`fleet`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Member:
    """Worker `number` of `size`, from 0. `meeting`: a directory where the workers of one server find each other."""

    number: int
    size: int
    meeting: Path

    @property
    def ready_file(self) -> Path:
        return self.meeting / f"ready-{self.number}"

    @property
    def socket(self) -> Path:
        """Where it tells the others its metrics."""
        return self.meeting / f"metrics-{self.number}"

    @property
    def all(self) -> list[Member]:
        return [Member(n, self.size, self.meeting) for n in range(self.size)]

    def __str__(self) -> str:
        return f"{self.number}/{self.size}:{self.meeting}"

    @staticmethod
    def parse(text: str) -> Member:
        numbers, _, meeting = text.partition(":")
        number, _, size = numbers.partition("/")
        return Member(int(number), int(size), Path(meeting))

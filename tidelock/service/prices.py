"""Prices in integer nano-USD per token, and the versioned book they come from.

A version, once used, never changes its numbers: every hold and usage row names the version it was priced with.
"""

from __future__ import annotations

from dataclasses import dataclass

from tidelock.service.db import Database
from tidelock.tokens.errors import UserError

NANO_PER_USD = 1_000_000_000


@dataclass(frozen=True)
class Price:
    """Nano-USD per token of one model. A cached input token never costs more than a fresh one, so a hold at list
    price always covers the bill."""

    input_nano: int
    cached_input_nano: int
    output_nano: int

    def __post_init__(self) -> None:
        if not 0 <= self.cached_input_nano <= self.input_nano or self.output_nano < 1:
            raise UserError(f"prices need 0 <= cached input <= input and output >= 1 nano-USD per token, got {self}")

    def cost_nano(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> int:
        fresh = prompt_tokens - cached_tokens
        return fresh * self.input_nano + cached_tokens * self.cached_input_nano + completion_tokens * self.output_nano


@dataclass(frozen=True)
class PriceBook:
    """Prices by model name, under one version."""

    version: str
    prices: dict[str, Price]

    def register(self, db: Database) -> None:
        """Records this version for later re-rating. Raises UserError if it was used before with other numbers."""
        with db.transaction() as write:
            for model, price in self.prices.items():
                numbers = (price.input_nano, price.cached_input_nano, price.output_nano)
                write("INSERT OR IGNORE INTO prices VALUES (?, ?, ?, ?, ?)", (self.version, model, *numbers))
                stored = write(
                    "SELECT input_nano, cached_input_nano, output_nano FROM prices WHERE version = ? AND model = ?",
                    (self.version, model),
                ).fetchone()
                if tuple(stored) != numbers:
                    raise UserError(
                        f"price version {self.version!r} already stands for {tuple(stored)} on {model!r}; "
                        f"give {numbers} a new version name"
                    )


def format_usd(nano_usd: int) -> str:
    """Exact decimal text, e.g. 1_500_000_000 -> "1.500000000"."""
    sign = "-" if nano_usd < 0 else ""
    whole, fraction = divmod(abs(nano_usd), NANO_PER_USD)
    return f"{sign}{whole}.{fraction:09d}"

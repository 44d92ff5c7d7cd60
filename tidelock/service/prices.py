"""Prices in integer nano-USD per token, and the versioned book they come from.

A version, once used, never changes its numbers: every hold and usage row names the version it was priced with, so any
bill can be computed again, and under another version too (`rating.py`).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from msgspec import Struct

from tidelock.service.db import Database
from tidelock.tokens.errors import UserError

NANO_PER_USD = 1_000_000_000
Factor = tuple[int, int]  # numerator, denominator


class Counts(Struct, frozen=True, gc=False):
    """What one request used. `prompt` counts all prompt tokens; the three after it are parts of it."""

    prompt: int
    cached: int = 0
    cache_write_5m: int = 0
    cache_write_1h: int = 0
    completion: int = 0
    tools: Mapping[str, int] = {}  # calls of paid tools, by name

    @property
    def fresh(self) -> int:
        return self.prompt - self.cached - self.cache_write_5m - self.cache_write_1h


@dataclass(frozen=True)
class Price:
    """Nano-USD per token of one model, and per call of a paid tool, times `factor` (batch, speed)."""

    input_nano: int
    cached_input_nano: int
    output_nano: int
    cache_write_5m_nano: int | None = None  # None: as fresh input
    cache_write_1h_nano: int | None = None
    tools: Mapping[str, int] = field(default_factory=dict)
    factor: Factor = (1, 1)

    def __post_init__(self) -> None:
        if not 0 <= self.cached_input_nano <= self.input_nano or self.output_nano < 1:
            raise UserError(f"prices need 0 <= cached input <= input and output >= 1 nano-USD per token, got {self}")
        others = [*self.tools.values(), self.cache_write_5m_nano or 0, self.cache_write_1h_nano or 0]
        if min(others) < 0 or min(self.factor) < 1:
            raise UserError(f"prices cannot be negative and factors must be positive, got {self}")

    def cost_nano(self, used: Counts) -> int:
        """Σ count × price, times the factor, rounded down once (in the customer's favour)."""
        numerator, denominator = self.factor
        return self._list_nano(used) * numerator // denominator

    def ceiling_nano(self, prompt_tokens: int, completion_tokens: int, tools: Mapping[str, int] | None = None) -> int:
        """The most that a request of this size can cost: every prompt token at the dearest of its four prices."""
        numerator, denominator = self.factor
        return self._ceiling_list_nano(prompt_tokens, completion_tokens, tools or {}) * numerator // denominator

    def tokens_within(self, nano_usd: int, prompt_tokens: int, tools: Mapping[str, int] | None = None) -> int:
        """The most completion tokens whose `ceiling_nano` is at most `nano_usd`; negative if not even the prompt's is."""
        numerator, denominator = self.factor
        budget = ((nano_usd + 1) * denominator - 1) // numerator  # the largest list price that rounds down to nano_usd
        return (budget - self._ceiling_list_nano(prompt_tokens, 0, tools or {})) // self.output_nano

    def times(self, factor: Factor) -> Price:
        numerator, denominator = self.factor[0] * factor[0], self.factor[1] * factor[1]
        return Price(**{**self.__dict__, "factor": (numerator, denominator)})

    def _list_nano(self, used: Counts) -> int:
        write_5m = self.input_nano if self.cache_write_5m_nano is None else self.cache_write_5m_nano
        write_1h = self.input_nano if self.cache_write_1h_nano is None else self.cache_write_1h_nano
        return (
            used.fresh * self.input_nano
            + used.cached * self.cached_input_nano
            + used.cache_write_5m * write_5m
            + used.cache_write_1h * write_1h
            + used.completion * self.output_nano
            + self._tools_nano(used.tools)
        )

    def _ceiling_list_nano(self, prompt_tokens: int, completion_tokens: int, tools: Mapping[str, int]) -> int:
        dearest = max(self.input_nano, self.cache_write_5m_nano or 0, self.cache_write_1h_nano or 0)
        return prompt_tokens * dearest + completion_tokens * self.output_nano + self._tools_nano(tools)

    def _tools_nano(self, calls: Mapping[str, int]) -> int:
        if not calls:
            return 0
        unknown = sorted(set(calls) - set(self.tools))
        if unknown:
            raise UserError(f"the price book has no price for a call of {', '.join(unknown)}")
        return sum(self.tools[name] * count for name, count in calls.items())


@dataclass(frozen=True)
class PriceBook:
    """Prices by model name, under one version, from `effective` (seconds since 1970) on.

    `modes` are named factors a request may be served under ("batch": (1, 2)); several are joined by "+".
    """

    version: str
    prices: Mapping[str, Price]
    modes: Mapping[str, Factor] = field(default_factory=lambda: {"batch": (1, 2)})
    effective: float = 0.0

    def price(self, model: str, mode: str = "") -> Price:
        """Raises UserError if the book does not have the model or the mode."""
        if model not in self.prices:
            raise UserError(f"the price book {self.version!r} has no price for model {model!r}")
        price = self.prices[model]
        for name in filter(None, mode.split("+")):
            if name not in self.modes:
                raise UserError(f"the price book {self.version!r} has no mode {name!r}")
            price = price.times(self.modes[name])
        return price

    def register(self, db: Database) -> None:
        """Records this version. Raises UserError if it was used before with other numbers."""
        document = to_json(self)
        with db.transaction() as tx:
            tx("INSERT INTO price_versions VALUES (?, ?, ?) ON CONFLICT (version) DO NOTHING",
               (self.version, self.effective, document))  # fmt: skip
            stored = tx("SELECT book FROM price_versions WHERE version = ?", (self.version,)).fetchone()[0]
        if json.loads(stored) != json.loads(document):
            raise UserError(f"price version {self.version!r} already stands for other numbers; give the new ones a new name")


@dataclass(frozen=True)
class Schedule:
    """Versions of a price book; each holds from its date until the next one's."""

    books: tuple[PriceBook, ...]

    def __post_init__(self) -> None:
        names = [book.version for book in self.books]
        dates = [book.effective for book in self.books]
        if len(set(names)) < len(names) or len(set(dates)) < len(dates) or not names:
            raise UserError("a price book needs at least one version, and versions with different names and dates")

    def at(self, when: float) -> PriceBook:
        """Raises UserError if no version has begun by then."""
        if len(self.books) == 1 and self.books[0].effective <= when:
            return self.books[0]
        begun = [book for book in self.books if book.effective <= when]
        if not begun:
            raise UserError("no version of the price book has begun yet")
        return max(begun, key=lambda book: book.effective)

    @property
    def now(self) -> PriceBook:
        return self.at(time.time())

    def register(self, db: Database) -> None:
        for book in self.books:
            book.register(db)


def to_json(book: PriceBook) -> str:
    """The book as it is stored, without version and date. Defaults are left out, so old documents read the same."""
    tools: dict[str, int] = {}
    for price in book.prices.values():
        tools.update(price.tools)
    models = {
        name: {column: getattr(p, f"{column}_nano") for column in COLUMNS if getattr(p, f"{column}_nano") is not None}
        for name, p in book.prices.items()
    }
    modes = {name: list(factor) for name, factor in book.modes.items()}
    return json.dumps({"models": models, "modes": modes, "tools": tools}, sort_keys=True)


def from_json(version: str, effective: float, text: str) -> PriceBook:
    data = json.loads(text)
    prices = {
        name: Price(**{f"{column}_nano": nano for column, nano in numbers.items()}, tools=data["tools"])
        for name, numbers in data["models"].items()
    }
    return PriceBook(version, prices, {name: tuple(f) for name, f in data["modes"].items()}, effective)


def stored_book(rows: list[Any], version: str) -> PriceBook:
    """The book of `version` out of `SELECT version, effective, book FROM price_versions WHERE version = ?`."""
    if not rows:
        raise UserError(f"there is no price version {version!r}")
    return from_json(*rows[0])


COLUMNS = ("input", "cached_input", "cache_write_5m", "cache_write_1h", "output")


AMOUNT = re.compile(r"[0-9]{1,12}(\.[0-9]{1,30})?|\.[0-9]{1,30}")


def exact_nano(usd: Any, per: int = 1) -> int | None:
    """Nano-USD of decimal text such as "2.50", shared by `per` of something; None if that is no whole number, or no such
    text. `Decimal` would take "1_000", "1e3" and other scripts' digits too, and round away what comes after 28 digits."""
    if not isinstance(usd, str) or AMOUNT.fullmatch(usd) is None:
        return None
    nano = Fraction(usd) * NANO_PER_USD / per
    return int(nano) if nano.denominator == 1 else None


def format_usd(nano_usd: int) -> str:
    """Exact decimal text, e.g. 1_500_000_000 -> "1.500000000"."""
    sign = "-" if nano_usd < 0 else ""
    whole, fraction = divmod(abs(nano_usd), NANO_PER_USD)
    return f"{sign}{whole}.{fraction:09d}"

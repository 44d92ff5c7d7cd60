"""A price book as a person writes it: one TOML file, USD per million tokens, every version with the date it begins.

    [[version]]
    name = "2026-11"
    effective = 2026-11-01T00:00:00Z
    [version.modes]
    batch = "1/2"
    [version.tools]                    # USD per call
    "$web_search" = "0.005"
    [version.models."my-model"]
    input = "3.00"
    cached_input = "0.30"
    cache_write_5m = "3.00"            # may be left out: as fresh input
    cache_write_1h = "6.00"
    output = "15.00"
"""

from __future__ import annotations

import tomllib
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

from tidelock.service.prices import COLUMNS, Factor, Price, PriceBook, Schedule, exact_nano
from tidelock.tokens.errors import UserError

TOKENS_PER_PRICE = 1_000_000


def read_prices(path: str | Path) -> Schedule:
    """Raises UserError that names the version and the field."""
    try:
        data = tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the price book {path}: {error}") from error
    versions = data.get("version")
    if not isinstance(versions, list) or set(data) != {"version"}:
        raise UserError(f"{path}: a price book is a list of [[version]] tables and nothing else")
    try:
        return Schedule(tuple(_version(version) for version in versions))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _version(data: dict[str, Any]) -> PriceBook:
    name = data.get("name")
    if not isinstance(name, str) or not name:
        raise UserError("every version needs a name")
    unknown = set(data) - {"name", "effective", "modes", "tools", "models"}
    if unknown:
        raise UserError(f"version {name}: unknown field {min(unknown)}")
    effective = data.get("effective")
    if not isinstance(effective, datetime) or effective.tzinfo is None:
        raise UserError(f"version {name}: effective must be a time with its zone, such as 2026-11-01T00:00:00Z")
    tools = {tool: _nano(f"version {name}: {tool}", usd, 1) for tool, usd in data.get("tools", {}).items()}
    modes = {mode: _factor(f"version {name}: {mode}", text) for mode, text in data.get("modes", {}).items()}
    models = data.get("models") or {}
    if not models:
        raise UserError(f"version {name} has no models")
    prices = {model: _price(f"version {name}: {model}", numbers, tools) for model, numbers in models.items()}
    return PriceBook(name, prices, modes, effective.timestamp())


def _price(where: str, numbers: dict[str, Any], tools: dict[str, int]) -> Price:
    unknown, missing = set(numbers) - set(COLUMNS), {"input", "cached_input", "output"} - set(numbers)
    if unknown or missing:
        raise UserError(f"{where}: {'unknown' if unknown else 'missing'} field {min(unknown or missing)}")
    nano = {f"{column}_nano": _nano(f"{where}.{column}", usd, TOKENS_PER_PRICE) for column, usd in numbers.items()}
    return Price(**nano, tools=tools)


def _nano(where: str, usd: Any, per: int) -> int:
    """Nano-USD of one token or call. Prices are strings, because a TOML number would be a binary fraction."""
    nano = exact_nano(usd, per)
    if nano is not None:
        return nano
    raise UserError(f"{where}: {usd!r} is no price; write it as a string that makes whole nano-USD, such as \"3.00\"")


def _factor(where: str, text: Any) -> Factor:
    try:
        factor = Fraction(text) if isinstance(text, str) else Fraction(0)
    except (ValueError, ZeroDivisionError):
        factor = Fraction(0)
    if factor <= 0:
        raise UserError(f"{where}: {text!r} is no factor; write it as a string such as \"1/2\" or \"2\"")
    return factor.numerator, factor.denominator

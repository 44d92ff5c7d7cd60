"""The hash chain of one customer's transactions: each hash covers the transaction and the hash of the one before.

One chain per customer, not one for all: a customer's transactions are written under a lock on that customer anyway, so
chaining costs no concurrency, and a customer's statement can be checked alone. `root` ties the chains together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence


def link(
    before: str, customer: str, seq: int, kind: str, reference: str, detail: str, created: float,
    entries: Iterable[Sequence[object]],
) -> str:  # fmt: skip
    """The hash of a transaction that follows the one with hash `before` ("" at the start). entries: (kind, lot, nano)."""
    fields = [before, customer, str(seq), kind, reference, detail, repr(created)]
    for account, lot, nano in entries:
        fields += (f"{account}", f"{lot}", f"{nano}")
    # lengths first, so that no two lists of fields read the same
    text = " ".join([str(len(field)) for field in fields]) + "".join(fields)
    return hashlib.sha256(text.encode()).hexdigest()


def root(heads: Iterable[tuple[str, int, str]]) -> str:
    """One hash over (customer, seq, hash) of all chains: write it down elsewhere, and no history can be replaced."""
    return hashlib.sha256("\n".join(f"{len(c)} {c} {seq} {head}" for c, seq, head in sorted(heads)).encode()).hexdigest()

"""Headers that requests to a remote policy carry on behalf of the request that is being answered (W3C trace context).

Whoever traces sets them, whoever speaks HTTP to a model server sends them; neither knows the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar

NONE: Mapping[str, str] = {}
outgoing: ContextVar[Mapping[str, str]] = ContextVar("tidelock_outgoing_headers", default=NONE)

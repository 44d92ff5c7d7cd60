"""What the upstream that answered says it used, beside what was billed: NULL where it said nothing or is this process."""

from __future__ import annotations

from typing import Any

from tidelock.service.migrations import script

SCHEMA = """
ALTER TABLE usage ADD COLUMN upstream_prompt BIGINT;
ALTER TABLE usage ADD COLUMN upstream_completion BIGINT;
ALTER TABLE usage ADD COLUMN upstream_cached BIGINT;
ALTER TABLE usage ADD COLUMN upstream TEXT;  -- its name in upstreams.toml
"""


def up(tx: Any, backend: Any) -> None:
    script(tx, SCHEMA)

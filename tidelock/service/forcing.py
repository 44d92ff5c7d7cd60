"""What an answer is held to while it is sampled: a JSON Schema, or a call of a tool. The engine does the holding."""

from __future__ import annotations

from tidelock.service.ask import Ask
from tidelock.tokens.policy import Constraint
from tidelock.tokens.template import Template


def constraint(template: Template, ask: Ask) -> Constraint | None:
    return None

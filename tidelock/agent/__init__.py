"""The agent: one loop, used by the product and by training. Talks to a `Policy`, runs tools in the sandbox."""

from .episode import Episode
from .loop import Agent

__all__ = ["Agent", "Episode"]

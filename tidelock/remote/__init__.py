"""Policies that run elsewhere: a server that speaks token ids, and any OpenAI-compatible endpoint that speaks text."""

from .sse import Patience, RemoteError
from .text import TextPolicy
from .tokens import TokenPolicy

__all__ = ["Patience", "RemoteError", "TextPolicy", "TokenPolicy"]

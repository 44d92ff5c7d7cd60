"""Policies that run elsewhere: a server that speaks token ids, and any OpenAI-compatible endpoint that speaks text."""

from .http import Client
from .sse import Patience, RemoteError
from .text import TextPolicy
from .tokens import TokenPolicy

__all__ = ["Client", "Patience", "RemoteError", "TextPolicy", "TokenPolicy"]

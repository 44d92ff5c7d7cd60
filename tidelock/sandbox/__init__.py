"""The sandbox: tool code runs in another process, confined as far as an unprivileged process can confine itself.

Fails closed: a level that was asked for and cannot be had is a refusal, and the level that was had is reported.
"""

from .host import ToolCrash, ToolHost, ToolResult
from .level import probe
from .shell import run_confined
from .toolset import ToolFault

__all__ = ["ToolCrash", "ToolFault", "ToolHost", "ToolResult", "probe", "run_confined"]

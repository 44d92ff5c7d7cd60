"""The models of the K2 line as declarations: what each does its own way in the ChatML format with tool sections.

K2 Thinking and K2.5 show a model no reasoning from before its latest answer. `chatml` keeps all of it: it is K2.6 with
`preserve_thinking`, and K2.7. Without `preserve_thinking` K2.6 is K2.5.

Source: model reference, sections 1.10, 2 and 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dialect:
    """What one model of the line does its own way."""

    name: str
    opened: tuple[str, ...] = ()  # what the generation prompt ends with; a model that is given nothing opens <think> itself
    thinks: bool = True  # False: a turn has no reasoning, and any that a message brings is left out
    forgets: bool = False  # reasoning up to the latest answer is left out of the prompt
    system: str = ""  # the system prompt of a conversation without one; "" = none
    sorted_tools: bool = True  # keys of a tool declaration, recursively; False: type, function{name, description, ...}


KIMI = "You are Kimi, an AI assistant created by Moonshot AI."
K2 = Dialect("k2", thinks=False, system=KIMI, sorted_tools=False)
K2_THINKING = Dialect("k2-thinking", forgets=True, system=KIMI, sorted_tools=False)
K2_5 = Dialect("k2.5", opened=("<think>",), forgets=True)
INSTANT = Dialect("k2.5-instant", opened=("<think>", "</think>"), thinks=False)
CHATML = Dialect("chatml", opened=("<think>",))

# By name: the modes of each, the usual one first.
DIALECTS = {
    "k2": (K2,),
    "k2-thinking": (K2_THINKING,),
    "k2.5": (K2_5, INSTANT),
    "k2.6": (CHATML, INSTANT),
    "k2.7": (CHATML,),
    "chatml": (CHATML, INSTANT),
}

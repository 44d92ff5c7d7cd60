"""The trace: the product's own history as a graph of messages, each holding only the ids it adds.

A node says what produced its ids (weights versions, sampling, template, sandbox) and what may be done with them
(consent, redactions). Siblings are retries or edits; a path from the root is one conversation, token for token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from .directives import is_of_one_request
from .journal import Journal, encode_finite, encode_record, read_journal
from .message import Message, ToolCall, ToolSpec
from .policy import Kept
from .siblings import Siblings, journals
from .template import Template


class Node(Struct, frozen=True, gc=False):
    """One message of a conversation and the ids it added. Make one with `Node.of`, which derives the id.

    sampled: how many of the trailing ids were sampled (0 for messages that came in); `logprobs` belong to those.
    sampled_logprobs, kept: of the distribution that was drawn from, where it was not the model's own (see
    `policy.Chunk`): with them the log-probability under the same cut-offs can be computed again. Empty where it was.
    weights_versions: (version, count) spans over the sampled ids. redactions: [start, end) ranges of `ids` kept out of
    any loss; ids themselves are never rewritten. exact: ids and logprobs are the sampler's own.
    """

    id: str
    parent: str | None
    scope: str  # who and which session; conversations never match across scopes
    message: Message
    ids: tuple[int, ...]
    sampled: int = 0
    logprobs: tuple[float, ...] = ()
    sampled_logprobs: tuple[float, ...] = ()
    kept: tuple[Kept, ...] = ()
    weights_versions: tuple[tuple[int, int], ...] = ()
    sampling: dict[str, Any] = {}
    template: str = ""
    sandbox: str = "none"
    consent: bool = False
    consent_source: str = ""
    redactions: tuple[tuple[int, int], ...] = ()
    finish_reason: str | None = None
    exact: bool = False
    created: float = 0.0  # seconds since 1970

    def __post_init__(self) -> None:
        spanned = sum(count for _, count in self.weights_versions)
        if not len(self.ids) >= self.sampled == len(self.logprobs) == spanned:
            raise ValueError(
                f"a node of {len(self.ids)} ids, {self.sampled} of them sampled, needs a logprob and a weights version "
                f"for each sampled id, not {len(self.logprobs)} and {spanned}"
            )
        if not {len(self.sampled_logprobs), len(self.kept)} <= {0, self.sampled}:
            raise ValueError(f"what was drawn from is told for each of the {self.sampled} sampled ids, or for none")

    @staticmethod
    def of(parent: str | None, message: Message, ids: Sequence[int], *, scope: str, **rest: Any) -> Node:
        """A node with its id derived from what it is and where it hangs: adding it twice adds it once."""
        above = "null" if parent is None else f'"{parent}"'
        identity = f'[{above}, {_quoted(scope)}, "{digest(message)}", {list(ids)}]'  # JSON, as `json.dumps` writes it
        node_id = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
        return Node(node_id, parent, scope, message, tuple(ids), **{"created": time.time(), **rest})


class Outcome(Struct, frozen=True, gc=False):
    """A verdict on the conversation that ends in `node`.

    Somebody whose request failed may have got there in smaller steps, each a conversation of its own. Then `request` is
    the answer that failed and `steps` are the last nodes of the conversations that together did what was asked; the
    verdict is on all of them, and `node` is the last.
    """

    node: str
    success: bool
    reward: float
    source: str
    request: str | None = None
    steps: tuple[str, ...] = ()


class Served(Struct, frozen=True, gc=False):
    """That a request was answered, and with what. Two requests with equal answers share the nodes, not this: it is what
    joins the trace to the bills. `sampled` counts the tokens of all its answers."""

    request: str
    nodes: tuple[str, ...]
    sampled: int
    exact: bool  # they are the tokens that were billed
    created: float


CACHED_CHARS = 2048  # a client sends a conversation again with each turn, and most of its messages are short
_sorted = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode
_quoted = lru_cache(4096)(json.dumps)  # of a scope


def digest(message: Message) -> str:
    """What a client can see of a message: role, text, reasoning, calls. Not call ids, not the sampled ids."""
    known = message.__dict__.get("_digest")  # a message is frozen, and asked this several times
    if known is None:
        plain = not message.tool_calls and not message.tools and len(message.content) + len(message.reasoning) <= CACHED_CHARS
        words = (message.role, message.content, message.reasoning, message.name)
        known = message.__dict__["_digest"] = _of_words(*words) if plain else _digest(message)
    return known


@lru_cache(16_384)
def _of_words(role: Any, content: str, reasoning: str, name: str | None) -> str:
    """As `_digest` would have it."""
    named = "null" if name is None else encode_basestring(name)
    words = ", ".join((encode_basestring(role), encode_basestring(content), encode_basestring(reasoning)))
    return _hash(f"[{words}, [], {named}, []]")


def _digest(message: Message) -> str:
    calls = [[c.name, c.arguments] for c in message.tool_calls]
    tools = [[t.name, t.description, t.parameters] for t in message.tools]
    return _hash(_sorted([message.role, message.content, message.reasoning, calls, message.name, tools]))


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def message_to_dict(m: Message) -> dict[str, Any]:
    out: dict[str, Any] = {"role": m.role, "content": m.content}
    if m.reasoning:
        out["reasoning"] = m.reasoning
    if m.tool_calls:
        out["tool_calls"] = [[c.id, c.name, c.arguments] for c in m.tool_calls]
    if m.tool_call_id is not None:
        out["tool_call_id"] = m.tool_call_id
    if m.name is not None:
        out["name"] = m.name
    if m.tools:
        out["tools"] = [[t.name, t.description, t.parameters] for t in m.tools]
    if m.verbatim is not None:
        out["verbatim"] = list(m.verbatim)
    return out


def message_from_dict(data: dict[str, Any]) -> Message:
    verbatim = data.get("verbatim")
    return Message(
        data["role"],
        data["content"],
        data.get("reasoning", ""),
        tuple(ToolCall(*c) for c in data.get("tool_calls", ())),
        data.get("tool_call_id"),
        data.get("name"),
        tuple(ToolSpec(*t) for t in data.get("tools", ())),
        None if verbatim is None else tuple(verbatim),
    )


def node_to_dict(node: Node) -> dict[str, Any]:
    out = {**asdict(node), "message": message_to_dict(node.message)}
    out["kept"] = [base64.b64encode(k).decode() if isinstance(k, bytes) else k for k in node.kept]
    return out


def _encoded(node: Node) -> bytes:
    record = {"kind": "node", "node": node_to_dict(node)}
    finite = math.isfinite(sum(node.logprobs) + sum(node.sampled_logprobs))
    return encode_finite(record) if finite else encode_record(record)


def node_from_dict(data: dict[str, Any]) -> Node:
    fields = dict(data, message=message_from_dict(data["message"]))
    for name in ("ids", "logprobs", "sampled_logprobs"):
        fields[name] = tuple(fields.get(name, ()))
    fields["kept"] = tuple(
        base64.b64decode(k) if isinstance(k, str) else None if k is None else tuple(k) for k in fields.get("kept", ())
    )
    for name in ("weights_versions", "redactions"):
        fields[name] = tuple(tuple(pair) for pair in fields[name])
    return Node(**fields)


class Trace:
    """Nodes and outcomes in memory: the read side. `TraceStore` adds the journal."""

    template_hash: str | None = None  # None: `match` takes the ids of any template

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.withdrawn: set[str] = set()  # scopes whose owner took consent back
        self._children: dict[str | None, list[str]] = defaultdict(list)
        # a tuple of strings is nothing to the collector of cycles, a list is for ever
        self._by_message: dict[tuple[str, str | None, str], tuple[str, ...]] = defaultdict(tuple)
        self._outcomes: dict[str, list[Outcome]] = defaultdict(list)

    @staticmethod
    def read(path: str | Path) -> Trace:
        """The trace in a journal and, where several workers serve from its directory, in those beside it (see `siblings`).
        Takes no write lock."""
        trace = Trace()
        for journal in journals(path):
            for record in read_journal(journal):
                trace._take(record)
        return trace

    def _take(self, record: dict[str, Any]) -> None:
        if record["kind"] == "node":
            self._index(node_from_dict(record["node"]))
        elif record["kind"] == "outcome":
            given = record["outcome"]
            outcome = Outcome(**{**given, "steps": tuple(given["steps"])})
            if outcome not in self._outcomes[outcome.node]:  # two workers may have been told the same
                self._outcomes[outcome.node].append(outcome)
        elif record["kind"] == "withdraw":
            self.withdrawn.add(record["scope"])

    def _index(self, node: Node) -> None:
        if node.id in self.nodes:  # two workers may have begun the same conversation
            return
        self.nodes[node.id] = node
        self._children[node.parent].append(node.id)
        self._by_message[node.scope, node.parent, digest(node.message)] += (node.id,)

    def get(self, node_id: str) -> Node | None:
        return self.nodes.get(node_id)

    def match(self, scope: str, messages: Sequence[Message]) -> tuple[Node | None, int]:
        """The deepest node of `scope` whose conversation is a prefix of `messages`, and how many it covers.

        Messages compare by `digest`. The same words may have been sampled more than once, as other ids: every such
        sibling is followed, and the latest of the deepest is taken; one after which the next message was said elsewhere
        (see `elsewhere`) goes before the others.
        """
        found: list[str] = []
        for n, message in enumerate(messages):
            following = self._following(scope, found or [None], digest(message))
            if not following:
                if len(found) > 1:
                    found = [i for i in found if self.elsewhere(self.nodes[i], message)] or found
                return (self.nodes[found[-1]] if found else None), n
            found = following
        return (self.nodes[found[-1]] if found else None), len(messages)

    def _following(self, scope: str, parents: Sequence[str | None], key: str) -> list[str]:
        return [i for parent in parents for i in self._by_message.get((scope, parent, key), ()) if self._fits(i)]

    def elsewhere(self, node: Node, message: Message) -> list[Node]:
        """The answers that say `message` to a request which followed `node` with directives of its own.

        Later requests do not repeat those, so their conversation hangs on `node` itself: what was said is in it with the
        ids that were sampled, but as something given. Where it was sampled, it stays.
        """
        if message.role != "assistant":
            return []
        out: list[str] = []
        level, key = [node.id], digest(message)
        while level := [i for at in level for i in self._children.get(at, ()) if is_of_one_request(self.nodes[i].message)]:
            out += self._following(node.scope, level, key)
        return [self.nodes[i] for i in out]

    def _fits(self, node_id: str) -> bool:
        return self.template_hash is None or self.nodes[node_id].template == self.template_hash

    def path(self, node_id: str) -> list[Node]:
        """Root first."""
        out = []
        at: str | None = node_id
        while at is not None:
            out.append(self.nodes[at])
            at = self.nodes[at].parent
        return out[::-1]

    def ids(self, node_id: str) -> list[int]:
        out: list[int] = []
        for node in self.path(node_id):
            out += node.ids
        return out

    def messages(self, node_id: str) -> list[Message]:
        return [node.message for node in self.path(node_id)]

    def children(self, node_id: str | None) -> list[Node]:
        return [self.nodes[c] for c in self._children.get(node_id, ())]

    def leaves(self) -> list[Node]:
        return [n for n in self.nodes.values() if not self._children.get(n.id)]

    def outcomes(self, node_id: str | None = None) -> list[Outcome]:
        """The verdicts on one conversation, or all there are."""
        if node_id is not None:
            return list(self._outcomes.get(node_id, ()))
        return [outcome for outcomes in self._outcomes.values() for outcome in outcomes]


class TraceStore(Trace):
    """The trace of a running service: what it adds is on disk before the call returns.

    Opening recovers (see `journal`). `match` ignores nodes that another template or tokenizer wrote. Conversations that
    other workers have in their journals (see `siblings`) are taken over as soon as somebody asks for them.
    """

    def __init__(self, path: str | Path, template: Template, patience_s: float = 0.0) -> None:
        super().__init__()
        self.template_hash = template.hash
        self._journal = Journal(path, patience_s)
        self._siblings = Siblings(self._journal.path)
        for record in self._journal.records:
            self._take(record)
        self._journal.records = []
        self.follow()

    def match(self, scope: str, messages: Sequence[Message]) -> tuple[Node | None, int]:
        found, known = super().match(scope, messages)
        # an answer that is not known here may have been given by another worker
        if any(message.role == "assistant" for message in messages[known:]):
            here = found is not None and bool(self.elsewhere(found, messages[known]))
            unknown = any(message.role == "assistant" for message in messages[known + here :])
            if unknown and self._take_over(scope):
                found, known = super().match(scope, messages)
        return found, known

    def get(self, node_id: str) -> Node | None:
        node = self.nodes.get(node_id)
        if node is None:
            self.follow()
            scope = self._siblings.scope_of(node_id)
            if scope is not None and self._take_over(scope):
                node = self.nodes.get(node_id)
        return node

    def path(self, node_id: str) -> list[Node]:
        self.get(node_id)
        return super().path(node_id)

    def follow(self) -> None:
        """Looks at what other workers have written since the last time: now and then, so that there is never much."""
        for record in self._siblings.look():
            self._take(record)

    def _take_over(self, scope: str) -> bool:
        self.follow()
        records = self._siblings.read(scope)
        for record in records:
            self._take(record)
        return bool(records)

    def add(self, node: Node) -> bool:
        """False, and nothing written, when the node is already there."""
        return self.add_many([node]) == 1

    def add_many(self, nodes: Iterable[Node], served: Iterable[Served] = ()) -> int:
        """How many nodes were new. Parents first; one fsync for all. Raises KeyError for an unknown parent."""
        new: dict[str, Node] = {}
        for node in nodes:
            if node.parent is not None and node.parent not in self.nodes and node.parent not in new:
                raise KeyError(node.parent)
            if node.id not in self.nodes:
                new.setdefault(node.id, node)
        records: list[dict[str, Any] | bytes] = [*map(_encoded, new.values())]
        records += [{"kind": "served", "served": asdict(s)} for s in served]
        self._journal.append_many(records)
        for node in new.values():
            self._index(node)
        return len(new)

    def add_outcome(self, outcome: Outcome) -> bool:
        """False when the same verdict is already recorded. Raises KeyError for an unknown node."""
        if self.get(outcome.node) is None:
            raise KeyError(outcome.node)
        self.follow()
        if outcome in self.outcomes(outcome.node):
            return False
        self._journal.append({"kind": "outcome", "outcome": asdict(outcome)})
        self._outcomes[outcome.node].append(outcome)
        return True

    def withdraw(self, scope: str) -> None:
        """Take back consent for everything in a scope, past and future."""
        if scope not in self.withdrawn:
            self._journal.append({"kind": "withdraw", "scope": scope})
            self.withdrawn.add(scope)

    @property
    def journal(self) -> Path:
        return self._journal.path

    def close(self) -> None:
        self._journal.close()

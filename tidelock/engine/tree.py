"""One radix tree over everything that has been computed: requests, turns and branches share their common beginning.

Under one root per set of weights, an edge is a run of token ids. A node owns references to the pages that hold its
tokens' latents and, optionally, one KDA state: that after its last token. Either may also lie in the store (offloaded).
The tree only keeps; what a request may resume from is said by `reach`, what to forget by `eviction`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import numpy as np

from .memory import Memory
from .offload import Store

Path = list[tuple["Node", int]]  # nodes from the root down, and how many of each one's tokens match


@dataclass(eq=False)
class Node:
    """Tokens start..end of a conversation. A page belongs to every node with tokens in it, and the page of a node's
    first token holds, before that token, the same tokens as the node's ancestors say."""

    ids: np.ndarray
    start: int
    parent: Node | None
    children: dict[int, Node] = field(default_factory=dict)
    pages: list[int] | None = None  # from page start // page_size on; None: not in memory
    slot: int | None = None  # the state at `end`; None: not in memory (a tombstone, if it once was)
    rows_key: int | None = None  # the same two in the store
    state_key: int | None = None
    pins: int = 0  # running requests that stand on this node
    used: int = 0  # the tree's clock when somebody last came by

    @property
    def end(self) -> int:
        return self.start + len(self.ids)


def common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    at = int(differ.argmax()) if n else 0
    return at if n and differ[at] else n


class Tree:
    """Nodes by (weights, ids)."""

    def __init__(self, memory: Memory, store: Store) -> None:
        self.memory, self.store = memory, store
        self.clock = 0
        self._roots: dict[Hashable, Node] = {}

    def __iter__(self) -> Iterator[Node]:
        """Every node, parents before children; roots (which hold nothing) are left out."""
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    # -- reading ------------------------------------------------------------------------------------------------------

    def walk(self, weights: Hashable, ids: np.ndarray) -> Path:
        """The longest path that `ids` follow; only the last node may match in part."""
        node, at, path = self._roots.get(weights), 0, []
        while node is not None and at < len(ids):
            node = node.children.get(int(ids[at]))
            if node is not None:
                n = common(node.ids, ids[at : at + len(node.ids)])
                path.append((node, n))
                at += n
                if n < len(node.ids):
                    break
        return path

    def has_rows(self, node: Node) -> bool:
        return node.pages is not None or node.rows_key in self.store

    def has_state(self, node: Node) -> bool:
        return node.slot is not None or node.state_key in self.store

    def reach(self, path: Path, limit: int) -> int:
        """How many of the path's tokens need not be run again, at most `limit`: as far as there are latents, and with
        KDA layers the last place before that where there is a state."""
        rows = state = 0
        for node, n in path:
            if not self.has_rows(node):
                break
            rows = min(node.start + n, limit)
            if node.start + n == node.end <= limit and self.has_state(node):
                state = node.end
        return state if self.memory.hybrid else rows

    def touch(self, path: Path) -> None:
        self.clock += 1
        for node, _ in path:
            node.used = self.clock

    # -- writing ------------------------------------------------------------------------------------------------------

    def insert(self, weights: Hashable, ids: np.ndarray, pages: list[int], slot: int | None = None) -> Node | None:
        """Keep the first len(ids) tokens of a sequence that lies in `pages`: ownership of the pages is shared, that of
        `slot` (the state after them) taken over. Returns the last node."""
        if len(ids) == 0:
            return None
        self.clock += 1
        node, at = self._roots.setdefault(weights, Node(ids[:0], 0, None)), 0
        while at < len(ids):
            child = node.children.get(int(ids[at]))
            if child is None:
                child = self._attach(node, ids[at:].copy(), at)
            n = common(child.ids, ids[at:])
            at += n
            if n < len(child.ids) and (at < len(ids) or slot is not None):
                child = self._split(child, n)
            if child.pages is None and child.end <= len(ids):
                self._adopt(child, pages)
            node, node.used = child, self.clock
        if slot is not None:
            if node.slot is None:
                self.store.drop(node.state_key)
                node.slot, node.state_key = slot, None
            else:
                self.memory.slots.release(slot)
        return node

    def _attach(self, parent: Node, ids: np.ndarray, start: int) -> Node:
        node = parent.children[int(ids[0])] = Node(ids, start, parent)
        return node

    def _adopt(self, node: Node, pages: list[int]) -> None:
        """The node's tokens now lie in these pages of a sequence, wherever they were before."""
        first, last = node.start // self.memory.page_size, self.memory.pages_for(node.end)
        node.pages = [self.memory.pages.share(p) for p in pages[first:last]]
        self.store.drop(node.rows_key)
        node.rows_key = None

    def _split(self, node: Node, n: int) -> Node:
        """A node of its own for the first `n` tokens; the state, like the children, stays below. Returns the upper."""
        at, size = node.start + n, self.memory.page_size
        upper = Node(node.ids[:n], node.start, node.parent, used=node.used)
        node.parent.children[int(node.ids[0])] = upper
        if node.pages is not None:
            boundary = at // size - node.start // size
            upper.pages = node.pages[: boundary + (at % size > 0)]
            node.pages = node.pages[boundary:]
            if at % size:
                self.memory.pages.share(node.pages[0])
        elif (rows := node.rows_key and self.store.get(node.rows_key)) is not None:
            self.store.drop(node.rows_key)
            upper.rows_key, node.rows_key = self.store.put(rows[:, :n].clone()), self.store.put(rows[:, n:].clone())
        node.ids, node.start, node.parent = node.ids[n:], at, upper
        upper.children = {int(node.ids[0]): node}
        return upper

    def forget_pages(self, node: Node) -> None:
        for page in node.pages or ():
            self.memory.pages.release(page)
        node.pages = None

    def forget_state(self, node: Node) -> None:
        if node.slot is not None:
            self.memory.slots.release(node.slot)
            node.slot = None

    def remove(self, node: Node) -> None:
        """Take a node and everything below it out of the tree."""
        del node.parent.children[int(node.ids[0])]
        stack = [node]
        while stack:
            node = stack.pop()
            self.forget_pages(node)
            self.forget_state(node)
            self.store.drop(node.rows_key)
            self.store.drop(node.state_key)
            node.rows_key = node.state_key = None
            stack.extend(node.children.values())

    def prune(self) -> None:
        """Take out the ends of paths whose latents are nowhere any more (pushed out of the store's last tier)."""
        for node in reversed(list(self)):
            if not node.children and not node.pins and not self.has_rows(node):
                self.remove(node)

    def drop(self, weights: Hashable) -> None:
        """Forget everything that was computed with these weights."""
        root = self._roots.pop(weights, None)
        for child in list(root.children.values()) if root else ():
            self.remove(child)

    def clear(self) -> None:
        for weights in list(self._roots):
            self.drop(weights)

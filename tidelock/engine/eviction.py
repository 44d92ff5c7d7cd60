"""What to forget when a page or a slot is wanted: first whatever is cheapest to compute again for the room it takes.

    worth = tokens to run again / bytes freed / age

Pages and states go separately. A state that goes leaves a tombstone (the pages stay, and the next visitor knows that
a branch was here); pages go from the leaves upward. With a store below, what goes is put there first.
"""

from __future__ import annotations

from collections.abc import Callable

from .limits import Stats
from .tree import Node, Tree

STATELESS = 0.1  # pages of a hybrid without a state at their end are worth this much: they spare a junction, no rows


class Eviction:
    def __init__(self, tree: Tree, stats: Stats) -> None:
        self.tree, self.memory, self.stats = tree, tree.memory, stats

    def make_room(self, pages: int = 0, slots: int = 0) -> bool:
        """Whether so many pages and slots are free now, after forgetting as little as that takes (and a bit ahead)."""
        if self.memory.hybrid and slots > self.memory.slots.free:
            self._evict(self._state_candidates(), self._drop_state, self.memory.slots, slots)
        if pages > self.memory.pages.free and self.tree.store.open:
            self.tree.prune()
        while pages > self.memory.pages.free:
            candidates = self._page_candidates()
            if not candidates:
                break
            self._evict(candidates, self._drop_pages, self.memory.pages, pages)
        return self.memory.pages.free >= pages and (not self.memory.hybrid or self.memory.slots.free >= slots)

    def _evict(self, candidates: list[Node], drop: Callable[[Node], None], pool, wanted: int) -> None:
        """A sixty-fourth of the pool more than is wanted, so that the tree is not searched for every single page."""
        for node in candidates:
            if pool.free >= wanted + pool.size // 64:
                return
            drop(node)
            self.stats.evicted += 1

    # -- candidates, least worth keeping first ------------------------------------------------------------------------

    def _state_candidates(self) -> list[Node]:
        """Unpinned or not, a state in the tree is only read while a request is placed."""
        return sorted((n for n in self.tree if n.slot is not None), key=self._worth_of_state)

    def _page_candidates(self) -> list[Node]:
        """Nodes in memory with none below them in memory and no request standing on them."""
        free = (
            n for n in self.tree
            if n.pages is not None and not n.pins and all(c.pages is None for c in n.children.values())
        )  # fmt: skip
        return sorted(free, key=self._worth_of_pages)

    def _age(self, node: Node) -> int:
        return self.tree.clock - node.used + 1

    def _worth_of_state(self, node: Node) -> float:
        above = node.parent
        while above.parent is not None and above.slot is None:
            above = above.parent
        return (node.end - above.end) / self.memory.slot_bytes / self._age(node)

    def _worth_of_pages(self, node: Node) -> float:
        tokens = len(node.ids) * (STATELESS if self.memory.hybrid and not self.tree.has_state(node) else 1.0)
        return tokens / (len(node.pages) * self.memory.page_bytes or 1) / self._age(node)

    # -- forgetting ---------------------------------------------------------------------------------------------------

    def _drop_state(self, node: Node) -> None:
        if self.tree.store.open:
            node.state_key = self.tree.store.put(self.memory.read_slot(node.slot))
        self.tree.forget_state(node)

    def _drop_pages(self, node: Node) -> None:
        if self.tree.store.open:
            node.rows_key = self.tree.store.put(self.memory.read_rows(node.pages, node.start, node.end))
        if node.rows_key is None:
            self.tree.remove(node)
        else:
            self.tree.forget_pages(node)

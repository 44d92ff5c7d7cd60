"""From a waiting request to a running one: what it can take over from the tree, and room for the rest.

Room for prompt + max_tokens is reserved at once, so a running request never has to be thrown out. Full pages are shared
with the tree, the page it will continue is copied, offloaded rows are written back, and the state gets a slot of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .eviction import Eviction
from .limits import Stats
from .memory import Memory
from .sequence import Sequence
from .tree import Node, Path, Tree
from .weights import Weights


@dataclass
class Plan:
    """What the first `start` tokens are made of. Everything named here is held until the plan is carried out."""

    start: int = 0
    shared: dict[int, int] = field(default_factory=dict)  # page index -> page in memory, full
    copies: dict[int, int] = field(default_factory=dict)  # page index -> page whose beginning is needed
    rows: list[tuple[int, int, Tensor]] = field(default_factory=list)  # offloaded latents of tokens lo..hi
    slot: int | None = None
    state: Tensor | None = None
    node: Node | None = None


class Admission:
    def __init__(self, memory: Memory, tree: Tree, eviction: Eviction, stats: Stats) -> None:
        self.memory, self.tree, self.eviction, self.stats = memory, tree, eviction, stats

    def admit(self, seq: Sequence, path: Path, weights: Weights, alone: bool) -> bool:
        """Give `seq` its pages and slot. False: not now. `alone`: nobody else runs, so a cold start must fit."""
        plan = self._plan(seq, path)
        need = self.memory.pages_for(seq.longest) - len(plan.shared)
        fits = self.eviction.make_room(need, 1)
        if not fits and alone and plan.start:  # what it could take over stands in its own way
            self._let_go(plan)
            plan, need = Plan(), self.memory.pages_for(seq.longest)
            fits = self.eviction.make_room(need, 1)
        if fits:
            self._carry_out(plan, seq, weights, need)
        self._let_go(plan)
        return fits

    # -- planning -----------------------------------------------------------------------------------------------------

    def _plan(self, seq: Sequence, path: Path) -> Plan:
        """Reading the store may turn out a miss; then the path reaches less far than it seemed."""
        while True:
            start = self.tree.reach(path, seq.reusable)
            plan, missing = Plan(start), None
            for node, _ in path:
                if node.start >= start or missing:
                    break
                missing = self._plan_rows(plan, node)
            if not missing and start:
                plan.node = [node for node, _ in path if node.start < start][-1]
                missing = self.memory.hybrid and self._plan_state(plan, plan.node)
            if not missing:
                return self._hold(plan)

    def _plan_rows(self, plan: Plan, node: Node) -> bool:
        """Add the node's part of the first plan.start tokens. True: it was offloaded and is lost."""
        size, end = self.memory.page_size, min(node.end, plan.start)
        indices = range(node.start // size, self.memory.pages_for(end))
        if node.pages is not None:
            for i in indices:
                page = node.pages[i - node.start // size]
                plan.copies.pop(i, None)
                (plan.shared if (i + 1) * size <= plan.start else plan.copies)[i] = page
            first = indices[0] * size  # this node's first page also holds what comes before it in there
            plan.rows = [(lo, min(hi, first), rows[:, : min(hi, first) - lo]) for lo, hi, rows in plan.rows if lo < first]
            return False
        rows = self.tree.store.get(node.rows_key)
        if rows is None:
            node.rows_key = None
            return True
        for i in indices:
            if i in plan.shared:
                plan.copies[i] = plan.shared.pop(i)
        plan.rows.append((node.start, end, rows[:, : end - node.start]))
        return False

    def _plan_state(self, plan: Plan, node: Node) -> bool:
        if node.slot is not None:
            plan.slot = node.slot
            return False
        plan.state = self.tree.store.get(node.state_key)
        if plan.state is None:
            node.state_key = None
            return True
        return False

    def _hold(self, plan: Plan) -> Plan:
        for page in (*plan.shared.values(), *plan.copies.values()):
            self.memory.pages.share(page)
        if plan.slot is not None:
            self.memory.slots.share(plan.slot)
        if plan.node is not None:
            plan.node.pins += 1
        return plan

    def _let_go(self, plan: Plan) -> None:
        for page in (*plan.shared.values(), *plan.copies.values()):
            self.memory.pages.release(page)
        if plan.slot is not None:
            self.memory.slots.release(plan.slot)
        if plan.node is not None:
            plan.node.pins -= 1

    # -- execution ----------------------------------------------------------------------------------------------------

    def _carry_out(self, plan: Plan, seq: Sequence, weights: Weights, need: int) -> None:
        memory = self.memory
        own = iter([memory.pages.take() for _ in range(need)])
        seq.pages = [
            memory.pages.share(plan.shared[i]) if i in plan.shared else next(own)
            for i in range(memory.pages_for(seq.longest))
        ]
        for i, page in plan.copies.items():
            memory.copy_page(page, seq.pages[i])
        for lo, hi, rows in plan.rows:
            memory.write_rows(seq.pages[lo // memory.page_size :], lo, hi, rows)
        if memory.hybrid:
            seq.slot = memory.slots.take()
            if plan.slot is not None:
                memory.copy_slot(plan.slot, seq.slot)
            elif plan.state is not None:
                memory.write_slot(seq.slot, plan.state)
        self.stats.restored += len(plan.rows) + (plan.state is not None)
        seq.weights, seq.computed, seq.node = weights, plan.start, plan.node
        if seq.node is not None:
            seq.node.pins += 1
        if seq.cached < 0:
            seq.cached = plan.start

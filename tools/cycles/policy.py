"""How branches on unknown values are decided: rules 2 and 3 of machine.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from tools.cycles.sass import Function, Loop, time_loops


class Policy:
    """Rules 2 and 3, for a function's branches."""

    def __init__(self, function: Function) -> None:
        self.function = function
        loops = time_loops(function)
        self.time = [
            loop for loop in loops if not any(loop.blocks < other.blocks for other in loops)
        ]
        self.gemms = {loop.header for loop in loops}

    @cached_property
    def returns(self) -> frozenset[int]:
        """Blocks from which the kernel's normal end can be reached."""
        f = self.function
        ends = [
            n
            for n, block in enumerate(f.blocks)
            if f.instructions[block.last].name in ("EXIT", "RET")
        ]
        return self._reaching(ends)

    def _reaching(self, to: Sequence[int]) -> frozenset[int]:
        seen, stack = set(to), list(to)
        while stack:
            for before in self.function.predecessors[stack.pop()]:
                if before not in seen:
                    seen.add(before)
                    stack.append(before)
        return frozenset(seen)

    @cached_property
    def _continues(self) -> list[tuple[Loop, frozenset[int]]]:
        return [(loop, self._reaching([loop.header])) for loop in self.time]

    def poll_of(self, block: int) -> Loop | None:
        """The innermost loop with a block, unless a GEMM is in it."""
        loop = self.function.innermost(block)
        return loop if loop and loop.header not in self.gemms else None

    def choose(self, index: int) -> tuple[bool, bool]:
        """Whether a branch on an unknown value is taken, and whether it ends a poll."""
        f = self.function
        block = f.block_of[index]
        taken = f.block_of[f.index_of[f.instructions[index].target or 0]]
        falls = f.block_of[index + 1]
        sides = [falls, taken]
        alive = [s for s in sides if s in self.returns]
        for loop, reaching in self._continues:
            if block in loop.blocks:
                alive = [s for s in alive if s in reaching] or alive
        if len(set(alive)) == 1:
            sides = alive
        poll = self.poll_of(block)
        if poll:
            outside = [s for s in sides if s not in poll.blocks]
            return (outside or sides)[0] == taken, bool(outside) or len(sides) < 2
        entering = [s for s in sides if self.poll_of(s)]
        if entering and len(entering) < len(sides):
            return next(s for s in sides if s not in entering) == taken, True
        return sides[0] == taken, False

    def polls(self, index: int) -> set[int]:
        """The loads whose value a branch that ends a poll waits for."""
        f = self.function
        block = f.block_of[index]
        poll = self.poll_of(block)
        blocks = poll.blocks if poll else {block}
        return {
            i
            for n in blocks
            for i in range(f.blocks[n].first, f.blocks[n].last + 1)
            if f.instructions[i].name in ("LDG", "LD", "ATOM", "ATOMG")
            and f.instructions[i].modifiers & {"STRONG", "VOLATILE"}
        }

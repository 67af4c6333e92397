"""Runs a CTA's integer instructions: which path each warp takes, and which addresses it accesses.

All threads of a CTA run on numpy vectors, each with its own program counter. The lowest counter
goes first, so that lanes which took different ways meet again. A value is known bit by bit. Floats,
and all that is loaded from global memory, are unknown. Three rules decide where values do not:

1. Every wait succeeds at once, and no time passes: a transaction barrier's phase is complete, data
   that is its own flag has come, and a clock stands at 0.
2. A branch on an unknown value leaves a loop that polls, and does not enter one.
3. Other branches on unknown values do not leave the loop over time for an end of the kernel;
   between two ways that stay, the branch falls through.

`Run.guesses` counts the decisions by rules 2 and 3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tools.cycles.integers import (
    ALL,
    WARP,
    Integers,
    Launch,
    Mask,
    UnsupportedError,
    Wide,
    is_data_poll,
    joined,
)
from tools.cycles.pipeline import BARRIER_CODE
from tools.cycles.policy import Policy
from tools.cycles.sass import Function, Instruction, Operand

BANKS = 32
SHARED = {"LDS", "STS", "LDSM", "STSM", "ATOMS"}
GLOBAL = {"LDG", "STG", "LD", "ST", "LDGSTS", "RED", "REDG", "ATOM", "ATOMG", "STAS", "LDL", "STL"}


@dataclass
class Run:
    """What a CTA did. `events`: instruction, warps, and of each its wavefronts and conflicts."""

    events: list[tuple[int, tuple[int, ...], tuple[tuple[int, int], ...] | None]]
    warps: int
    guesses: Counter[int] = field(default_factory=Counter)
    polls: set[int] = field(default_factory=set)  # instructions that wait for other CTAs
    unknown: dict[str, int] = field(default_factory=dict)  # opcodes without a rule
    unknown_addresses: int = 0  # of a warp's accesses to shared memory
    forced: int = 0  # lanes released from a barrier that others never reached

    def traces(self) -> list[list[tuple[int, int]]]:
        """For each warp its instructions with the wavefronts of a memory access, or its barrier.

        Else -1; 0 if its guard leaves the warp out.
        """
        traces: list[list[tuple[int, int]]] = [[] for _ in range(self.warps)]
        for index, warps, waves in self.events:
            if waves is None:
                for w in warps:
                    traces[w].append((index, -1))
            else:
                for w, (wave, _) in zip(warps, waves, strict=True):
                    traces[w].append((index, wave))
        return traces

    def conflicts(self) -> list[list[int]]:
        """For each warp and instruction of its trace the wavefronts beyond the least possible."""
        found: list[list[int]] = [[] for _ in range(self.warps)]
        for _, warps, waves in self.events:
            for i, w in enumerate(warps):
                found[w].append(waves[i][1] if waves else 0)
        return found


def access_bytes(ins: Instruction) -> int:
    """The bytes that a lane accesses."""
    for size in (128, 64):
        if str(size) in ins.modifiers:
            return size // 8
    if ins.modifiers & {"U16", "S16", "16"} and ins.name not in ("LDSM", "STSM"):
        return 2
    return 1 if ins.modifiers & {"U8", "S8"} else 4


def wavefronts(addresses: Sequence[int], lane_bytes: int) -> tuple[int, int]:
    """The wavefronts of a warp's access to shared memory, and the least possible.

    `addresses` are those of the active lanes with their lane: see `lane_groups`. Lanes that access
    the same word share it. Wider accesses go by half and quarter warps.
    """
    words: dict[int, set[int]] = {}
    for address in addresses:
        for word in range(address // 4, (address + lane_bytes + 3) // 4):
            words.setdefault(word % BANKS, set()).add(word)
    most = max((len(w) for w in words.values()), default=0)
    return most, 1 if addresses else 0


def shared_wavefronts(
    addresses: Sequence[int], active: Sequence[bool], lane_bytes: int
) -> tuple[int, int]:
    """The wavefronts of all 32 lanes of a warp, and the least possible."""
    lanes = WARP // max(1, lane_bytes // 4)
    total = ideal = 0
    for first in range(0, WARP, lanes):
        group = [addresses[i] for i in range(first, first + lanes) if active[i]]
        found, least = wavefronts(group, lane_bytes)
        total += found
        ideal += least
    return total, ideal


Execute = Callable[[Mask, tuple[int, ...]], int | None]


def _access(
    ins: Instruction, size: int, mask: Mask, known: Mask, addresses: Wide
) -> tuple[int, int]:
    """The wavefronts of a warp's access, and those beyond the least."""
    if not mask.any():
        return 0, 0
    if ins.name not in SHARED:
        return (4 if size == 16 or ins.name == "STAS" else 1), 0
    matrices = 0
    if ins.name in ("LDSM", "STSM"):
        matrices, size = int(ins.opcode.rsplit(".", 1)[1]), 16
    if not known[mask].all():
        return matrices or max(1, size // 4), 0
    if matrices:  # eight lanes have the rows of one matrix
        mask = mask & (np.arange(WARP) < 8 * matrices)
    # A CTA's window in the cluster's shared memory begins at a multiple of 2^24.
    at = (addresses & np.uint64(0xFFFFFF)).tolist()
    waves, least = shared_wavefronts(at, mask.tolist(), size)
    return waves, waves - least


class Machine(Integers):
    """A CTA of a kernel. It runs one launch after the other."""

    def __init__(
        self, function: Function, threads: int, params: int, limit: int = 2_000_000
    ) -> None:
        """`params`: the bytes of the kernel's arguments; `limit`: instructions of a run."""
        super().__init__(function.arch, threads, params)
        self.function = function
        self.limit = limit
        self.policy = Policy(function)
        self.result = Run([], self.warps)
        self._waves: dict[tuple[str, bytes, bytes, bytes], list[tuple[int, int]]] = {}
        self._steps: list[Execute | None] = [None] * len(function.instructions)

    # ---- memory ---------------------------------------------------------------------------------

    def _memory(self, ins: Instruction, mask: Mask) -> list[tuple[int, int]]:
        """Each warp's wavefronts, 0 if it accesses nothing, and those beyond the least."""
        size = access_bytes(ins)
        memory = next((o for o in ins.operands if o.kind == "mem"), None)
        addresses, known = self._address(memory) if memory else (self.zeros, self.false)
        key = (ins.opcode, mask.tobytes(), b"", b"")
        if ins.name in SHARED:
            key = (ins.opcode, mask.tobytes(), known.tobytes(), addresses.tobytes())
        found = self._waves.get(key)
        if found is None:
            lanes = (x.reshape(self.warps, WARP) for x in (mask, known, addresses))
            found = self._waves[key] = [
                _access(ins, size, *warp) for warp in zip(*lanes, strict=True)
            ]
        if ins.name in SHARED:
            self.result.unknown_addresses += int((mask & ~known).any())
        return found

    # ---- the run --------------------------------------------------------------------------------

    def run(self, launch: Launch, cta: tuple[int, int, int] = (0, 0, 0)) -> Run:
        """Runs a CTA to its end."""
        self.start(launch, cta)
        self.result = Run([], self.warps)
        with np.errstate(over="ignore"):
            self._run()
        self.result.unknown = self.unknown
        return self.result

    def _run(self) -> None:
        f, n = self.function, self.n
        end = len(f.instructions)
        self.pc = pc = np.zeros(n, np.int64)
        # Lanes that wait for others of their warp or CTA do not run.
        self.waits = np.zeros(n, np.int64)  # 0: runs; 1: in a warp; 2: in the CTA
        self.alive = np.ones(n, np.bool_)
        self.together: dict[int, Mask] = {}  # the lanes of a convergence barrier
        self.arrived: dict[int, Mask] = {}
        steps = 0
        everyone = tuple(range(self.warps))
        while True:
            at = np.where(self.alive & (self.waits == 0), pc, end)
            i = int(at.min())
            if i == end:
                if not self.alive.any():
                    return
                self._force()
                continue
            active = at == i
            if active.all():
                active, stop, warps = self.true, end, everyone
            else:
                stop = int(at[~active].min())
                by_warp = active.reshape(self.warps, WARP).any(axis=1)
                warps = tuple(np.flatnonzero(by_warp).tolist())
            self.active = active
            while True:
                steps += 1
                if steps > self.limit:
                    raise UnsupportedError(
                        f"{f.name}: {self.limit} instructions and no end at "
                        f"{f.instructions[i].address:#x}"
                    )
                after = self._execute(i, active, warps)
                if after is None or after >= stop:
                    break
                i = after
            if after is not None:
                pc[active] = after

    def _execute(self, i: int, active: Mask, warps: tuple[int, ...]) -> int | None:
        """Runs one instruction. Returns the next, the same for all lanes; None: they differ."""
        step = self._steps[i]
        if step is None:
            step = self._steps[i] = self._decoded(i)
        return step(active, warps)

    def _decoded(self, i: int) -> Execute:
        """A function that records and runs one instruction: see `_execute`."""
        ins = self.function.instructions[i]
        flow = getattr(self, f"_flow_{ins.name.lower()}", None)
        if flow is not None:
            is_barrier = ins.name == "BAR"

            def branch(active: Mask, warps: tuple[int, ...]) -> int | None:
                waves = self._barrier_waves(ins, active, warps) if is_barrier else None
                self.result.events.append((i, warps, waves))
                after: int | None = flow(i, ins, active)
                return after

            return branch
        step = self.step(ins)
        if ins.name in SHARED or ins.name in GLOBAL:
            polls = is_data_poll(ins)

            def access(active: Mask, warps: tuple[int, ...]) -> int | None:
                if polls:
                    self.result.polls.add(i)
                mask, _ = self.guard(ins, active)
                waves = self._memory(ins, mask)
                self.result.events.append((i, warps, tuple(waves[w] for w in warps)))
                step(active)
                return i + 1

            return access
        polls = "PHASECHK" in ins.modifiers
        # A warp that its guard leaves out neither waits nor signals.
        guarded = ins.guard is not None and ins.name in ("MEMBAR", "SYNCS")

        def plain(active: Mask, warps: tuple[int, ...]) -> int | None:
            waves = None
            if guarded:
                mask = self.guard(ins, active)[0].reshape(self.warps, WARP)
                waves = tuple((-1 if mask[w].any() else 0, 0) for w in warps)
            self.result.events.append((i, warps, waves))
            if polls:
                self.result.polls.add(i)
            step(active)
            return i + 1

        return plain

    def _barrier_waves(
        self, ins: Instruction, active: Mask, warps: tuple[int, ...]
    ) -> tuple[tuple[int, int], ...]:
        """Of each warp its barrier, see `_barriers_of`; 0 if its guard leaves it out."""
        mask, _ = self.guard(ins, active)
        keys = np.where(mask, self._barriers_of(ins, mask), 0).reshape(self.warps, WARP).max(axis=1)
        return tuple((int(keys[w]), 0) for w in warps)

    # ---- control flow ---------------------------------------------------------------------------

    def _condition(self, i: int, ins: Instruction, active: Mask) -> Mask:
        """The lanes that take a branch."""
        v, k = active.copy(), self.true
        predicates = [o for o in ins.operands if o.kind in ("P", "UP")]
        if ins.guard is not None:
            predicates.append(ins.guard)
        for o in predicates:
            pv, pk = self._truth(o)()
            v, k = joined("AND", (v, k), (pv, pk))
        unknown = active & ~k
        if unknown.any():
            taken, polls = self.policy.choose(i)
            self.result.guesses[i] += 1
            if polls:
                self.result.polls |= self.policy.polls(i)
            v = np.where(unknown, taken, v)
        return active & v

    def _flow_bra(self, i: int, ins: Instruction, active: Mask) -> int | None:
        target = ins.target
        if target not in self.function.index_of:
            raise UnsupportedError(f"{ins.text}: a branch out of the function")
        to = self.function.index_of[target]
        if "CONV" in ins.modifiers or "DIV" in ins.modifiers:
            # Taken by a warp whose lanes are not together (DIV), or are (CONV).
            whole = np.repeat(active.reshape(self.warps, WARP).all(axis=1), WARP)
            taken = active & (~whole if "DIV" in ins.modifiers else whole)
        else:
            taken = self._condition(i, ins, active)
        if not taken.any():
            return i + 1
        if taken.sum() == active.sum():
            self.pc[active] = to
            return to if to > i else None
        self.pc[active & ~taken] = i + 1
        self.pc[taken] = to
        return None

    _flow_jmp = _flow_bra

    def _kill(self, lanes: Mask) -> None:
        self.alive &= ~lanes
        self._release_all()

    def _flow_exit(self, i: int, ins: Instruction, active: Mask) -> int | None:
        gone = self._condition(i, ins, active) if ins.guard is not None else active
        if not gone.any():
            return i + 1
        self.pc[active] = i + 1
        self._kill(gone)
        return None

    def _flow_bpt(self, i: int, ins: Instruction, active: Mask) -> int | None:
        return self._flow_exit(i, ins, active) if "TRAP" in ins.modifiers else i + 1

    def _flow_call(self, i: int, ins: Instruction, active: Mask) -> int | None:
        return self._flow_bra(i, ins, active)

    def _flow_ret(self, i: int, ins: Instruction, active: Mask) -> int | None:
        back = next(o for o in ins.operands if o.kind == "R")
        v, k = self._word(Operand("R", back.number))()
        if not (k[active] == ALL).all():
            raise UnsupportedError(f"{self.function.name}: return to an unknown address")
        for lane in np.flatnonzero(active):
            self.pc[lane] = self.function.index_of[int(v[lane])]
        return None

    def _flow_bssy(self, i: int, ins: Instruction, active: Mask) -> int:
        barrier = ins.operands[0].number
        mask, _ = self.guard(ins, active)
        whole = self._warps_of(mask)
        kept = self.together.get(barrier, self.false) & ~whole
        self.together[barrier] = kept | mask
        self.arrived[barrier] = self.arrived.get(barrier, self.false) & ~whole
        return i + 1

    def _flow_break(self, i: int, ins: Instruction, active: Mask) -> int:
        barrier = next((o.number for o in ins.operands if o.kind == "barrier"), 0)
        mask, _ = self.guard(ins, active)
        self.together[barrier] = self.together.get(barrier, self.false) & ~mask
        self._release(barrier)
        return i + 1

    def _warps_of(self, mask: Mask) -> Mask:
        """All lanes of the warps that have a lane in `mask`."""
        return np.repeat(mask.reshape(self.warps, WARP).any(axis=1), WARP)

    def _flow_bsync(self, i: int, ins: Instruction, active: Mask) -> int | None:
        if active is self.true and ins.guard is None:
            return i + 1
        barrier = ins.operands[0].number
        mask = self._condition(i, ins, active) if ins.guard is not None else active
        if not mask.any():
            return i + 1
        self.pc[active] = i + 1
        self.arrived[barrier] = self.arrived.get(barrier, self.false) | mask
        self.waits[mask] = 1
        self._release(barrier)
        return None  # lanes that had waited go on with these

    def _release(self, barrier: int) -> None:
        """Lets warps go on whose lanes have all come to a convergence barrier."""
        arrived = self.arrived.get(barrier, self.false)
        needed = self.together.get(barrier, self.false) & self.alive
        missing = self._warps_of(needed & ~arrived)
        free = arrived & ~missing
        self.waits[free & (self.waits == 1)] = 0
        self.arrived[barrier] = arrived & missing

    _WARP_SYNC = -1  # a key of `arrived`

    def _flow_warpsync(self, i: int, ins: Instruction, active: Mask) -> int | None:
        if "COLLECTIVE" in ins.modifiers or (active is self.true and ins.guard is None):
            return i + 1
        mask = self._condition(i, ins, active) if ins.guard is not None else active
        if not mask.any():
            return i + 1
        self.pc[active] = i + 1
        key = self._WARP_SYNC
        self.together[key] = self.alive
        self.arrived[key] = self.arrived.get(key, self.false) | mask
        self.waits[mask] = 1
        self._release(key)
        return None  # lanes that had waited go on with these

    def _flow_bar(self, i: int, ins: Instruction, active: Mask) -> int | None:
        mask = self._condition(i, ins, active) if ins.guard is not None else active
        if not mask.any():
            return i + 1
        self.pc[active] = i + 1
        if "ARV" not in ins.modifiers:
            self.waits[mask] = 2
        keys = self._barriers_of(ins, mask)
        for key in np.unique(keys[mask]).tolist():
            here = mask & (keys == key)
            self.arrived[key] = self.arrived.get(key, self.false) | here
            self._release_cta(key)
        return None  # lanes that had waited go on with these

    def _barriers_of(self, ins: Instruction, mask: Mask) -> npt.NDArray[np.int64]:
        """Each lane's named barrier and its threads, 0 for all of the CTA: `pipeline.barrier`."""
        found = [np.zeros(self.n, np.int64), np.zeros(self.n, np.int64)]
        sources = [o for o in ins.operands if o.kind in ("imm", "R", "UR")]
        for at, o in enumerate(sources[:2]):
            v, k = self._word(o)()
            if not (k[mask] == ALL).all():
                raise UnsupportedError(f"{ins.text}: a barrier with an unknown number")
            found[at] = v.astype(np.int64)
        return BARRIER_CODE * (1 + found[0]) + found[1]

    def _release_cta(self, key: int) -> None:
        arrived = self.arrived.get(key, self.false)
        count = key % BARRIER_CODE
        full = int(arrived.sum()) >= count if count else not (self.alive & ~arrived).any()
        if full and arrived.any():
            self.waits[arrived & (self.waits == 2)] = 0
            self.arrived[key] = self.false

    def _release_all(self) -> None:
        for key in list(self.arrived):
            if key >= BARRIER_CODE:
                self._release_cta(key)
            else:
                self._release(key)

    def _force(self) -> None:
        """Nobody can run: lets lanes go on from convergence barriers, or else from all."""
        stuck = self.alive & (self.waits == 1)
        if not stuck.any():
            stuck = self.alive & (self.waits == 2)
        self.result.forced += int(stuck.sum())
        self.waits[stuck] = 0
        for key in self.arrived:
            self.arrived[key] = self.arrived[key] & ~stuck

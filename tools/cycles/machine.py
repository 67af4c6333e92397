"""Runs a CTA's integer instructions: which path each warp takes, and which addresses it accesses.

All threads of a CTA run on numpy vectors, each with its own program counter. The lowest counter goes
first, so that lanes which took different ways meet again. A value is known bit by bit. Floats, and
all that is loaded from memory, are unknown. Three rules decide what the values do not:

1. Every wait succeeds at once, and no time passes: a transaction barrier's phase is complete, and a
   clock stands at 0.
2. A branch on an unknown value leaves a loop that polls, and does not enter one.
3. Other branches on unknown values do not leave the loop over time for an end of the kernel;
   between two ways that stay, the branch falls through.

`Run.guesses` counts the decisions by rules 2 and 3.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from tools.cycles.sass import Block, Function, Instruction, Loop, Operand, time_loops

WARP = 32
BANKS = 32
ALL = 0xFFFFFFFF
# The constant bank's offset of a kernel's arguments.
PARAMS_AT = {"sm_80": 0x160, "sm_90": 0x210, "sm_100": 0x380}
SHARED = {"LDS", "STS", "LDSM", "STSM", "ATOMS"}
GLOBAL = {"LDG", "STG", "LD", "ST", "LDGSTS", "RED", "REDG", "ATOM", "ATOMG", "STAS", "LDL", "STL"}

Array = npt.NDArray[np.uint32]
Wide = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
Known = tuple[Array, Array]  # values, and which of their bits are known
Known64 = tuple[Wide, Wide]
Truth = tuple[Mask, Mask]


class UnsupportedError(Exception):
    """An instruction that decides the path and that the machine does not know."""


@dataclass(frozen=True)
class Launch:
    """A kernel's launch, as tools/cycles/host/launches.cpp records it."""

    kernel: str
    threads: int
    grid: tuple[int, int, int]
    cluster: int
    shared: int
    params: bytes


@dataclass
class Access:
    """All accesses of one instruction to shared memory."""

    warps: int = 0
    wavefronts: int = 0
    ideal: int = 0
    unknown: int = 0  # accesses whose addresses are not known


@dataclass
class Run:
    """What a CTA did. `events`: instruction, warps, and of each its wavefronts and conflicts."""

    events: list[tuple[int, tuple[int, ...], tuple[tuple[int, int], ...] | None]]
    warps: int
    guesses: Counter[int] = field(default_factory=Counter)
    polls: set[int] = field(default_factory=set)  # instructions that wait for other CTAs
    unknown: Counter[str] = field(default_factory=Counter)  # opcodes without a rule
    forced: int = 0  # lanes released from a barrier that others never reached

    def traces(self) -> list[list[tuple[int, int]]]:
        """For each warp its instructions, with the wavefronts of a memory access, else -1."""
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


def _low(known: Array) -> Array:
    """The known bits below the lowest unknown one: all that a sum keeps."""
    return known & ~(known + np.uint32(1))


def _low64(known: Wide) -> Wide:
    return known & ~(known + np.uint64(1))


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


Step = Callable[[Mask], None]


class Machine:
    """A CTA of a launch."""

    def __init__(
        self,
        function: Function,
        launch: Launch,
        cta: tuple[int, int, int] = (0, 0, 0),
        limit: int = 2_000_000,
    ) -> None:
        self.function = function
        self.launch = launch
        self.cta = cta
        self.limit = limit
        self.n = n = launch.threads
        self.warps = n // WARP
        self.lanes = np.arange(n, dtype=np.uint32)
        self.R = np.zeros((257, n), np.uint32)
        self.RK = np.full((257, n), ALL, np.uint32)
        self.UR = np.zeros((65, n), np.uint32)
        self.URK = np.full((65, n), ALL, np.uint32)
        # The last row is PT and UPT.
        self.P = np.zeros((8, n), np.bool_)
        self.PK = np.ones((8, n), np.bool_)
        self.UP = np.zeros((8, n), np.bool_)
        self.UPK = np.ones((8, n), np.bool_)
        self.P[7] = self.UP[7] = True
        self.zeros = np.zeros(n, np.uint32)
        self.ones = np.full(n, ALL, np.uint32)
        self.true = np.ones(n, np.bool_)
        self.false = np.zeros(n, np.bool_)
        self.constants = self._constant_bank()
        self.policy = Policy(function)
        self.run_ = Run([], self.warps)
        self.accesses: dict[int, Access] = {}
        self._waves: dict[tuple[bytes, bytes, int], tuple[int, int]] = {}
        self._steps: list[Step | None] = [None] * len(function.instructions)

    # ---- operands -------------------------------------------------------------------------------

    def _constant_bank(self) -> dict[int, int]:
        """The known words of constant bank 0."""
        launch = self.launch
        words = {0: launch.threads, 4: 1, 8: 1}
        words.update({0xC + 4 * i: size for i, size in enumerate(launch.grid)})
        arch = self.function.arch.rstrip("af")
        if arch not in PARAMS_AT:
            raise UnsupportedError(f"{arch}: where its constant bank has a kernel's arguments")
        at = PARAMS_AT[arch]
        data = launch.params + bytes(-len(launch.params) % 4)
        words.update({at + 4 * i: word[0] for i, word in enumerate(struct.iter_unpack("<I", data))})
        return words

    def _full(self, value: int) -> Array:
        return np.full(self.n, value & ALL, np.uint32)

    def _constant(self, offset: int) -> Known:
        word = self.constants.get(offset)
        return (self.zeros, self.zeros) if word is None else (self._full(word), self.ones)

    def _word(self, o: Operand, high: bool = False) -> Callable[[], Known]:
        """Reads a 32-bit operand, or the high word of a 64-bit one."""
        more = 1 if high else 0

        def plain() -> Callable[[], Known]:
            if o.kind in ("R", "UR"):
                bank, known = (self.R, self.RK) if o.kind == "R" else (self.UR, self.URK)
                row = o.number + more if o.number >= 0 else -1
                return lambda: (bank[row], known[row])
            if o.kind == "imm":
                value = self._full(0 if high else o.number)
                return lambda: (value, self.ones)
            if o.kind == "const" and o.bank == 0:
                if o.base is None and o.ubase is None:
                    fixed = self._constant(o.number + 4 * more)
                    return lambda: fixed
                return lambda: self._indexed(o, 4 * more)
            return lambda: (self.zeros, self.zeros)

        read = plain()
        if o.negative and not high:

            def negated() -> Known:
                v, k = read()
                return np.uint32(0) - v, _low(k)

            return negated
        if o.inverted:

            def inverted() -> Known:
                v, k = read()
                return ~v, k

            return inverted
        if o.absolute:

            def absolute() -> Known:
                v, k = read()
                return np.abs(v.view(np.int32)).view(np.uint32), np.where(k == ALL, k, 0)

            return absolute
        return read

    def _indexed(self, o: Operand, more: int) -> Known:
        """A constant whose offset is in a register."""
        at, known = self._address(o)
        values, bits = self.zeros.copy(), self.zeros.copy()
        for offset in np.unique(at[known]):
            v, k = self._constant(int(offset) + more)
            where = known & (at == offset)
            values[where], bits[where] = v[0], k[0]
        return values, bits

    def _pair(self, o: Operand) -> Callable[[], Known64]:
        """Reads a 64-bit operand."""
        bare = Operand(o.kind, o.number, base=o.base, ubase=o.ubase, bank=o.bank)
        low, high = self._word(bare), self._word(bare, high=True)
        if o.kind == "imm":
            high = self._word(Operand("imm", ALL if o.number >> 31 else 0))

        def read() -> Known64:
            (v0, k0), (v1, k1) = low(), high()
            v = v0.astype(np.uint64) | v1.astype(np.uint64) << np.uint64(32)
            k = k0.astype(np.uint64) | k1.astype(np.uint64) << np.uint64(32)
            if o.negative:
                return np.uint64(0) - v, _low64(k)
            return (~v, k) if o.inverted else (v, k)

        return read

    def _truth(self, o: Operand) -> Callable[[], Truth]:
        bank, known = (self.P, self.PK) if o.kind == "P" else (self.UP, self.UPK)
        row = o.number if o.number >= 0 else 7
        if o.negative:
            return lambda: (~bank[row], known[row])
        return lambda: (bank[row], known[row])

    def _address(self, o: Operand) -> tuple[Wide, Mask]:
        """A memory operand's addresses, and which are known."""
        total = np.full(self.n, o.number & (2**64 - 1), np.uint64)
        known = self.true
        for register, bank, bits in ((o.base, self.R, self.RK), (o.ubase, self.UR, self.URK)):
            if register is None:
                continue
            total = total + bank[register]
            known = known & (bits[register] == ALL)
            if o.base_wide and register >= 0:
                total = total + (bank[register + 1].astype(np.uint64) << np.uint64(32))
                known = known & (bits[register + 1] == ALL)
        return total, known

    # ---- results --------------------------------------------------------------------------------

    def _set(self, o: Operand, value: Known, mask: Mask, sure: Mask, more: int = 0) -> None:
        """Writes to the lanes of `mask`; only in those of `sure` it is known that they write."""
        if o.number < 0:
            return
        bank, known = (self.R, self.RK) if o.kind == "R" else (self.UR, self.URK)
        v, k = value
        np.copyto(bank[o.number + more], v, where=mask)
        np.copyto(known[o.number + more], np.where(sure, k, np.uint32(0)), where=mask)

    def _set64(self, o: Operand, value: Known64, mask: Mask, sure: Mask) -> None:
        v, k = value
        for more, shift in ((0, np.uint64(0)), (1, np.uint64(32))):
            half = ((v >> shift).astype(np.uint32), (k >> shift).astype(np.uint32))
            self._set(o, half, mask, sure, more)

    def _set_truth(self, o: Operand, value: Truth, mask: Mask, sure: Mask) -> None:
        if o.kind not in ("P", "UP") or o.number < 0:
            return
        bank, known = (self.P, self.PK) if o.kind == "P" else (self.UP, self.UPK)
        np.copyto(bank[o.number], value[0], where=mask)
        np.copyto(known[o.number], value[1] & sure, where=mask)

    # ---- instructions ---------------------------------------------------------------------------

    def _compute(self, ins: Instruction) -> Callable[[], Sequence[tuple[Operand, object]]] | None:
        """The results of an instruction as (operand, value) pairs; None: see `_unknown`."""
        name = ins.name
        ops = ins.operands
        # A uniform instruction does the same with uniform registers.
        plain = name[1:] if name.startswith("U") and name not in ("UNDEF",) else name
        method = getattr(self, f"_op_{plain.lower()}", None)
        if method is None or not ops:
            return None
        found: Callable[[], Sequence[tuple[Operand, object]]] | None = method(ins, ops)
        return found

    def _op_mov(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        read = self._word(ops[1])
        return lambda: [(ops[0], read())]

    _op_r2ur = _op_mov
    _op_mov32i = _op_mov

    def _op_imad(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        if "WIDE" in ins.modifiers:
            return self._imad_wide(ins, ops)
        predicates = [o for o in ops[1:] if o.kind in ("P", "UP")]
        a, b, c = (o for o in ops[1:] if o.kind not in ("P", "UP"))
        if any(o.kind in ("R", "UR") and o.number < 0 for o in (a, b)) and not predicates:
            read = self._word(c)
            return lambda: [(ops[0], read())]
        reads = [self._word(o) for o in (a, b, c)]
        high = "HI" in ins.modifiers
        signed = "U32" not in ins.modifiers
        carry = self._truth(predicates[0]) if predicates and "X" in ins.modifiers else None

        def run() -> list[tuple[Operand, object]]:
            (av, ak), (bv, bk), (cv, ck) = (read() for read in reads)
            if high:
                wide = _product(av, bv, signed)
                known = np.where((ak & bk & ck) == ALL, ck, np.uint32(0))
                # The addend is the high word's low part: c is 64-bit only where it is a pair.
                return [(ops[0], ((wide >> np.uint64(32)).astype(np.uint32) + cv, known))]
            v = av * bv + cv
            k = _low(ak & bk & ck)
            if carry:
                bit, sure = carry()
                v = v + bit
                k = np.where(sure, k, np.uint32(0))
            return [(ops[0], (v, k))]

        return run

    def _imad_wide(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        sources = [o for o in ops[1:] if o.kind not in ("P", "UP")]
        outs = [o for o in ops[1:] if o.kind in ("P", "UP")]
        a, b = self._word(sources[0]), self._word(sources[1])
        c = self._pair(sources[2])
        signed = "U32" not in ins.modifiers

        def run() -> list[tuple[Operand, object]]:
            (av, ak), (bv, bk), (cv, ck) = a(), b(), c()
            product = _product(av, bv, signed)
            known = (ak & bk) == ALL
            k = np.where(known, _low64(ck), _low64((_low(ak & bk)).astype(np.uint64) & ck))
            total = product + cv
            results: list[tuple[Operand, object]] = [((ops[0]), (total, k))]
            results += [(o, (total < cv, known & (ck == np.uint64(2**64 - 1)))) for o in outs]
            return results

        return run

    def _op_iadd3(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        outs: list[Operand] = []
        rest = list(ops[1:])
        while rest and rest[0].kind in ("P", "UP"):
            outs.append(rest.pop(0))
        sources = [o for o in rest if o.kind not in ("P", "UP")]
        carries = [self._truth(o) for o in rest if o.kind in ("P", "UP")]
        if "X" not in ins.modifiers:
            carries = []
        # -x with a carry is ~x + 1 over 64 bits: the low word alone adds the 1.
        reads = [self._word(o) for o in sources]
        plains = [
            self._word(Operand(o.kind, o.number, inverted=o.inverted or o.negative, base=o.base,
                               ubase=o.ubase, bank=o.bank))
            for o in sources
        ]  # fmt: skip
        negatives = sum(o.negative for o in sources)

        def run() -> list[tuple[Operand, object]]:
            v, k = self.zeros, self.ones
            for read in reads:
                sv, sk = read()
                v, k = v + sv, k & sk
            sure = self.true
            for carry in carries:
                bit, known = carry()
                v, sure = v + bit, sure & known
            k = np.where(sure, _low(k), np.uint32(0))
            results: list[tuple[Operand, object]] = [(ops[0], (v, k))]
            if outs:
                total = np.full(self.n, negatives, np.uint64)
                for read in plains:
                    total = total + read()[0]
                for carry in carries:
                    total = total + carry()[0]
                over = total >> np.uint64(32)
                known = k == ALL
                results.append((outs[0], (over >= 1, known)))
                results += [(o, (over >= 2, known)) for o in outs[1:]]
            return results

        return run

    _op_iadd = _op_iadd3
    _op_viadd = _op_iadd3

    def _op_lea(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        outs: list[Operand] = []
        rest = list(ops[1:])
        while rest and rest[0].kind in ("P", "UP"):
            outs.append(rest.pop(0))
        carries = [self._truth(o) for o in rest if o.kind in ("P", "UP")]
        sources = [o for o in rest if o.kind not in ("P", "UP")]
        shift = sources[-1].number
        a, b = self._word(sources[0]), self._word(sources[1])
        high = "HI" in ins.modifiers
        extends = "SX32" in ins.modifiers
        c = self._word(sources[2]) if high and not extends else None

        def run() -> list[tuple[Operand, object]]:
            (av, ak), (bv, bk) = a(), b()
            if high:
                if c is None:
                    top, topk = _extended(av), ak
                else:
                    top, topk = c()
                wide = top.astype(np.uint64) << np.uint64(32) | av
                shifted = (wide << np.uint64(shift) >> np.uint64(32)).astype(np.uint32)
                known = np.where((ak & topk) == ALL, self.ones, self.zeros)
            else:
                shifted = (av.astype(np.uint64) << np.uint64(shift)).astype(np.uint32)
                known = (ak.astype(np.uint64) << np.uint64(shift)).astype(np.uint32) | np.uint32(
                    (1 << shift) - 1
                )
            v = shifted + bv
            total = shifted.astype(np.uint64) + bv
            k = _low(known & bk)
            for carry in carries:
                bit, sure = carry()
                v, total = v + bit, total + bit
                k = np.where(sure, k, np.uint32(0))
            results: list[tuple[Operand, object]] = [(ops[0], (v, k))]
            results += [(o, (total >> np.uint64(32) > 0, k == ALL)) for o in outs]
            return results

        return run

    def _op_lop3(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        outs: list[Operand] = []
        rest = list(ops)
        while rest[0].kind in ("P", "UP"):
            outs.append(rest.pop(0))
        to, *sources = rest[:4]
        table = rest[4].number
        reads = [self._word(o) for o in sources]

        def run() -> list[tuple[Operand, object]]:
            values = [read() for read in reads]
            v, k = self.zeros, self.zeros
            # A bit is known if all rows of the table that fit its known inputs agree.
            can_be = [self.zeros, self.zeros]
            for row in range(8):
                fits = self.ones
                for i, (sv, sk) in enumerate(values):
                    wanted = sv if row >> (2 - i) & 1 else ~sv
                    fits = fits & (wanted | ~sk)
                result = table >> row & 1
                can_be[result] = can_be[result] | fits
            v = can_be[1] & ~can_be[0]
            k = can_be[0] ^ can_be[1]
            results: list[tuple[Operand, object]] = [(to, (v, k))]
            results += [(o, ((v & k) != 0, (k == ALL) | ((v & k) != 0))) for o in outs]
            return results

        return run

    def _op_plop3(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        to, other = ops[0], ops[1]
        reads = [self._truth(o) for o in ops[2:5]]
        tables = [o.number for o in ops[5:7]]

        def run() -> list[tuple[Operand, object]]:
            values = [read() for read in reads]
            results: list[tuple[Operand, object]] = []
            for o, table in zip((to, other), tables, strict=False):
                can_be = [self.false, self.false]
                for row in range(8):
                    fits = self.true
                    for i, (sv, sk) in enumerate(values):
                        fits = fits & ((sv if row >> (2 - i) & 1 else ~sv) | ~sk)
                    result = table >> row & 1
                    can_be[result] = can_be[result] | fits
                results.append((o, (can_be[1] & ~can_be[0], can_be[0] ^ can_be[1])))
            return results

        return run

    def _op_isetp(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        to, other = ops[0], ops[1]
        sources = [o for o in ops[2:] if o.kind not in ("P", "UP")]
        predicates = [self._truth(o) for o in ops[2:] if o.kind in ("P", "UP")]
        a, b = self._word(sources[0]), self._word(sources[1])
        extended = "EX" in ins.modifiers
        signed = "U32" not in ins.modifiers
        compare = next(m for m in ins.opcode.split(".") if m in _COMPARES)
        join = next((m for m in ins.opcode.split(".") if m in ("AND", "OR", "XOR")), "AND")

        def run() -> list[tuple[Operand, object]]:
            (av, ak), (bv, bk) = a(), b()
            known = (ak & bk) == ALL
            low = None
            if extended:
                low, lowk = predicates[-1]()
            if signed:
                av, bv = av.view(np.int32), bv.view(np.int32)  # type: ignore[assignment]
            if low is None:
                v = _COMPARES[compare](av, bv)
            elif compare in ("EQ", "NE"):
                equal = av == bv
                v = equal & low if compare == "EQ" else ~equal | low
                known = known & lowk | ((ak & bk & (av ^ bv).view(np.uint32)) != 0)
            else:
                strict = av > bv if compare in ("GT", "GE") else av < bv
                v = strict | ((av == bv) & low)
                known = known & (lowk | (av != bv))
            if compare in ("EQ", "NE") and low is None:
                differ = (ak & bk & (av ^ bv).view(np.uint32)) != 0
                v = np.where(differ, compare == "NE", v)
                known = known | differ
            with_, withk = predicates[0]() if predicates else (self.true, self.true)
            first = _joined(join, (v, known), (with_, withk))
            second = _joined(join, (~v, known), (with_, withk))
            return [(to, first), (other, second)]

        return run

    def _op_sel(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        a, b, p = self._word(ops[1]), self._word(ops[2]), self._truth(ops[3])

        def run() -> list[tuple[Operand, object]]:
            (av, ak), (bv, bk), (pv, pk) = a(), b(), p()
            same = ak & bk & ~(av ^ bv)
            return [(ops[0], (np.where(pv, av, bv), np.where(pk, np.where(pv, ak, bk), same)))]

        return run

    def _op_imnmx(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        a, b, p = self._word(ops[1]), self._word(ops[2]), self._truth(ops[3])
        kind = np.uint32 if "U32" in ins.modifiers else np.int32

        def run() -> list[tuple[Operand, object]]:
            (av, ak), (bv, bk), (least, pk) = a(), b(), p()
            ai, bi = av.view(kind), bv.view(kind)
            v = np.where(least, np.minimum(ai, bi), np.maximum(ai, bi)).view(np.uint32)
            known = ((ak & bk) == ALL) & pk
            return [(ops[0], (v, np.where(known, self.ones, self.zeros)))]

        return run

    _op_vimnmx = _op_imnmx

    def _op_viaddmnmx(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        a, b, c = (self._word(o) for o in ops[1:4])
        p = self._truth(ops[4])
        kind = np.uint32 if "U32" in ins.modifiers else np.int32

        def run() -> list[tuple[Operand, object]]:
            (av, ak), (bv, bk), (cv, ck), (least, pk) = a(), b(), c(), p()
            s, ci = (av + bv).view(kind), cv.view(kind)
            v = np.where(least, np.minimum(s, ci), np.maximum(s, ci)).view(np.uint32)
            known = ((ak & bk & ck) == ALL) & pk
            return [(ops[0], (v, np.where(known, self.ones, self.zeros)))]

        return run

    def _op_iabs(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        a = self._word(ops[1])

        def run() -> list[tuple[Operand, object]]:
            v, k = a()
            known = np.where(k == ALL, self.ones, self.zeros)
            return [(ops[0], (np.abs(v.view(np.int32)).view(np.uint32), known))]

        return run

    def _op_shf(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        low, count, high = (self._word(o) for o in ops[1:4])
        left = "L" in ins.modifiers
        signed = bool(ins.modifiers & {"S32", "S64"})
        wide = bool(ins.modifiers & {"U64", "S64"})
        upper = "HI" in ins.modifiers
        wraps = "W" in ins.modifiers

        def run() -> list[tuple[Operand, object]]:
            (lv, lk), (cv, ck), (hv, hk) = low(), count(), high()
            limit = 63 if wide else 31 if wraps else 32
            s = (cv & np.uint32(limit) if wraps else np.minimum(cv, np.uint32(limit))).astype(
                np.uint64
            )
            out = []
            for lo, hi, is_known in ((lv, hv, False), (lk, hk, True)):
                both = hi.astype(np.uint64) << np.uint64(32) | lo
                if left:
                    # SHF.L's word is the low one's for .U32 without .HI: {high, low} << s.
                    moved = both << s
                    if is_known:
                        moved |= (np.uint64(1) << s) - np.uint64(1)
                elif wide or not upper:
                    moved = both >> s
                else:
                    # The high word alone, with zeros or its sign above.
                    if signed:
                        word = hi.view(np.int32).astype(np.int64) >> s.astype(np.int64)
                        moved = word.astype(np.uint64) << np.uint64(32)
                    else:
                        moved = hi.astype(np.uint64) >> s << np.uint64(32)
                        if is_known:
                            moved |= ~(np.uint64(2**32 - 1) >> s) << np.uint64(32)
                word = moved >> np.uint64(32) if upper else moved
                out.append(word.astype(np.uint32))
            v, k = out
            return [(ops[0], (v, np.where(ck == ALL, k, np.uint32(0))))]

        return run

    def _op_prmt(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        a, selector, b = (self._word(o) for o in ops[1:4])
        if len(ins.modifiers) > 0:
            return None

        def run() -> list[tuple[Operand, object]]:
            (av, ak), (sv, sk), (bv, bk) = a(), selector(), b()
            out = []
            for lo, hi in ((av, bv), (ak, bk)):
                both = hi.astype(np.uint64) << np.uint64(32) | lo
                word = self.zeros
                for i in range(4):
                    pick = sv >> np.uint32(4 * i) & np.uint32(15)
                    byte = (both >> (pick & np.uint32(7)).astype(np.uint64) * np.uint64(8)).astype(
                        np.uint32
                    ) & np.uint32(255)
                    sign = np.where(byte >> np.uint32(7), np.uint32(255), np.uint32(0))
                    byte = np.where(pick >> np.uint32(3), sign, byte)
                    word = word | byte << np.uint32(8 * i)
                out.append(word)
            return [(ops[0], (out[0], np.where(sk == ALL, out[1], np.uint32(0))))]

        return run

    def _op_popc(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        a = self._word(ops[1])

        def run() -> list[tuple[Operand, object]]:
            v, k = a()
            count = np.array([int(x).bit_count() for x in v], np.uint32)
            return [(ops[0], (count, np.where(k == ALL, self.ones, self.zeros)))]

        return run

    def _op_s2r(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        value = self._special(ops[1].text)
        return lambda: [(ops[0], value)]

    _op_s2ur = _op_s2r

    def _special(self, name: str) -> Known:
        x, y, z = self.cta
        rank = x % self.launch.cluster if self.launch.cluster else 0
        fixed = {
            "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_CTAID.X": x, "SR_CTAID.Y": y, "SR_CTAID.Z": z,
            "SR_CgaCtaId": rank, "SR_CLOCKLO": 0, "SR_CLOCKHI": 0, "SR_GLOBALTIMERLO": 0,
            "SR_GLOBALTIMERHI": 0, "SRZ": 0,
            "SR_CLUSTER_CTARANK": rank, "SR_CLUSTER_NCTARANK": max(1, self.launch.cluster),
        }  # fmt: skip
        if name == "SR_TID.X":
            return self.lanes, self.ones
        if name == "SR_LANEID":
            return self.lanes % np.uint32(WARP), self.ones
        if name in fixed:
            return self._full(fixed[name]), self.ones
        return self.zeros, self.zeros

    def _op_cs2r(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        v, k = self._special(ops[1].text)
        if "32" in ins.modifiers:
            return lambda: [(ops[0], (v, k))]
        return lambda: [(ops[0], (v.astype(np.uint64), np.where(k == ALL, _ALL64, np.uint64(0))))]

    def _op_ldc(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        if ins.modifiers - {"64"}:
            return None
        if "64" in ins.modifiers:
            pair = self._pair(ops[1])
            return lambda: [(ops[0], pair())]
        word = self._word(ops[1])
        return lambda: [(ops[0], word())]

    def _op_i2f(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        if ins.modifiers - {"RP", "U32"}:
            return None
        a = self._word(ops[1])
        # Rounded up, for a quotient by an estimate.
        signed = "U32" not in ins.modifiers

        def run() -> list[tuple[Operand, object]]:
            v, k = a()
            exact = (v.view(np.int32) if signed else v).astype(np.float64)
            near = exact.astype(np.float32)
            up = np.where(near < exact, np.nextafter(near, np.float32(np.inf)), near)
            bits = up.astype(np.float32).view(np.uint32)
            return [(ops[0], (bits, np.where(k == ALL, self.ones, self.zeros)))]

        return run

    def _op_mufu(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        if ins.modifiers != {"RCP"}:
            return None
        a = self._word(ops[1])

        def run() -> list[tuple[Operand, object]]:
            v, k = a()
            with np.errstate(all="ignore"):
                bits = (np.float32(1) / v.view(np.float32)).astype(np.float32).view(np.uint32)
            return [(ops[0], (bits, np.where(k == ALL, self.ones, self.zeros)))]

        return run

    def _op_f2i(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        if "U32" not in ins.modifiers or "TRUNC" not in ins.modifiers:
            return None
        a = self._word(ops[1])

        def run() -> list[tuple[Operand, object]]:
            v, k = a()
            with np.errstate(all="ignore"):
                number = np.clip(np.nan_to_num(v.view(np.float32).astype(np.float64)), 0, ALL)
            known = np.where(k == ALL, self.ones, self.zeros)
            return [(ops[0], (number.astype(np.uint64).astype(np.uint32), known))]

        return run

    def _op_hfma2(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        """As a move of two half constants; other uses are unknown."""
        if any(o.kind != "R" or o.number >= 0 for o in ops[1:3]) or len(ops) != 5:
            return None
        halves = []
        for o in ops[3:5]:
            try:
                halves.append(float(o.text) if o.kind == "float" else float(o.number))
            except ValueError:
                return None
        high, low = (int(np.float16(x).view(np.uint16)) for x in halves)
        value = self._full(high << 16 | low)
        return lambda: [(ops[0], (value, self.ones))]

    def _op_shfl(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        to, source, by = ops[1], self._word(ops[2]), self._word(ops[3])
        limit = ops[4]
        mode = ins.opcode.split(".")[1]
        if mode not in ("IDX", "BFLY") or limit.kind != "imm" or limit.number != 0x1F:
            return None

        def run() -> list[tuple[Operand, object]]:
            (v, k), (bv, bk) = source(), by()
            lane = self.lanes % np.uint32(WARP)
            other = bv if mode == "IDX" else lane ^ bv
            at = self.lanes - lane + other % np.uint32(WARP)
            known = np.where(bk == ALL, k[at], np.uint32(0))
            return [(to, (v[at], known)), (ops[0], (self.true, bk == ALL))]

        return run

    def _op_p2r(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        if ops[1].text != "PR" or ins.modifiers:
            return None
        source, table = self._word(ops[2]), ops[3].number

        def run() -> list[tuple[Operand, object]]:
            v, k = source()
            v, k = v & np.uint32(~table & ALL), k | np.uint32(table)
            for i in range(7):
                if table >> i & 1:
                    v = v | self.P[i].astype(np.uint32) << np.uint32(i)
                    k = np.where(self.PK[i], k, k & np.uint32(~(1 << i) & ALL))
            return [(ops[0], (v, k))]

        return run

    def _op_vote(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        """VOTEU.ANY of true: the mask of the active lanes. Other votes are unknown."""
        if len(ops) != 3 or ops[0].kind not in ("R", "UR") or ops[2].number >= 0:
            return None

        def run() -> list[tuple[Operand, object]]:
            by_warp = self._active.reshape(self.warps, WARP)
            masks = np.packbits(by_warp, axis=1, bitorder="little").view(np.uint32).ravel()
            return [(ops[0], (np.repeat(masks, WARP), self.ones))]

        return run

    def _op_flo(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        a = self._word(ops[1])

        def run() -> list[tuple[Operand, object]]:
            v, k = a()
            top = np.array([int(x).bit_length() - 1 for x in v], np.int64)
            return [(ops[0], ((top & ALL).astype(np.uint32), np.where(k == ALL, k, 0)))]

        return run

    def _op_syncs(self, ins: Instruction, ops: Sequence[Operand]) -> object:
        if "PHASECHK" not in ins.modifiers:
            return None
        return lambda: [(ops[0], (self.true, self.true))]

    # ---- memory ---------------------------------------------------------------------------------

    def _memory(self, index: int, ins: Instruction, mask: Mask) -> list[tuple[int, int]]:
        """Each warp's wavefronts, 0 if it accesses nothing, and those beyond the least."""
        by_warp = mask.reshape(self.warps, WARP)
        takes_part = by_warp.any(axis=1)
        size = access_bytes(ins)
        if ins.name not in SHARED:
            wide = 4 if size == 16 or ins.name == "STAS" else 1
            return [(wide if part else 0, 0) for part in takes_part]
        memory = next((o for o in ins.operands if o.kind == "mem"), None)
        access = self.accesses.setdefault(index, Access())
        matrices = 0
        if ins.name in ("LDSM", "STSM"):
            matrices, size = int(ins.opcode.rsplit(".", 1)[1]), 16
        least = matrices or max(1, size // 4)
        found = []
        addresses, known = self._address(memory) if memory else (None, self.false)
        for w in range(self.warps):
            if not takes_part[w]:
                found.append((0, 0))
                continue
            here = slice(w * WARP, (w + 1) * WARP)
            access.warps += 1
            if addresses is None or not known[here][by_warp[w]].all():
                access.unknown += 1
                waves = ideal = least
            else:
                at = (addresses[here] & np.uint64(0xFFFFFF)).astype(np.int64)
                active = by_warp[w]
                if matrices:  # eight lanes have the rows of one matrix
                    active = active & (np.arange(WARP) < 8 * matrices)
                key = ((at - (at[active].min() & ~127)).tobytes(), active.tobytes(), size)
                if key not in self._waves:
                    self._waves[key] = shared_wavefronts(at.tolist(), active.tolist(), size)
                waves, ideal = self._waves[key]
            access.wavefronts += waves
            access.ideal += ideal
            found.append((waves, waves - ideal))
        return found

    # ---- the run --------------------------------------------------------------------------------

    def run(self) -> Run:
        """Runs the CTA to its end."""
        with np.errstate(over="ignore"):
            self._run()
        return self.run_

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
        while True:
            at = np.where(self.alive & (self.waits == 0), pc, end)
            i = int(at.min())
            if i == end:
                if not self.alive.any():
                    return
                self._force()
                continue
            active = at == i
            others = at[~active]
            stop = int(others.min()) if others.size else end
            self._active = active
            warps = tuple(np.flatnonzero(active.reshape(self.warps, WARP).any(axis=1)).tolist())
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

    def _guard(self, ins: Instruction, active: Mask) -> tuple[Mask, Mask]:
        """The lanes that run an instruction, and those that are known to."""
        if ins.guard is None:
            return active, active
        v, k = self._truth(ins.guard)()
        return active & (v | ~k), active & v & k

    def _execute(self, i: int, active: Mask, warps: tuple[int, ...]) -> int | None:
        """Runs one instruction. Returns the next, the same for all lanes; None: they differ."""
        ins = self.function.instructions[i]
        name = ins.name
        if name in SHARED or name in GLOBAL:
            mask, _ = self._guard(ins, active)
            waves = self._memory(i, ins, mask)
            self.run_.events.append((i, warps, tuple(waves[w] for w in warps)))
        else:
            self.run_.events.append((i, warps, None))
        flow = getattr(self, f"_flow_{name.lower()}", None)
        if flow is not None:
            after: int | None = flow(i, ins, active)
            return after
        if "PHASECHK" in ins.modifiers:
            self.run_.polls.add(i)
        step = self._steps[i]
        if step is None:
            step = self._steps[i] = self._step(ins)
        step(active)
        return i + 1

    def _step(self, ins: Instruction) -> Step:
        compute = self._compute(ins)
        if compute is None:
            return self._unknown(ins)
        results = compute

        def step(active: Mask) -> None:
            mask, sure = self._guard(ins, active)
            for o, value in results():
                if o.kind in ("P", "UP"):
                    self._set_truth(o, value, mask, sure)  # type: ignore[arg-type]
                elif value[0].dtype == np.uint64:  # type: ignore[index]
                    self._set64(o, value, mask, sure)  # type: ignore[arg-type]
                else:
                    self._set(o, value, mask, sure)  # type: ignore[arg-type]

        return step

    def _unknown(self, ins: Instruction) -> Step:
        """An instruction whose results are not known."""
        from tools.cycles.pipeline import registers_of

        written = registers_of(ins)[0]
        rows: list[tuple[Array | Mask, int]] = []
        for name in written:
            kind, number = name.rstrip("0123456789"), int(name.lstrip("URP"))
            bank = {"R": self.RK, "UR": self.URK, "P": self.PK, "UP": self.UPK}[kind]
            rows.append((bank, number))
        if ins.name not in _FLOATS and ins.name not in SHARED | GLOBAL and rows:
            self.run_.unknown[ins.opcode] += 1

        def step(active: Mask) -> None:
            mask, _ = self._guard(ins, active)
            for bank, number in rows:
                bank[number][mask] = 0

        return step

    # ---- control flow ---------------------------------------------------------------------------

    def _condition(self, i: int, ins: Instruction, active: Mask) -> Mask:
        """The lanes that take a branch."""
        v, k = active.copy(), self.true
        predicates = [o for o in ins.operands if o.kind in ("P", "UP")]
        if ins.guard is not None:
            predicates.append(ins.guard)
        for o in predicates:
            pv, pk = self._truth(o)()
            v, k = _joined("AND", (v, k), (pv, pk))
        unknown = active & ~k
        if unknown.any():
            taken, polls = self.policy.choose(i)
            self.run_.guesses[i] += 1
            if polls:
                self.run_.polls |= self.policy.polls(i)
            v = np.where(unknown, taken, v)
        return active & v

    def _flow_bra(self, i: int, ins: Instruction, active: Mask) -> int | None:
        target = ins.target
        if target not in self.function.index_of:
            return None if not self._kill(active) else None
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

    def _kill(self, lanes: Mask) -> bool:
        self.alive &= ~lanes
        self._release_all()
        return True

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
        mask, _ = self._guard(ins, active)
        whole = self._warps_of(mask)
        kept = self.together.get(barrier, self.false) & ~whole
        self.together[barrier] = kept | mask
        self.arrived[barrier] = self.arrived.get(barrier, self.false) & ~whole
        return i + 1

    def _flow_break(self, i: int, ins: Instruction, active: Mask) -> int:
        barrier = next((o.number for o in ins.operands if o.kind == "barrier"), 0)
        mask, _ = self._guard(ins, active)
        self.together[barrier] = self.together.get(barrier, self.false) & ~mask
        self._release(barrier)
        return i + 1

    def _warps_of(self, mask: Mask) -> Mask:
        """All lanes of the warps that have a lane in `mask`."""
        return np.repeat(mask.reshape(self.warps, WARP).any(axis=1), WARP)

    def _flow_bsync(self, i: int, ins: Instruction, active: Mask) -> int | None:
        barrier = ins.operands[0].number
        mask = self._condition(i, ins, active) if ins.guard is not None else active
        if not mask.any():
            return i + 1
        self.pc[active] = i + 1
        self.arrived[barrier] = self.arrived.get(barrier, self.false) | mask
        self.waits[mask] = 1
        self._release(barrier)
        return None if self.waits[active].any() else i + 1

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
        if "COLLECTIVE" in ins.modifiers:
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
        return None if self.waits[active].any() else i + 1

    def _flow_bar(self, i: int, ins: Instruction, active: Mask) -> int | None:
        mask = self._condition(i, ins, active) if ins.guard is not None else active
        if not mask.any():
            return i + 1
        barrier, count = self.barrier_of(ins, mask)
        self.pc[active] = i + 1
        key = 1000 + barrier
        self.arrived[key] = self.arrived.get(key, self.false) | mask
        waits = "ARV" not in ins.modifiers
        if waits:
            self.waits[mask] = 2
        self.counts = getattr(self, "counts", {})
        self.counts[key] = count
        self._release_cta(key)
        return None if self.waits[active].any() else i + 1

    def barrier_of(self, ins: Instruction, mask: Mask) -> tuple[int, int]:
        """A named barrier's number and its threads; 0: all of the CTA."""
        numbers = []
        for o in ins.operands:
            if o.kind in ("imm", "R", "UR"):
                v, k = self._word(o)()
                if not (k[mask] == ALL).all():
                    raise UnsupportedError(f"{ins.text}: a barrier with an unknown number")
                numbers.append(int(v[mask][0]))
        return (numbers + [0, 0])[0], (numbers + [0, 0])[1]

    def _release_cta(self, key: int) -> None:
        arrived = self.arrived.get(key, self.false)
        count = self.counts.get(key, 0)
        full = int(arrived.sum()) >= count if count else not (self.alive & ~arrived).any()
        if full and arrived.any():
            self.waits[arrived & (self.waits == 2)] = 0
            self.arrived[key] = self.false

    def _release_all(self) -> None:
        for key in list(self.arrived):
            if key >= 1000:
                self._release_cta(key)
            else:
                self._release(key)

    def _force(self) -> None:
        """Nobody can run: lets lanes go on from convergence barriers, or else from all."""
        stuck = self.alive & (self.waits == 1)
        if not stuck.any():
            stuck = self.alive & (self.waits == 2)
        self.run_.forced += int(stuck.sum())
        self.waits[stuck] = 0
        for key in self.arrived:
            self.arrived[key] = self.arrived[key] & ~stuck


_ALL64 = np.uint64(2**64 - 1)
_COMPARES: dict[str, Callable[[Array, Array], Mask]] = {
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
}
# Arithmetic on floats, and other results that never decide a path today.
_FLOATS = {
    "FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP", "MUFU", "HMMA", "F2F", "F2FP", "HADD2",
    "HFMA2", "HMUL2", "FSET", "I2F", "F2I", "FCHK", "HGMMA", "FRND", "I2FP", "HSETP2", "HMNMX2",
}  # fmt: skip


def _product(a: Array, b: Array, signed: bool) -> Wide:
    if signed:
        product = a.view(np.int32).astype(np.int64) * b.view(np.int32).astype(np.int64)
        return product.view(np.uint64)
    return a.astype(np.uint64) * b.astype(np.uint64)


def _extended(v: Array) -> Array:
    """The sign in all bits."""
    return (v.view(np.int32) >> 31).view(np.uint32)


def _joined(how: str, a: Truth, b: Truth) -> Truth:
    (av, ak), (bv, bk) = a, b
    if how == "AND":
        return av & bv, (ak & bk) | (ak & ~av) | (bk & ~bv)
    if how == "OR":
        return av | bv, (ak & bk) | (ak & av) | (bk & bv)
    return av ^ bv, ak & bk


__all__ = ["Access", "Block", "Launch", "Machine", "Run", "UnsupportedError", "shared_wavefronts"]

"""The integer instructions of SASS, on all threads of a CTA at once.

A value is an array with a thread's word each, and an array of its known bits. `Integers.step` makes
a function of an instruction. Where all bits of its inputs are known it computes values alone.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tools.cycles.registers import numbers, registers_of
from tools.cycles.sass import Instruction, Operand

WARP = 32
SHARED_WORDS = 1 << 16
ALL = 0xFFFFFFFF
# The constant bank's offset of a kernel's arguments.
PARAMS_AT = {"sm_80": 0x160, "sm_90": 0x210, "sm_100": 0x380}

Array = npt.NDArray[np.uint32]
Wide = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
Known = tuple[Array, Array]  # values, and which of their bits are known
Known64 = tuple[Wide, Wide]
Truth = tuple[Mask, Mask]
Results = list[tuple[Operand, Any]]
Compute = Callable[[], Results]
Values = Callable[[], list[Any]]
Step = Callable[[Mask], None]


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


class Integers:
    """The registers of a CTA's threads, and what instructions do to them."""

    def __init__(self, arch: str, threads: int, params: int) -> None:
        """`params`: the bytes of the kernel's arguments."""
        name = arch.rstrip("af")
        if name not in PARAMS_AT:
            raise UnsupportedError(f"{arch}: where its constant bank has a kernel's arguments")
        self.params_at = PARAMS_AT[name]
        self.params = params
        self.n = n = threads
        self.warps = n // WARP
        self.lanes = np.arange(n, dtype=np.uint32)
        self.R = np.zeros((257, n), np.uint32)
        self.RK = np.zeros((257, n), np.uint32)
        self.UR = np.zeros((65, n), np.uint32)
        self.URK = np.zeros((65, n), np.uint32)
        # The last row is PT and UPT.
        self.P = np.zeros((8, n), np.bool_)
        self.PK = np.zeros((8, n), np.bool_)
        self.UP = np.zeros((8, n), np.bool_)
        self.UPK = np.zeros((8, n), np.bool_)
        self.dirty: set[int] = set()  # the registers with unknown bits
        self.zeros = np.zeros(n, np.uint32)
        self.ones = np.full(n, ALL, np.uint32)
        self.true = np.ones(n, np.bool_)
        self.false = np.zeros(n, np.bool_)
        self.active = self.true  # the lanes that run the present instruction
        self.unknown: dict[str, int] = {}  # runs of opcodes without a rule
        # Shared memory, and which of its bits are known. Row lengths lie there.
        self.words = np.zeros(SHARED_WORDS, np.uint32)
        self.words_known = np.zeros(SHARED_WORDS, np.uint32)
        self._immediates: dict[int, Array] = {}
        # The known words of constant bank 0 and the known special registers: `start` fills them.
        offsets = [*range(0, 0x18, 4), *range(self.params_at, self.params_at + params, 4)]
        self.constants = {offset: np.zeros(n, np.uint32) for offset in offsets}
        self.specials = {name: np.zeros(n, np.uint32) for name in _SPECIALS}

    def start(self, launch: Launch, cta: tuple[int, int, int]) -> None:
        """Sets all registers to 0, which is as good as any value, and the constants."""
        if (launch.threads, len(launch.params)) != (self.n, self.params):
            raise ValueError(f"{launch.kernel}: another kernel's launch")
        for values, known in (
            (self.R, self.RK), (self.UR, self.URK), (self.P, self.PK), (self.UP, self.UPK)
        ):  # fmt: skip
            values[:] = 0
            known[:] = True if known.dtype == np.bool_ else ALL
        self.P[7] = self.UP[7] = True
        self.dirty.clear()
        self.unknown = {}
        self.words_known[:] = 0
        sizes = (launch.threads, 1, 1, *launch.grid)
        data = launch.params + bytes(-len(launch.params) % 4)
        words = [(4 * i, size) for i, size in enumerate(sizes)]
        words += [
            (self.params_at + 4 * i, word[0])
            for i, word in enumerate(struct.iter_unpack("<I", data))
        ]
        for offset, word in words:
            self.constants[offset][:] = word
        rank = cta[0] % launch.cluster if launch.cluster else 0
        known_specials = {
            "SR_CTAID.X": cta[0], "SR_CTAID.Y": cta[1], "SR_CTAID.Z": cta[2],
            "SR_CgaCtaId": rank, "SR_CLUSTER_CTARANK": rank,
            "SR_CLUSTER_NCTARANK": max(1, launch.cluster),
        }  # fmt: skip
        for name, row in self.specials.items():
            row[:] = known_specials.get(name, 0)
        self.specials["SR_TID.X"][:] = self.lanes
        self.specials["SR_LANEID"][:] = self.lanes % np.uint32(WARP)

    # ---- operands -------------------------------------------------------------------------------

    def _full(self, value: int) -> Array:
        value &= ALL
        if value not in self._immediates:
            self._immediates[value] = np.full(self.n, value, np.uint32)
        return self._immediates[value]

    def _constant(self, offset: int) -> Known:
        word = self.constants.get(offset)
        return (self.zeros, self.zeros) if word is None else (word, self.ones)

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
        for register, bank, bits, scale in (
            (o.base, self.R, self.RK, o.scale), (o.ubase, self.UR, self.URK, 1)
        ):  # fmt: skip
            if register is None:
                continue
            total = total + bank[register].astype(np.uint64) * np.uint64(scale)
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

    # ---- an instruction as a function -----------------------------------------------------------

    def guard(self, ins: Instruction, active: Mask) -> tuple[Mask, Mask]:
        """The lanes that run an instruction, and those that are known to."""
        if ins.guard is None:
            return active, active
        v, k = self._truth(ins.guard)()
        return active & (v | ~k), active & v & k

    def step(self, ins: Instruction) -> Step:
        """Runs an instruction on the lanes of a mask."""
        if ins.name in _TO_SHARED:
            return self._store(ins)
        compute = self._compute(ins)
        if compute is None:
            return self._unknown(ins)
        general = self._general(ins, compute)
        values = self._values(ins)
        if values is None:
            return general
        quick = self._quick(ins, values)
        inputs = frozenset(numbers(registers_of(ins)[1]))
        dirty = self.dirty

        def step(active: Mask) -> None:
            (quick if dirty.isdisjoint(inputs) else general)(active)

        return step

    def _general(self, ins: Instruction, results: Compute) -> Step:
        """For inputs of which not all bits are known."""
        outputs = self._rows(ins)

        def step(active: Mask) -> None:
            mask, sure = self.guard(ins, active)
            for o, value in results():
                if o.kind in ("P", "UP"):
                    self._set_truth(o, value, mask, sure)
                elif value[0].dtype == np.uint64:
                    self._set64(o, value, mask, sure)
                else:
                    self._set(o, value, mask, sure)
            self._mark(outputs)

        return step

    def _rows(self, ins: Instruction) -> list[tuple[int, Array | Mask]]:
        """The registers that an instruction writes: number, known bits."""
        found: list[tuple[int, Array | Mask]] = []
        for name in registers_of(ins)[0]:
            kind, number = name.rstrip("0123456789"), int(name.lstrip("URP"))
            bank = {"R": self.RK, "UR": self.URK, "P": self.PK, "UP": self.UPK}[kind]
            found.append((numbers([name])[0], bank[number]))
        return found

    def _mark(self, rows: Sequence[tuple[int, Array | Mask]]) -> None:
        for number, known in rows:
            whole = (known if known.dtype == np.bool_ else known == ALL).all()
            if whole:
                self.dirty.discard(number)
            else:
                self.dirty.add(number)

    def _quick(self, ins: Instruction, values: Values) -> Step:
        """For inputs that are known."""
        rows: list[tuple[Any, Any, int]] = []
        o = ins.operands[0]
        wide = o.kind in ("R", "UR") and bool(ins.modifiers & {"WIDE", "64"})
        for more in range(2 if wide else 1):
            bank, known = {
                "R": (self.R, self.RK), "UR": (self.UR, self.URK),
                "P": (self.P, self.PK), "UP": (self.UP, self.UPK),
            }[o.kind]  # fmt: skip
            if o.number >= 0:
                number = numbers([f"{o.kind}{o.number + more}"])[0]
                rows.append((bank[o.number + more], known[o.number + more], number))
            else:
                rows.append((None, None, -1))
        truth = None if ins.guard is None else self._truth(ins.guard)
        dirty = self.dirty
        everything = self.true

        def step(active: Mask) -> None:
            mask = active if truth is None else active & truth()[0]
            for (row, known, number), value in zip(rows, values(), strict=True):
                if row is None:
                    continue
                if mask is everything:
                    row[:] = value
                else:
                    np.copyto(row, value, where=mask)
                if number in dirty:
                    known[mask] = True if known.dtype == np.bool_ else ALL
                    self._mark([(number, known)])

        return step

    def _unknown(self, ins: Instruction) -> Step:
        """An instruction whose results are not known."""
        rows = self._rows(ins)
        counts = bool(rows) and ins.name not in _FLOATS and not _is_memory(ins)

        def step(active: Mask) -> None:
            if counts:
                self.unknown[ins.opcode] = self.unknown.get(ins.opcode, 0) + 1
            if active is self.true and ins.guard is None:
                for number, known in rows:
                    known[:] = 0
                    self.dirty.add(number)
                return
            mask, _ = self.guard(ins, active)
            if mask.any():
                for number, known in rows:
                    known[mask] = 0
                    self.dirty.add(number)

        return step

    # ---- shared memory --------------------------------------------------------------------------

    def _words_at(self, memory: Operand, count: int) -> tuple[npt.NDArray[np.int64], Mask]:
        """Each lane's first word, and whether `count` words from there are known to be meant."""
        at, known = self._address(memory)
        # A CTA's window in the cluster's shared memory begins at a multiple of 2^24.
        index = ((at & np.uint64(0xFFFFFF)) >> np.uint64(2)).astype(np.int64)
        sure = known & (at % np.uint64(4) == 0) & (index + count <= SHARED_WORDS)
        return np.where(sure, index, 0), sure

    def _op_ldg(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        """Other CTAs' data that is its own flag has come: no word of it is 0xffffffff."""
        if not is_data_poll(ins) or ops[0].number < 0:
            return None
        words = [Operand("R", ops[0].number + i) for i in range(_word_count(ins))]
        return lambda: [(o, (self.zeros, self.ones)) for o in words]

    _op_ld = _op_ldg

    def _op_lds(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        to, memory = ops[0], ops[-1]
        if ins.modifiers & _NARROW or to.number < 0 or memory.kind != "mem":
            return None
        count = _word_count(ins)

        def run() -> Results:
            index, sure = self._words_at(memory, count)
            return [
                (
                    Operand("R", to.number + i),
                    (self.words[index + i], np.where(sure, self.words_known[index + i], 0)),
                )
                for i in range(count)
            ]

        return run

    def _store(self, ins: Instruction) -> Step:
        """A store to shared memory.

        What comes from elsewhere is unknown, and so is everything after an unknown address.
        """
        memory = next(o for o in ins.operands if o.kind == "mem")
        count = _word_count(ins)
        source = ins.operands[-1]
        plain = ins.name == "STS" and not ins.modifiers & _NARROW and source.kind in ("R", "UR")
        reads = [
            self._word(Operand(source.kind, source.number + i if source.number >= 0 else -1))
            for i in range(count if plain else 0)
        ]

        def step(active: Mask) -> None:
            mask, sure = self.guard(ins, active)
            index, known = self._words_at(memory, count)
            if not known[mask].all() or ins.name == "STSM":
                self.words_known[:] = 0
                return
            to = index[mask]
            for i in range(count):
                if plain:
                    v, k = reads[i]()
                    self.words[to + i] = v[mask]
                    self.words_known[to + i] = np.where(sure, k, np.uint32(0))[mask]
                else:
                    self.words_known[to + i] = 0

        return step

    # ---- values alone ---------------------------------------------------------------------------

    def _value(self, o: Operand) -> Callable[[], Array] | None:
        """Reads an operand whose bits are all known; None: they may not be."""
        if o.kind == "const" and (
            o.bank or o.base is not None or o.ubase is not None or o.number not in self.constants
        ):
            return None
        if o.kind not in ("R", "UR", "imm", "const") or o.absolute or o.half:
            return None
        if o.kind in ("R", "UR") and not o.negative and not o.inverted:
            row = (self.R if o.kind == "R" else self.UR)[o.number]
            return lambda: row
        if o.kind in ("imm", "const") and not o.negative and not o.inverted:
            fixed = self._full(o.number) if o.kind == "imm" else self.constants[o.number]
            return lambda: fixed
        read = self._word(o)
        return lambda: read()[0]

    def _values(self, ins: Instruction) -> Values | None:
        """The same as `_compute` for known inputs, for the instructions that are most often run."""
        name = ins.name[1:] if ins.name.startswith("U") else ins.name
        method = getattr(self, f"_fast_{name.lower()}", None)
        if method is None:
            return None
        sources = [self._value(o) for o in ins.operands[1:] if o.kind not in ("P", "UP")]
        truths = [self._truth(o) for o in ins.operands[1:] if o.kind in ("P", "UP")]
        if any(read is None for read in sources):
            return None
        found: Values | None = method(ins, sources, truths)
        return found

    def _fast_mov(self, ins: Instruction, reads: Any, truths: Any) -> Values | None:
        return lambda: [reads[0]()]

    def _fast_ldc(self, ins: Instruction, reads: Any, truths: Any) -> Values | None:
        if ins.modifiers:
            return None
        return lambda: [reads[0]()]

    def _fast_imad(self, ins: Instruction, reads: Any, truths: Any) -> Values | None:
        a, b, c = reads
        ops = ins.operands
        if "HI" in ins.modifiers or truths:
            return None
        if "WIDE" in ins.modifiers:
            signed = "U32" not in ins.modifiers
            if ops[3].kind not in ("R", "UR"):
                return None
            pair = self._pair(ops[3])

            def wide() -> list[Any]:
                total = _product(a(), b(), signed)
                if ops[3].number >= 0:
                    total = total + pair()[0]
                return [total.astype(np.uint32), (total >> np.uint64(32)).astype(np.uint32)]

            return wide
        if any(o.kind in ("R", "UR") and o.number < 0 for o in ops[1:3]):
            return lambda: [c()]
        if ops[3].kind in ("R", "UR") and ops[3].number < 0:
            return lambda: [a() * b()]
        if ops[2].kind == "imm" and ops[2].number == 1:
            return lambda: [a() + c()]
        return lambda: [a() * b() + c()]

    def _fast_iadd3(self, ins: Instruction, reads: Any, truths: Any) -> Values | None:
        if truths:
            return None
        kept = [
            read
            for read, o in zip(reads, ins.operands[1:], strict=True)
            if o.kind not in ("R", "UR") or o.number >= 0 or o.inverted
        ]
        if len(kept) == 2:
            a, b = kept
            return lambda: [a() + b()]
        if len(kept) == 3:
            a, b, c = kept
            return lambda: [a() + b() + c()]
        return None

    _fast_viadd = _fast_iadd3
    _fast_iadd = _fast_iadd3

    def _fast_lea(self, ins: Instruction, reads: Any, truths: Any) -> Values | None:
        if truths or "SX32" in ins.modifiers:
            return None
        shift = np.uint32(ins.operands[-1].number)
        a, b = reads[:2]
        if "HI" not in ins.modifiers:
            return lambda: [(a() << shift) + b()]
        if ins.operands[3].kind not in ("R", "UR") or ins.operands[3].number >= 0 or not shift:
            return None
        # With a high word of zeros.
        return lambda: [(a() >> np.uint32(32 - int(shift))) + b()]

    def _fast_shf(self, ins: Instruction, reads: Any, truths: Any) -> Values | None:
        low, _, high = reads
        count = ins.operands[2]
        if count.kind != "imm" or not 0 < count.number < 32 or ins.modifiers & {"U64", "S64", "W"}:
            return None
        s = np.uint32(count.number)
        if "R" in ins.modifiers and "HI" in ins.modifiers:
            if "S32" in ins.modifiers:
                signed = np.int32(count.number)
                return lambda: [(high().view(np.int32) >> signed).view(np.uint32)]
            return lambda: [high() >> s]
        if "L" in ins.modifiers and "HI" not in ins.modifiers:
            return lambda: [low() << s]
        return None

    def _fast_lop3(self, ins: Instruction, reads: Any, truths: Any) -> Values | None:
        if ins.operands[0].kind in ("P", "UP"):
            return None
        a, b, c = reads[:3]
        table = ins.operands[4].number
        simple: dict[int, Callable[[], list[Any]]] = {
            0xC0: lambda: [a() & b()],
            0xFC: lambda: [a() | b()],
            0x3C: lambda: [a() ^ b()],
            0x33: lambda: [~b()],
            0x0F: lambda: [~a()],
            0x30: lambda: [a() & ~b()],
            0xF8: lambda: [a() | (b() & c())],
            0xFE: lambda: [a() | b() | c()],
            0xEA: lambda: [(a() & b()) | c()],
            0x80: lambda: [a() & b() & c()],
        }
        return simple.get(table)

    def _fast_isetp(self, ins: Instruction, reads: Any, truths: Any) -> Values | None:
        if "EX" in ins.modifiers or ins.operands[1].number >= 0 or len(truths) != 2:
            return None
        a, b = reads
        compare = _COMPARES[next(m for m in ins.opcode.split(".") if m in _COMPARES)]
        join = next((m for m in ins.opcode.split(".") if m in ("AND", "OR", "XOR")), "AND")
        signed = "U32" not in ins.modifiers
        with_ = truths[1]
        alone = join == "AND" and ins.operands[4].number < 0 and not ins.operands[4].negative

        def run() -> list[Any]:
            av, bv = a(), b()
            if signed:
                av, bv = av.view(np.int32), bv.view(np.int32)
            v = compare(av, bv)
            if alone:
                return [v]
            other = with_()[0]
            return [v & other if join == "AND" else v | other if join == "OR" else v ^ other]

        return run

    def _fast_sel(self, ins: Instruction, reads: Any, truths: Any) -> Values | None:
        a, b = reads
        p = truths[0]
        return lambda: [np.where(p()[0], a(), b())]

    def _fast_prmt(self, ins: Instruction, reads: Any, truths: Any) -> Values | None:
        selector = ins.operands[2]
        if selector.kind != "imm" or ins.modifiers or selector.number & 0x8888:
            return None
        a, _, b = reads
        picks = [selector.number >> 4 * i & 7 for i in range(4)]

        def run() -> list[Any]:
            av, bv = a(), b()
            word = None
            for i, pick in enumerate(picks):
                source = av if pick < 4 else bv
                byte = source >> np.uint32(8 * (pick % 4)) & np.uint32(255)
                byte = byte << np.uint32(8 * i)
                word = byte if word is None else word | byte
            return [word]

        return run

    # ---- instructions ---------------------------------------------------------------------------

    def _compute(self, ins: Instruction) -> Compute | None:
        """The results of an instruction as (operand, value) pairs; None: see `_unknown`."""
        name = ins.name
        ops = ins.operands
        # A uniform instruction does the same with uniform registers.
        plain = name[1:] if name.startswith("U") and name not in ("UNDEF",) else name
        method = getattr(self, f"_op_{plain.lower()}", None)
        if method is None or not ops:
            return None
        found: Compute | None = method(ins, ops)
        return found

    def _op_mov(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        read = self._word(ops[1])
        return lambda: [(ops[0], read())]

    _op_r2ur = _op_mov
    _op_mov32i = _op_mov

    def _op_imad(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
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

        def run() -> Results:
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

    def _imad_wide(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        sources = [o for o in ops[1:] if o.kind not in ("P", "UP")]
        outs = [o for o in ops[1:] if o.kind in ("P", "UP")]
        a, b = self._word(sources[0]), self._word(sources[1])
        c = self._pair(sources[2])
        signed = "U32" not in ins.modifiers

        def run() -> Results:
            (av, ak), (bv, bk), (cv, ck) = a(), b(), c()
            product = _product(av, bv, signed)
            known = (ak & bk) == ALL
            k = np.where(known, _low64(ck), _low64((_low(ak & bk)).astype(np.uint64) & ck))
            total = product + cv
            results: Results = [((ops[0]), (total, k))]
            results += [(o, (total < cv, known & (ck == np.uint64(2**64 - 1)))) for o in outs]
            return results

        return run

    def _op_iadd3(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
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

        def run() -> Results:
            v, k = self.zeros, self.ones
            for read in reads:
                sv, sk = read()
                v, k = v + sv, k & sk
            sure = self.true
            for carry in carries:
                bit, known = carry()
                v, sure = v + bit, sure & known
            k = np.where(sure, _low(k), np.uint32(0))
            results: Results = [(ops[0], (v, k))]
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

    def _op_lea(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
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

        def run() -> Results:
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
            results: Results = [(ops[0], (v, k))]
            results += [(o, (total >> np.uint64(32) > 0, k == ALL)) for o in outs]
            return results

        return run

    def _op_lop3(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        outs: list[Operand] = []
        rest = list(ops)
        while rest[0].kind in ("P", "UP"):
            outs.append(rest.pop(0))
        to, *sources = rest[:4]
        table = rest[4].number
        reads = [self._word(o) for o in sources]

        def run() -> Results:
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
            results: Results = [(to, (v, k))]
            results += [(o, ((v & k) != 0, (k == ALL) | ((v & k) != 0))) for o in outs]
            return results

        return run

    def _op_plop3(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        to, other = ops[0], ops[1]
        reads = [self._truth(o) for o in ops[2:5]]
        tables = [o.number for o in ops[5:7]]

        def run() -> Results:
            values = [read() for read in reads]
            results: Results = []
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

    def _op_isetp(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        to, other = ops[0], ops[1]
        sources = [o for o in ops[2:] if o.kind not in ("P", "UP")]
        predicates = [self._truth(o) for o in ops[2:] if o.kind in ("P", "UP")]
        a, b = self._word(sources[0]), self._word(sources[1])
        extended = "EX" in ins.modifiers
        signed = "U32" not in ins.modifiers
        compare = next(m for m in ins.opcode.split(".") if m in _COMPARES)
        join = next((m for m in ins.opcode.split(".") if m in ("AND", "OR", "XOR")), "AND")

        def run() -> Results:
            (av, ak), (bv, bk) = a(), b()
            known = (ak & bk) == ALL
            low = None
            if extended:
                low, lowk = predicates[-1]()
            if signed:
                av, bv = av.view(np.int32), bv.view(np.int32)
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
            first = joined(join, (v, known), (with_, withk))
            second = joined(join, (~v, known), (with_, withk))
            return [(to, first), (other, second)]

        return run

    def _op_sel(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        a, b, p = self._word(ops[1]), self._word(ops[2]), self._truth(ops[3])

        def run() -> Results:
            (av, ak), (bv, bk), (pv, pk) = a(), b(), p()
            same = ak & bk & ~(av ^ bv)
            return [(ops[0], (np.where(pv, av, bv), np.where(pk, np.where(pv, ak, bk), same)))]

        return run

    def _op_imnmx(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        """Of two words, or three (VIMNMX3); the last operand tells whether the least is wanted."""
        words = [self._word(o) for o in ops[1:-1]]
        p = self._truth(ops[-1])
        kind = np.uint32 if "U32" in ins.modifiers else np.int32

        def run() -> Results:
            least, pk = p()
            found, known = words[0]()
            for word in words[1:]:
                v, k = word()
                x, y = found.view(kind), v.view(kind)
                found = np.where(least, np.minimum(x, y), np.maximum(x, y)).view(np.uint32)
                known = known & k
            sure = (known == ALL) & pk
            return [(ops[0], (found, np.where(sure, self.ones, self.zeros)))]

        return run

    _op_vimnmx = _op_imnmx
    _op_vimnmx3 = _op_imnmx

    def _op_viaddmnmx(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        a, b, c = (self._word(o) for o in ops[1:4])
        p = self._truth(ops[4])
        kind = np.uint32 if "U32" in ins.modifiers else np.int32

        def run() -> Results:
            (av, ak), (bv, bk), (cv, ck), (least, pk) = a(), b(), c(), p()
            s, ci = (av + bv).view(kind), cv.view(kind)
            v = np.where(least, np.minimum(s, ci), np.maximum(s, ci)).view(np.uint32)
            known = ((ak & bk & ck) == ALL) & pk
            return [(ops[0], (v, np.where(known, self.ones, self.zeros)))]

        return run

    def _op_iabs(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        a = self._word(ops[1])

        def run() -> Results:
            v, k = a()
            known = np.where(k == ALL, self.ones, self.zeros)
            return [(ops[0], (np.abs(v.view(np.int32)).view(np.uint32), known))]

        return run

    def _op_shf(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        low, count, high = (self._word(o) for o in ops[1:4])
        left = "L" in ins.modifiers
        signed = bool(ins.modifiers & {"S32", "S64"})
        wide = bool(ins.modifiers & {"U64", "S64"})
        upper = "HI" in ins.modifiers
        wraps = "W" in ins.modifiers

        def run() -> Results:
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
                        high_word = hi.view(np.int32).astype(np.int64) >> s.astype(np.int64)
                        moved = high_word.astype(np.uint64) << np.uint64(32)
                    else:
                        moved = hi.astype(np.uint64) >> s << np.uint64(32)
                        if is_known:
                            moved |= ~(np.uint64(2**32 - 1) >> s) << np.uint64(32)
                word = moved >> np.uint64(32) if upper else moved
                out.append(word.astype(np.uint32))
            v, k = out
            return [(ops[0], (v, np.where(ck == ALL, k, np.uint32(0))))]

        return run

    def _op_prmt(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        a, selector, b = (self._word(o) for o in ops[1:4])
        if len(ins.modifiers) > 0:
            return None

        def run() -> Results:
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

    def _op_popc(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        a = self._word(ops[1])

        def run() -> Results:
            v, k = a()
            count = np.array([int(x).bit_count() for x in v], np.uint32)
            return [(ops[0], (count, np.where(k == ALL, self.ones, self.zeros)))]

        return run

    def _op_s2r(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        value = self._special(ops[1].text)
        return lambda: [(ops[0], value)]

    _op_s2ur = _op_s2r

    def _special(self, name: str) -> Known:
        row = self.specials.get(name)
        return (self.zeros, self.zeros) if row is None else (row, self.ones)

    def _op_cs2r(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        v, k = self._special(ops[1].text)
        if "32" in ins.modifiers:
            return lambda: [(ops[0], (v, k))]
        known = np.where(k == ALL, _ALL64, np.uint64(0))
        return lambda: [(ops[0], (v.astype(np.uint64), known))]

    def _op_ldc(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        if ins.modifiers - {"64"}:
            return None
        if "64" in ins.modifiers:
            pair = self._pair(ops[1])
            return lambda: [(ops[0], pair())]
        word = self._word(ops[1])
        return lambda: [(ops[0], word())]

    def _op_i2f(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        if ins.modifiers - {"RP", "U32"}:
            return None
        a = self._word(ops[1])
        # Rounded up, for a quotient by an estimate.
        signed = "U32" not in ins.modifiers

        def run() -> Results:
            v, k = a()
            exact = (v.view(np.int32) if signed else v).astype(np.float64)
            near = exact.astype(np.float32)
            up = np.where(near < exact, np.nextafter(near, np.float32(np.inf)), near)
            bits = up.astype(np.float32).view(np.uint32)
            return [(ops[0], (bits, np.where(k == ALL, self.ones, self.zeros)))]

        return run

    def _op_mufu(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        if ins.modifiers != {"RCP"}:
            return None
        a = self._word(ops[1])

        def run() -> Results:
            v, k = a()
            with np.errstate(all="ignore"):
                bits = (np.float32(1) / v.view(np.float32)).astype(np.float32).view(np.uint32)
            return [(ops[0], (bits, np.where(k == ALL, self.ones, self.zeros)))]

        return run

    def _op_f2i(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        if "U32" not in ins.modifiers or "TRUNC" not in ins.modifiers:
            return None
        a = self._word(ops[1])

        def run() -> Results:
            v, k = a()
            with np.errstate(all="ignore"):
                number = np.clip(np.nan_to_num(v.view(np.float32).astype(np.float64)), 0, ALL)
            known = np.where(k == ALL, self.ones, self.zeros)
            return [(ops[0], (number.astype(np.uint64).astype(np.uint32), known))]

        return run

    def _op_hfma2(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
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

    def _op_shfl(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        to, source, by = ops[1], self._word(ops[2]), self._word(ops[3])
        limit = ops[4]
        mode = ins.opcode.split(".")[1]
        if mode not in ("IDX", "BFLY") or limit.kind != "imm" or limit.number != 0x1F:
            return None

        def run() -> Results:
            (v, k), (bv, bk) = source(), by()
            lane = self.lanes % np.uint32(WARP)
            other = bv if mode == "IDX" else lane ^ bv
            at = self.lanes - lane + other % np.uint32(WARP)
            known = np.where(bk == ALL, k[at], np.uint32(0))
            return [(to, (v[at], known)), (ops[0], (self.true, bk == ALL))]

        return run

    def _op_p2r(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        if ops[1].text not in ("PR", "UPR") or ins.modifiers:
            return None
        source, table = self._word(ops[2]), ops[3].number
        bank, known = (self.P, self.PK) if ops[1].text == "PR" else (self.UP, self.UPK)

        def run() -> Results:
            v, k = source()
            v, k = v & np.uint32(~table & ALL), k | np.uint32(table)
            for i in range(7):
                if table >> i & 1:
                    v = v | bank[i].astype(np.uint32) << np.uint32(i)
                    k = np.where(known[i], k, k & np.uint32(~(1 << i) & ALL))
            return [(ops[0], (v, k))]

        return run

    _op_p2ur = _op_p2r  # UP2UR

    def _op_vote(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        """VOTEU.ANY of true: the mask of the active lanes. Other votes are unknown."""
        if len(ops) != 3 or ops[0].kind not in ("R", "UR") or ops[2].number >= 0:
            return None

        def run() -> Results:
            by_warp = self.active.reshape(self.warps, WARP)
            masks = np.packbits(by_warp, axis=1, bitorder="little").view(np.uint32).ravel()
            return [(ops[0], (np.repeat(masks, WARP), self.ones))]

        return run

    _op_voteu = _op_vote

    def _op_flo(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        a = self._word(ops[1])

        def run() -> Results:
            v, k = a()
            top = np.array([int(x).bit_length() - 1 for x in v], np.int64)
            return [(ops[0], ((top & ALL).astype(np.uint32), np.where(k == ALL, k, 0)))]

        return run

    def _op_syncs(self, ins: Instruction, ops: Sequence[Operand]) -> Compute | None:
        if "PHASECHK" not in ins.modifiers:
            return None
        return lambda: [(ops[0], (self.true, self.true))]


def _low(known: Array) -> Array:
    """The known bits below the lowest unknown one: all that a sum keeps."""
    return known & ~(known + np.uint32(1))


def _low64(known: Wide) -> Wide:
    return known & ~(known + np.uint64(1))


# The special registers that are known; no time passes.
_SPECIALS = (
    "SR_TID.X", "SR_TID.Y", "SR_TID.Z", "SR_LANEID", "SR_CTAID.X", "SR_CTAID.Y", "SR_CTAID.Z",
    "SR_CgaCtaId", "SR_CLUSTER_CTARANK", "SR_CLUSTER_NCTARANK", "SR_CLOCKLO", "SR_CLOCKHI",
    "SR_GLOBALTIMERLO", "SR_GLOBALTIMERHI", "SRZ",
)  # fmt: skip
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


_TO_SHARED = {"STS", "STSM", "STAS", "LDGSTS", "ATOMS"}
_NARROW = {"U8", "S8", "U16", "S16", "8", "16"}


def is_data_poll(ins: Instruction) -> bool:
    """Whether an instruction loads data that other CTAs send and that are their own flag.

    It has 16 bytes. A flag is a word.
    """
    strong = bool(ins.modifiers & {"STRONG", "VOLATILE"})
    return ins.name in ("LDG", "LD") and strong and "128" in ins.modifiers


def _word_count(ins: Instruction) -> int:
    return 4 if "128" in ins.modifiers else 2 if "64" in ins.modifiers else 1


def _product(a: Array, b: Array, signed: bool) -> Wide:
    if signed:
        product = a.view(np.int32).astype(np.int64) * b.view(np.int32).astype(np.int64)
        return product.view(np.uint64)
    return a.astype(np.uint64) * b.astype(np.uint64)


def _extended(v: Array) -> Array:
    """The sign in all bits."""
    return (v.view(np.int32) >> 31).view(np.uint32)


def joined(how: str, a: Truth, b: Truth) -> Truth:
    (av, ak), (bv, bk) = a, b
    if how == "AND":
        return av & bv, (ak & bk) | (ak & ~av) | (bk & ~bv)
    if how == "OR":
        return av | bv, (ak & bk) | (ak & av) | (bk & bv)
    return av ^ bv, ak & bk


def _is_memory(ins: Instruction) -> bool:
    return any(o.kind == "mem" for o in ins.operands)

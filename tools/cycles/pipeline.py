"""An in-order issue model: warps on four schedulers, pipes with latencies and rates."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tools.cycles.sass import Function, Instruction

SCHEDULERS = 4

# ---- assumptions --------------------------------------------------------------------------------
#
# Cycles on Hopper. Nobody has measured these kernels on a card. Sources: [J] Jia et al., "Dissecting
# the NVIDIA Volta GPU Architecture via Microbenchmarking" (2018) and its successors for Ampere and
# Hopper; [C] the CUDA Programming Guide's throughput table; [E] estimated.

# The latency of a result; FIXED for opcodes that are not listed.
FIXED = 5.0
LATENCIES = {
    "FFMA": 4.0, "FADD": 4.0, "FMUL": 4.0,  # [J]
    "IMAD": 4.5,  # [J]
    "FMNMX": 5.0,  # [J]
    "HMMA": 33.0,  # [J] m16n8k16 with float32 sums
    "MUFU": 22.0,  # [J]
    "LDS": 30.0, "LDSM": 33.0,  # [J]
    "LDG": 280.0, "LD": 280.0, "ATOM": 280.0, "ATOMG": 280.0, "LDGSTS": 280.0,  # [J] L2
    "SHFL": 24.0, "F2F": 24.0, "I2F": 24.0, "F2I": 24.0, "S2R": 28.0, "S2UR": 28.0,  # [J]
    "LDC": 28.0, "ULDC": 14.0,  # [E]
    "POPC": 20.0, "FLO": 20.0, "UFLO": 20.0, "UPOPC": 20.0, "R2UR": 12.0, "VOTEU": 12.0,  # [E]
    "SYNCS": 25.0,  # [E]
    "CS2R": 14.0,  # [E]
}  # fmt: skip
# Cycles for which an instruction keeps a scheduler's pipe. [C]: 32 lanes at 32 a cycle and
# scheduler for fma, at 16 for the others, at 4 for xu.
PIPES = {"fma": 1.0, "imad": 2.0, "alu": 2.0, "xu": 8.0, "uniform": 1.0, "control": 1.0}
HMMA_ISSUE = 6.5  # [E] m16n8k16 at two warps a scheduler; half the K takes as long in TF32
BARRIER = 28.0  # [J] from the last arrival
TAKEN, NOT_TAKEN, RECONVERGE = 10.0, 3.0, 6.0  # [E] until the next instruction of the warp
LSU_QUEUE = 24.0  # [E] cycles of accesses that wait in front of shared memory
CLUSTER_BARRIER = 200.0  # [E]
# The exchange between CTAs.
MEMBAR = 500.0  # [E] until earlier writes are visible to the GPU
FLAG = 500.0  # [E] from a RED or store until another CTA's poll has seen it
REMOTE = 230.0  # [E] from st.async until the receiver's barrier has counted it

KINDS = {
    "FFMA": "FMA", "FADD": "FMA", "FMUL": "FMA", "HMMA": "HMMA", "HGMMA": "HMMA", "MUFU": "MUFU",
    "LDS": "LDS", "LDSM": "LDS", "STS": "STS", "LDG": "LDG", "LD": "LDG", "LDGSTS": "LDG",
    "STG": "STG", "ST": "STG", "STAS": "STAS", "RED": "RED", "REDG": "RED", "ATOM": "RED",
    "ATOMG": "RED", "SHFL": "SHFL", "BAR": "BAR", "SYNCS": "SYNCS", "MEMBAR": "MEMBAR",
    "BRA": "branch", "BSSY": "branch", "BSYNC": "branch", "EXIT": "branch", "WARPSYNC": "branch",
    "CALL": "branch", "RET": "branch", "BREAK": "branch", "LDC": "LDC",
    "IMAD": "IMAD", "F2F": "convert", "F2FP": "convert", "I2F": "convert", "F2I": "convert",
}  # fmt: skip

_CONTROL = {
    "BRA", "JMP", "BSSY", "BSYNC", "BREAK", "BAR", "NOP", "WARPSYNC", "YIELD", "MEMBAR", "ERRBAR",
    "CGAERRBAR", "CCTL", "EXIT", "FENCE", "ENDCOLLECTIVE", "UCGABAR_ARV", "UCGABAR_WAIT", "CALL",
    "RET", "BPT", "NANOSLEEP", "DEPBAR", "LDGDEPBAR", "BMOV", "ACQBULK",
}  # fmt: skip
_XU = {"MUFU", "F2F", "POPC", "S2R", "S2UR", "I2F", "F2I", "FLO", "UFLO", "UPOPC", "FRND"}
_LSU = {
    "LDS", "STS", "LDSM", "STSM", "LDG", "STG", "LD", "ST", "LDL", "STL", "SHFL", "STAS", "LDC",
    "RED", "REDG", "ATOM", "ATOMG", "ATOMS", "SYNCS", "LDGSTS",
}  # fmt: skip
_STORES = {"STS", "STG", "ST", "STL", "STAS", "RED", "REDG", "STSM"}


def kind_of(ins: Instruction) -> str:
    """The kind that an instruction is counted as."""
    if ins.name in KINDS:
        return KINDS[ins.name]
    if ins.name.startswith("U") or ins.name in ("S2UR", "R2UR", "VOTEU"):
        return "uniform"
    if ins.name in _CONTROL:
        return "branch"
    return "ALU"


def _width(ins: Instruction) -> int:
    """The registers of a loaded or stored value."""
    return 4 if "128" in ins.modifiers else 2 if "64" in ins.modifiers else 1


def _named(kind: str, number: int, count: int = 1) -> list[str]:
    return [] if number < 0 else [f"{kind}{number + i}" for i in range(count)]


def registers_of(ins: Instruction) -> tuple[list[str], list[str]]:
    """The registers and predicates that an instruction writes, and those it reads."""
    written: list[str] = []
    read: list[str] = []
    ops = list(ins.operands)
    if ins.guard is not None:
        read += _named(ins.guard.kind, ins.guard.number)
    name = ins.name
    first = 0  # the first operand that is read
    if name in _STORES or name in _CONTROL:
        pass
    elif name in ("SYNCS", "LDGSTS"):
        first = 1
        if name == "SYNCS" and ops and ops[0].kind in ("P", "UP"):
            written += _named(ops[0].kind, ops[0].number)
        if name == "LDGSTS":
            first = 0
    elif ops:
        while first < len(ops) and ops[first].kind in ("P", "UP"):
            written += _named(ops[first].kind, ops[first].number)
            first += 1
        only_predicates = re.search(r"SETP\d?$|PLOP3$", name) is not None
        if only_predicates:
            first = 2
            written = [r for o in ops[:2] for r in _named(o.kind, o.number)]
        elif first < len(ops):
            o = ops[first]
            written += _named(o.kind, o.number, _result_width(ins))
            first += 1
            # Carries follow the result.
            while name in ("IADD3", "UIADD3", "LEA", "ULEA", "IMAD", "UIMAD", "LOP3") and (
                first < len(ops) - 1 and ops[first].kind in ("P", "UP") and "X" not in ins.modifiers
            ):
                written += _named(ops[first].kind, ops[first].number)
                first += 1
    for at, o in enumerate(ops[first:], first):
        read += _reads(ins, o, at, first)
    return written, read


def _result_width(ins: Instruction) -> int:
    if ins.name == "HMMA":
        return 2 if "F16" in ins.opcode.split(".")[2:3] else 4
    if ins.name in ("LDS", "LDG", "LD", "LDC", "ULDC", "LDL", "ATOM", "ATOMG"):
        return _width(ins)
    if ins.name == "LDSM":
        return int(ins.opcode.rsplit(".", 1)[1])
    if ins.name == "CS2R":
        return 1 if "32" in ins.modifiers else 2
    return 2 if ins.modifiers & {"WIDE", "64"} else 1


def _reads(ins: Instruction, o: object, at: int, first: int) -> list[str]:
    from tools.cycles.sass import Operand

    assert isinstance(o, Operand)
    if o.kind == "mem" or o.kind == "const":
        found = [] if o.base is None else _named("R", o.base, 2 if o.base_wide or o.wide else 1)
        if o.ubase is not None:
            found += _named("UR", o.ubase)
        return found
    if o.kind not in ("R", "UR", "P", "UP"):
        return []
    count = 1
    if ins.name == "HMMA":
        halves = {"16816": (4, 2, 4), "1688": (2, 1, 4), "1684": (2, 1, 4)}
        shape = next((m for m in ins.opcode.split(".") if m in halves), "16816")
        sizes = list(halves[shape])
        if "TF32" in ins.modifiers and shape == "1688":
            sizes = [4, 2, 4]
        count = sizes[at - first] if at - first < 3 and o.kind == "R" else 1
    elif ins.name in _STORES and o.kind == "R":
        count = _width(ins)
    elif "WIDE" in ins.modifiers and at == len(ins.operands) - 1:
        count = 2
    return _named(o.kind, o.number, count)


@dataclass(frozen=True)
class Timing:
    """What the model knows of one instruction."""

    pipe: str
    occupies: float
    latency: float
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    name: str
    barrier: tuple[int, int] | None = None  # BAR: number and threads
    arrives: bool = False  # BAR.ARV
    signals: bool = False
    polls: str = ""  # barrier or flag
    fence: bool = False


_NUMBERS = {"R": 0, "UR": 256, "P": 320, "UP": 328}
_STATE = 336


def _numbers(names: Sequence[str]) -> tuple[int, ...]:
    found = []
    for name in names:
        kind = name.rstrip("0123456789")
        found.append(_NUMBERS[kind] + int(name[len(kind) :]))
    return tuple(dict.fromkeys(found))


def timing_of(ins: Instruction, polls: bool) -> Timing:
    """`polls`: the instruction waits for other CTAs."""
    name = ins.name
    written, read = registers_of(ins)
    latency = LATENCIES.get(name, FIXED)
    if name in ("FADD", "FMUL", "FFMA", "FADD32I", "FMUL32I", "FFMA32I"):
        pipe, occupies = "fma", PIPES["fma"]
    elif name == "IMAD":
        pipe, occupies = "imad", PIPES["imad"]
    elif name == "HMMA":
        pipe, occupies = "tensor", HMMA_ISSUE
    elif name in _XU:
        pipe, occupies = "xu", PIPES["xu"]
    elif name in _LSU:
        pipe, occupies = "lsu", 0.0
    elif name in _CONTROL:
        pipe, occupies = "control", PIPES["control"]
    elif name.startswith("U"):
        pipe, occupies = "uniform", PIPES["uniform"]
    else:
        pipe, occupies = "alu", PIPES["alu"]
    strong = bool(ins.modifiers & {"GPU", "SYS"})
    barrier = None
    if name == "BAR":
        numbers = [o.number for o in ins.operands if o.kind == "imm"]
        barrier = ((numbers + [0])[0], (numbers + [0, 0])[1])
    return Timing(
        pipe, occupies, latency, _numbers(read), _numbers(written), name, barrier,
        arrives=name == "BAR" and "ARV" in ins.modifiers,
        signals=name == "STAS" or (name in ("RED", "REDG", "ATOM", "ATOMG", "ST", "STG") and strong),
        polls=("barrier" if name == "SYNCS" else "flag") if polls else "",
        fence=name == "MEMBAR" and strong,
    )  # fmt: skip


Trace = list[tuple[int, int]]


@dataclass(frozen=True)
class Simulation:
    """The cycle at which each warp issued each instruction of its trace."""

    issued: list[list[float]]
    end: float


class Model:
    """Issues the traces of a CTA's warps."""

    def __init__(self, function: Function, polls: frozenset[int] | set[int]) -> None:
        self.timings = [timing_of(ins, i in polls) for i, ins in enumerate(function.instructions)]

    def chain(self, traces: Sequence[Trace], header: int) -> list[list[float]]:
        """When each warp comes to `header`, if only dependences take time: see `_Chain`."""
        return _Chain(self.timings, traces, header).run()

    def simulate(self, traces: Sequence[Trace], exchange: bool) -> Simulation:
        """`exchange`: waits and fences take their time; else all has arrived already."""
        return _Issue(self.timings, traces, exchange).run()


class _Exchange:
    """The waits for other CTAs in the traces of a CTA's warps."""

    def __init__(self, timings: Sequence[Timing], traces: Sequence[Trace]) -> None:
        self.timings = timings
        self.traces = traces
        self.warps = len(traces)
        # For the exchange: each warp's signals so far, and how many it sends in all.
        self.signals: list[list[float]] = [[] for _ in traces]
        self.all_signals = [
            sum(timings[i].signals and wave != 0 for i, wave in trace) for trace in traces
        ]
        self.all_polls = [sum(bool(timings[i].polls) for i, _ in trace) for trace in traces]

    def arrival(self, w: int, poll: int) -> float:
        """When a warp's poll succeeds; infinite if a signal that it waits for is not sent yet.

        All CTAs do the same, so this CTA's signals stand for those of the others. A warp's j-th of
        n polls waits for that part of every warp's signals.
        """
        part = (poll + 1) / self.all_polls[w]
        last = 0.0
        for sent, total in zip(self.signals, self.all_signals, strict=True):
            needed = math.ceil(total * part - 1e-9)
            if needed > len(sent):
                return math.inf
            if needed:
                last = max(last, sent[needed - 1])
        return last


class _Issue(_Exchange):
    def __init__(self, timings: Sequence[Timing], traces: Sequence[Trace], exchange: bool) -> None:
        super().__init__(timings, traces)
        self.exchange = exchange

    def run(self) -> Simulation:
        timings, traces, exchange = self.timings, self.traces, self.exchange
        W = self.warps
        at = [0] * W
        ready = [0.0] * W
        registers = [[0.0] * _STATE for _ in range(W)]
        scheduler = [0.0] * SCHEDULERS
        pipes: list[dict[str, float]] = [{} for _ in range(SCHEDULERS)]
        lsu = 0.0
        issued: list[list[float]] = [[] for _ in range(W)]
        polls = [0] * W
        waiting: dict[int, list[tuple[int, float, bool]]] = {}  # by barrier
        blocked: list[int] = []  # polls whose signals are not sent yet
        ended: set[int] = set()
        end = 0.0

        def earliest(w: int) -> float:
            t = timings[traces[w][at[w]][0]]
            s = w % SCHEDULERS
            e = max(ready[w], scheduler[s])
            state = registers[w]
            for r in t.reads:
                if state[r] > e:
                    e = state[r]
            free = lsu - LSU_QUEUE if t.pipe == "lsu" else pipes[s].get(t.pipe, 0.0)
            return free if free > e else e

        def release(number: int, needed: int) -> None:
            group = waiting.get(number, [])
            alive = W - len(ended)
            count = needed // 32 if needed else alive
            if group and len(group) >= count:
                go = max(e for _, e, _ in group) + BARRIER
                for w, _, waits in group:
                    if waits:
                        ready[w] = max(ready[w], go)
                        heapq.heappush(heap, (earliest(w), w))
                waiting[number] = []

        needs: dict[int, int] = {}
        heap: list[tuple[float, int]] = []
        for w in range(W):
            if traces[w]:
                heap.append((0.0, w))
            else:
                ended.add(w)
        heapq.heapify(heap)
        while heap or blocked:
            if not heap:  # the signals are never sent: the poll succeeds
                for w in blocked:
                    polls[w] = self.all_polls[w] * 1000
                    heap.append((earliest(w), w))
                blocked = []
                continue
            e, w = heapq.heappop(heap)
            now = earliest(w)
            if now > e:
                heapq.heappush(heap, (now, w))
                continue
            index, wave = traces[w][at[w]]
            t = timings[index]
            s = w % SCHEDULERS
            arrives = 0.0
            if exchange and t.polls and polls[w] < self.all_polls[w]:
                sent = self.arrival(w, polls[w])
                if sent == math.inf:
                    blocked.append(w)
                    continue
                arrives = sent + (REMOTE if t.polls == "barrier" else FLAG)
            issued[w].append(e)
            scheduler[s] = ready[w] = e + 1
            if t.pipe == "lsu":
                if t.name in ("LDC", "SYNCS"):
                    done = e + t.latency
                else:
                    waves = 1 if wave < 0 else wave
                    start = max(e, lsu)
                    lsu = start + waves
                    done = start + max(0, waves - 1) + t.latency if waves else e + FIXED
            else:
                pipes[s][t.pipe] = e + t.occupies
                done = e + t.latency
            if arrives > done:
                done = arrives
            if t.polls:
                polls[w] += 1
            state = registers[w]
            for r in t.writes:
                state[r] = done
            name = t.name
            at[w] += 1
            if exchange and t.fence:
                ready[w] = e + MEMBAR
            if t.signals and wave != 0:
                self.signals[w].append(e)
                for other in blocked:
                    heapq.heappush(heap, (earliest(other), other))
                blocked = []
            end = max(end, e)
            if at[w] == len(traces[w]):
                ended.add(w)
                for number in list(waiting):
                    if not needs.get(number, 0):
                        release(number, 0)
                continue
            if name == "BAR":
                assert t.barrier is not None
                number, needed = t.barrier
                needs[number] = needed
                group = waiting.setdefault(number, [])
                group.append((w, e, not t.arrives))
                if t.arrives:
                    heapq.heappush(heap, (earliest(w), w))
                release(number, needed)
                continue
            if name in ("BRA", "CALL", "RET"):
                taken = traces[w][at[w]][0] != index + 1
                ready[w] = e + (TAKEN if taken else NOT_TAKEN)
            elif name in ("BSYNC", "WARPSYNC"):
                ready[w] = e + RECONVERGE
            elif name == "UCGABAR_WAIT":
                ready[w] = e + CLUSTER_BARRIER
            heapq.heappush(heap, (earliest(w), w))
        return Simulation(issued, end)


class _Chain(_Exchange):
    """The longest dependent path: as many pipes as wanted, and no order within a warp but this.

    An access to memory follows the warp's last wait: a barrier, a poll or a fence. A barrier
    follows the warp's accesses before it.
    """

    def __init__(self, timings: Sequence[Timing], traces: Sequence[Trace], header: int) -> None:
        super().__init__(timings, traces)
        self.header = header

    def run(self) -> list[list[float]]:
        timings, W = self.timings, self.warps
        at = [0] * W
        polls = [0] * W
        waited = [0.0] * W  # the last wait's end
        accessed = [0.0] * W  # the last access's start
        registers = [[0.0] * _STATE for _ in range(W)]
        visits: list[list[float]] = [[] for _ in range(W)]
        barriers: dict[int, list[tuple[int, float, bool]]] = {}
        asleep: set[int] = set()

        def advance(w: int) -> bool:
            """Runs a warp up to its next wait for others; whether it did anything."""
            trace, state = self.traces[w], registers[w]
            began = at[w]
            while at[w] < len(trace):
                index, wave = trace[at[w]]
                t = timings[index]
                start = max((state[r] for r in t.reads), default=0.0)
                orders = t.pipe == "lsu" and t.name not in ("LDC", "SHFL")
                if orders or t.fence:
                    start = max(start, waited[w])
                done = start + t.latency
                if t.polls:
                    sent = self.arrival(w, polls[w])
                    if sent == math.inf:
                        break
                    polls[w] += 1
                    done = waited[w] = max(done, sent + (REMOTE if t.polls == "barrier" else FLAG))
                if index == self.header:
                    visits[w].append(waited[w])
                if t.name == "BAR":
                    assert t.barrier is not None
                    here = max(start, waited[w], accessed[w])
                    barriers.setdefault(t.barrier[0], []).append((w, here, not t.arrives))
                    needs[t.barrier[0]] = t.barrier[1]
                    at[w] += 1
                    if not t.arrives:
                        asleep.add(w)
                        return True
                    continue
                if orders:
                    accessed[w] = max(accessed[w], start)
                if t.fence:
                    waited[w] = max(start, accessed[w]) + MEMBAR
                if t.signals and wave != 0:
                    self.signals[w].append(start)
                for r in t.writes:
                    state[r] = done
                at[w] += 1
            return at[w] > began

        needs: dict[int, int] = {}
        while True:
            moved = False
            for w in range(W):
                if w not in asleep:
                    moved |= advance(w)
            alive = [w for w in range(W) if at[w] < len(self.traces[w]) or w in asleep]
            for number, group in barriers.items():
                count = needs[number] // 32 if needs[number] else len(alive)
                if group and len(group) >= count:
                    go = max(e for _, e, _ in group) + BARRIER
                    for w, _, waits in group:
                        if waits:
                            waited[w] = go
                            asleep.discard(w)
                    barriers[number] = []
                    moved = True
            if not moved:
                if all(at[w] == len(self.traces[w]) for w in range(W)):
                    return visits
                # The signals are never sent, or a barrier is not complete: go on.
                for w in list(asleep):
                    asleep.discard(w)
                self.all_signals = [len(sent) for sent in self.signals]
                barriers.clear()

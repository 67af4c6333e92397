"""An in-order issue model: warps on four schedulers, pipes with latencies and rates."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tools.cycles.integers import is_data_poll
from tools.cycles.registers import CONTROL, STATE, numbers, registers_of
from tools.cycles.sass import Function, Instruction

SCHEDULERS = 4

# ---- assumptions --------------------------------------------------------------------------------
#
# Cycles on Hopper. Nobody has measured these kernels on a card. Sources: [J] Jia et al.,
# "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking" (2018) and its successors for
# Ampere and Hopper; [C] the CUDA Programming Guide's throughput table; [E] estimated.

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
# [E] The same for 16 bytes of data that are their own flag. Each of their words comes by itself. A
# load that finds one missing is a whole round trip to L2 too early.
DATA = FLAG + LATENCIES["LDG"]
REMOTE = 230.0  # [E] from st.async until the receiver's barrier has counted it
ARRIVAL = {"barrier": REMOTE, "flag": FLAG, "data": DATA}  # by what a wait polls

KINDS = {
    "FFMA": "FMA", "FADD": "FMA", "FMUL": "FMA", "HMMA": "HMMA", "HGMMA": "HMMA", "MUFU": "MUFU",
    "LDS": "LDS", "LDSM": "LDS", "STS": "STS", "LDG": "LDG", "LD": "LDG", "LDGSTS": "LDG",
    "STG": "STG", "ST": "STG", "STAS": "STAS", "RED": "RED", "REDG": "RED", "ATOM": "RED",
    "ATOMG": "RED", "SHFL": "SHFL", "BAR": "BAR", "SYNCS": "SYNCS", "MEMBAR": "MEMBAR",
    "BRA": "branch", "BSSY": "branch", "BSYNC": "branch", "EXIT": "branch", "WARPSYNC": "branch",
    "CALL": "branch", "RET": "branch", "BREAK": "branch", "LDC": "LDC",
    "IMAD": "IMAD", "F2F": "convert", "F2FP": "convert", "I2F": "convert", "F2I": "convert",
}  # fmt: skip

_GLOBAL_WRITES = {"RED", "REDG", "ATOM", "ATOMG", "ST", "STG"}
_XU = {"MUFU", "F2F", "POPC", "S2R", "S2UR", "I2F", "F2I", "FLO", "UFLO", "UPOPC", "FRND"}
_LSU = {
    "LDS", "STS", "LDSM", "STSM", "LDG", "STG", "LD", "ST", "LDL", "STL", "SHFL", "STAS", "LDC",
    "RED", "REDG", "ATOM", "ATOMG", "ATOMS", "SYNCS", "LDGSTS",
}  # fmt: skip


def kind_of(ins: Instruction) -> str:
    """The kind that an instruction is counted as."""
    if ins.name in KINDS:
        return KINDS[ins.name]
    if ins.name.startswith("U") or ins.name in ("S2UR", "R2UR", "VOTEU"):
        return "uniform"
    if ins.name in CONTROL:
        return "branch"
    return "ALU"


@dataclass(frozen=True)
class Timing:
    """What the model knows of one instruction."""

    pipe: str
    occupies: float
    latency: float
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    name: str
    arrives: bool = False  # BAR.ARV
    signals: bool = False
    polls: str = ""  # a key of ARRIVAL
    fence: bool = False


def _polled(ins: Instruction) -> str:
    """What an instruction that waits for other CTAs polls."""
    if ins.name == "SYNCS":
        return "barrier"
    return "data" if is_data_poll(ins) else "flag"


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
    elif name in CONTROL:
        pipe, occupies = "control", PIPES["control"]
    elif name.startswith("U"):
        pipe, occupies = "uniform", PIPES["uniform"]
    else:
        pipe, occupies = "alu", PIPES["alu"]
    strong = bool(ins.modifiers & {"GPU", "SYS"})
    return Timing(
        pipe, occupies, latency, numbers(read), numbers(written), name,
        arrives=name == "BAR" and "ARV" in ins.modifiers,
        signals=name == "STAS" or (name in _GLOBAL_WRITES and strong),
        polls=_polled(ins) if polls else "",
        fence=name == "MEMBAR" and strong,
    )  # fmt: skip


# An instruction, and the wavefronts of a memory access, 0 if no lane takes part. A barrier has
# BARRIER_CODE * (1 + its number) + its threads, 0 for all of the CTA. Others have -1, or 0 if their
# guard leaves the warp out.
Trace = list[tuple[int, int]]
BARRIER_CODE = 1 << 16


class Model:
    """Issues the traces of a CTA's warps, each up to its stop."""

    def __init__(
        self,
        function: Function,
        polls: set[int],
        traces: Sequence[Trace],
        stops: Sequence[int] | None = None,
    ) -> None:
        """`polls`: the instructions that wait for other CTAs."""
        self.timings = [timing_of(ins, i in polls) for i, ins in enumerate(function.instructions)]
        self.traces = traces
        self.stops = [len(trace) for trace in traces] if stops is None else list(stops)

    @property
    def has_exchange(self) -> bool:
        """Whether a wait or a fence in the traces depends on other CTAs."""
        seen = {i for trace in self.traces for i, _ in trace}
        return any(self.timings[i].polls or self.timings[i].fence for i in seen)

    def simulate(self, exchange: bool) -> list[list[float]]:
        """When each warp issues each instruction.

        `exchange`: waits and fences take their time; else all has arrived already.
        """
        return _Issue(self.timings, self.traces, self.stops, exchange).run()

    def chain(self) -> list[list[float]]:
        """When each warp has ended its last wait before each instruction: see `_Chain`."""
        return _Chain(self.timings, self.traces, self.stops).run()


class _Exchange:
    """The waits for other CTAs in the traces of a CTA's warps."""

    def __init__(
        self, timings: Sequence[Timing], traces: Sequence[Trace], stops: Sequence[int]
    ) -> None:
        self.timings = timings
        self.traces = traces
        self.stops = stops
        self.warps = len(traces)
        # For the exchange: each warp's signals so far, and how many it sends in all.
        self.signals: list[list[float]] = [[] for _ in traces]
        self.all_signals = [
            sum(timings[i].signals and wave != 0 for i, wave in trace) for trace in traces
        ]
        self.all_polls = [
            sum(bool(timings[i].polls) and wave != 0 for i, wave in trace) for trace in traces
        ]

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
    def __init__(
        self,
        timings: Sequence[Timing],
        traces: Sequence[Trace],
        stops: Sequence[int],
        exchange: bool,
    ) -> None:
        super().__init__(timings, traces, stops)
        self.exchange = exchange

    def run(self) -> list[list[float]]:
        timings, traces, exchange = self.timings, self.traces, self.exchange
        stops = self.stops
        W = self.warps
        at = [0] * W
        ready = [0.0] * W
        registers = [[0.0] * STATE for _ in range(W)]
        scheduler = [0.0] * SCHEDULERS
        pipes: list[dict[str, float]] = [{} for _ in range(SCHEDULERS)]
        lsu = 0.0
        issued: list[list[float]] = [[] for _ in range(W)]
        polls = [0] * W
        waiting: dict[int, list[tuple[int, float, bool]]] = {}  # by barrier
        blocked: list[int] = []  # polls whose signals are not sent yet
        ended: set[int] = set()

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
                for w, _, sleeps in group:
                    if sleeps:
                        ready[w] = max(ready[w], go)
                        heapq.heappush(heap, (earliest(w), w))
                waiting[number] = []

        heap: list[tuple[float, int]] = []
        for w in range(W):
            if stops[w]:
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
            if exchange and t.polls and wave and polls[w] < self.all_polls[w]:
                sent = self.arrival(w, polls[w])
                if sent == math.inf:
                    blocked.append(w)
                    continue
                arrives = sent + ARRIVAL[t.polls]
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
            if t.polls and wave:
                polls[w] += 1
            state = registers[w]
            for r in t.writes:
                state[r] = done
            name = t.name
            at[w] += 1
            if exchange and t.fence and wave:
                ready[w] = e + MEMBAR
            if t.signals and wave != 0:
                self.signals[w].append(e)
                for other in blocked:
                    heapq.heappush(heap, (earliest(other), other))
                blocked = []
            if at[w] == stops[w]:
                ended.add(w)
                for number in list(waiting):
                    if not number % BARRIER_CODE:
                        release(number, 0)
                continue
            if name == "BAR" and wave:
                number, needed = wave, wave % BARRIER_CODE
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
        return issued


class _Chain(_Exchange):
    """The longest dependent path: as many pipes as wanted, and no order within a warp but this.

    An access to memory follows the warp's last wait: a barrier, a poll or a fence. Data that are
    their own flag order nothing but their readers. A barrier follows the warp's accesses before it.
    """

    def run(self) -> list[list[float]]:
        timings, W = self.timings, self.warps
        at = [0] * W
        polls = [0] * W
        waited = [0.0] * W  # the last wait's end
        accessed = [0.0] * W  # the last access's start
        registers = [[0.0] * STATE for _ in range(W)]
        waits: list[list[float]] = [[] for _ in range(W)]
        barriers: dict[int, list[tuple[int, float, bool]]] = {}
        asleep: set[int] = set()

        def advance(w: int) -> bool:
            """Runs a warp up to its next wait for others; whether it did anything."""
            trace, state = self.traces[w], registers[w]
            began = at[w]
            while at[w] < self.stops[w]:
                index, wave = trace[at[w]]
                t = timings[index]
                start = max((state[r] for r in t.reads), default=0.0)
                is_data = t.polls == "data"
                orders = t.pipe == "lsu" and t.name not in ("LDC", "SHFL") and not is_data
                fences = t.fence and wave != 0
                if orders or fences:
                    start = max(start, waited[w])
                done = start + t.latency
                if t.polls and wave:
                    sent = self.arrival(w, polls[w])
                    if sent == math.inf:
                        break
                    polls[w] += 1
                    done = max(done, sent + ARRIVAL[t.polls])
                    waited[w] = waited[w] if is_data else done
                waits[w].append(waited[w])
                if t.name == "BAR" and wave:
                    here = max(start, waited[w], accessed[w])
                    barriers.setdefault(wave, []).append((w, here, not t.arrives))
                    at[w] += 1
                    if not t.arrives:
                        asleep.add(w)
                        return True
                    continue
                if orders:
                    accessed[w] = max(accessed[w], start)
                if fences:
                    waited[w] = max(start, accessed[w]) + MEMBAR
                if t.signals and wave != 0:
                    self.signals[w].append(start)
                for r in t.writes:
                    state[r] = done
                at[w] += 1
            return at[w] > began

        while True:
            moved = False
            for w in range(W):
                if w not in asleep:
                    moved |= advance(w)
            alive = [w for w in range(W) if at[w] < self.stops[w] or w in asleep]
            for number, group in barriers.items():
                threads = number % BARRIER_CODE
                count = threads // 32 if threads else len(alive)
                if group and len(group) >= count:
                    go = max(e for _, e, _ in group) + BARRIER
                    for w, _, sleeps in group:
                        if sleeps:
                            waited[w] = go
                            asleep.discard(w)
                    barriers[number] = []
                    moved = True
            if not moved:
                if all(at[w] == self.stops[w] for w in range(W)):
                    return waits
                # The signals are never sent, or a barrier is not complete: go on.
                for w in list(asleep):
                    asleep.discard(w)
                self.all_signals = [len(sent) for sent in self.signals]
                barriers.clear()

"""The figures of one launch: its path from the machine, its cycles from the model."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tools.cycles import machine, pipeline, sass
from tools.cycles.integers import Launch, UnsupportedError
from tools.cycles.policy import Policy

STEPS = 12  # that a kernel runs: enough for a loop over time that is unrolled four times


class MeasureError(Exception):
    """Why a kernel has no figures."""


@dataclass(frozen=True)
class Figures:
    """A step in the middle of a sequence, of the CTA (0, 0, 0); cycles are the model's.

    `step` = `cycles` + `exchange`. `chain` is the longest dependent path of a step, the exchange
    included.
    """

    kernel: str
    ctas: int
    step: int
    cycles: int  # if whatever other CTAs send has arrived already
    exchange: int
    chain: int
    prologue: int  # cycles from the kernel's entry to the loop over time
    instructions: int  # of the warp with the most
    mean_instructions: int  # of a warp
    kinds: dict[str, int]  # of the warp with the most
    conflicts: int  # wavefronts of shared memory beyond the least, all warps of the CTA
    prologue_conflicts: int
    steps_per_turn: int  # of the loop over time
    loop: str  # the loop's address
    guesses: dict[str, int]  # branches on unknown values: address and times in the whole run
    unknown: dict[str, int]  # runs of opcodes that the machine does not know
    unknown_addresses: int  # of a warp's accesses to shared memory
    forced: int  # lanes released from a barrier that others never reached


def header_of(
    function: sass.Function, policy: Policy, traces: Sequence[pipeline.Trace]
) -> tuple[int, list[list[int]]]:
    """The loop over time's first instruction, and where it is in each trace.

    It is the outermost loop with the GEMM that runs most often: a function may have another for a
    case that does not occur.
    """
    best: tuple[int, list[list[int]]] | None = None
    for loop in policy.time:
        first = function.blocks[loop.header].first
        visits = [[i for i, (index, _) in enumerate(trace) if index == first] for trace in traces]
        if best is None or len(visits[0]) > len(best[1][0]):
            best = first, visits
    if best is None or min(map(len, best[1])) < 3:
        counts = [] if best is None else [len(v) for v in best[1]]
        raise MeasureError(f"{function.name}: no loop over time is found: turns {counts}")
    return best


@dataclass(frozen=True)
class Times:
    """When the warps come to the loop over time, in its turns a and b, and at first."""

    cycles: float
    step: float
    chain: float
    prologue: float


class Kernel:
    """A kernel's figures for one launch after the other."""

    def __init__(self, text: str) -> None:
        """`text`: the function's SASS."""
        self.function = next(iter(sass.parse(text).values()))
        self._machine: machine.Machine | None = None
        self._times: dict[bytes, Times] = {}  # by traces

    def measure(self, launch: Launch) -> Figures:
        if self._machine is None:
            self._machine = machine.Machine(self.function, launch.threads, len(launch.params))
        run = self._machine.run(launch)
        traces = run.traces()
        first, visits = header_of(self.function, self._machine.policy, traces)
        turns = max(map(len, visits))
        # Today's loops take one step a turn; a peeled step makes a turn more or less.
        per_turn = max(1, round(STEPS / turns))
        # Six steps of twelve: the grid has a fence in every third one.
        a = max(1, turns // 4)
        b = a + max(1, turns // 2)
        steps = (b - a) * per_turn
        times = self._times_of(run, traces, visits, a, b)
        counts = [(at[b] - at[a]) / steps for at in visits]
        busiest = counts.index(max(counts))
        part = traces[busiest][visits[busiest][a] : visits[busiest][b]]
        kinds = Counter(pipeline.kind_of(self.function.instructions[i]) for i, _ in part)
        extra = run.conflicts()
        before = sum(sum(x[: at[0]]) for x, at in zip(extra, visits, strict=True))
        during = sum(sum(x[at[a] : at[b]]) for x, at in zip(extra, visits, strict=True))
        cycles, step = round(times.cycles / steps), round(times.step / steps)

        def address(i: int) -> str:
            return f"{self.function.instructions[i].address:#x}"

        return Figures(
            kernel=launch.kernel,
            ctas=math.prod(launch.grid),
            step=step,
            cycles=cycles,
            exchange=step - cycles,
            chain=round(times.chain / steps),
            prologue=round(times.prologue),
            instructions=round(max(counts)),
            mean_instructions=round(sum(counts) / len(counts)),
            kinds={kind: round(n / steps) for kind, n in sorted(kinds.items())},
            conflicts=round(during / steps),
            prologue_conflicts=before,
            steps_per_turn=per_turn,
            loop=address(first),
            guesses={address(i): n for i, n in sorted(run.guesses.items())},
            unknown=dict(sorted(run.unknown.items())),
            unknown_addresses=run.unknown_addresses,
            forced=run.forced,
        )

    def _times_of(
        self,
        run: machine.Run,
        traces: Sequence[pipeline.Trace],
        visits: Sequence[Sequence[int]],
        a: int,
        b: int,
    ) -> Times:
        """Launches of other sizes often have the same traces."""
        everything = [np.asarray(trace, np.int32).tobytes() for trace in traces]
        key = hashlib.sha256(repr((a, b, sorted(run.polls))).encode() + b"|".join(everything))
        if key.digest() in self._times:
            return self._times[key.digest()]
        model = pipeline.Model(self.function, run.polls, traces, [at[b] + 1 for at in visits])

        def turns(times: Sequence[Sequence[float]], n: int) -> float:
            return max(t[at[n]] for t, at in zip(times, visits, strict=True))

        without = model.simulate(exchange=False)
        with_ = model.simulate(exchange=True) if model.has_exchange else without
        chain = model.chain()
        found = Times(
            turns(without, b) - turns(without, a),
            turns(with_, b) - turns(with_, a),
            turns(chain, b) - turns(chain, a),
            turns(without, 0),
        )
        self._times[key.digest()] = found
        return found


_MODEL = ("integers", "machine", "measure", "pipeline", "policy", "registers", "sass")
_SOURCES = b"".join((Path(__file__).parent / f"{name}.py").read_bytes() for name in _MODEL)


def measure_all(text: str, launches: Sequence[Launch], cache: Path) -> list[Figures | str]:
    """The figures of a function's launches, or why there are none.

    They are kept in a folder by the code, the launch and the model.
    """
    kernel: Kernel | None = None
    found: list[Figures | str] = []
    for launch in launches:
        key = hashlib.sha256(_SOURCES + repr((text, launch)).encode()).hexdigest()[:24]
        stored = cache / f"{key}.json"
        if stored.exists():
            found.append(Figures(**json.loads(stored.read_text())))
            continue
        kernel = kernel or Kernel(text)
        try:
            figures = kernel.measure(launch)
        except (MeasureError, UnsupportedError) as why:
            found.append(str(why))
            continue
        found.append(figures)
        cache.mkdir(parents=True, exist_ok=True)
        partial = cache / f"{key}.{os.getpid()}"
        partial.write_text(json.dumps(asdict(figures)))
        partial.rename(stored)
    return found

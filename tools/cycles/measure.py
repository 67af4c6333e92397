"""The figures of one launch: its path from the machine, its cycles from the model."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.cycles import machine, pipeline, sass
from tools.cycles.machine import Launch

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
    unknown: dict[str, int]  # opcodes that the machine does not know: an instruction each


def header_of(
    function: sass.Function, policy: machine.Policy, traces: Sequence[pipeline.Trace]
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


def measure(text: str, launch: Launch) -> Figures:
    """The figures of a launch of the function with this SASS."""
    function = next(iter(sass.parse(text).values()))
    cta = machine.Machine(function, launch)
    run = cta.run()
    traces = run.traces()
    first, visits = header_of(function, cta.policy, traces)
    turns = max(map(len, visits))
    # Today's loops take one step a turn; a peeled step makes a turn more or less.
    per_turn = max(1, round(STEPS / turns))
    a, b = turns // 3, 2 * turns // 3
    steps = (b - a) * per_turn
    model = pipeline.Model(function, run.polls)

    def period(times: Sequence[Sequence[float]]) -> float:
        return (max(t[b] for t in times) - max(t[a] for t in times)) / steps

    def headers(exchange: bool) -> list[list[float]]:
        issued = model.simulate(traces, exchange).issued
        return [[t[i] for i in at] for t, at in zip(issued, visits, strict=True)]

    without, with_ = headers(False), headers(True)
    counts = [(at[b] - at[a]) / steps for at in visits]
    busiest = counts.index(max(counts))
    part = traces[busiest][visits[busiest][a] : visits[busiest][b]]
    kinds = Counter(pipeline.kind_of(function.instructions[i]) for i, _ in part)
    extra = run.conflicts()
    before = sum(sum(x[: at[0]]) for x, at in zip(extra, visits, strict=True))
    during = sum(sum(x[at[a] : at[b]]) for x, at in zip(extra, visits, strict=True))
    cycles, step = round(period(without)), round(period(with_))

    def address(i: int) -> str:
        return f"{function.instructions[i].address:#x}"

    grid = launch.grid
    return Figures(
        kernel=launch.kernel,
        ctas=grid[0] * grid[1] * grid[2],
        step=step,
        cycles=cycles,
        exchange=step - cycles,
        chain=round(period(model.chain(traces, first))),
        prologue=round(max(t[0] for t in without)),
        instructions=round(max(counts)),
        mean_instructions=round(sum(counts) / len(counts)),
        kinds={kind: round(n / steps) for kind, n in sorted(kinds.items())},
        conflicts=round(during / steps),
        prologue_conflicts=before,
        steps_per_turn=per_turn,
        loop=address(first),
        guesses={address(i): n for i, n in sorted(run.guesses.items())},
        unknown=dict(sorted(run.unknown.items())),
    )


def _version() -> bytes:
    """The sources of the model itself."""
    return b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py")))


def cached(text: str, launch: Launch, cache: Path) -> Figures:
    """`measure`, whose answers are kept in a folder by the code, the launch and the model."""
    key = hashlib.sha256(_version() + repr((text, launch)).encode()).hexdigest()[:24]
    stored = cache / f"{key}.json"
    if stored.exists():
        return Figures(**json.loads(stored.read_text()))
    figures = measure(text, launch)
    cache.mkdir(parents=True, exist_ok=True)
    partial = cache / f"{key}.{os.getpid()}"
    partial.write_text(json.dumps(asdict(figures)))
    partial.rename(stored)
    return figures

"""`python -m benchmarks plan`: the CUDA plans of the cases, and modelled ratios over cuDNN.

No call here was run. Our times are those of the library's own cost function (csrc/cuda/cost.h),
which chooses the plans; its figures were measured on an H200. cuDNN's microseconds a step are
guesses but for one: 1.96 us at float16, B16, H768 and T1024 on an H100. A ratio is a call's time by
cuDNN over ours. Both calls have the same GEMMs outside of the time loop.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import report
from benchmarks.cases import Case
from benchmarks.cases import pick as pick_cases
from benchmarks.measure import MODES
from tools import cuda_plan
from tools.cuda_plan import H100, Cost, Plan, Problem

OUTPUT = Path(__file__).with_name("results") / "cuda_plan.md"
# float32 layers multiply in TF32 by default.
TYPES = {"float32": "tf32"}
CELLS = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}

# Python, the launch of a call and the wait for its end, on both sides: a guess.
CALL_US = {"inference": 20.0, "training": 45.0}
# cuDNN's launches before its first step, of a pass: a guess.
CUDNN_LAUNCHES_US = 10.0

_Times = dict[int, dict[int, float]]
# cuDNN's microseconds a forward step of an LSTM on an H100, by H, then B. From 512 units on, and in
# other types than float16 from 256 on, its kernels run step by step.
_STEPWISE: _Times = {
    128: {1: 2.3, 16: 2.3, 64: 2.3, 256: 3.7},
    256: {1: 5.5, 16: 5.5, 64: 5.5, 256: 5.5},
    512: {1: 5.5, 16: 5.5, 64: 5.5, 256: 6.1},
    768: {1: 5.5, 16: 5.5, 64: 5.8, 256: 7.5},
    1024: {1: 5.5, 16: 5.5, 64: 6.1, 256: 9.3},
}
CUDNN_US: dict[str, _Times] = {
    "bfloat16": _STEPWISE,
    "float16": _STEPWISE
    | {
        256: {1: 1.4, 16: 1.4, 64: 2.0, 256: 5.5},
        512: {1: 1.7, 16: 1.7, 64: 2.4, 256: 6.1},
        768: {1: 1.96, 16: 1.96, 64: 5.8, 256: 7.5},
    },
    "tf32": _STEPWISE
    | {
        512: {1: 5.5, 16: 5.5, 64: 5.5, 256: 6.8},
        1024: {1: 5.5, 16: 5.5, 64: 6.8, 256: 12.0},
    },
}
# A backward step over a forward step: 3.4 us over 2.3, 6.9 over 5.5.
CUDNN_BACKWARD = 1.3

# The geometric mean's cases: LSTMs of every combination.
GRID_H, GRID_B = (64, 128, 256, 512, 1024), (1, 4, 16, 64, 256)
GRID_T = (20, 50, 100, 1000)


def _between(low: float, high: float, share: float) -> float:
    return math.exp((1 - share) * math.log(low) + share * math.log(high))


def _interpolated(at: int, sizes: Sequence[int], values: Sequence[float]) -> float:
    """Between the neighbouring sizes, by logarithms; constant outside of them."""
    i = bisect.bisect(sizes, at)
    if i in (0, len(sizes)):
        return values[min(i, len(sizes) - 1)]
    share = math.log(at / sizes[i - 1]) / math.log(sizes[i] / sizes[i - 1])
    return _between(values[i - 1], values[i], share)


def cudnn_step_us(type: str, hidden: int, rows: int) -> float:
    """CuDNN's guessed microseconds a forward step."""
    times = CUDNN_US[type]
    of_rows = [_interpolated(rows, sorted(t), [t[b] for b in sorted(t)]) for t in times.values()]
    by_size = dict(zip(times, of_rows, strict=True))
    return _interpolated(hidden, sorted(by_size), [by_size[h] for h in sorted(by_size)])


@dataclass(frozen=True)
class Pass:
    """One pass of one layer."""

    plan: Plan
    cost: Cost


@dataclass(frozen=True)
class Modelled:
    """A call in one mode.

    Attributes:
        passes: of each layer.
        cudnn_us: None where nothing is known of cuDNN.
        shared_us: the time in both calls that no plan changes.
    """

    layers: int
    passes: tuple[Pass, ...]
    cudnn_us: float | None
    shared_us: float

    @property
    def us(self) -> float:
        return self.shared_us + self.layers * sum(p.cost.us for p in self.passes)

    @property
    def ratio(self) -> float | None:
        return None if self.cudnn_us is None else self.cudnn_us / self.us

    @property
    def bound(self) -> str:
        """The largest part of our time: what all plans share, the launches, or a step's bound."""
        parts = {"the call and its GEMMs": self.shared_us}

        def add(part: str, us: float) -> None:
            parts[part] = parts.get(part, 0.0) + self.layers * us

        for p in self.passes:
            add("launches and prologue", p.cost.fixed_us)
            add(p.cost.bound, p.cost.us - p.cost.fixed_us)
        return max(parts, key=lambda part: parts[part])


def modelled(case: Case, mode: str) -> Modelled:
    """A case's call on an H100."""
    library, passes = cuda_plan.library(), []
    P = case.proj_size or case.H
    type = TYPES.get(case.dtype, case.dtype)
    forward = Problem(
        case.T,
        case.B,
        case.H,
        type,
        CELLS[case.cell.removesuffix("Cell")],
        case.directions,
        saves=mode == "training",
        has_projection=case.proj_size > 0,
        starts_at_zero=case.T > 1,
        device=H100,
    )
    problems = [forward]
    if mode == "training":
        problems.append(replace(forward, backward=True))
    shared_us = CALL_US[mode]
    for problem in problems:
        plan = library.plan(problem)
        passes.append(Pass(plan, library.cost(problem, plan)))
        for layer in range(case.layers):
            shared_us += library.shared_us(problem, P * case.directions if layer else case.I)
    cudnn_us = None
    if type in CUDNN_US and not case.proj_size and not case.is_cell:
        step_us = cudnn_step_us(type, case.H, case.B)
        steps_us = step_us * (1 + CUDNN_BACKWARD if mode == "training" else 1)
        cudnn_us = case.layers * (len(problems) * CUDNN_LAUNCHES_US + case.T * steps_us)
        cudnn_us += shared_us
    return Modelled(case.layers, tuple(passes), cudnn_us, shared_us)


def grid() -> list[Case]:
    """LSTMs of all sizes, batches, lengths and types that the geometric mean is over."""
    return [
        Case(f"B{B} T{T} H{H} {dtype}", B=B, T=T, H=H, dtype=dtype)
        for dtype, H, B, T in itertools.product(
            ("float32", "bfloat16", "float16"), GRID_H, GRID_B, GRID_T
        )
    ]


def _row(case: Case, mode: str, m: Modelled) -> list[str]:
    plans = "; ".join(dict.fromkeys(cuda_plan.described(p.plan) for p in m.passes))
    steps = " + ".join(f"{p.cost.step_us:.2f}" for p in m.passes)
    cudnn = "" if m.cudnn_us is None else f"{m.cudnn_us:.0f}"
    ratio = "" if m.ratio is None else f"{m.ratio:.2f}"
    return [case.name, mode, plans, steps, f"{m.us:.0f}", cudnn, ratio, m.bound]


HEADER = ("case", "mode", "plan", "us a step", "us a call", "cuDNN's", "ratio", "most of ours")


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [HEADER, ["---"] * 3 + ["---:"] * 4 + ["---"], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _order(group: tuple[str, list[float]]) -> tuple[bool, str, int]:
    """Modes and types first, then sizes in their order."""
    name = group[0]
    is_size = name[1:].isdigit()
    return is_size, name[0] if is_size else name, int(name[1:]) if is_size else 0


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def text() -> str:
    """The tables, in Markdown."""
    of_grid = [(case, mode, modelled(case, mode)) for case in grid() for mode in MODES]
    ratios: dict[str, list[float]] = {}
    for case, mode, m in of_grid:
        sizes = (f"T{case.T}", f"B{case.B}", f"H{case.H}")
        for group in ("all", mode, *sizes, case.dtype):
            ratios.setdefault(group, []).append(m.ratio or 0.0)
    means = {group: _mean(found) for group, found in sorted(ratios.items(), key=_order)}
    lost = [(c, mode, m) for c, mode, m in of_grid if (m.ratio or 0.0) < 1]
    cases = [
        _row(case, mode, modelled(case, mode)) for case in pick_cases([], "cuda") for mode in MODES
    ]
    return "\n".join(
        [
            "# Modelled times on an H100",
            "",
            " ".join((__doc__ or "").split("\n\n")[1].split()),
            "",
            f"Geometric mean over {len(of_grid)} calls of LSTMs, H {GRID_H[0]} to {GRID_H[-1]}, "
            f"B {GRID_B[0]} to {GRID_B[-1]}, T {GRID_T[0]} to {GRID_T[-1]}, three types, both "
            f"modes: **{means.pop('all'):.2f}**.",
            "",
            "| " + " | ".join(means) + " |",
            "|" + "---:|" * len(means),
            "| " + " | ".join(f"{mean:.2f}" for mean in means.values()) + " |",
            "",
            "## Calls that cuDNN wins",
            "",
            _table([_row(*one) for one in lost]) if lost else "None.",
            "",
            "## The benchmarks' cases",
            "",
            _table(cases),
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the tables; gives the exit status."""
    parser = report.parser("plan", __doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default: {OUTPUT}")
    args = parser.parse_args(argv)
    args.output.write_text(text())
    print(args.output)
    return 0

"""`python -m benchmarks pass_cost`: microseconds per step of each pass on a GPU, by algorithm.

Inference, training's forward pass and the backward pass are measured apart, for each algorithm that
can run a layer and for cuDNN. A time is a call's between two events, the median of five. A step's
is the difference between long and short sequences, over the difference in steps. The rest is the
pass's fixed time: launches, the input's GEMM, the loading of weights, and the host where it is
slower than the GPU.

`--compare FILE` needs no GPU. It compares a stored run with the cost model (csrc/cuda/cost.h): the
model's error, and the time that its choices lose against the fastest algorithm.
"""

from __future__ import annotations

import collections
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, report
from benchmarks.baselines import CuDnn
from benchmarks.cells import CELLS
from benchmarks.step_cost import INPUT_SIZE, KINDS, running
from fusedrnn import _ops
from tools import cuda_plan

# FUSEDRNN_CUDA_REGIME's values, and the algorithms.
ALGORITHMS = {
    "alone": "persistent_cta",
    "cluster": "persistent_cluster",
    "grid": "persistent_grid",
    "step": "stepwise",
}
PASSES = ("inference", "training", "backward")
# LSTMs of every combination, then some GRUs.
GRID = [
    *itertools.product(
        ("LSTM",), ("bfloat16", "tf32", "ieee"), (64, 128, 256, 512, 1024), (1, 16, 64, 256)
    ),
    *itertools.product(("GRU",), ("float16", "tf32"), (128, 256, 512), (1, 64)),
]
_REPEATS = 5

Row = dict[str, Any]


def steps_of(algorithm: str, rows: int) -> tuple[int, int]:
    """A short and a long sequence."""
    if algorithm == "step":
        return 50, 250
    return (100, 500) if rows >= 64 else (200, 1000)


def _call_us(call: Callable[[], object], device: str) -> float:
    call()
    times = []
    for _ in range(_REPEATS):
        if device == "cuda":
            event: Any = torch.cuda.Event
            begin, end = event(enable_timing=True), event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(1e3 * float(begin.elapsed_time(end)))
        else:
            start = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def _passes(
    cell: str, kind: str, hidden: int, rows: int, steps: int, starts_at_zero: bool, device: str
) -> dict[str, float]:
    """Microseconds of our ops by pass; without the backward pass where it can't run."""
    name, dtype = cell.lower(), getattr(torch, KINDS[kind])
    row = _ops.CELLS[name]
    ops = torch.ops.fusedrnn
    forward, backward = getattr(ops, name), getattr(ops, f"{name}_backward")

    def tensor(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(shape, device=device, dtype=dtype)

    x, gates = tensor(steps, rows, INPUT_SIZE), row.gates * hidden
    shapes = ((gates, INPUT_SIZE), (gates, hidden), (gates,), (gates,))
    weights = [tensor(*shape, scale=hidden**-0.5) for shape in shapes]
    zeros = torch.zeros(1, rows, hidden, device=device, dtype=dtype)
    states = [None if starts_at_zero else zeros] * row.states
    layer = (x, *states, weights, False, None, None)
    found = {
        "inference": _call_us(lambda: forward(*layer, False), device),
        "training": _call_us(lambda: forward(*layer, True), device),
    }
    output, *_, saved = forward(*layer, True)
    gradients = [torch.randn_like(output), *(tensor(1, rows, hidden) for _ in states)]
    mask = [True, *(not starts_at_zero for _ in states), *(True for _ in weights)]
    try:
        found["backward"] = _call_us(
            lambda: backward(*gradients, *layer, output, saved, mask), device
        )
    except RuntimeError as error:
        if "this device can't" not in str(error):
            raise
    return found


def _cudnn_passes(
    cell: str, kind: str, hidden: int, rows: int, steps: int, device: str
) -> dict[str, float]:
    dtype = getattr(torch, KINDS[kind])
    module = CELLS[cell].torch(INPUT_SIZE, hidden).to(device, dtype)
    x = torch.randn(steps, rows, INPUT_SIZE, device=device, dtype=dtype)
    with torch.no_grad():
        inference = _call_us(lambda: module(x), device)
    training = _call_us(lambda: module(x), device)
    y = module(x)[0]
    wanted, dy = list(module.parameters()), torch.randn_like(y)
    backward = _call_us(lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True), device)
    return {"inference": inference, "training": training, "backward": backward}


def measured(
    problems: Sequence[tuple[str, str, int, int]],
    algorithms: Sequence[str] = ("cudnn", *ALGORITHMS),
    device: str = "cuda",
) -> Iterator[Row]:
    """A row for each layer and algorithm that can run it: [us a step, fixed us] by pass."""
    for (cell, kind, hidden, rows), name in itertools.product(problems, algorithms):
        # TF32 that starts at zero multiplies float16 operands.
        for starts_at_zero in (True, False) if kind == "tf32" and name != "cudnn" else (True,):
            times = []
            try:
                with running("" if name == "cudnn" else name, kind):
                    for steps in steps_of(name, rows):
                        layer = (cell, kind, hidden, rows, steps)
                        times.append(
                            _cudnn_passes(*layer, device)
                            if name == "cudnn"
                            else _passes(*layer, starts_at_zero, device)
                        )
            except RuntimeError as error:
                if "this device can't" not in str(error):
                    raise
                continue
            few, many = times
            short, long = steps_of(name, rows)
            row: Row = {"algorithm": name, "cell": cell, "kind": kind, "H": hidden, "B": rows}
            row["starts_at_zero"] = starts_at_zero
            for of in many:
                each = (many[of] - few[of]) / (long - short)
                row[of] = [round(each, 4), round(few[of] - short * each, 1)]
            yield row


def _modelled_us(library: cuda_plan.Library, row: Row, of: str) -> float | None:
    """The cost model's microseconds a step; None where no plan fits an H100."""
    problem = cuda_plan.Problem(
        steps_of(row["algorithm"], row["B"])[1],
        row["B"],
        row["H"],
        row["kind"],
        row["cell"].lower(),
        backward=of == "backward",
        saves=of == "training",
        starts_at_zero=row["starts_at_zero"],
        requested=ALGORITHMS[row["algorithm"]],
    )
    try:
        return library.cost(problem, library.plan(problem)).step_us
    except RuntimeError:
        return None


def compared(rows: Sequence[Row]) -> list[str]:
    """A stored run beside the cost model, as lines of Markdown."""
    library = cuda_plan.library()
    layers: dict[tuple[Any, ...], dict[str, tuple[float, float]]] = collections.defaultdict(dict)
    for row in rows:
        if row["algorithm"] not in ALGORITHMS:
            continue
        for of in PASSES:
            if of in row and (us := _modelled_us(library, row, of)):
                key = (of, row["cell"], row["kind"], row["H"], row["B"], row["starts_at_zero"])
                layers[key][row["algorithm"]] = (row[of][0], us)
    lines = [
        "| pass | algorithm | layers | model over measured | spread |",
        "|---|---|--:|--:|--:|",
    ]
    for of, name in itertools.product(PASSES, ALGORITHMS):
        logs = [
            math.log(v[name][1] / v[name][0]) for k, v in layers.items() if k[0] == of and name in v
        ]
        if logs:
            mean = statistics.fmean(logs)
            spread = math.sqrt(statistics.fmean((x - mean) ** 2 for x in logs))
            lines.append(
                f"| {of} | {name} | {len(logs)} | {math.exp(mean):.2f} | {100 * spread:.0f} % |"
            )
    losses, worst = [], []
    for key, times in layers.items():
        best = min(times, key=lambda n: times[n][0])
        chosen = min(times, key=lambda n: times[n][1])
        losses.append(math.log(times[chosen][0] / times[best][0]))
        if losses[-1] > 0.05:
            of, cell, kind, hidden, rows_, starts = key
            layer = f"{cell} {kind} H{hidden} B{rows_}{'' if starts else ' with h0'}, {of}"
            worst.append(
                f"| {layer} | {chosen} | {times[chosen][0]:.2f} | {best} | {times[best][0]:.2f} |"
            )
    lost = math.exp(statistics.fmean(losses)) - 1
    lines += [
        "",
        f"The model's choice takes {100 * lost:.1f} % longer than the fastest algorithm, in the "
        f"geometric mean over {len(losses)} passes. Choices that lose over 5 %:",
        "",
        "| pass | chosen | us | fastest | us |",
        "|---|---|--:|---|--:|",
        *worst,
    ]
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and stores, or compares; gives the exit status."""
    parser = report.parser("pass_cost", __doc__)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DEVICE_steps.json")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="a stored run, without a GPU")
    args = parser.parse_args(argv)
    if args.compare:
        print("\n".join(compared(json.loads(args.compare.read_text())["steps"])))
        return 0
    missing = CuDnn().available()
    if missing or "cuda" not in _ops.devices():
        print(missing or "this build of fusedrnn has no kernels for cuda")
        return 1
    header = machine.header("cuda", [CuDnn()])
    print(report.caption(header))
    output = args.output or report.results_of(f"{header['device']} steps")
    rows: list[Row] = []
    for row in measured(GRID):
        rows.append(row)
        times = " ".join(f"{of} {row[of][0]:.2f}" for of in PASSES if of in row)
        print(
            f"{row['cell']:5}{row['kind']:9}H{row['H']:<5}B{row['B']:<4}{row['algorithm']:8}{times}"
        )
        report.store(output, {"header": header, "steps": rows})
    return 0

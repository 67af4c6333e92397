"""`python -m benchmarks checks`: which kernels run on a GPU, and what a step of each costs.

`--clusters`: instead, what a step costs in clusters, beside the grid and cuDNN.

The kernels that cuDNN runs for nn.LSTM and nn.GRU, by torch.profiler; then microseconds a step of
each regime of ours and of cuDNN, from the difference between long sequences and short ones, which
leaves out launches and the loading of weights, but has in it whatever else grows with the steps:
the products with the input, small here, and in training those of the weights' gradients.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fusedrnn
from benchmarks import machine, report
from benchmarks.measure import MODES
from benchmarks.peers import Call, CuDnn
from fusedrnn import _ops

REGIMES = ("step", "alone", "grid")
CLUSTERS = ("grid", "cluster")  # what --clusters measures
# Type and, of float32, the precision of products.
KINDS = {"tf32": "float32", "ieee": "float32", "bfloat16": "bfloat16", "float16": "float16"}
INPUT_SIZE = 8
STEPS = (200, 1200)

# The traits in csrc/cuda/exchange_*.cuh, which name a persistent kernel, and their regimes.
_TRAITS = re.compile(r"\b(Cta|Grid|Cluster)(?:\w*)Traits<(?:\w+::)*\w+Gemm<")
_REGIME = {"Cta": "alone", "Grid": "grid", "Cluster": "cluster"}

Kernel = tuple[str, int, float]


def kernels_of(call: Call) -> list[Kernel]:
    """Name, launches and microseconds of each kernel of a warm call, the longest first.

    Empty where the profiler can't tell.
    """
    profiler: Any = torch.profiler
    activities = [profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.CUDA]
    call()
    for _ in range(2):  # the first profile of a process may miss its kernels
        with profiler.profile(activities=activities) as profile:
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        found = [
            (event.key, event.count, event.self_device_time_total)
            for event in profile.key_averages()
            if event.device_type.name == "CUDA"
            and not event.key.startswith(("Mem", "Activity", "Context"))
        ]
        if found:
            break
    return sorted(found, key=lambda kernel: -kernel[2])


def regimes_in(names: Sequence[str]) -> set[str]:
    """The regimes that kernels with these names belong to, by their template arguments."""
    found = set()
    for name in names:
        if re.search(r"\b(Forward|Backward)StepKernel<", name):
            found.add("step")
        if traits := _TRAITS.search(name):
            found.add(_REGIME[traits[1]])
    return found


def regime_of(call: Call) -> str:
    """The regime that a warm call runs in; of several, all; "-" where none is known."""
    return "+".join(sorted(regimes_in([name for name, _, _ in kernels_of(call)]))) or "-"


@contextlib.contextmanager
def running(regime: str, kind: str) -> Iterator[None]:
    """Layers run in this regime and in the precision of this kind."""
    rnn: Any = torch.backends.cudnn.rnn
    before, precision = os.environ.get("FUSEDRNN_CUDA_REGIME", ""), rnn.fp32_precision
    os.environ["FUSEDRNN_CUDA_REGIME"] = regime
    rnn.fp32_precision = "ieee" if kind == "ieee" else "tf32"
    try:
        yield
    finally:
        os.environ["FUSEDRNN_CUDA_REGIME"] = before
        rnn.fp32_precision = precision


def call_of(module: Any, steps: int, rows: int, mode: str) -> Call:
    """A call of a module with a random batch, without gradients or with those of all weights."""
    weight = next(module.parameters())
    x = torch.randn(steps, rows, module.input_size, device=weight.device, dtype=weight.dtype)

    def inference() -> Any:
        with torch.no_grad():
            return module(x)[0]

    def training() -> Any:
        module.zero_grad()
        module(x)[0].sum().backward()

    return inference if mode == "inference" else training


def _modules(cell: str, hidden: int, kind: str, device: str) -> tuple[Any, Any]:
    """Torch's layer and ours."""
    dtype = getattr(torch, KINDS[kind])
    theirs = getattr(nn, cell)(INPUT_SIZE, hidden).to(device, dtype)
    ours = getattr(fusedrnn, f"Fused{cell}")(INPUT_SIZE, hidden).to(device, dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def cudnn_kernels(
    kinds: Sequence[str], sizes: Sequence[int], rows: Sequence[int], device: str = "cuda"
) -> list[dict[str, Any]]:
    """The kernels in which cuDNN spends most of its time, by cell, type, H and B."""
    found = []
    for cell, kind, H, B in itertools.product(("LSTM", "GRU"), kinds, sizes, rows):
        module, _ = _modules(cell, H, kind, device)
        with running("", kind):
            kernels = {m: kernels_of(call_of(module, 50, B, m)) for m in MODES}
        row: dict[str, Any] = {"cell": cell, "kind": kind, "H": H, "B": B}
        for mode, of_mode in kernels.items():
            row[mode] = [f"{n} x {us / n:.1f} us {name[:120]}" for name, n, us in of_mode[:3]]
            longest = row[mode][0] if of_mode else "unknown"
            print(f"{cell:5}{kind:9}H{H:<5}B{B:<4}{mode:10} {longest[:110]}", flush=True)
        found.append(row)
    return found


def _milliseconds(call: Call, device: str) -> float:
    """The median of a few calls, each with the wait for its end."""
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()
    times = []
    for _ in range(5):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def step_times(
    cells: Sequence[str],
    kinds: Sequence[str],
    sizes: Sequence[int],
    rows: Sequence[int],
    device: str = "cuda",
    regimes: Sequence[str] = REGIMES,
) -> list[dict[str, Any]]:
    """Microseconds a step of cuDNN and of those of our regimes that the GPU has room for.

    `tflops`: of the products with weight_hh in inference.
    """
    found = []
    for cell, kind, H, B in itertools.product(cells, kinds, sizes, rows):
        theirs, ours = _modules(cell, H, kind, device)
        gates = 4 if cell == "LSTM" else 3
        row: dict[str, Any] = {"cell": cell, "kind": kind, "H": H, "B": B}
        for name in ("cudnn", *regimes):
            module = theirs if name == "cudnn" else ours
            us = {}
            try:
                with running("" if name == "cudnn" else name, kind):
                    for mode in MODES:
                        few, many = (
                            _milliseconds(call_of(module, steps, B, mode), device)
                            for steps in STEPS
                        )
                        us[mode] = 1e3 * (many - few) / (STEPS[1] - STEPS[0])
            except RuntimeError as error:
                if f"FUSEDRNN_CUDA_REGIME={name}: this device can't" not in str(error):
                    raise
                continue
            row[name] = {
                **{f"{mode}_us": round(value, 3) for mode, value in us.items()},
                "tflops": round(2e-6 * B * gates * H * H / us["inference"], 3),
            }
        found.append(row)
        print(f"{cell:5}{kind:9}H{H:<5}B{B:<4}{_times(row)}", flush=True)
    return found


def _times(row: dict[str, Any]) -> str:
    times = (
        f"{name} {row[name]['inference_us']:.2f} {row[name]['training_us']:.2f}"
        for name in ("cudnn", *REGIMES, "cluster")
        if name in row
    )
    return f"us a step: {', '.join(times)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Checks, stores under "checks" and reports; gives the exit status."""
    parser = report.parser("checks", __doc__)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DEVICE.json")
    parser.add_argument("--clusters", action="store_true", help='stored under "clusters" instead')
    args = parser.parse_args(argv)
    missing = CuDnn().available()
    if missing or "cuda" not in _ops.devices():
        print(missing or "this build of fusedrnn has no kernels for cuda")
        return 1
    header = machine.header("cuda", [CuDnn()])
    print(report.caption(header))
    output = args.output or report.results_of(header["device"])
    if args.clusters:
        steps = [
            *step_times(("LSTM",), ("tf32",), (128, 256), (1, 16, 64, 128), regimes=CLUSTERS),
            *step_times(
                ("LSTM",), ("bfloat16", "float16"), (256, 512), (1, 16, 64, 128), regimes=CLUSTERS
            ),
            *step_times(("GRU",), ("tf32", "float16"), (256,), (1, 64), regimes=CLUSTERS),
        ]
        report.store(output, {"clusters": {"header": header, "steps": steps}})
        return 0
    kinds, sizes = ("tf32", "ieee", "bfloat16"), (64, 128, 256, 512, 1024)
    steps = [
        *step_times(("LSTM",), kinds, sizes, (1, 16, 64, 128)),
        *step_times(("GRU",), ("tf32", "float16"), (128, 512), (1, 64)),
    ]
    checks = {
        "header": header,
        "cudnn_kernels": cudnn_kernels(("tf32", "float16", "bfloat16"), (128, 512, 1024), (1, 64)),
        "steps": steps,
    }
    report.store(output, {"checks": checks})
    return 0

"""`python -m benchmarks step_cost`: cuDNN's kernels on a GPU, and microseconds per step.

torch.profiler names the kernels that cuDNN runs for each cell. Then the benchmark times a step in
cuDNN and in each of our regimes. `--clusters` measures the cluster regime instead, beside the grid
and cuDNN.

A step's time is the difference between long and short sequences, over the difference in steps. It
excludes launches and the loading of weights. It includes all work that grows with the steps: the
input GEMM, small here, and in training the weight-gradient GEMMs.
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

from benchmarks import machine, report
from benchmarks.baselines import Call, CuDnn
from benchmarks.cells import CELLS
from benchmarks.measure import MODES
from fusedrnn import _ops

REGIMES = ("step", "alone", "grid")
CLUSTERS = ("grid", "cluster")  # the regimes of --clusters
# The dtype by kind; float32 has a kind for each GEMM precision.
KINDS = {"tf32": "float32", "ieee": "float32", "bfloat16": "bfloat16", "float16": "float16"}
INPUT_SIZE = 8
STEPS = (200, 1200)

# The traits in csrc/cuda/exchange_*.cuh, which name a persistent kernel, and their regimes.
_TRAITS = re.compile(r"\b(Cta|Grid|Cluster)\w*Traits<(?:(?:\w+::)*\w+Traits<)?(?:\w+::)*\w+Gemm<")
_REGIME = {"Cta": "alone", "Grid": "grid", "Cluster": "cluster"}

Kernel = tuple[str, int, float]


def kernels_of(call: Call) -> list[Kernel]:
    """Name, launches and microseconds for each kernel in a warm call, the longest first.

    Empty if the profiler records no kernels.
    """
    profiler: Any = torch.profiler
    activities = [profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.CUDA]
    call()
    for _ in range(2):  # a process's first profile may miss its kernels
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
    """The regimes of the kernels with these names, read from their template arguments."""
    found = set()
    for name in names:
        if re.search(r"\b(Forward|Backward|Fused)StepKernel<", name):
            found.add("step")
        if traits := _TRAITS.search(name):
            found.add(_REGIME[traits[1]])
    return found


def regime_of(call: Call) -> str:
    """The regime a warm call runs in, or several joined by "+"; "-" if unknown."""
    return "+".join(sorted(regimes_in([name for name, _, _ in kernels_of(call)]))) or "-"


@contextlib.contextmanager
def running(regime: str, kind: str) -> Iterator[None]:
    """Layers use this regime and this kind's precision within the context."""
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
    """A module's call with a random batch: inference, or training with all weight gradients."""
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
    """Builds nn's layer and ours."""
    dtype = getattr(torch, KINDS[kind])
    theirs = CELLS[cell].torch(INPUT_SIZE, hidden).to(device, dtype)
    ours = CELLS[cell].fused(INPUT_SIZE, hidden).to(device, dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def described(kernels: Sequence[Kernel]) -> list[str]:
    """A line for each kernel: launches, microseconds per launch, and the name."""
    return [f"{count} x {us / count:.1f} us {name[:120]}" for name, count, us in kernels]


def cudnn_kernels(
    kinds: Sequence[str], sizes: Sequence[int], rows: Sequence[int], device: str = "cuda"
) -> list[dict[str, Any]]:
    """The three longest kernels in cuDNN, by cell, kind, H and B."""
    found = []
    for cell, kind, H, B in itertools.product(CELLS, kinds, sizes, rows):
        module, _ = _modules(cell, H, kind, device)
        with running("", kind):
            kernels = {m: kernels_of(call_of(module, 50, B, m)) for m in MODES}
        row: dict[str, Any] = {"cell": cell, "kind": kind, "H": H, "B": B}
        for mode, longest_first in kernels.items():
            row[mode] = described(longest_first[:3])
            longest = row[mode][0] if longest_first else "unknown"
            print(f"{cell:9}{kind:9}H{H:<5}B{B:<4}{mode:10} {longest[:110]}", flush=True)
        found.append(row)
    return found


def _milliseconds(call: Call, device: str) -> float:
    """The median over a few calls, each with the wait for its end."""
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
    """Microseconds per step in cuDNN and in each regime that this GPU can run.

    `tflops` counts the GEMMs with weight_hh in inference.
    """
    found = []
    for cell, kind, H, B in itertools.product(cells, kinds, sizes, rows):
        theirs, ours = _modules(cell, H, kind, device)
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
                "tflops": round(2e-6 * B * CELLS[cell].gates * H * H / us["inference"], 3),
            }
        found.append(row)
        print(f"{cell:9}{kind:9}H{H:<5}B{B:<4}{_times(row)}", flush=True)
    return found


def _times(row: dict[str, Any]) -> str:
    times = (
        f"{name} {row[name]['inference_us']:.2f} {row[name]['training_us']:.2f}"
        for name in ("cudnn", *REGIMES, "cluster")
        if name in row
    )
    return f"us per step: {', '.join(times)}"


def _cluster_steps() -> list[dict[str, Any]]:
    half, rows = ("bfloat16", "float16"), (1, 16, 64, 128)
    return [
        *step_times(("LSTM",), ("tf32",), (128, 256), rows, regimes=CLUSTERS),
        *step_times(("LSTM",), half, (256, 512), rows, regimes=CLUSTERS),
        *step_times(("GRU",), ("tf32", "float16"), (256,), (1, 64), regimes=CLUSTERS),
    ]


def _steps() -> list[dict[str, Any]]:
    kinds, sizes = ("tf32", "ieee", "bfloat16"), (64, 128, 256, 512, 1024)
    return [
        *step_times(("LSTM",), kinds, sizes, (1, 16, 64, 128)),
        *step_times(("GRU",), ("tf32", "float16"), (128, 512), (1, 64)),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, stores under "step_cost" or "clusters", and reports; gives the exit status."""
    parser = report.parser("step_cost", __doc__)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DEVICE.json")
    parser.add_argument(
        "--clusters", action="store_true", help='measure clusters; stored under "clusters"'
    )
    args = parser.parse_args(argv)
    missing = CuDnn().available()
    if missing or "cuda" not in _ops.devices():
        print(missing or "this build of fusedrnn has no kernels for cuda")
        return 1
    header = machine.header("cuda", [CuDnn()])
    print(report.caption(header))
    output = args.output or report.results_of(header["device"])
    if args.clusters:
        report.store(output, {"clusters": {"header": header, "steps": _cluster_steps()}})
        return 0
    steps = _steps()
    kernels = cudnn_kernels(("tf32", "float16", "bfloat16"), (128, 512, 1024), (1, 64))
    found = {"header": header, "cudnn_kernels": kernels, "steps": steps}
    report.store(output, {"step_cost": found})
    return 0

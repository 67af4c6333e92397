"""`python -m benchmarks step_cost`: cuDNN's kernels on a GPU by cell, type, H and B.

torch.profiler names the kernels. The algorithms of our calls are read from their kernels' names.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, report
from benchmarks.baselines import Call, CuDnn
from benchmarks.cells import CELLS
from benchmarks.measure import MODES
from fusedrnn import _ops

# The dtype by kind; float32 has a kind for each GEMM precision.
KINDS = {"tf32": "float32", "ieee": "float32", "bfloat16": "bfloat16", "float16": "float16"}
INPUT_SIZE = 8

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


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, stores under "step_cost", and reports; gives the exit status."""
    parser = report.parser("step_cost", __doc__)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DEVICE.json")
    args = parser.parse_args(argv)
    missing = CuDnn().available()
    if missing or "cuda" not in _ops.devices():
        print(missing or "this build of fusedrnn has no kernels for cuda")
        return 1
    header = machine.header("cuda", [CuDnn()])
    print(report.caption(header))
    kernels = cudnn_kernels(("tf32", "float16", "bfloat16"), (128, 512, 1024), (1, 64))
    output = args.output or report.results_of(header["device"])
    report.store(output, {"step_cost": {"header": header, "cudnn_kernels": kernels}})
    return 0

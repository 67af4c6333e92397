"""`python -m benchmarks peaks`: a GPU's peaks beside the figures that the issue model assumes.

Stores them under "peaks" and "model". Half a minute on a new GPU tells which figures of the model
are wrong: issue rates and latencies of instructions, and the time of an exchange.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import gpu_roofline, machine, report

# Units by section.
UNITS = {
    "clock": "GHz",
    "latency_cycles": "cycles, latency",
    "issue_cycles": "cycles a scheduler, issue",
    "exchange_ns": "ns a step, exchange",
}


def lines(model: dict[str, dict[str, dict[str, float | None]]]) -> list[str]:
    """The model's figures and the measured ones, a line each."""
    found = [f"{'':28}{'assumed':>10}{'measured':>10}"]
    for section, values in model.items():
        for name, value in values.items():
            measured = "-" if value["measured"] is None else f"{value['measured']:.4g}"
            found.append(f"{name:28}{value['assumed']:>10}{measured:>10}  {UNITS[section]}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, stores and prints; gives the exit status."""
    parser = report.parser("peaks", __doc__)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DEVICE.json")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device")
        return 1
    header = machine.header("cuda", [])
    peaks = gpu_roofline.measure()
    if not peaks.kernels:
        return 1
    model = gpu_roofline.compared(peaks)
    print(report.caption(header))
    print("\n".join(lines(model)))
    output = args.output or report.results_of(header["device"])
    found = {"peaks": {"header": header, **dataclasses.asdict(peaks)}, "model": model}
    report.store(output, found)
    return 0

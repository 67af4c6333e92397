"""`python -m benchmarks [case ...]`: times fusedrnn and its baselines in turn, in one process.

Subcommands:
  latency    single calls in the situations of a service
  models     models from other packages
  compiled   networks under torch.compile
  training   the tagger example
  frozen     freeze() beside quantised runtimes
  variants   each variant beside the plain layer and a loop over its steps
  publish    the pages' tables, charts and figures from the stored runs
  peaks      a GPU's peaks beside the figures that the issue model assumes
  plan       the CUDA kernels' plan for each case, with modelled times
  pass_cost  the cost of a step on a GPU, by pass and algorithm
  step_cost  cuDNN's kernels on a GPU
  profile    kernels and counters in the slowest cases on a GPU

A run over the whole grid is stored in benchmarks/results/, with charts. A partial run is stored
only with --output. `publish` writes the pages' tables from the stored runs. A GPU has three clocks
(measure.py): calls with the wait for their end, calls back to back, and a CUDA graph's replay.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    baselines,
    cases,
    charts,
    gpu_roofline,
    machine,
    measure,
    report,
    roofline,
    step_cost,
)
from fusedrnn import _ops


def main(argv: Sequence[str]) -> int:
    """Measures the cases or reads a stored run, and reports; gives the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.report:
        run, output = json.loads(args.report.read_text()), args.report
        report.show(run["rows"])
    else:
        try:
            chosen = cases.pick(args.cases, args.device)
        except ValueError as error:
            parser.error(str(error))
        output = args.output
        if output is None and not (args.cases or args.mode or args.baseline):
            name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
            output = report.results_of(name)
        modes = [args.mode] if args.mode else measure.MODES
        # On a GPU, store after each case: a borrowed machine may be withdrawn.
        early = output if args.device == "cuda" else None
        run = _measure(chosen, modes, args.device, args.baseline, args.seconds, early)
        if output:
            report.store(output, run)
    report.summary(run["rows"])
    if output:
        charts.draw(charts.of_run(run, output))
    if args.compare:
        old = json.loads(args.compare.read_text())
        worse = report.compare(old["rows"], run["rows"], args.tolerance)
        print("\n".join(worse) or f"no case is worse than in {args.compare}")
        return 1 if worse else 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = report.parser("", __doc__)
    parser.add_argument("cases", nargs="*", metavar="case", help="names or parts of names")
    parser.add_argument("--mode", choices=measure.MODES, help="default: both")
    names = sorted({baseline.name for baseline in baselines.BASELINES})
    parser.add_argument("--baseline", choices=names, action="append", help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="time for a case and mode (%(default)s)"
    )
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="report a stored run instead of measuring"
    )
    parser.add_argument(
        "--compare", type=Path, metavar="OLD", help="fail if a ratio is lower than in a stored run"
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.1, help="how far a ratio may drop (%(default)s)"
    )
    return parser


def _present(device: str, names: Sequence[str] | None) -> list[baselines.Candidate]:
    """The chosen baselines that this machine can run; says why others are missing."""
    if device not in _ops.devices():
        raise SystemExit(f"this build of fusedrnn has no kernels for {device}")
    present = []
    for baseline in baselines.BASELINES:
        if baseline.device == device and (not names or baseline.name in names):
            missing = baseline.available()
            if missing:
                print(f"without {baseline.name}: {missing}", file=sys.stderr)
            else:
                present.append(baseline)
    if not present:
        raise SystemExit("no baseline to compare with")
    return present


def _measure(
    chosen: Sequence[cases.Case],
    modes: Sequence[str],
    device: str,
    names: Sequence[str] | None,
    seconds: float,
    early: Path | None,
) -> dict[str, Any]:
    present = _present(device, names)
    header = machine.header(device, present)
    probe = roofline.probe() if device == "cpu" else None
    gpu_peaks = gpu_roofline.measure() if device == "cuda" else None
    header["peaks"] = gpu_peaks and dataclasses.asdict(gpu_peaks)
    best = probe.measure() if probe else None
    rows: list[dict[str, Any]] = []
    report.heading(on_gpu=device == "cuda")
    for case in chosen:
        for mode in modes:
            supporting = [baseline for baseline in present if baseline.supports(case, mode)]
            found = measure.calmest(
                functools.partial(measure.measure, case, mode, supporting, device, seconds)
            )
            if probe and best:
                best = probe.measure().or_better(best)
            _add_rooflines(found, [case], best, gpu_peaks)
            report.lines(found)
            rows += found
            if early:
                report.store(early, {"header": header, "rows": rows})
    # A virtual machine's peaks vary with its host, so a limit is known at the end.
    _add_rooflines(rows, chosen, best, gpu_peaks)
    if best:
        header["peaks"] = dataclasses.asdict(best)
    if gpu_peaks:
        _add_regimes(rows, chosen, device)
    run = {"header": header, "rows": rows}
    return run | ({"model": gpu_roofline.compared(gpu_peaks)} if gpu_peaks else {})


def _add_rooflines(
    rows: list[dict[str, Any]],
    chosen: Sequence[cases.Case],
    peaks: roofline.Peaks | None,
    gpu_peaks: gpu_roofline.GpuPeaks | None,
) -> None:
    """Sets each row's bound, by the peaks of the device."""
    by_name = {case.name: case for case in chosen}
    for row in rows:
        case, mode = by_name[row["name"]], row["mode"]
        if gpu_peaks:
            row["roofline_ms"] = gpu_roofline.bound_ms(case, mode, gpu_peaks)
        else:
            row["roofline_ms"] = roofline.bound_ms(case, mode, peaks)


def _add_regimes(rows: list[dict[str, Any]], chosen: Sequence[cases.Case], device: str) -> None:
    """Adds the regime to each row; after all times, because a profiler slows later launches."""
    by_name = {case.name: case for case in chosen}
    regimes: dict[tuple[str, str], str] = {}
    for row in rows:
        key = name, mode = row["name"], row["mode"]
        if key not in regimes:
            call = baselines.Fused(device).prepare(by_name[name], mode)
            regimes[key] = step_cost.regime_of(call)
        row["regime"] = regimes[key]

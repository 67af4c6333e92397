"""`python -m benchmarks [case ...]`: times of fusedrnn and its peers, in turn, in one process.

`python -m benchmarks steady` is about single calls instead: steady.py; `python -m benchmarks
checks` about the kernels of a GPU: checks.py; `python -m benchmarks models` about models of other
packages: models.py; `python -m benchmarks compiled` about torch.compile: compiled.py; `python -m
benchmarks training` about the tagger example: training.py; `python -m benchmarks worst` about the
kernels of the worst cases on a GPU: worst.py. A run of the whole grid is stored in
benchmarks/results/, with pictures; a part of it only where --output says. On a GPU the time of a
call includes the wait for its end.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    cases,
    checks,
    compiled,
    limits,
    machine,
    measure,
    models,
    peers,
    report,
    steady,
    training,
    worst,
)
from fusedrnn import _ops

OTHERS: dict[str, Callable[[Sequence[str]], int]] = {
    "checks": checks.main,
    "compiled": compiled.main,
    "models": models.main,
    "steady": steady.main,
    "training": training.main,
    "worst": worst.main,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is asked for, or reads a stored run, and reports; gives the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in OTHERS:
        return OTHERS[argv[0]](argv[1:])
    parser = report.parser("", __doc__)
    parser.add_argument("cases", nargs="*", metavar="case", help="names or parts of names")
    parser.add_argument("--mode", choices=measure.MODES, help="default: both")
    names = sorted({peer.name for peer in peers.PEERS})
    parser.add_argument("--peer", choices=names, action="append", help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="to spend on a case and mode (%(default)s)"
    )
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    parser.add_argument("--readme", type=Path, help="a page whose table to write anew")
    parser.add_argument("--report", type=Path, metavar="FILE", help="a stored run: no measuring")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="a stored run to be as good as")
    parser.add_argument(
        "--tolerance", type=float, default=0.1, help="how far a ratio may drop (%(default)s)"
    )
    args = parser.parse_args(argv)
    if args.report:
        run = json.loads(args.report.read_text())
        report.show(run["rows"])
        output = args.report
    else:
        try:
            chosen = cases.pick(args.cases, args.device)
        except ValueError as error:
            parser.error(str(error))
        modes = [args.mode] if args.mode else measure.MODES
        output = args.output
        if output is None and not (args.cases or args.mode or args.peer):
            name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
            output = report.results_of(name)
        # On a GPU after each case, for what is lent to a session may be taken away.
        early = output if args.device == "cuda" else None
        run = _measure(chosen, modes, args.device, args.peer, args.seconds, early)
        if output:
            report.store(output, run)
    report.summary(run["rows"])
    if output:
        report.pictures(run, output)
    if args.readme:
        text = report.table(run)
        if run["header"]["device"] != "cpu" and output:
            picture = os.path.relpath(report.picture(output, "ratio"), args.readme.parent)
            text += f"\n\n![Time of cuDNN over fusedrnn's, by case]({picture})"
        report.write_between(args.readme, report.marker("table", run), text)
        if "training" in run and run["header"]["device"] != "cpu":
            text = training.table(run["training"])
            report.write_between(args.readme, report.marker("training", run), text)
    if args.compare:
        old = json.loads(args.compare.read_text())
        worse = report.compare(old["rows"], run["rows"], args.tolerance)
        print("\n".join(worse) or f"no case is worse than in {args.compare}")
        return 1 if worse else 0
    return 0


def _measure(
    chosen: Sequence[cases.Case],
    modes: Sequence[str],
    device: str,
    names: Sequence[str] | None,
    seconds: float,
    early: Path | None,
) -> dict[str, Any]:
    if device not in _ops.devices():
        raise SystemExit(f"this build of fusedrnn has no kernels for {device}")
    present = []
    for peer in peers.PEERS:
        if peer.device == device and (not names or peer.name in names):
            missing = peer.available()
            if missing:
                print(f"without {peer.name}: {missing}", file=sys.stderr)
            else:
                present.append(peer)
    if not present:
        raise SystemExit("no peer to compare with")
    header = machine.header(device, present)
    probe = limits.probe() if device == "cpu" else None
    of_gpu = limits.gpu_peaks() if device == "cuda" else None
    header["peaks"] = of_gpu and dataclasses.asdict(of_gpu)
    last = best = probe.measure() if probe else None
    rows: list[dict[str, Any]] = []
    report.heading()
    for case in chosen:
        for mode in modes:
            supporting = [peer for peer in present if peer.supports(case, mode)]
            found = measure.measure(case, mode, supporting, device, seconds)
            if probe:
                now = probe.measure()
                # Of before and after, for a virtual machine's peaks change with its host's load.
                for row in found:
                    row["limit_ms"] = limits.limit_ms(case, mode, now.or_better(last or now))
                last, best = now, now.or_better(best or now)
            if of_gpu:
                for row in found:
                    row["limit_ms"] = limits.gpu_limit_ms(case, mode, of_gpu)
            report.lines(found)
            rows += found
            if early:
                report.store(early, {"header": header, "rows": rows})
    if best:
        header["peaks"] = dataclasses.asdict(best)
    if of_gpu:
        # After all times: launches stay slower once a profiler has been attached.
        regimes = {
            (case.name, mode): checks.regime_of(peers.Fused(device).prepare(case, mode))
            for case in chosen
            for mode in modes
        }
        for row in rows:
            row["regime"] = regimes[row["name"], row["mode"]]
    return {"header": header, "rows": rows}


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks profile`: profiles the cases with the lowest ratios over cuDNN.

A stored run gives the cases and modes. torch.profiler lists the kernels in a call, ours and
cuDNN's. Nsight Compute (ncu), if installed, profiles ours. The run stores the results under
"profile". The output of ncu goes to build/ncu/.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import cases, report, step_cost
from benchmarks.baselines import Candidate, CuDnn, Fused
from benchmarks.measure import MODES
from tools import cuda_toolkit

ROOT = Path(__file__).parents[1]
NCU_OUTPUT = ROOT / "build" / "ncu"
SECTIONS = (
    *("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats"),
    *("ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis"),
)
# The rows in ncu's table that identify a kernel's bottleneck.
METRICS = (
    *("Duration", "SM Frequency", "Compute (SM) Throughput", "Memory Throughput"),
    *("DRAM Throughput", "L2 Cache Throughput", "L2 Hit Rate", "Registers Per Thread"),
    "Achieved Occupancy",
    *("Grid Size", "Block Size", "Dynamic Shared Memory Per Block"),
    *("Warp Cycles Per Issued Instruction", "Issue Slots Busy"),
)


def pick(rows: Sequence[report.Row], count: int) -> list[tuple[str, str]]:
    """Names and modes with the lowest ratios over cuDNN."""
    over_cudnn = [row for row in rows if row["baseline"] == "cudnn"]
    lowest = sorted(over_cudnn, key=lambda row: float(row["ratio"]))[:count]
    return [(row["name"], row["mode"]) for row in lowest]


def metrics_in(text: str) -> list[dict[str, str]]:
    """The name and the METRICS, with units, for each kernel in ncu's output."""
    found: list[dict[str, str]] = []
    for line in text.splitlines():
        # "  name<...> (132, 1, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0"
        if kernel := re.match(r" +(\S.*) \([\d, ]+\)x\([\d, ]+\), Context ", line):
            found.append({"kernel": kernel[1][:160]})
        # "    Duration                 us         12.34"
        elif found and (entry := re.match(r" +(\S.*?)  +(?:(\S+) +)?([\d,.]+)\s*$", line)):
            name, unit, value = entry.groups()
            if name in METRICS:
                found[-1].setdefault(name, f"{value} {unit or ''}".strip())
    return found


def profiled(name: str, mode: str) -> list[dict[str, str]] | str:
    """The metrics of our kernels in a call; if ncu fails, a sentence with the reason."""
    try:
        home = cuda_toolkit.find_home()
    except cuda_toolkit.MissingError:
        home = None
    ncu = shutil.which("ncu") or (shutil.which(f"{home}/bin/ncu") if home else None)
    if ncu is None:
        return "ncu is not installed"
    # ncu must not lock the clocks or flush the caches.
    command = [ncu, "--clock-control", "none", "--cache-control", "none"]
    command += ["--target-processes", "all", "--page", "details", "--kernel-name-base", "demangled"]
    for section in SECTIONS:
        command += ["--section", section]
    NCU_OUTPUT.mkdir(parents=True, exist_ok=True)
    failure = ""
    # The second launch of each kernel is warm; without one, profile the first twelve launches.
    for chosen in (
        ["--kernel-id", "::regex:fusedrnn:2"],
        ["--kernel-name", "regex:fusedrnn", "--launch-count", "12"],
    ):
        call = [sys.executable, "-m", "benchmarks", "profile", "--call", name, mode]
        status, text = _run([*command, *chosen, *call], 60)
        (NCU_OUTPUT / f"{report.slug(f'{name} {mode}')}.txt").write_text(text)
        if found := metrics_in(text):
            return found
        failure = f"ncu exited {status}: {text.strip()[-200:]}"
    return failure


def _run(command: Sequence[str], limit: float) -> tuple[int, str]:
    """Exit status and output; after `limit` seconds, kills the command and its children."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
    return process.returncode, text


def kernels(name: str, mode: str, device: str = "cuda") -> dict[str, list[str]]:
    """The eight longest kernels in a call, ours and cuDNN's."""
    (case,) = cases.pick([name], device)
    both: tuple[Candidate, Candidate] = (Fused(device), CuDnn())
    return {
        candidate.name: step_cost.described(step_cost.kernels_of(candidate.prepare(case, mode))[:8])
        for candidate in both
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Profiles, stores and reports; gives the exit status."""
    parser = report.parser("profile", __doc__)
    parser.add_argument("--run", type=Path, help="default: benchmarks/results/DEVICE.json")
    parser.add_argument("--count", type=int, default=3, help="number of cases (%(default)s)")
    parser.add_argument(
        "--call", nargs=2, metavar=("CASE", "MODE"), help="only call our layer three times"
    )
    args = parser.parse_args(argv)
    if missing := CuDnn().available():
        print(missing)
        return 1
    if args.call:
        name, mode = args.call
        if mode not in MODES:
            parser.error(f"no mode {mode!r}; there are {', '.join(MODES)}")
        (case,) = cases.pick([name], "cuda")
        call = Fused("cuda").prepare(case, mode)
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        return 0
    path = args.run or report.results_of(torch.cuda.get_device_name())
    rows = json.loads(path.read_text()).get("rows", []) if path.exists() else []
    if not rows:
        print(f"{path} has no rows yet: python -m benchmarks --device cuda")
        return 1
    found = []
    for name, mode in pick(rows, args.count):
        ncu = profiled(name, mode)
        found.append({"name": name, "mode": mode, "kernels": kernels(name, mode), "ncu": ncu})
        print(json.dumps(found[-1], indent=1), flush=True)
    report.store(path, {"profile": found})
    return 0

"""`python -m benchmarks worst`: what the GPU does in the cases where fusedrnn is worst.

Of a stored run, the cases and modes with the lowest ratios over cuDNN: all kernels of a call of
either, by torch.profiler, and what Nsight Compute (ncu) says of ours, where it is there.
Stored under "worst" of the run, the lines of ncu in build/ncu/.
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

from benchmarks import cases, checks, report
from benchmarks.measure import MODES
from benchmarks.peers import CuDnn, Fused, Peer
from tools import cuda_toolkit

ROOT = Path(__file__).parents[1]
LINES = ROOT / "build" / "ncu"
SECTIONS = (
    *("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats"),
    *("ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis"),
)
# Of ncu's table, what says which resource a kernel waits for.
METRICS = (
    *(
        "Duration",
        "SM Frequency",
        "Compute (SM) Throughput",
        "Memory Throughput",
        "DRAM Throughput",
    ),
    *("L2 Cache Throughput", "L2 Hit Rate", "Registers Per Thread", "Achieved Occupancy"),
    *("Grid Size", "Block Size", "Dynamic Shared Memory Per Block"),
    *("Warp Cycles Per Issued Instruction", "Issue Slots Busy"),
)


def pick(rows: Sequence[report.Row], count: int) -> list[tuple[str, str]]:
    """Names and modes of the lowest ratios over cuDNN."""
    of_cudnn = [row for row in rows if row["peer"] == "cudnn"]
    lowest = sorted(of_cudnn, key=lambda row: float(row["ratio"]))[:count]
    return [(row["name"], row["mode"]) for row in lowest]


def metrics_in(text: str) -> list[dict[str, str]]:
    """Of each kernel that ncu printed details of: its name and METRICS, with their units."""
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
    """What ncu says of our kernels in a call; a sentence where it can't."""
    try:
        home = cuda_toolkit.find_home()
    except cuda_toolkit.MissingError:
        home = None
    ncu = shutil.which("ncu") or (shutil.which(f"{home}/bin/ncu") if home else None)
    if ncu is None:
        return "ncu is not there"
    # Clocks and caches stay as they are.
    command = [ncu, "--clock-control", "none", "--cache-control", "none"]
    command += ["--target-processes", "all", "--page", "details", "--kernel-name-base", "demangled"]
    for section in SECTIONS:
        command += ["--section", section]
    LINES.mkdir(parents=True, exist_ok=True)
    said = ""
    # The second launch of each kernel, which is warm; else the first launches of any.
    for chosen in (
        ["--kernel-id", "::regex:fusedrnn:2"],
        ["--kernel-name", "regex:fusedrnn", "--launch-count", "12"],
    ):
        call = [sys.executable, "-m", "benchmarks", "worst", "--call", name, mode]
        status, text = _run([*command, *chosen, *call], 60)
        (LINES / f"{report.slug(f'{name} {mode}')}.txt").write_text(text)
        if found := metrics_in(text):
            return found
        said = f"ncu exited {status}: {text.strip()[-200:]}"
    return said


def _run(command: Sequence[str], limit: float) -> tuple[int, str]:
    """Exit status and output; after `limit` seconds it is killed, with what it has started."""
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
    """The kernels of a call of ours and of cuDNN's, the longest first."""
    (case,) = cases.pick([name], device)
    both: tuple[Peer, Peer] = (Fused(device), CuDnn())
    return {
        peer.name: [
            f"{count} x {us / count:.1f} us {kernel[:120]}"
            for kernel, count, us in checks.kernels_of(peer.prepare(case, mode))[:8]
        ]
        for peer in both
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Profiles, stores and reports; gives the exit status."""
    parser = report.parser("worst", __doc__)
    parser.add_argument("--run", type=Path, help="default: benchmarks/results/DEVICE.json")
    parser.add_argument("--count", type=int, default=3, help="cases (%(default)s)")
    parser.add_argument(
        "--call", nargs=2, metavar=("CASE", "MODE"), help="only call our layer, three times"
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
    report.store(path, {"worst": found})
    return 0

"""Describes the machine and the versions: the header of a stored run."""

from __future__ import annotations

import datetime
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fusedrnn
import fusedrnn.__main__ as doctor
from benchmarks.baselines import Candidate
from fusedrnn import _ops

# Variables that hold libraries to an instruction set.
_LIMITS = (
    "FUSEDRNN_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
)


def header(device: str, baselines: Sequence[Candidate]) -> dict[str, Any]:
    """Machine and versions; warns if other processes are busy."""
    others = Others()
    time.sleep(0.3)
    busy = others.cores()
    if busy and busy > 0.2:
        print(f"other processes use {busy:.1f} cores: times are unreliable", file=sys.stderr)
    found = {
        "machine": platform.machine(),
        "processor": doctor.processor(),
        "cores": os.cpu_count(),
        "isa": _ops.cpu_isa(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": str(torch.__version__),
        "environment": {name: os.environ[name] for name in _LIMITS if name in os.environ},
        "baselines": {k: v for baseline in baselines for k, v in baseline.versions().items()},
        "fusedrnn": fusedrnn.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    return found | (_cuda() if device == "cuda" else {})


def _cuda() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties()
    return {
        "cuda": torch.version.cuda,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": doctor.output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        ),
    }


def _commit() -> str | None:
    """The checkout's commit, with -dirty if files differ; None outside a checkout."""
    here = str(Path(__file__).parent)
    options = ("--always", "--dirty", "--abbrev=40", "--exclude=*")
    return doctor.output("git", "-C", here, "describe", *options)


class Others:
    """Counts the cores that other processes use from now on (Linux).

    Time stolen by a hypervisor counts as other processes' time.
    """

    def __init__(self) -> None:
        self._start = self._now()

    def _now(self) -> tuple[float, float] | None:
        """Clock seconds, and seconds all cores worked for other processes."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
            user, nice, system, _, _, irq, softirq, steal = (int(field) for field in fields)
            ticks = os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, AttributeError):
            return None
        worked = (user + nice + system + irq + softirq + steal) / ticks
        return time.perf_counter(), worked - time.process_time()

    def cores(self) -> float | None:
        """Cores in use since the start, on average; None if unknown."""
        now = self._now()
        if now is None or self._start is None or now[0] == self._start[0]:
            return None
        return (now[1] - self._start[1]) / (now[0] - self._start[0])

"""Measures times and memory: one process calls the candidates in turn."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import Call, Candidate, Fused, Torch, Unsupported, check
from benchmarks.cases import Case
from benchmarks.machine import Others

# The workers of ONNX Runtime and OpenMP keep spinning after a call. They occupy the cores that the
# next candidate needs, so each candidate warms up this long before its timed calls.
WARM_SECONDS = 0.06
# A round is disturbed if other processes use more cores than this, because threads wait for each
# other. The kernel counts their work roughly, in ticks per core.
BUSY_CORES = max(0.15, 0.05 * (os.cpu_count() or 1))
# A case may take this many times as long to find calm rounds.
PATIENCE = 3
MODES = ("inference", "training")


def in_turn(
    calls: Mapping[str, Call],
    seconds: float,
    before: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Calls the candidates in turn, in rounds.

    A disturbed round is repeated, for as long as `PATIENCE` allows.

    Args:
        calls: the candidates.
        seconds: approximate duration; at least 3 rounds, or 5 if a round takes under 0.3 s.
        before: called with a candidate's name before its turn.

    Returns:
        Milliseconds per call for each candidate: one median per round.
    """
    calm: list[dict[str, float]] = []
    disturbed: list[dict[str, float]] = []
    begin = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        while True:
            others = Others()
            times = {}
            for name, call in calls.items():
                before(name)
                times[name] = statistics.median(_samples(call))
            (disturbed if (others.cores() or 0) > BUSY_CORES else calm).append(times)
            spent = time.perf_counter() - begin
            each = spent / (len(calm) + len(disturbed))
            least = 5 if each < 0.3 else 3
            if len(calm) >= least and spent + each > seconds:
                break
            if len(calm) + len(disturbed) >= least and spent + each > PATIENCE * seconds:
                calm += disturbed
                break
    finally:
        gc.enable()
    return {name: [times[name] for times in calm] for name in calls}


def _samples(call: Call) -> list[float]:
    clock = time.perf_counter
    end = clock() + WARM_SECONDS
    count = 0
    while count == 0 or clock() < end:
        call()
        count += 1
    samples = []
    for _ in range(max(3, min(200, count))):
        start = clock()
        call()
        samples.append(1e3 * (clock() - start))
    return samples


def spread(times: Sequence[float]) -> float:
    """Interquartile range over median: the variation between rounds."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / middle


def peak_memory(call: Call, device: str = "cpu") -> int | None:
    """Peak bytes a warm call allocates beyond those held before it; None if unknown."""
    if device == "cuda":
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        # Memory kept by the allocator would escape the count.
        ctypes.CDLL(None).malloc_trim(0)
        # Writing 5 resets the peak, VmHWM, to the resident size (proc_pid_clear_refs(5)).
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError, KeyError, TypeError):
        return None


def _resident(key: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in status if ":" in line)
    return 1024 * int(fields[key].split()[0])


def _synchronized(call: Call) -> Call:
    def wait() -> Any:
        output = call()
        torch.cuda.synchronize()
        return output

    return wait


def measure(
    case: Case,
    mode: str,
    baselines: Sequence[Candidate],
    device: str,
    seconds: float,
) -> list[dict[str, Any]]:
    """Measures a case against baselines that support it on the device; one row for each.

    The caller fills in roofline_ms.

    Raises:
        AssertionError: a candidate's output differs from nn's.
    """
    calls: dict[str, Call] = {}
    for candidate in [Fused(device), *baselines]:
        try:
            call = candidate.prepare(case, mode)
        except Unsupported as error:
            print(f"{case.name} {mode}: no {candidate.name}: {error}", file=sys.stderr)
            continue
        calls[candidate.name] = _synchronized(call) if device == "cuda" else call
    expected = Torch(device).prepare(case, "inference")()
    for name, call in calls.items():
        check(name, case, device, call(), expected)
    memory = {
        name: peak_memory(call, device)
        for name, call in calls.items()
        if name in ("fusedrnn", "torch", "cudnn")
    }
    times = in_turn(calls, seconds)
    ours = times.pop("fusedrnn")
    sizes = dataclasses.asdict(case)
    del sizes["compiled"]
    return [
        {
            **sizes,
            "mode": mode,
            "baseline": name,
            "ours_ms": statistics.median(ours),
            "baseline_ms": statistics.median(theirs),
            # Per round, because a slow second of the machine slows both alike.
            "ratio": statistics.median(t / o for t, o in zip(theirs, ours, strict=True)),
            "roofline_ms": None,
            "ours_spread": spread(ours),
            "baseline_spread": spread(theirs),
            "rounds": len(ours),
            "ours_bytes": memory["fusedrnn"],
            "baseline_bytes": memory.get(name),
        }
        for name, theirs in times.items()
    ]

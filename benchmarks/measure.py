"""Measures times and memory: one process calls the candidates in turn.

A GPU has three clocks. A call with the wait for its end includes Python, the launches and the wait,
on both sides. Calls back to back, timed by events, hide the host where the GPU is slower. The
replay of a call's CUDA graph is the GPU alone.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import random
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
from benchmarks.report import is_noisy

# The workers of ONNX Runtime and OpenMP keep spinning after a call. They occupy the cores that the
# next candidate needs, so each candidate warms up this long before its timed calls.
WARM_SECONDS = 0.06
# A GPU has no such workers.
GPU_WARM_SECONDS = 0.01
# A round is disturbed if other processes use more cores than this, because threads wait for each
# other. The kernel counts their work roughly, in ticks per core.
BUSY_CORES = max(0.15, 0.05 * (os.cpu_count() or 1))
# A case may take this many times as long to find calm rounds.
PATIENCE = 3
MODES = ("inference", "training")
# A noisy case is measured again, up to this many times in all.
TRIES = 3
# Rounds of a case of the grid: with fewer, an interval means little.
ROUNDS = 7
# Draws of the rounds for a ratio's interval.
RESAMPLES = 1000
# Rounds of a GPU's clocks, and the milliseconds that a round's calls of a candidate should take.
GPU_ROUNDS = 7
GPU_ROUND_MS = 10.0


def in_turn(
    calls: Mapping[str, Call],
    seconds: float,
    before: Callable[[str], None] = lambda name: None,
    warm_seconds: float | None = None,
    least_rounds: int = 3,
) -> dict[str, list[float]]:
    """Calls the candidates in turn, in rounds.

    A disturbed round is repeated, for as long as `PATIENCE` allows.

    Args:
        calls: the candidates.
        seconds: approximate duration; at least 5 rounds if a round takes under 0.3 s.
        before: called with a candidate's name before its turn.
        warm_seconds: a candidate's warm-up in each round; `WARM_SECONDS` by default.
        least_rounds: the least number of rounds, however long they take.

    Returns:
        Milliseconds per call for each candidate: one median per round.
    """
    warm = WARM_SECONDS if warm_seconds is None else warm_seconds
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
                times[name] = statistics.median(_samples(call, warm))
            (disturbed if (others.cores() or 0) > BUSY_CORES else calm).append(times)
            spent = time.perf_counter() - begin
            each = spent / (len(calm) + len(disturbed))
            least = max(least_rounds, 5 if each < 0.3 else 0)
            if len(calm) >= least and spent + each > seconds:
                break
            if len(calm) + len(disturbed) >= least and spent + each > PATIENCE * seconds:
                calm += disturbed
                break
    finally:
        gc.enable()
    return {name: [times[name] for times in calm] for name in calls}


def _samples(call: Call, warm_seconds: float) -> list[float]:
    clock = time.perf_counter
    end = clock() + warm_seconds
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


def calmest(rows_of: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A case's rows; those of the calmest of up to `TRIES` measurements, if rows are noisy."""
    tries: list[list[dict[str, Any]]] = []
    while len(tries) < TRIES:
        tries.append(rows_of())
        if not any(map(is_noisy, tries[-1])):
            break
    return min(tries, key=lambda rows: sum(map(is_noisy, rows)))


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


def _event_ms(call: Call, count: int) -> float:
    """Milliseconds per call of `count` calls back to back, between two events."""
    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    call()  # the GPU is busy with it when it gets the first event
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / count


def back_to_back(calls: Mapping[str, Call]) -> dict[str, list[float]]:
    """Milliseconds per call for each candidate, timed by events: one mean per round."""
    counts = {}
    for name, call in calls.items():
        each = max(_event_ms(call, 3), 1e-3)
        counts[name] = max(5, min(200, round(GPU_ROUND_MS / each)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(GPU_ROUNDS):
            for name, call in calls.items():
                times[name].append(_event_ms(call, counts[name]))
    finally:
        gc.enable()
    return times


def captured(call: Call) -> Call:
    """Captures a call in a CUDA graph; gives a call that replays the graph.

    Raises:
        Unsupported: the call can't be captured, because it waits for the GPU or copies from the
            host's memory.
    """
    stream: Any = torch.cuda.current_stream()
    cuda: Any = torch.cuda
    graph, warm_up = cuda.CUDAGraph(), cuda.Stream()
    gc.collect()  # a destructor of another graph would break the capture
    gc.disable()
    try:
        warm_up.wait_stream(stream)
        with torch.cuda.stream(warm_up):
            for _ in range(3):
                call()
        stream.wait_stream(warm_up)
        with torch.cuda.graph(graph):
            output = call()
    except RuntimeError as error:
        # The call's own error is the reason. The end of an invalid capture raises another.
        reason = error.__context__ or error
        first = str(reason).strip().splitlines() or [""]
        raise Unsupported(f"no CUDA graph: {first[0]}") from error
    finally:
        torch.cuda.set_stream(stream)  # a failed capture leaves its own stream current
        gc.enable()

    def replay() -> Any:
        graph.replay()
        return output

    return replay


def _graph_times(
    calls: Mapping[str, Call], verify: Callable[[str, Any], None]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Milliseconds per replay, and the reasons why candidates have no graph."""
    replays, missing = {}, {}
    for name, call in calls.items():
        try:
            replays[name] = captured(call)
        except Unsupported as error:
            missing[name] = str(error)
    for name, replay in replays.items():
        verify(name, replay())
    return back_to_back(replays), missing


def ratio_of_medians(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The ratio of two candidates' medians over their common rounds, and its interval.

    The interval has 95 % of the ratios from a paired bootstrap: the rounds are drawn again with
    repetition, both candidates' times together, because a slow second of the machine slows both.
    """
    rounds = list(zip(above, below, strict=True))
    draw = random.Random(0)
    ratios = []
    for _ in range(RESAMPLES):
        tops, bottoms = zip(*draw.choices(rounds, k=len(rounds)), strict=True)
        ratios.append(statistics.median(tops) / statistics.median(bottoms))
    ratios.sort()
    return {
        "ratio": statistics.median(above) / statistics.median(below),
        "ratio_low": ratios[round(0.025 * (RESAMPLES - 1))],
        "ratio_high": ratios[round(0.975 * (RESAMPLES - 1))],
    }


def compared(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Medians over rounds, their ratio with its interval, and spreads."""
    return {
        "ours_ms": statistics.median(ours),
        "baseline_ms": statistics.median(theirs),
        **ratio_of_medians(theirs, ours),
        "ours_spread": spread(ours),
        "baseline_spread": spread(theirs),
    }


def gpu_clocks(
    calls: Mapping[str, Call], verify: Callable[[str, Any], None]
) -> dict[str, dict[str, dict[str, Any]]]:
    """The results of a GPU's further clocks, by baseline and clock; ours is named "fusedrnn".

    Each has the keys of `compared`. A graph that could not be captured has None in their place and
    `missing`, the reason by candidate.
    """
    plain = back_to_back(calls)
    graphs, missing = _graph_times(calls, verify)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in calls:
        if name == "fusedrnn":
            continue
        found[name] = {"back_to_back": compared(plain["fusedrnn"], plain[name])}
        both = ("fusedrnn", name)
        reasons = {key: missing[key] for key in both if key in missing}
        if not reasons:
            found[name]["graph"] = compared(graphs["fusedrnn"], graphs[name])
            continue
        alone: dict[str, Any] = dict.fromkeys(compared([1.0, 1.0], [1.0, 1.0]))
        for key, side in zip(both, ("ours", "baseline"), strict=True):
            if key in graphs:
                alone[f"{side}_ms"] = statistics.median(graphs[key])
                alone[f"{side}_spread"] = spread(graphs[key])
        found[name]["graph"] = {**alone, "missing": reasons}
    return found


def measure(
    case: Case,
    mode: str,
    baselines: Sequence[Candidate],
    device: str,
    seconds: float,
) -> list[dict[str, Any]]:
    """Measures a case against baselines that support it on the device; one row for each.

    The caller fills in roofline_ms. On a GPU, a row's own times are those of calls with the wait
    for their end. The other clocks' results are under their names, as `gpu_clocks` gives them.

    Raises:
        AssertionError: our output differs from nn's. A baseline's leaves it out, with a message.
    """
    calls: dict[str, Call] = {}
    for candidate in [Fused(device), *baselines]:
        try:
            call = candidate.prepare(case, mode)
        except Unsupported as error:
            print(f"{case.name} {mode}: no {candidate.name}: {error}", file=sys.stderr)
            continue
        calls[candidate.name] = call
    expected = Torch(device).prepare(case, "inference")()

    def verify(name: str, output: Any) -> None:
        check(name, case, device, output, expected)

    for name, call in list(calls.items()):
        try:
            verify(name, call())
        except AssertionError as error:
            if name == "fusedrnn":
                raise
            print(f"{case.name} {mode}: no {name}: {error}".splitlines()[0], file=sys.stderr)
            del calls[name]
    memory = {
        name: peak_memory(call, device)
        for name, call in calls.items()
        if name in ("fusedrnn", "torch", "cudnn")
    }
    on_gpu = device == "cuda"
    waiting = {name: _synchronized(call) for name, call in calls.items()} if on_gpu else calls
    warm = GPU_WARM_SECONDS if on_gpu else None
    times = in_turn(waiting, seconds, warm_seconds=warm, least_rounds=ROUNDS)
    clocks = gpu_clocks(calls, verify) if on_gpu else {}
    ours = times.pop("fusedrnn")
    sizes = dataclasses.asdict(case)
    del sizes["compiled"]
    return [
        {
            **sizes,
            "mode": mode,
            "baseline": name,
            "roofline_ms": None,
            **compared(ours, theirs),
            "rounds": len(ours),
            "ours_bytes": memory["fusedrnn"],
            "baseline_bytes": memory.get(name),
            **clocks.get(name, {}),
        }
        for name, theirs in times.items()
    ]

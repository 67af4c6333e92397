"""Compares and times a model's jobs: plain, nudged and fused."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cells import FUSED
from benchmarks.measure import in_turn, ratio_of_medians, spread
from benchmarks.models.job import RECURRENT, Model, Results, Swap, quiet

# Training accumulates rounding errors over its steps.
TOLERANCE = {"inference": 1e-5, "training": 1e-3}


def _tensor(value: Any) -> Tensor:
    if isinstance(value, str):
        value = [ord(character) for character in value]
    return torch.as_tensor(value).detach().double()


def difference(found: Results, expected: Results) -> float:
    """The largest difference in any result, relative to the result's largest value.

    For "learnt", the norm of the difference relative to the norm. Adam takes full steps even for
    weights with gradients of pure rounding, so their maximum means nothing.
    """
    if found.keys() != expected.keys():
        return float("inf")
    largest = 0.0
    for name, value in expected.items():
        a, b = _tensor(found[name]), _tensor(value)
        if a.shape != b.shape or not bool(b.isfinite().all()):
            return float("inf")
        if b.numel():
            order = 2.0 if name == "learnt" else float("inf")
            size = torch.linalg.vector_norm(b, order).clamp_min(1e-30)
            gap = float(torch.linalg.vector_norm(a - b, order) / size)
            largest = max(largest, gap if gap == gap else float("inf"))  # NaN counts as infinite
    return largest


class _Calls:
    """Counts and times the forward calls of recurrent layers within the context."""

    def __init__(self) -> None:
        self.fused = 0
        self.seconds = 0.0
        self._start = 0.0

    def __enter__(self) -> _Calls:
        hooks = nn.modules.module
        self._handles = (
            hooks.register_module_forward_pre_hook(self._before),
            hooks.register_module_forward_hook(self._after),
        )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: Any) -> None:
        self._start = time.perf_counter()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, RECURRENT):  # these call no other modules
            self.seconds += time.perf_counter() - self._start
            self.fused += isinstance(module, FUSED)


def measure(model: Model, seconds: float) -> dict[str, Any]:
    """A model's row: the swapped layers, the largest difference, and times."""
    with quiet():
        swaps = {kind: Swap(kind, model.subclass) for kind in ("plain", "nudged", "fused")}
        jobs = {kind: model.prepare(swap) for kind, swap in swaps.items()}
        expected = jobs["plain"]()
        rounding = difference(jobs["nudged"](), expected)
        with _Calls() as calls:
            found = difference(jobs["fused"](), expected)
        with _Calls() as plain:
            start = time.perf_counter()
            again = jobs["plain"]()
            share = plain.seconds / (time.perf_counter() - start)
        repeated = difference(again, expected)
        times = in_turn({kind: jobs[kind] for kind in ("fused", "plain")}, seconds)
    swap = swaps["fused"]
    tolerance = TOLERANCE[model.mode] if model.tolerance is None else model.tolerance
    # A job proves nothing if its own results vary, or if it never calls the fused layers.
    ok = found <= tolerance and repeated == 0 and bool(calls.fused) == bool(swap.swapped)
    return {
        "name": model.name,
        "package": model.versions(),
        "what": model.what,
        "mode": model.mode,
        "subclass": model.subclass,
        "swapped": swap.swapped,
        "left": swap.left,
        "calls": calls.fused,
        "share": share,
        "difference": found,
        "rounding": rounding,
        "repeated": repeated,
        "tolerance": tolerance,
        "ok": ok,
        "plain_ms": statistics.median(times["plain"]),
        "fused_ms": statistics.median(times["fused"]),
        **ratio_of_medians(times["plain"], times["fused"]),
        "plain_spread": spread(times["plain"]),
        "fused_spread": spread(times["fused"]),
        "rounds": len(times["fused"]),
    }

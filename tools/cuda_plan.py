"""csrc/cuda/plan.h for Python: the plan of a layer on a device, and what the model says it costs.

    python -m tools.cuda_plan --type bfloat16 -B 64 -H 512 -T 100

Needs a C++ compiler, but neither torch nor CUDA nor a GPU. Nothing here computes a cost:
cuda_plan.cpp calls the library's own functions.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (ROOT / "tools" / "cuda_plan.cpp", ROOT / "csrc" / "cuda" / "plan.cpp")
BUILD = ROOT / "build" / "cuda_plan"
ALGORITHMS = ("stepwise", "persistent_cta", "persistent_cluster", "persistent_grid")
BOUNDS = ("launches", "chain", "cluster bytes", "L2 bytes", "memory bytes", "GEMM")
CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")  # in the order of csrc/cells.h
BYTES = {"float64": 8, "ieee": 4, "tf32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Device:
    """A GPU as the plan sees it.

    Attributes:
        capability: compute capability, 10 * major + minor.
        shared_limit: the bytes of shared memory that a CTA can have.
        processing_clusters: multiprocessors in each GPC. A cluster of CTAs lies in one.
    """

    name: str
    multiprocessors: int
    capability: int
    shared_limit: int
    processing_clusters: tuple[int, ...] = ()

    def active_clusters(self, ctas: int) -> int:
        """How many clusters run at the same time, with a CTA on each multiprocessor."""
        return sum(n // ctas for n in self.processing_clusters)


A100 = Device("A100", 108, 80, 163 * 1024)
# Multiprocessors that explain the clusters which an H200 runs at the same time (peaks).
H100 = Device("H100", 132, 90, 227 * 1024, (18, 18, 18, 18, 18, 16, 16, 10))


@dataclass(frozen=True)
class Problem:
    """One pass of a layer.

    Attributes:
        type: a key of BYTES; float32 has two, by precision.
        saves: whether the forward pass stores values for a backward pass.
        starts_at_zero: whether the layer gets no h0.
        requested: an algorithm, or none.
    """

    T: int
    B: int
    H: int
    type: str = "bfloat16"
    cell: str = "lstm"
    directions: int = 1
    backward: bool = False
    saves: bool = False
    has_projection: bool = False
    starts_at_zero: bool = True
    device: Device = H100
    requested: str = ""


@dataclass(frozen=True)
class Plan:
    """A LaunchPlan (csrc/cuda/plan.h)."""

    algorithm: str = "stepwise"
    half_registers: bool = False
    half_operands: bool = False
    few_rows: bool = False
    ctas: int = 0
    groups: int = 0
    tile_rows: int = 0
    max_units: int = 0


@dataclass(frozen=True)
class Cost:
    """Microseconds: of launches and prologues, of a step, of the pass; and what bounds a step."""

    fixed_us: float
    step_us: float
    us: float
    bound: str


class _Request(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in (
            "cell", "element_bytes", "is_bfloat16", "is_backward", "requested",
            "steps", "rows", "hidden_size", "directions", "saves", "has_projection", "is_bounded",
            "is_tf32", "multiprocessors", "capability", "shared_limit",
        )),
        ("active_clusters", ctypes.c_int64 * 17),
    )  # fmt: skip


class _Launch(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "algorithm", "half_registers", "half_operands", "few_rows", "ctas", "groups",
            "tile_rows", "max_units",
        )
    )  # fmt: skip


class _Costs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_double) for name in ("fixed_us", "step_us", "us")),
        ("bound", ctypes.c_int64),
    )


def build(root: Path = ROOT, output: Path = BUILD) -> Path:
    """Compiles the library from the sources in `root`, where they have changed."""
    command = [*os.environ.get("CXX", "g++").split(), "-std=c++17", "-O2", "-fPIC", "-shared"]
    command += [f"-I{root / p}" for p in ("csrc", "csrc/cuda", "tests/emulator")]
    command += [str(root / source.relative_to(ROOT)) for source in SOURCES]
    folders = (root / "csrc", root / "tests" / "emulator", root / "tools")
    files = sorted(p for folder in folders for p in folder.rglob("*"))
    key = hashlib.sha256(" ".join(command).encode())
    for path in files:
        if path.suffix in (".h", ".cuh", ".cpp"):
            key.update(path.read_bytes())
    library = output / f"plan-{key.hexdigest()[:16]}.so"
    if not library.exists():
        output.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(partial)], check=True)
        for old in output.glob("plan-*.so"):
            old.unlink(missing_ok=True)
        partial.rename(library)
    return library


class Library:
    """The plan's functions, from a library that build() made."""

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))
        self._functions.fusedrnn_plan.restype = ctypes.c_char_p
        self._functions.fusedrnn_shared_us.restype = ctypes.c_double
        self._functions.fusedrnn_shared_bytes.restype = ctypes.c_int64

    def plan(self, problem: Problem) -> Plan:
        """The plan that the library chooses.

        Raises:
            RuntimeError: the requested algorithm can't run.
        """
        to = _Launch()
        error = self._functions.fusedrnn_plan(ctypes.byref(_request(problem)), ctypes.byref(to))
        if error:
            raise RuntimeError(error.decode())
        return Plan(
            ALGORITHMS[to.algorithm],
            bool(to.half_registers),
            bool(to.half_operands),
            bool(to.few_rows),
            to.ctas,
            to.groups,
            to.tile_rows,
            to.max_units,
        )

    def cost(self, problem: Problem, plan: Plan) -> Cost:
        to = _Costs()
        self._functions.fusedrnn_cost(
            ctypes.byref(_request(problem)), ctypes.byref(_launch(plan)), ctypes.byref(to)
        )
        return Cost(to.fixed_us, to.step_us, to.us, BOUNDS[to.bound])

    def shared_us(self, problem: Problem, input_size: int) -> float:
        """Microseconds of the work that all plans share: the GEMMs outside of the time loop."""
        us: float = self._functions.fusedrnn_shared_us(
            ctypes.byref(_request(problem)), ctypes.c_int64(input_size)
        )
        return us

    def shared_bytes(self, problem: Problem, plan: Plan) -> int:
        """Bytes of shared memory in a CTA; negative: there is no such kernel."""
        found: int = self._functions.fusedrnn_shared_bytes(
            ctypes.byref(_request(problem)), ctypes.byref(_launch(plan))
        )
        return found


def _request(p: Problem) -> _Request:
    device = p.device
    clusters = (0, *(device.active_clusters(n) for n in range(1, 17)))
    return _Request(
        CELLS.index(p.cell),
        BYTES[p.type],
        p.type == "bfloat16",
        p.backward,
        ALGORITHMS.index(p.requested) if p.requested else -1,
        p.T,
        p.B,
        p.H,
        p.directions,
        p.saves,
        p.has_projection,
        p.starts_at_zero,
        p.type == "tf32",
        device.multiprocessors,
        device.capability,
        device.shared_limit,
        (ctypes.c_int64 * 17)(*clusters),
    )


def _launch(plan: Plan) -> _Launch:
    return _Launch(
        ALGORITHMS.index(plan.algorithm),
        plan.half_registers,
        plan.half_operands,
        plan.few_rows,
        plan.ctas,
        plan.groups,
        plan.tile_rows,
        plan.max_units,
    )


@functools.cache
def library() -> Library:
    """The library of this checkout."""
    return Library(build())


def described(plan: Plan) -> str:
    """A plan in a few words: "cluster, 16 x 8 CTAs, 16 rows, half registers"."""
    if plan.algorithm == "stepwise":
        return "stepwise"
    words = [plan.algorithm.removeprefix("persistent_"), f"{plan.groups} x {plan.ctas} CTAs"]
    words += [f"{plan.tile_rows} rows"]
    words += [
        name.replace("_", " ")
        for name in ("half_registers", "half_operands", "few_rows")
        if getattr(plan, name)
    ]
    return ", ".join(words)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("cuda_plan", description=__doc__)
    parser.add_argument("--type", choices=BYTES, default="bfloat16")
    parser.add_argument("--cell", choices=CELLS, default="lstm")
    parser.add_argument("-T", type=int, default=100)
    parser.add_argument("-B", type=int, default=16)
    parser.add_argument("-H", type=int, default=256)
    parser.add_argument("--directions", type=int, choices=(1, 2), default=1)
    parser.add_argument("--device", choices=("A100", "H100"), default="H100")
    args = parser.parse_args(argv)
    forward = Problem(
        args.T,
        args.B,
        args.H,
        args.type,
        args.cell,
        args.directions,
        device={"A100": A100, "H100": H100}[args.device],
    )
    passes = {
        "inference": forward,
        "training, forward": replace(forward, saves=True),
        "training, backward": replace(forward, backward=True),
    }
    for name, problem in passes.items():
        chosen = library().plan(problem)
        print(f"{name}: {described(chosen)}")
        plans = [chosen]
        for requested in ALGORITHMS:
            try:
                plans.append(library().plan(replace(problem, requested=requested)))
            except RuntimeError:
                continue
        for plan in dict.fromkeys(plans):
            cost = library().cost(problem, plan)
            print(
                f"  {cost.us:9.1f} us = {cost.fixed_us:5.1f} + {args.T} x {cost.step_us:6.3f} us, "
                f"bound by {cost.bound}: {described(plan)}"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

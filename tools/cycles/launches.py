"""The launches of problems: asks csrc/cuda itself, through host/launches.cpp."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tools import cuda_check
from tools.cycles.integers import Launch

HOST = Path(__file__).parent / "host"
CSRC = cuda_check.ROOT / "csrc"
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
FLAGS = ("-std=c++17", "-O1", "-w", f"-I{HOST}", f"-I{CSRC}")
# Multiprocessors, compute capability, KiB of shared memory in a CTA.
DEVICES = {"sm_80": (108, 80, 163), "sm_90a": (132, 90, 227), "sm_100": (148, 100, 227)}
TYPES = {
    "bfloat16": ("bfloat16", "ieee"),
    "float16": ("float16", "ieee"),
    "tf32": ("float32", "tf32"),
    "ieee": ("float32", "ieee"),
}
MODES = {
    "inference": ("forward", "inference"),
    "training": ("forward", "training"),
    "backward": ("backward", "training"),
}


class LaunchError(Exception):
    """Why a problem's launch is not known."""


@dataclass(frozen=True)
class Problem:
    """A layer of one direction without lengths and h0, and the algorithm asked for."""

    arch: str
    cell: str
    type: str
    H: int
    B: int
    mode: str
    algorithm: str = "default"

    def line(self, planned: int, steps: int) -> str:
        words = (self.cell, *TYPES[self.type], *MODES[self.mode], self.H, self.B, planned, steps,
                 self.algorithm, *DEVICES[self.arch])  # fmt: skip
        return " ".join(map(str, words))


@dataclass(frozen=True)
class Answer:
    """The algorithm that runs, its persistent kernel's launch, or why there is none."""

    algorithm: str
    launch: Launch | None
    error: str = ""


def build(cache: Path, jobs: int) -> Path:
    """Builds the program that knows the launches; reuses one of the same sources."""
    files = [p for p in sorted([*CSRC.rglob("*"), *HOST.glob("*")]) if p.is_file()]
    files.append(cuda_check.ROOT / "tests/emulator/emulator.h")
    state = b"".join(p.name.encode() + p.read_bytes() for p in files)
    key = hashlib.sha256(state + repr((COMPILER, FLAGS)).encode()).hexdigest()[:16]
    program = cache / f"launches-{key}"
    if program.exists():
        return program
    cache.mkdir(parents=True, exist_ok=True)
    sources = [*sorted((CSRC / "cuda").glob("persistent_*.cu")), CSRC / "cuda/plan.cpp"]
    sources.append(HOST / "launches.cpp")

    def one(source: Path) -> Path:
        to = cache / f"{source.stem}-{key}.o"
        command = [*COMPILER, *FLAGS, "-x", "c++", "-c", str(source), "-o", str(to)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise LaunchError(f"{COMPILER[0]} can't compile {source}:\n{result.stderr}")
        return to

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(one, sources))
    partial = cache / f"launches.{os.getpid()}"
    subprocess.run([*COMPILER, *map(str, objects), "-o", str(partial)], check=True)
    for old in (*objects, *cache.glob("launches-*")):
        old.unlink(missing_ok=True)
    partial.rename(program)
    return program


def ask(program: Path, problems: Sequence[Problem], planned: int, steps: int) -> list[Answer]:
    """The launches of problems planned for so many steps, whose kernels run `steps`."""
    lines = "".join(problem.line(planned, steps) + "\n" for problem in problems)
    out = subprocess.run([program], input=lines, capture_output=True, text=True, check=True).stdout
    return [_answer(json.loads(line)) for line in out.splitlines()]


def _answer(found: dict[str, object]) -> Answer:
    if "error" in found:
        return Answer("", None, str(found["error"]))
    launches = found["launches"]
    assert isinstance(launches, list)
    if not launches:
        return Answer(str(found["algorithm"]), None)
    if len(launches) > 1:
        names = ", ".join(cuda_check.short(one["kernel"]) for one in launches)
        raise LaunchError(f"more than one persistent kernel for a layer: {names}")
    one = launches[0]
    launch = Launch(
        cuda_check.short(one["kernel"]),
        one["threads"],
        tuple(one["grid"]),
        one["cluster"],
        one["shared"],
        bytes.fromhex(one["params"]),
    )
    return Answer(str(found["algorithm"]), launch)

"""Compiles csrc/cuda/*.cu with nvcc alone; holds kernels to register and spill budgets.

Needs neither torch nor a GPU: python -m tools.cuda_check --help
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tools import cuda_toolkit
from tools.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("sm_80", "sm_90a", "sm_100")
# `make gpu` compiles these too. Here: for one arch, without a budget.
OTHERS = ("benchmarks/peaks.cu", "tests/kernels/primitives.cu")
# All lines but the first are flags passed by torch in a build.
FLAGS = (
    *("-std=c++17", "-O3", "-Icsrc", "-Xptxas=-v", "-Werror=all-warnings", "-cubin"),
    "--expt-relaxed-constexpr",
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
)


@dataclass(frozen=True)
class Budget:
    """A kernel's limits: registers a thread, bytes of spill stores or loads."""

    registers: int = 255
    spill: int = 0


DEFAULT = Budget()
# Exceptions by name, with or without template arguments. Each needs a comment with its reason.
BUDGETS: dict[str, Budget] = {}


@dataclass(frozen=True)
class Kernel:
    """ptxas's figures for a kernel, or for a called function, which has no register count."""

    name: str
    arch: str
    registers: int | None
    stores: int
    loads: int
    stack: int
    shared: int


def short(name: str) -> str:
    """The functor of `void run<Functor>(Functor)`, else the function; without namespaces."""
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", name)
    name = name.replace(" >", ">").removeprefix("void ")
    if name.startswith("run<"):
        depth = 0
        for i, c in enumerate(name):
            depth += (c == "<") - (c == ">")
            if c == ">" and depth == 0:
                return name[len("run<") : i]
    return name


def parse(text: str) -> Iterator[Kernel]:
    """The kernels in `nvcc -Xptxas -v`'s output, demangled."""
    arch = ""
    for entry, function, stack, stores, loads, used in re.findall(
        r"Compiling entry function '(?:.*)' for '(\w+)'"
        r"|Function properties for (.+)\n"
        r" *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r"(?:\nptxas info *: (Used .*))?",
        text,
    ):
        if entry:
            arch = entry
            continue
        registers = re.search(r"(\d+) registers", used)
        shared = re.search(r"(\d+) bytes smem", used)
        yield Kernel(
            short(function),
            arch,
            int(registers[1]) if registers else None,
            int(stores),
            int(loads),
            int(stack),
            int(shared[1]) if shared else 0,
        )


def problems(kernel: Kernel) -> list[str]:
    """The limits exceeded by a kernel."""
    budget = BUDGETS.get(kernel.name) or BUDGETS.get(kernel.name.split("<")[0]) or DEFAULT
    found = []
    if (kernel.registers or 0) > budget.registers:
        found.append(f"{kernel.registers} registers, over {budget.registers}")
    if max(kernel.stores, kernel.loads) > budget.spill:
        found.append(
            f"{kernel.stores} bytes of spill stores and {kernel.loads} of loads, "
            f"over {budget.spill}"
        )
    return [f"{kernel.name} for {kernel.arch}: {problem}" for problem in found]


def table(kernels: Sequence[Kernel]) -> str:
    """A Markdown table, one row a kernel and arch."""
    lines = [
        "| kernel | arch | registers | spill stores | spill loads | stack | static shared |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for k in kernels:
        registers = "" if k.registers is None else k.registers
        lines.append(
            f"| `{k.name}` | {k.arch} | {registers} | {k.stores} | {k.loads} | {k.stack} "
            f"| {k.shared} |"
        )
    return "\n".join(lines) + "\n"


def demangled(text: str) -> str:
    return subprocess.run(
        ["c++filt"], input=text, capture_output=True, text=True, check=True
    ).stdout


def compiled(nvcc: Path, source: Path, arch: str, cubin: Path | None = None) -> tuple[bool, str]:
    """Whether nvcc succeeds without a warning, and its demangled output; keeps `cubin` if named."""
    with tempfile.TemporaryDirectory() as folder:
        output = cubin or Path(folder) / "cubin"
        command = [str(nvcc), *FLAGS, f"-arch={arch}", "-o", str(output), str(source)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return result.returncode == 0, demangled(result.stdout + result.stderr)


def main() -> int:
    """1 if a file does not compile, a kernel breaks its budget or there is no nvcc."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", default=ARCHS, help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time (%(default)s)")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    try:
        home = cuda_toolkit.find_home()
        if home is None:
            raise cuda_toolkit.MissingError(
                "there is no nvcc: set CUDA_HOME to a CUDA toolkit's root"
            )
        version = cuda_toolkit.find_version(home)
    except cuda_toolkit.MissingError as why:
        print(f"the CUDA kernels can't be checked: {why}")
        return 1
    start = time.monotonic()
    runs = [
        (path.relative_to(ROOT), arch)
        for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))
        for arch in args.arch
    ]
    runs += [(Path(other), args.arch[-1]) for other in OTHERS]
    with Progress("cuda-check") as progress, ThreadPoolExecutor(args.jobs) as pool:
        outputs = pool.map(lambda run: compiled(home / "bin/nvcc", *run), runs)
        results = list(progress.counted(outputs, len(runs), "compiled"))
    failed: list[str] = []
    kernels: dict[Kernel, None] = {}  # an ordered set: header functions are in many files
    for (source, arch), (succeeded, output) in zip(runs, results, strict=True):
        if not succeeded:
            print(output)
            failed.append(f"{source} for {arch}: nvcc warns or fails")
        if str(source) not in OTHERS:
            kernels.update(dict.fromkeys(parse(output)))
    rows = sorted(kernels, key=lambda k: (k.name, list(args.arch).index(k.arch)))
    failed += [problem for kernel in rows for problem in problems(kernel)]
    text = table(rows)
    print(text)
    if args.output:
        args.output.write_text(
            f"nvcc {version}: registers a thread; spills, stack and static shared memory in bytes. "
            f"Written by `make cuda-check`.\n\n{text}"
        )
    for line in failed:
        print(f"FAILED {line}")
    minutes = (time.monotonic() - start) / 60
    print(f"{len(kernels)} kernels and functions of {len(runs)} compilations, {minutes:.1f} min")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

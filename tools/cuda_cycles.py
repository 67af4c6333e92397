"""Cycles of a step of the persistent CUDA kernels, from their machine code: needs no GPU.

nvcc compiles the kernels, cuobjdump disassembles them. A machine (tools/cycles/machine.py) runs a
CTA's integer instructions for each problem, so the path through the code is the code's own. A model
(tools/cycles/pipeline.py) issues that path. Its latencies are assumptions: take differences
between kernels, not microseconds, from it.

    python -m tools.cuda_cycles --help
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools import cuda_check, cuda_toolkit
from tools.cycles import disassembler, launches, measure
from tools.cycles.disassembler import MissingError
from tools.cycles.integers import Launch
from tools.cycles.launches import Answer, Problem
from tools.progress import Progress

STORED = cuda_check.ROOT / "benchmarks" / "results" / "cycles.json"
AGAINST = STORED.with_name("cycles_before_after.md")
CACHE = cuda_check.ROOT / "build" / "cycles"
ARCHS = ("sm_90a", "sm_80")
CELLS = ("lstm",)
HIDDEN = (128, 256, 512, 1024)
ROWS = (1, 16, 64, 256)
# With all types these are left out: the code is bfloat16's but for the names of its types.
SAME = {("sm_80", "float16")}
# As planned, and each one by request.
ALGORITHMS = ("default", "persistent_cta", "persistent_cluster", "persistent_grid")
T = 100  # of the problems
TOLERANCE = 1.03  # a kernel that is dearer by more fails
MISSING = 2  # the exit status where a tool is missing

Row = dict[str, Any]
KEY = ("arch", "cell", "type", "H", "B", "mode", "requested")


def problems(
    archs: Iterable[str],
    cells: Iterable[str],
    types: Iterable[str],
    hidden: Iterable[int],
    rows: Iterable[int],
    modes: Iterable[str],
    algorithms: Iterable[str],
) -> list[Problem]:
    """All combinations; clusters only where a device has them, types without those in SAME."""
    chosen = [*types]
    return [
        Problem(arch, cell, type_, H, B, mode, algorithm)
        for arch, cell, type_, H, B, mode, algorithm in itertools.product(
            archs, cells, chosen, hidden, rows, modes, algorithms
        )
        if not (len(chosen) == len(launches.TYPES) and (arch, type_) in SAME)
        and (algorithm != "persistent_cluster" or launches.DEVICES[arch][1] >= 90)
    ]


def row_of(problem: Problem, answer: Answer, figures: measure.Figures | None) -> Row:
    """A problem's row. `waves`: how often all multiprocessors are full of CTAs."""
    row: Row = {k: v for k, v in asdict(problem).items() if k != "algorithm"}
    row |= {"requested": problem.algorithm, "algorithm": answer.algorithm}
    if figures is not None:
        multiprocessors = launches.DEVICES[problem.arch][0]
        row["waves"] = -(-figures.ctas // multiprocessors)
        row |= asdict(figures)
    return row


def kept(problem: Problem, answer: Answer, default: str) -> bool:
    """Whether a problem has a row of its own: the algorithm fits and is not the default."""
    if problem.algorithm == "default":
        return True
    return not answer.error and answer.algorithm != default


def measured(job: tuple[str, list[Launch], Path]) -> list[measure.Figures | str]:
    """The figures of a kernel's launches, or why there are none."""
    return measure.measure_all(*job)


def rows_of(found: Sequence[Problem], jobs: int, progress: Progress) -> tuple[list[Row], list[str]]:
    """The rows of problems, and what went wrong."""
    progress.step = "compiling the plan"
    program = launches.build(CACHE, jobs)
    answers = launches.ask(program, found, T, measure.STEPS)
    default = {
        (p.arch, p.cell, p.type, p.H, p.B, p.mode): a.algorithm
        for p, a in zip(found, answers, strict=True)
        if p.algorithm == "default"
    }
    pairs = [
        (p, a)
        for p, a in zip(found, answers, strict=True)
        if kept(p, a, default.get((p.arch, p.cell, p.type, p.H, p.B, p.mode), ""))
    ]
    failed = [f"{p.line(T, measure.STEPS)}: {a.error}" for p, a in pairs if a.error]
    texts: dict[tuple[str, str], str] = {}
    for arch in dict.fromkeys(p.arch for p in found):
        progress.step = f"compiling for {arch}"
        kernels = disassembler.kernels(arch, jobs, CACHE)
        texts.update({(arch, name): text for name, text in kernels.items()})
    work: dict[tuple[str, str], dict[Launch, None]] = {}  # the launches of a kernel
    for p, a in pairs:
        if a.launch is None:
            continue
        if (p.arch, a.launch.kernel) not in texts:
            failed.append(f"{a.launch.kernel} is launched but not compiled for {p.arch}")
            continue
        work.setdefault((p.arch, a.launch.kernel), {})[a.launch] = None
    jobs_ = [(texts[key], list(each), CACHE / "figures") for key, each in work.items()]
    figures: dict[tuple[str, Launch], measure.Figures | str] = {}
    with ProcessPoolExecutor(jobs) as pool:
        outputs = progress.counted(pool.map(measured, jobs_), len(jobs_), "kernels modelled")
        for (arch, _), job, results in zip(work, jobs_, outputs, strict=True):
            figures.update({(arch, launch): r for launch, r in zip(job[1], results, strict=True)})
    rows = []
    for p, a in pairs:
        result = figures.get((p.arch, a.launch)) if a.launch else None
        if isinstance(result, str):
            failed.append(f"{p.line(T, measure.STEPS)}: {result}")
        elif not a.error:
            rows.append(row_of(p, a, result))
    return rows, failed


# ---- comparison ---------------------------------------------------------------------------------


def key_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[k] for k in KEY)


def cost_of(row: Row) -> float | None:
    """A step's cycles, as often as the multiprocessors are full; None: stepwise."""
    return row["step"] * row["waves"] if "step" in row else None


def dearer(stored: Sequence[Row], rows: Sequence[Row], tolerance: float = TOLERANCE) -> list[str]:
    """The problems that cost more than in the stored run."""
    before = {key_of(row): row for row in stored}
    found = []
    for row in rows:
        old = before.get(key_of(row))
        if old is None:
            continue
        name = " ".join(map(str, key_of(row)))
        was, now = cost_of(old), cost_of(row)
        if was is not None and now is None:
            found.append(f"{name}: stepwise, and was {old['algorithm']} with {was} cycles a step")
        if was is None or now is None:
            continue
        for what, a, b in (("a step", was, now), ("before", old["prologue"], row["prologue"])):
            if b > a * tolerance:
                where = "a step" if what == "a step" else "before the loop over time"
                found.append(f"{name}: {a} cycles {where} became {b} ({100 * (b / a - 1):+.1f} %)")
    return found


# ---- tables -------------------------------------------------------------------------------------


def label(row: Row) -> str:
    return str(row["algorithm"]).removeprefix("persistent_")


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of rows with figures."""
    lines = [
        "| type | H | B | pass | algorithm | cycles a step | issue | exchange | chain "
        "| instructions a warp | conflicts | prologue | waves |",
        "|---|---:|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        start = f"| {r['type']} | {r['H']} | {r['B']} | {r['mode']} | {label(r)} |"
        if "step" not in r:
            lines.append(start + " |" * 8)
            continue
        lines.append(
            f"{start} {r['step']} | {r['cycles']} | {r['exchange']} | {r['chain']} "
            f"| {r['instructions']} | {r['conflicts']} | {r['prologue']} | {r['waves']} |"
        )
    return "\n".join(lines)


def kinds_table(rows: Sequence[Row]) -> str:
    """The instructions of a warp and step by kind, a row for each kernel's first problem."""
    seen: dict[str, Row] = {}
    for row in rows:
        if "kinds" in row:
            seen.setdefault(f"{row['kernel']} {row['mode']}", row)
    kinds = sorted({kind for row in seen.values() for kind in row["kinds"]})
    lines = [
        "| kernel | pass | " + " | ".join(kinds) + " | all |",
        "|---|---|" + "---:|" * (len(kinds) + 1),
    ]
    for row in seen.values():
        cells = " | ".join(str(row["kinds"].get(kind, "")) for kind in kinds)
        lines.append(f"| `{row['kernel']}` | {row['mode']} | {cells} | {row['instructions']} |")
    return "\n".join(lines)


BEFORE_AFTER = """\
# Cycles of a step, before and after

Written by `python -m tools.cuda_cycles --table-against FILE` from two stored runs. The model and
its assumptions are those of [cycles.md](cycles.md), and no GPU has run this. Both sides have the
plan's kernel: **cycles** a step, as often as the multiprocessors are full of CTAs,
**instructions** of the warp with the most, **prologue** in cycles. Stepwise has none.
"""


def _figures(row: Row | None) -> str:
    if row is None:
        return " | | |"
    if "step" not in row:
        return f"{label(row)} | | |"
    return f"{label(row)} | {row['instructions']} | {cost_of(row)} | {row['prologue']}"


def before_after(before: Sequence[Row], after: Sequence[Row]) -> str:
    """The text of cycles_before_after.md: a row for each planned problem of the run after."""
    old = {key_of(row): row for row in before}
    rows = [row for row in after if row["requested"] == "default"]
    parts = [BEFORE_AFTER]
    for arch, cell, type_ in dict.fromkeys((r["arch"], r["cell"], r["type"]) for r in rows):
        lines = [
            "| H | B | pass | before | instructions | cycles | prologue "
            "| after | instructions | cycles | prologue | before / after |",
            "|---:|---:|---|---|---:|---:|---:|---|---:|---:|---:|---:|",
        ]
        for r in rows:
            if (r["arch"], r["cell"], r["type"]) != (arch, cell, type_):
                continue
            was = old.get(key_of(r))
            a, b = (cost_of(x) if x else None for x in (was, r))
            ratio = f"{a / b:.2f}" if a and b else ""
            lines.append(
                f"| {r['H']} | {r['B']} | {r['mode']} | {_figures(was)} | {_figures(r)} | {ratio} |"
            )
        parts.append(f"\n## {cell}, {type_} on {arch}\n\n" + "\n".join(lines) + "\n")
    return "".join(parts)


INTRODUCTION = """\
# Cycles of a step, modelled

Written by `make cuda-cycles CUDA_CYCLES_ARGS=--store`. No GPU has run this. A machine runs the
integer instructions of one CTA, so the path through the code is the code's own. An in-order model
of 8 warps on 4 schedulers issues it with assumed latencies (`tools/cycles/pipeline.py`), without
instruction-cache misses: +-30 %.

- **cycles a step**: a step in the middle of a sequence, the exchange included: issue + exchange.
- **issue**: if all that other CTAs send has arrived already. **exchange**: the wait for it.
- **chain**: the longest dependent path of a step, the exchange included.
- **conflicts**: wavefronts of shared memory beyond the least, all warps.
- **prologue**: cycles from the kernel's entry to the loop over time.
- **waves**: how often the multiprocessors are full of CTAs. A call takes so many times as long.
"""


def report(rows: Sequence[Row], version: str) -> str:
    """The text of cycles.md."""
    parts = [INTRODUCTION]
    for arch, cell in dict.fromkeys((r["arch"], r["cell"]) for r in rows):
        own = [r for r in rows if (r["arch"], r["cell"]) == (arch, cell)]
        parts.append(f"\n## {cell} on {arch}\n\n{table(own)}\n")
        parts.append(f"\nInstructions of the warp with the most, a step:\n\n{kinds_table(own)}\n")
    parts.append(f"\nnvcc {version}.\n")
    return "".join(parts)


def stored_text(rows: Sequence[Row], version: str) -> str:
    """The text of cycles.json, a row a line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f'{{"nvcc": "{version}", "rows": [\n{lines}\n]}}\n'


# ---- the command --------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--arch", nargs="+", default=ARCHS, choices=sorted(launches.DEVICES), help="%(default)s")
    add("--cells", nargs="+", default=CELLS, help="default: %(default)s")
    add("--types", nargs="+", default=tuple(launches.TYPES), choices=tuple(launches.TYPES))
    add("--hidden", nargs="+", type=int, default=HIDDEN, help="H, default: %(default)s")
    add("--rows", nargs="+", type=int, default=ROWS, help="B, default: %(default)s")
    add("--modes", nargs="+", default=tuple(launches.MODES), choices=tuple(launches.MODES))
    add("--algorithm", nargs="+", default=ALGORITHMS,
        help="default: %(default)s")  # fmt: skip
    add("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (%(default)s)")
    add("--compare", action="store_true", help="fail where a kernel is dearer than the stored one")
    add("--store", action="store_true", help=f"write {STORED.name} and its table")
    add("--fetch", action="store_true", help="download cuobjdump and nvdisasm if there are none")
    add("--find", action="store_true", help="only tell whether nvcc and the tools are there")
    add("--table-against", metavar="FILE", type=Path,
        help=f"write {AGAINST.name}: another cycles.json and the stored one")  # fmt: skip
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    chosen = ("arch", "cells", "types", "hidden", "rows", "modes", "algorithm")
    if args.store and any(getattr(args, name) != parser.get_default(name) for name in chosen):
        parser.error("--store is for all problems: leave out the options that choose some")
    return args


def find_tools(fetch: bool) -> str:
    """Nvcc's release; MissingError without it or a disassembler."""
    try:
        home = cuda_toolkit.find_home()
        if home is None:
            raise MissingError("there is no nvcc: set CUDA_HOME to a CUDA toolkit's root")
        version = cuda_toolkit.find_version(home)
    except cuda_toolkit.MissingError as why:
        raise MissingError(str(why)) from None
    try:
        disassembler.find(home)
    except MissingError:
        if not fetch or os.environ.get("CUDA_BINUTILS"):
            raise
        disassembler.fetch()
    return version


def main(argv: Sequence[str] | None = None) -> int:
    """1 if a kernel is dearer or has no figures; 2 where a tool is missing."""
    args = parse_arguments(argv)
    if args.table_against:
        before, after = (json.loads(p.read_text())["rows"] for p in (args.table_against, STORED))
        AGAINST.write_text(before_after(before, after))
        return 0
    start = time.monotonic()
    try:
        version = find_tools(args.fetch)
        if args.find:
            return 0
        asked = problems(
            args.arch, args.cells, args.types, args.hidden, args.rows, args.modes, args.algorithm
        )
        with Progress("cuda-cycles") as progress:
            rows, failed = rows_of(asked, args.jobs, progress)
    except MissingError as why:
        print(f"the kernels' cycles can't be modelled: {why}")
        return MISSING
    except launches.LaunchError as why:
        print(f"FAILED {why}")
        return 1
    text = report(rows, version)
    print(text)
    if args.compare and not args.store and STORED.exists():
        failed += dearer(json.loads(STORED.read_text())["rows"], rows)
    if args.store:
        STORED.write_text(stored_text(rows, version))
        STORED.with_suffix(".md").write_text(text)
    for line in failed:
        print(f"FAILED {line}")
    minutes = (time.monotonic() - start) / 60
    print(f"{len(rows)} problems, {minutes:.1f} min")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

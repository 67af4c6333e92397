"""The recurrent and step kernels in the emulator without torch: right as they are, under
ThreadSanitizer too, and wrong with each of these bugs."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import re
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest
from helpers import emulated

pytestmark = pytest.mark.long  # many compilations, and ThreadSanitizer

KINDS = [("Lstm", "BFloat16"), ("Gru", "float"), ("Gru", "Float16"), ("Lstm", "float")]


@dataclasses.dataclass(frozen=True)
class Bug:
    """A text of a file that is replaced, and what must be said of it."""

    name: str
    file: str
    old: str
    new: str
    said: str
    kind: tuple[str, str] = ("Lstm", "BFloat16")
    sanitizer: bool = False


KERNEL, STEP = "csrc/cuda/recurrent.cuh", "csrc/cuda/step.cu"
WORKERS, PRODUCTS = "csrc/cuda/workers.cuh", "csrc/cuda/products.cuh"
BUGS = [
    Bug(
        "no wait for the sums of other warps",
        WORKERS,
        "warp * Product::kScratch);\n    sync_cta();",
        "warp * Product::kScratch);",
        "wrong",
    ),
    Bug(
        "sums written while others read them",
        WORKERS,
        "} else if (!last || k < this->run_.steps) {",
        "} else if (last && k < this->run_.steps) {",
        "data race",
        sanitizer=True,
    ),
    Bug(
        "no wait for the other CTAs",
        WORKERS,
        "while (load_acquire(arrivals_) < uint32_t(k + 1) * gridDim.x) pause();",
        "",
        "wrong",
    ),
    Bug(
        "a wait for one arrival too few",
        WORKERS,
        "< uint32_t(k + 1) * gridDim.x)",
        "< uint32_t(k + 1) * gridDim.x - 1)",
        "wrong|data race",
        sanitizer=True,
    ),
    Bug(
        "a wait for an arrival that never comes",
        WORKERS,
        "< uint32_t(k + 1) * gridDim.x)",
        "< uint32_t(k + 2) * gridDim.x)",
        "livelock: .* in pause, line",
    ),
    Bug(
        "an arrival before the others have written",
        WORKERS,
        "} else if (!last || k < this->run_.steps) {",
        "} else if (!last) {",
        "wrong|data race",
        sanitizer=True,
    ),
    Bug(
        "no release",
        "tests/emulator/emulator.h",
        "__ATOMIC_RELEASE",
        "__ATOMIC_RELAXED",
        "data race",
        sanitizer=True,
    ),
    Bug(
        "no acquire",
        "tests/emulator/emulator.h",
        "__ATOMIC_ACQUIRE",
        "__ATOMIC_RELAXED",
        "data race",
        sanitizer=True,
    ),
    Bug(
        "one half of the exchange for all steps",
        WORKERS,
        "k % 2 * half_",
        "0 * half_",
        "wrong|data race",
        sanitizer=True,
    ),
    Bug(
        "a barrier in a branch",
        WORKERS,
        "add_release(arrivals_, 1);",
        "add_release(arrivals_, 1), sync_cta();",
        "deadlock.* in sync_cta, line",
    ),
    Bug(
        "a warp's barrier that not all lanes reach",
        PRODUCTS,
        "        sync_warp();\n        unroll<2>",
        "        if (lane < 31) sync_warp();\n        unroll<2>",
        "deadlock|different places",
    ),
    Bug(
        "a thread leaves while others wait",
        KERNEL,
        "w.chunks() - 1);\n\n    for (int i = 0;",
        "w.chunks() - 1);\n    if (threadIdx.x == 7) return;\n\n    for (int i = 0;",
        "left the kernel",
    ),
    Bug(
        "CTAs that wait for each other and may not run together",
        KERNEL,
        "cut.reach == Reach::grid,",
        "false,",
        "livelock",
    ),
    Bug(
        "rows past the batch",
        WORKERS,
        "pair.exists = pair.row < run_.rows && ",
        "pair.exists = ",
        "outside of a buffer|wrong",
    ),
    Bug(
        "units past the layer",
        WORKERS,
        " && pair.unit < run_.hidden_size;",
        ";",
        "outside of a buffer|wrong",
    ),
    Bug(
        "shared memory that nobody has set",
        KERNEL,
        "        w.kept(p, 1) = h;\n      }\n      unroll",
        "      }\n      unroll",
        "wrong",
    ),
    Bug(
        "too little shared memory",
        WORKERS,
        "size_t(kPartials + kScratch + kept * cut.tile_rows * kUnits)",
        "size_t(kPartials + kScratch + kept * cut.tile_rows * kUnits - 4)",
        "outside of a buffer",
    ),
    Bug(
        "padding that nobody has cleared",
        WORKERS,
        "exchange_[i] = S{};",
        ";",
        "wrong",
    ),
    Bug(
        "rows of a fragment that change places",
        PRODUCTS,
        "const S* p = tile + (r + i % 2 * 8) * kPair",
        "const S* p = tile + (r + i / 2 * 8) * kPair",
        "wrong",
    ),
    Bug(
        "half of a sum",
        PRODUCTS,
        "if constexpr (kHalves == 2) sum += shuffle_xor(sum, 16);",
        "",
        "wrong",
        ("Gru", "float"),
    ),
    Bug(
        "rows staged while others still read the last",
        PRODUCTS,
        "      sync_warp();\n    }\n  }",
        "    }\n  }",
        "data race",
        ("Gru", "float"),
        sanitizer=True,
    ),
    Bug(
        "one step too many for rows of some length",
        WORKERS,
        "return t < run_.lengths[row];",
        "return t <= run_.lengths[row];",
        "wrong|outside of a buffer",
    ),
    Bug(
        "the forward order of time in both directions",
        WORKERS,
        "return direction ? run_.steps - 1 - i : i;",
        "return i;",
        "wrong",
    ),
    Bug(
        "threads past the last row",
        STEP,
        "if (i >= rows * per_row) return {-1, 0};",
        "",
        "outside of a buffer|wrong",
    ),
    Bug(
        "wide accesses where there is no room for them",
        STEP,
        "  return fit;",
        "  return true;",
        "outside of a buffer|wrong|misaligned",
    ),
    Bug(
        "wide accesses at odd addresses",
        STEP,
        "fit &= reinterpret_cast<uintptr_t>(p) % (V * sizeof(T)) == 0;",
        "fit &= p != p + 1;",
        "misaligned",
    ),
    Bug(
        "rows of the exchange at odd addresses",
        WORKERS,
        "kShared ? operand_stride<S>(kDepth) : kDepth;",
        "kShared ? operand_stride<S>(kDepth) + 1 : kDepth;",
        "misaligned",
    ),
    Bug(
        "a gradient that is not carried past a row's end",
        STEP,
        "store(s.dh + at, part ? Pack<T, V>{} : dh);",
        "store(s.dh + at, Pack<T, V>{});",
        "wrong",
    ),
    Bug(
        "mail before all boxes are open",
        WORKERS,
        "    sync_cluster();\n",
        "    sync_cta();\n",
        "nobody has opened|data race|wrong",
        sanitizer=True,
    ),
    Bug(
        "no wait for mail",
        WORKERS,
        "    wait_for(box(k, chunk), k / 2 % 2);\n",
        "",
        "wrong|twice|more mail|left the kernel",
    ),
    Bug(
        "a wait for the other phase of a box",
        WORKERS,
        "k / 2 % 2);",
        "(k / 2 + 1) % 2);",
        "wrong|twice|deadlock|more mail|left the kernel",
    ),
    Bug(
        "less mail expected than comes",
        WORKERS,
        "gridDim.x * Sharing::kUnits * this->rows_of(chunk) * sizeof(S);",
        "(gridDim.x - 1) * Sharing::kUnits * this->rows_of(chunk) * sizeof(S);",
        "more mail|wrong|twice|deadlock",
    ),
    Bug(
        "more mail expected than comes",
        WORKERS,
        "((this->rows_of(chunk) + 1) / 2) * 2",
        "((this->rows_of(chunk) + 3) / 2) * 2",
        "deadlock.* in wait_for, line",
    ),
    Bug(
        "a box that is not told what to expect again",
        WORKERS,
        "if (threadIdx.x == 0 && k + 2 < steps_)",
        "if (threadIdx.x == 0 && k + 2 < 0)",
        "deadlock.* in wait_for, line",
    ),
    Bug(
        "one box for both halves",
        WORKERS,
        "return boxes_ + k % 2 * chunks_ + chunk;",
        "return boxes_ + chunk;",
        "twice|more mail|deadlock|wrong",
    ),
    Bug(
        "mail after the last step",
        WORKERS,
        "    if (k == this->run_.steps) return;\n    S* const row =",
        "    S* const row =",
        "left the kernel|more mail",
    ),
    Bug(
        "mail that tells of this lane's reads alone",
        WORKERS,
        "    sync_warp();  // whoever gets",
        "    // whoever gets",
        "data race",
        sanitizer=True,
    ),
    Bug(
        "sums of one chunk written while others read those of another",
        WORKERS,
        "if (this->chunks() > 1) sync_cta();",
        "",
        "wrong|data race",
        sanitizer=True,
    ),
    Bug(
        "gradients multiplied before all are there",
        WORKERS,
        "    if (k == this->run_.steps) return;\n    sync_cta();",
        "    if (k == this->run_.steps) return;",
        "wrong|data race",
        sanitizer=True,
    ),
    Bug(
        "gradients written while others multiply those of the step before",
        WORKERS,
        "operands_ + (k % 2 * this->run_.tile_rows + row)",
        "operands_ + (0 * this->run_.tile_rows + row)",
        "wrong|data race",
        sanitizer=True,
    ),
    Bug(
        "rows that nobody sends are waited for",
        WORKERS,
        "return rows < Sharing::kRows ? rows : Sharing::kRows;",
        "return Sharing::kRows;",
        "deadlock.* in wait_for, line",
    ),
    Bug(
        "sums where weights are still on their way",
        WORKERS,
        "sync_cta();  // that was",
        "// that was",
        "data race",
        sanitizer=True,
    ),
    Bug(
        "two rows' sums that change places",
        WORKERS,
        "odd ? uneven : even, odd ? even : uneven",
        "even, uneven",
        "wrong",
        ("Gru", "float"),
    ),
    Bug(
        "products sent to the wrong CTA",
        WORKERS,
        "const unsigned cta = first / Sharing::kUnits;",
        "const unsigned cta = first / Sharing::kUnits ^ 1;",
        "wrong|deadlock|more mail",
    ),
    Bug(
        "words of a row that change places",
        WORKERS,
        "lane % kWords * kOf + i * kPerWord)",
        "lane % kWords * kOf + (i ^ 1) * kPerWord)",
        "wrong",
        ("Gru", "float"),
    ),
    Bug(
        "products of all CTAs but the last",
        WORKERS,
        "cta < gridDim.x ? at[",
        "cta + 1 < gridDim.x ? at[",
        "wrong",
        ("Gru", "Float16"),
    ),
]


EMULATOR = "tests/emulator"
# The files of the checking program, whether ThreadSanitizer may see them (it must not see the
# emulator's own work), and on which of the files above they depend.
PARTS = {
    "check": (
        f"{EMULATOR}/check.cpp",
        True,
        {KERNEL, WORKERS, PRODUCTS, f"{EMULATOR}/emulator.h"},
    ),
    "step": (STEP, True, {STEP, f"{EMULATOR}/emulator.h"}),
    "cut": ("csrc/cuda/cut.cpp", False, set[str]()),
    "emulator": (f"{EMULATOR}/emulator.cpp", False, {f"{EMULATOR}/emulator.h"}),
}


def compile_part(part: str, root: Path, kind: tuple[str, str], sanitizer: bool) -> Path:
    """The object file of one part, from the sources in `root`."""
    source, watched, _ = PARTS[part]
    flags = [*emulated.COMMON, "-O1", "-std=c++17", "-fno-tree-loop-distribute-patterns"]
    flags += emulated.ALIGNED
    flags += [f"-I{root / p}" for p in ("csrc/cuda", "csrc", EMULATOR)]
    flags += [f"-DFUSEDRNN_CELL={kind[0]}", f"-DFUSEDRNN_OPERAND={kind[1]}"]
    flags += ["-fsanitize=thread"] if sanitizer and watched else []
    output = Path(tempfile.mkdtemp(dir=root / "build")) / f"{part}.o"
    command = [*emulated.COMPILER, *flags, "-x", "c++", "-c", str(root / source)]
    subprocess.run([*command, "-o", str(output)], check=True)
    return output


class Builder:
    """Builds checking programs; what has no bug in it once for all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clean = folder / "clean"
        self.copy(self.clean)
        self.pool = concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        self.parts: dict[object, Path] = {}
        self.lock = threading.Lock()
        self.programs = {
            bug.name: self.pool.submit(self.planted, i, bug) for i, bug in enumerate(BUGS)
        }

    @staticmethod
    def copy(root: Path) -> None:
        for name in ("csrc", EMULATOR):
            shutil.copytree(emulated.ROOT / name, root / name)
        (root / "build").mkdir()

    def clean_part(self, part: str, kind: tuple[str, str], sanitizer: bool) -> Path:
        of_all = part in ("cut", "emulator")
        key = (part, *(() if of_all else (kind if part == "check" else (), sanitizer)))
        with self.lock:
            if key not in self.parts:
                self.parts[key] = compile_part(part, self.clean, kind, sanitizer)
            return self.parts[key]

    def program(
        self, root: Path, kind: tuple[str, str], sanitizer: bool, file: str | None = None
    ) -> Path:
        """The program of one cell and type; `file` is what differs from the clean sources."""
        objects = [
            compile_part(part, root, kind, sanitizer)
            if file in depends
            else self.clean_part(part, kind, sanitizer)
            for part, (_, _, depends) in PARTS.items()
        ]
        program = Path(tempfile.mkdtemp(dir=root / "build")) / "check"
        link = ["-fsanitize=thread"] if sanitizer else []
        command = [*emulated.COMPILER, *map(str, objects), *link, "-o", str(program)]
        subprocess.run(command, check=True)
        return program

    def planted(self, i: int, bug: Bug) -> Path:
        root = self.folder / str(i)
        self.copy(root)
        path = root / bug.file
        text = path.read_text()
        assert bug.old in text, f"the text of {bug.name!r} is no longer in {bug.file}"
        path.write_text(text.replace(bug.old, bug.new))
        return self.program(root, bug.kind, bug.sanitizer, bug.file)


def run(program: Path, seeds: int, left_out: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), str(seeds), left_out],
        env={**emulated.ENVIRONMENT, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="session")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_right_as_they_are(kind: tuple[str, str], builder: Builder) -> None:
    result = run(builder.program(builder.clean, kind, False), 5)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("kind", KINDS[:2], ids="-".join)
def test_no_race(kind: tuple[str, str], builder: Builder) -> None:
    # A step's threads have nothing to do with each other.
    result = run(builder.program(builder.clean, kind, True), 1, "step")
    assert result.returncode == 0, result.stdout + result.stderr[:4000]
    assert "WARNING: ThreadSanitizer" not in result.stderr


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted(bug: Bug, builder: Builder) -> None:
    program = builder.programs[bug.name].result()
    result = run(program, 2, "step") if bug.sanitizer else run(program, 10)
    said = result.stdout + result.stderr
    assert result.returncode != 0, f"not seen: {bug.name}"
    assert re.search(bug.said, said), said[:3000]

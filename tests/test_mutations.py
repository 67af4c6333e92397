"""Mutation tests for the CUDA kernels, in the emulator without torch.

The kernels are right, also under ThreadSanitizer. Each bug here makes the program fail.
"""

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

KINDS = [
    ("Lstm", "BFloat16"),
    ("Gru", "float"),
    ("Gru", "Float16"),
    ("Lstm", "float"),
    ("RnnTanh", "BFloat16"),
    ("RnnRelu", "float"),
]


@dataclasses.dataclass(frozen=True)
class Bug:
    """A mutation: a text in a file and its replacement.

    Attributes:
        said: a pattern for the failure's report.
        kind: the cell and the type.
        sanitizer: whether only ThreadSanitizer finds it.
    """

    name: str
    file: str
    old: str
    new: str
    said: str
    kind: tuple[str, str] = ("Lstm", "BFloat16")
    sanitizer: bool = False


FORWARD = "csrc/cuda/persistent_forward.cuh"
KERNELS = "csrc/cuda/persistent_kernels.cuh"
EXCHANGE, GRID = "csrc/cuda/exchange.cuh", "csrc/cuda/exchange_grid.cuh"
CTA, CLUSTER = "csrc/cuda/exchange_cta.cuh", "csrc/cuda/exchange_cluster.cuh"
GEMM, STEP = "csrc/cuda/mma.cuh", "csrc/cuda/stepwise_kernels.cu"


def endless(algorithm: str, backward: str = "(_backward)?") -> str:
    """The error of a wait for another CTA that does not end, of an Lstm in BFloat16."""
    return (
        rf"fusedrnn: lstm{backward}, {algorithm}, BFloat16, hidden size \d+, batch \d+: "
        "a CTA waited 10 s for another CTA"
    )


BUGS = [
    Bug(
        "no wait for partial sums of other warps",
        EXCHANGE,
        "warp * Gemm::kScratchFloats);\n    sync_cta();",
        "warp * Gemm::kScratchFloats);",
        "wrong",
    ),
    Bug(
        "partial sums written while others read them",
        GRID,
        "if constexpr (!Traits::kInFragments) sync_cta();",
        "",
        "data race",
        ("Gru", "float"),
        sanitizer=True,
    ),
    Bug(
        "no barrier between warps that trade their sums",
        EXCHANGE,
        "    sync_threads(1 + group(), kSplits * kWarp);\n",
        "",
        "wrong|data race",
        sanitizer=True,
    ),
    Bug(
        "sums traded through one buffer",
        EXCHANGE,
        "    traded_ += is_second_ ? -kTraded : kTraded;\n",
        "",
        "wrong|data race",
        sanitizer=True,
    ),
    Bug(
        "sums traded where weights are still being loaded",
        EXCHANGE,
        "      sync_cta();  // the traded",
        "      // the traded",
        "data race",
        sanitizer=True,
    ),
    Bug(
        "a matrix of weights overwritten while others read it",
        GEMM,
        "          set(group, some * kAhead + i, w);\n          sync_warp();\n",
        "          set(group, some * kAhead + i, w);\n",
        "data race",
        sanitizer=True,
    ),
    Bug(
        "no wait for the words of other CTAs",
        GRID,
        "if (largest_of_all == kMissing) {",
        "if (false) {",
        "wrong",
    ),
    Bug(
        "a wait for one word of four",
        GRID,
        "return larger(larger(w.word[0], w.word[1]), larger(w.word[2], w.word[3]));",
        "return w.word[2];",
        "wrong",
    ),
    Bug(
        "words that are never cleared",
        GRID,
        "store_relaxed(kMissing, word(k - 2, v));",
        "",
        "wrong",
    ),
    Bug(
        "words cleared while others still want them",
        GRID,
        "store_relaxed(kMissing, word(k - 2, v));",
        "store_relaxed(kMissing, word(k - 1, v));",
        endless("persistent_grid", ""),
    ),
    Bug(
        "words cleared just before they are stored again",
        GRID,
        "store_relaxed(kMissing, word(k - 2, v));",
        "store_relaxed(kMissing, word(k + 1, v));",
        "wrong",
    ),
    Bug(
        "no fence behind cleared words",
        GRID,
        "if (chunk + 1 == this->chunks() && k % kFenceSteps == 0) fence_device();",
        "",
        "wrong",
    ),
    Bug(
        "fences that are too far apart",
        GRID,
        "k % kFenceSteps == 0",
        "k % (3 * kFenceSteps) == 0",
        "wrong",
    ),
    Bug(
        "too few slots",
        GRID,
        "unsigned(k) % kExchangeSlots",
        "unsigned(k) % 3",
        "wrong",
    ),
    Bug(
        "one slot for all steps",
        GRID,
        "unsigned(k) % kExchangeSlots",
        "unsigned(k) % 1",
        endless("persistent_grid", ""),
    ),
    Bug(
        "a wait for a slot that nobody fills",
        GRID,
        "PolledOperand<Operand>(slot(k) +",
        "PolledOperand<Operand>(slot(k + 1) +",
        endless("persistent_grid", "") + ".* in poll, line",
    ),
    Bug(
        "a store that is lost",
        GRID,
        "store_relaxed(words[v], word(k, v));",
        "if (blockIdx.x != 1 || k != 2) store_relaxed(words[v], word(k, v));",
        endless("persistent_grid", ""),
    ),
    Bug(
        "a store of the backward pass that is lost",
        GRID,
        "store_relaxed(words[v], word(k, v));",
        "if (kValues == 1 || v != 3 || k != 2) store_relaxed(words[v], word(k, v));",
        endless("persistent_grid", "_backward"),
    ),
    Bug(
        "a NaN that looks like a missing word",
        GRID,
        "return bits < kMissing ? bits : kMissing - 1;",
        "return bits;",
        "a CTA waited 10 s for another CTA",
        ("RnnRelu", "float"),
    ),
    Bug(
        "a wait for rows past the batch",
        GRID,
        "row < rows_ ? row : rows_ - 1",
        "row",
        endless("persistent_grid", ""),
    ),
    Bug(
        "a wait for units that no CTA has",
        GRID,
        "if (j < parts) to = load_relaxed",
        "to = load_relaxed",
        endless("persistent_grid", ""),
    ),
    Bug(
        "a wait for units that no CTA has, without tensor cores",
        GRID,
        "      if (first_k_ + k >= row_k_) return w;\n",
        "",
        "a CTA waited 10 s for another CTA",
        ("Gru", "float"),
    ),
    Bug(
        "operands in another order than the weights",
        GRID,
        "unit / n * n * kValues + v * n + unit % n",
        "v * (Traits::kK / kValues) + unit",
        "wrong|a CTA waited 10 s for another CTA",
    ),
    Bug(
        "the words of another row",
        GRID,
        "from[n] = at(8 * n + lane / 4, k);",
        "from[n] = at(8 * n + (lane / 4 ^ 1), k);",
        "wrong",
    ),
    Bug(
        "one buffer of a cluster's exchange for all steps",
        CLUSTER,
        "k % 2 * buffer_stride_",
        "0 * buffer_stride_",
        "wrong|data race",
        sanitizer=True,
    ),
    Bug(
        "a warp's barrier that not all lanes reach",
        GEMM,
        "        sync_warp();\n        unroll<2>",
        "        if (lane < 31) sync_warp();\n        unroll<2>",
        "(deadlock|waited 10 s for another CTA).* in sync_warp, line|different places",
    ),
    Bug(
        "a thread leaves while others wait",
        FORWARD,
        "e.chunks() - 1);\n\n    for (int i = 0;",
        "e.chunks() - 1);\n    if (threadIdx.x == 7) return;\n\n    for (int i = 0;",
        "left the kernel",
    ),
    Bug(
        "CTAs that wait for each other and need not be resident",
        KERNELS,
        "grid.resident = plan.algorithm == Algorithm::persistent_grid;",
        "grid.resident = false;",
        endless("persistent_grid"),
    ),
    Bug(
        "rows past the batch",
        EXCHANGE,
        "pair.exists = pair.row < params_.rows && ",
        "pair.exists = ",
        "outside of a buffer|wrong",
    ),
    Bug(
        "units past the layer",
        EXCHANGE,
        " && pair.unit < params_.hidden_size;",
        ";",
        "outside of a buffer|wrong",
    ),
    Bug(
        "shared memory that nobody has set",
        FORWARD,
        "        e.carried(p, kH) = h;\n      }\n      unroll",
        "      }\n      unroll",
        "wrong",
    ),
    Bug(
        "too little shared memory",
        KERNELS,
        "grid.shared = size_t(storage.bytes);",
        "grid.shared = size_t(storage.bytes) - 16;",
        "outside of a buffer|no address in shared memory",
    ),
    Bug(
        "padding that nobody has cleared",
        CTA,
        "operands_[i] = Element{};",
        ";",
        "wrong",
    ),
    Bug(
        "padding of a cluster's CTA that nobody has cleared",
        CLUSTER,
        "operands_[i] = Element{};",
        ";",
        "wrong",
    ),
    Bug(
        "rows of a fragment that change places",
        GEMM,
        "const Element* p = tile + (r + i % 2 * 8) * kPairK",
        "const Element* p = tile + (r + i / 2 * 8) * kPairK",
        "wrong",
    ),
    Bug(
        "half of a sum",
        GEMM,
        "if constexpr (kLanesPerRow == 2) sum += shuffle_xor(sum, 16);",
        "",
        "wrong",
        ("Gru", "float"),
    ),
    Bug(
        "rows staged while others still read the last",
        GEMM,
        "      sync_warp();\n    }\n  }",
        "    }\n  }",
        "data race",
        ("Gru", "float"),
        sanitizer=True,
    ),
    Bug(
        "one step too many for rows of some length",
        EXCHANGE,
        "return t < params_.lengths[row];",
        "return t <= params_.lengths[row];",
        "wrong|outside of a buffer",
    ),
    Bug(
        "the forward order of time in both directions",
        EXCHANGE,
        "return direction ? params_.steps - 1 - i : i;",
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
        CTA,
        "operand_stride<typename Base::Element>(Base::kK);",
        "operand_stride<typename Base::Element>(Base::kK) + 1;",
        "misaligned",
    ),
    Bug(
        "a gradient that is not carried past a row's end",
        STEP,
        "store(p.dh + at, active ? Vector<Accum, V>{} : dh);",
        "store(p.dh + at, Vector<Accum, V>{});",
        "wrong",
    ),
    Bug(
        "stores before all barriers are initialised",
        CLUSTER,
        "    sync_cluster();\n",
        "    sync_cta();\n",
        "was not initialised|data race|wrong",
        sanitizer=True,
    ),
    Bug(
        "no wait for a transaction barrier",
        CLUSTER,
        "    at(k, chunk)->wait(k / 2 % 2, waiter);\n",
        "",
        "wrong|twice|more bytes|left the kernel",
    ),
    Bug(
        "a wait for the other phase of a barrier",
        CLUSTER,
        "k / 2 % 2, waiter);",
        "(k / 2 + 1) % 2, waiter);",
        "wrong|twice|waited|more bytes|left the kernel",
    ),
    Bug(
        "fewer bytes announced than sent",
        CLUSTER,
        "gridDim.x * Traits::kUnits * this->rows_of(chunk) * sizeof(Element);",
        "(gridDim.x - 1) * Traits::kUnits * this->rows_of(chunk) * sizeof(Element);",
        "more bytes|wrong|twice|waited",
    ),
    Bug(
        "more bytes announced than sent",
        CLUSTER,
        "((this->rows_of(chunk) + 1) / 2) * 2",
        "((this->rows_of(chunk) + 3) / 2) * 2",
        endless("persistent_cluster") + ".* in wait, line",
    ),
    Bug(
        "bytes of one CTA that are never sent",
        CLUSTER,
        "      st_async(words, row + lane % kStores",
        "      if (blockIdx.x != 1) st_async(words, row + lane % kStores",
        endless("persistent_cluster", ""),
    ),
    Bug(
        "a barrier whose next bytes are not announced",
        CLUSTER,
        "if (threadIdx.x == 0 && k + 2 < steps_)",
        "if (threadIdx.x == 0 && k + 2 < 0)",
        endless("persistent_cluster") + ".* in wait, line",
    ),
    Bug(
        "one barrier for both buffers",
        CLUSTER,
        "return barriers_ + k % 2 * chunks_ + chunk;",
        "return barriers_ + chunk;",
        "twice|more bytes|waited|wrong",
    ),
    Bug(
        "stores after the last step",
        CLUSTER,
        "    if (k == this->params_.steps) return;\n    Element* const row =",
        "    Element* const row =",
        "left the kernel|more bytes",
    ),
    Bug(
        "stores ordered after this lane's reads alone",
        CLUSTER,
        "    sync_warp();  // the receiver",
        "    // the receiver",
        "data race",
        sanitizer=True,
    ),
    Bug(
        "partial sums of one chunk written while others read those of another",
        CLUSTER,
        "if (this->chunks() > 1) sync_cta();",
        "",
        "wrong|data race",
        sanitizer=True,
    ),
    Bug(
        "gradients multiplied before all are there",
        CLUSTER,
        "    if (k == this->params_.steps) return;\n    sync_cta();",
        "    if (k == this->params_.steps) return;",
        "wrong|data race",
        sanitizer=True,
    ),
    Bug(
        "gradients written while others multiply those of the step before",
        CLUSTER,
        "operands_ + (k % 2 * this->params_.tile_rows + row)",
        "operands_ + (0 * this->params_.tile_rows + row)",
        "wrong|data race",
        sanitizer=True,
    ),
    Bug(
        "rows that nobody sends are waited for",
        EXCHANGE,
        "return rows < Traits::kChunkRows ? rows : Traits::kChunkRows;",
        "return Traits::kChunkRows;",
        endless("persistent_cluster") + ".* in wait, line",
    ),
    Bug(
        "partial sums where weights are still being loaded",
        EXCHANGE,
        "sync_cta();  // the partial sums",
        "// the partial sums",
        "data race",
        sanitizer=True,
    ),
    Bug(
        "two rows' partial dh that change places",
        CLUSTER,
        "is_swapped ? odd : even, is_swapped ? even : odd",
        "even, odd",
        "wrong",
        ("Gru", "float"),
    ),
    Bug(
        "partial dh sent to the wrong CTA",
        CLUSTER,
        "const unsigned cta = first / Traits::kUnits;",
        "const unsigned cta = first / Traits::kUnits ^ 1;",
        "wrong|waited|more bytes",
    ),
    Bug(
        "words of a row that change places",
        CLUSTER,
        "lane % kStores * kPerStore + i * kPerWord)",
        "lane % kStores * kPerStore + (i ^ 1) * kPerWord)",
        "wrong",
        ("Gru", "float"),
    ),
    Bug(
        "partial dh of all CTAs but the last",
        CLUSTER,
        "cta < gridDim.x ? at[",
        "cta + 1 < gridDim.x ? at[",
        "wrong",
        ("Gru", "Float16"),
    ),
]


EMULATOR = "tests/emulator"
# The checking program's files. For each: whether ThreadSanitizer instruments it, and the mutated
# files it depends on. The emulator's own work must not be instrumented.
PARTS = {
    "check": (
        f"{EMULATOR}/check.cpp",
        True,
        {FORWARD, KERNELS, EXCHANGE, CTA, GRID, CLUSTER, GEMM, f"{EMULATOR}/emulator.h"},
    ),
    "step": (STEP, True, {STEP, f"{EMULATOR}/emulator.h"}),
    "plan": ("csrc/cuda/plan.cpp", False, set[str]()),
    "emulator": (f"{EMULATOR}/emulator.cpp", False, {f"{EMULATOR}/emulator.h"}),
}


def compile_part(part: str, root: Path, kind: tuple[str, str], sanitizer: bool) -> Path:
    """One part's object file, from the sources in `root`."""
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
    """Builds checking programs. Files without a mutation are compiled once."""

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
        of_all = part in ("plan", "emulator")
        key = (part, *(() if of_all else (kind if part == "check" else (), sanitizer)))
        with self.lock:
            if key not in self.parts:
                self.parts[key] = compile_part(part, self.clean, kind, sanitizer)
            return self.parts[key]

    def program(
        self, root: Path, kind: tuple[str, str], sanitizer: bool, file: str | None = None
    ) -> Path:
        """The program for one cell and type; only `file` differs from the clean sources."""
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
    # A stepwise kernel's threads do not interact.
    result = run(builder.program(builder.clean, kind, True), 1, "stepwise")
    assert result.returncode == 0, result.stdout + result.stderr[:4000]
    assert "WARNING: ThreadSanitizer" not in result.stderr


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted(bug: Bug, builder: Builder) -> None:
    program = builder.programs[bug.name].result()
    result = run(program, 2, "stepwise") if bug.sanitizer else run(program, 10)
    said = result.stdout + result.stderr
    assert result.returncode != 0, f"not seen: {bug.name}"
    assert re.search(bug.said, said), said[:3000]

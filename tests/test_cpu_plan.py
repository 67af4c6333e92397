"""The split of a layer over a CPU's threads, as a table for 1 to 64 cores."""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parent
COMPILER = os.environ.get("CXX", "c++")
AVX2, AVX512 = (8, 3), (16, 6)  # lanes, rows of a tile
SMALL = (32 << 10, 512 << 10, 32 << 20)  # a Zen 3's caches
LARGE = (32 << 10, 1 << 20, 32 << 20)  # a Zen 4's
THREADS = (1, 2, 3, 4, 6, 8, 16, 32, 64)


class Plan(NamedTuple):
    members: int
    groups: int
    gemm: int
    cycles: float


class Shape(NamedTuple):
    rows: int
    steps: int
    input: int
    hidden: int


SHAPES = [
    Shape(1, 100, 256, 256),
    Shape(1, 50, 1024, 1024),
    Shape(2, 50, 256, 256),
    Shape(4, 50, 256, 256),
    Shape(8, 50, 128, 128),
    Shape(16, 100, 128, 128),
    Shape(32, 50, 512, 512),
    Shape(64, 100, 256, 256),
    Shape(256, 20, 64, 64),
    Shape(4, 1000, 32, 32),
    Shape(32, 1, 256, 256),
    Shape(1, 1, 256, 256),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("plan") / "plan"
    sources = [TESTS / "kernels/plan.cpp", TESTS.parent / "csrc/cpu/plan.cpp"]
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", *map(str, sources), "-o", str(output)], check=True
    )
    return output


def plans(program: Path, rows: list[tuple[int, ...]]) -> list[Plan]:
    """Each row: a shape, lanes, tile rows, threads, caches."""
    arguments = [str(n) for row in rows for n in row]
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=True)
    found = [line.split() for line in done.stdout.splitlines()]
    return [Plan(int(m), int(g), int(x), float(c)) for m, g, x, c in found]


@pytest.mark.parametrize(("target", "caches"), [(AVX2, SMALL), (AVX512, LARGE)])
def test_every_split_is_possible(
    program: Path, target: tuple[int, int], caches: tuple[int, int, int]
) -> None:
    cases = list(itertools.product(SHAPES, THREADS))
    found = plans(program, [(*shape, *target, threads, *caches) for shape, threads in cases])
    for (shape, threads), plan in zip(cases, found, strict=True):
        assert 1 <= plan.members * plan.groups <= threads, (shape, threads, plan)
        assert plan.groups == 1 or 2 * plan.groups <= shape.rows, (shape, threads, plan)
        assert plan.members <= -(-shape.hidden // target[0]), (shape, threads, plan)


@pytest.mark.parametrize(("target", "caches"), [(AVX2, SMALL), (AVX512, LARGE)])
def test_more_threads_are_never_slower(
    program: Path, target: tuple[int, int], caches: tuple[int, int, int]
) -> None:
    """By the model; and the GEMM for the input does not depend on them, as bits would."""
    for shape in SHAPES:
        threads = (1, 2, 4, 8, 16, 32, 64)
        found = plans(program, [(*shape, *target, n, *caches) for n in threads])
        for before, after in itertools.pairwise(found):
            assert after.cycles <= before.cycles
            assert after.gemm == before.gemm


def test_table(program: Path) -> None:
    """Members, groups and the GEMM for shapes whose times were measured on two cores."""
    expected = {
        # Weights of a core's part fit its L2 where all of them do not.
        (Shape(8, 50, 128, 128), 2): (2, 1, 0),
        (Shape(4, 50, 256, 256), 2): (2, 1, 1),
        (Shape(1, 50, 1024, 1024), 2): (2, 1, 1),
        # Too little work for a second thread.
        (Shape(1, 1, 64, 64), 2): (1, 1, 0),
        (Shape(1, 5, 6, 6), 64): (1, 1, 1),
        # A barrier in each of many short steps costs more than the rows do.
        (Shape(4, 1000, 32, 32), 2): (1, 2, 0),
        (Shape(256, 20, 64, 64), 2): (1, 2, 0),
        # Both ways on many cores.
        (Shape(64, 100, 256, 256), 64): (8, 8, 0),
    }
    rows = [(*shape, *AVX2, threads, *SMALL) for shape, threads in expected]
    for key, plan in zip(expected, plans(program, rows), strict=True):
        assert plan[:3] == expected[key], (key, plan)

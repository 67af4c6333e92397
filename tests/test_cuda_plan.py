"""csrc/cuda/plan.h: every plan is the cheapest of all that the device can run, by the one model.

The plans and their costs come from the library's own functions, called without torch or a GPU.
Which launches a device can run is derived here once more.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import plan as table
from benchmarks.cases import CASES, CUDA_CASES, Case
from benchmarks.measure import MODES
from tools import cuda_plan
from tools.cuda_plan import A100, ALGORITHMS, H100, ROOT, Device, Library, Plan, Problem

NO_CLUSTERS = replace(H100, name="H100 that refuses clusters", processing_clusters=())
# Its answers must not matter: it has no clusters.
ASKED_IN_VAIN = replace(A100, name="A100 that is asked", processing_clusters=(16,) * 6)
# Room for clusters of 8 CTAs, but not of 16.
SMALL_CLUSTERS = replace(H100, name="H100 with clusters of 8", processing_clusters=(14,) * 8)
LITTLE_SHARED = replace(H100, name="H100 with little shared memory", shared_limit=32 * 1024)
STEPWISE = Plan()


@pytest.fixture(scope="module")
def library() -> Library:
    return cuda_plan.library()


# ---- which launches a device can run ------------------------------------------------------------


def divide_up(a: int, b: int) -> int:
    return -(-a // b)


def has_half_operands(p: Problem) -> bool:
    return p.type == "tf32" and not p.backward and p.starts_at_zero and p.cell != "rnn_relu"


def kernels(p: Problem) -> Iterator[tuple[Plan, int, int]]:
    """Every kernel with room for the units, without its rows; a tile's row step and most rows."""
    if p.type == "float64" or p.has_projection or not p.B:
        return
    tensor_cores, half_operands = p.type != "ieee", has_half_operands(p)
    few_bytes = p.type in ("bfloat16", "float16") or half_operands
    units = 128 if few_bytes else 64
    for half in (False, True):
        room = units // 2 if half else units
        for few in (False, True):
            is_cta = tensor_cores or not (half or few)
            if room >= p.H and is_cta and not (half and not few_bytes):
                yield (
                    Plan("persistent_cta", half, half_operands, few, 1, 0, 0, room),
                    1,
                    256 // room if few else 8,
                )
            if 8 * room >= p.H:
                ctas, rows = divide_up(p.H, 16), 8 if few else 16
                yield (
                    Plan("persistent_grid", half, half_operands, few, ctas, 0, 0, 8 * room),
                    rows,
                    8 if few else 128,
                )
        if 4 * room >= p.H and tensor_cores and p.device.capability >= 90:
            ctas = max(2, divide_up(p.H, 32))
            yield (
                Plan("persistent_cluster", half, half_operands, False, ctas, 0, 0, 4 * room),
                8,
                64,
            )


def has_room(p: Problem, plan: Plan) -> bool:
    if plan.algorithm == "persistent_grid":
        return plan.groups * plan.ctas * p.directions <= p.device.multiprocessors
    return plan.algorithm != "persistent_cluster" or p.device.active_clusters(plan.ctas) > 0


def launches(p: Problem, library: Library) -> Iterator[Plan]:
    """Every launch that the device can run."""
    yield STEPWISE
    for kernel, row_step, most in kernels(p):
        for rows in range(row_step, most + 1, row_step):
            plan = replace(kernel, tile_rows=rows, groups=divide_up(p.B, rows))
            if rows - row_step < p.B and plan.groups < 1 << 16 and has_room(p, plan):
                bytes = library.shared_bytes(p, plan)
                assert bytes > 0
                if bytes <= p.device.shared_limit:
                    yield plan


def check(p: Problem, library: Library) -> Plan:
    """The plan is valid, and no launch is cheaper."""
    chosen, all_plans = library.plan(p), list(launches(p, library))
    assert chosen in all_plans
    cost = library.cost(p, chosen)
    cheapest = min(all_plans, key=lambda other: library.cost(p, other).us)
    assert cost.us == library.cost(p, cheapest).us, f"{chosen} for {p}, not {cheapest}"
    if chosen == STEPWISE:
        return chosen
    # Each row is in one tile, and each tile has rows.
    assert chosen.tile_rows * (chosen.groups - 1) < p.B <= chosen.tile_rows * chosen.groups
    assert chosen.max_units >= p.H
    assert chosen.ctas <= 16 or chosen.algorithm == "persistent_grid"
    assert cost.us < library.cost(p, STEPWISE).us
    return chosen


# ---- the cheapest -------------------------------------------------------------------------------

TYPES = {"float32": "tf32"}
DEVICES = (A100, ASKED_IN_VAIN, H100, NO_CLUSTERS, SMALL_CLUSTERS, LITTLE_SHARED)
ROWS = (1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 100, 132, 133, 256, 600, 1057, 2048)
UNITS = (1, 6, 31, 33, 64, 65, 100, 128, 129, 200, 256, 257, 512, 513, 768, 1024, 1025, 2048)


@pytest.mark.parametrize("case", CASES + CUDA_CASES, ids=lambda case: case.name)
def test_benchmark_cases(case: Case, library: Library) -> None:
    cell = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[case.cell.removesuffix("Cell")]
    p = Problem(
        case.T,
        case.B,
        case.H,
        TYPES.get(case.dtype, case.dtype),
        cell,
        case.directions,
        has_projection=case.proj_size > 0,
        starts_at_zero=case.T > 1,
    )
    for device in (A100, H100):
        for saves, backward in ((False, False), (True, False), (False, True)):
            check(replace(p, device=device, saves=saves, backward=backward), library)


def random_problems(count: int) -> Iterator[Problem]:
    rng = random.Random(1)
    for _ in range(count):
        yield Problem(
            T=rng.choice((1, 2, 3, 4, 10, 100, 1000, 100_000)),
            B=rng.choice((rng.choice(ROWS), rng.randint(1, 2048))),
            H=rng.choice((rng.choice(UNITS), rng.randint(1, 2048), rng.randint(1, 512))),
            type=rng.choice(tuple(cuda_plan.BYTES)),
            cell=rng.choice(cuda_plan.CELLS),
            directions=rng.choice((1, 2)),
            backward=rng.random() < 0.4,
            saves=rng.random() < 0.5,
            starts_at_zero=rng.random() < 0.7,
            device=rng.choice(DEVICES),
        )


def test_sweep(library: Library) -> None:
    """All sizes, types, cells, directions, passes and devices."""
    chosen = set()
    for p in random_problems(2000):
        found = check(p, library)
        chosen.add((found.algorithm, found.half_registers, found.few_rows))
    # The sweep reaches every kernel of every algorithm.
    expected = {("stepwise", False, False)}
    expected |= {("persistent_cluster", half, False) for half in (False, True)}
    expected |= {
        (algorithm, half, few)
        for algorithm in ("persistent_cta", "persistent_grid")
        for half in (False, True)
        for few in (False, True)
    }
    assert chosen == expected


def test_steps_cost(library: Library) -> None:
    """More steps never cost less, and a plan stays the cheapest once stepwise has lost."""
    for p in random_problems(300):
        costs = []
        for T in (1, 2, 3, 4, 5, 7, 10, 20, 50, 100, 300, 1000, 3000, 10_000):
            longer = replace(p, T=T)
            costs.append(library.cost(longer, library.plan(longer)).us)
        assert costs == sorted(costs)
        assert costs[0] > 0


def test_costs_of_one_plan(library: Library) -> None:
    """A plan's cost is that of its launches, prologues and steps; more rows never cost less."""
    for p in random_problems(300):
        for plan in launches(p, library):
            cost = library.cost(p, plan)
            assert math.isclose(cost.us, cost.fixed_us + p.T * cost.step_us, rel_tol=1e-12)
            assert cost.step_us > 0
            assert cost.fixed_us >= 0
            if plan.algorithm == "persistent_cta":
                later = replace(p, B=p.B + plan.tile_rows)
                more = replace(plan, groups=plan.groups + 1)
                assert library.cost(later, more).us >= cost.us


# ---- expected plans -----------------------------------------------------------------------------


def problem(text: str, steps: int, rows: int, hidden: int, device: Device = H100) -> Problem:
    """`text`: a type, and any of: h0, two (directions), backward."""
    type, *words = text.split()
    return Problem(
        steps,
        rows,
        hidden,
        type,
        directions=2 if "two" in words else 1,
        backward="backward" in words,
        starts_at_zero="h0" not in words,
        device=device,
    )


HALF, FEW = "half registers", "few rows"
EXPECTED = [
    # One CTA a tile: as few rows in each as the multiprocessors allow.
    ("bfloat16", 100, 1, 64, H100, f"cta, 1 x 1 CTAs, 1 rows, {HALF}, {FEW}"),
    ("bfloat16", 100, 64, 64, H100, f"cta, 64 x 1 CTAs, 1 rows, {HALF}, {FEW}"),
    ("bfloat16", 100, 256, 64, H100, f"cta, 128 x 1 CTAs, 2 rows, {HALF}, {FEW}"),
    ("bfloat16", 100, 64, 128, A100, f"cta, 64 x 1 CTAs, 1 rows, {FEW}"),
    ("bfloat16", 100, 600, 128, H100, "cta, 120 x 1 CTAs, 5 rows"),
    ("bfloat16", 100, 600, 128, A100, "cta, 100 x 1 CTAs, 6 rows"),
    ("bfloat16", 100, 2048, 128, H100, "cta, 256 x 1 CTAs, 8 rows"),  # two waves
    ("bfloat16 backward", 100, 64, 64, H100, f"cta, 64 x 1 CTAs, 1 rows, {HALF}, {FEW}"),
    ("bfloat16 backward", 100, 1000, 64, H100, f"cta, 125 x 1 CTAs, 8 rows, {HALF}"),
    ("bfloat16 backward", 100, 64, 128, A100, f"cta, 64 x 1 CTAs, 1 rows, {FEW}"),
    # Clusters: as many as are active at the same time, in two waves, or with tiles of more rows.
    ("bfloat16", 100, 64, 129, H100, f"cluster, 8 x 5 CTAs, 8 rows, {HALF}"),
    ("bfloat16", 100, 1, 256, H100, f"cluster, 1 x 8 CTAs, 8 rows, {HALF}"),
    ("bfloat16", 100, 256, 256, H100, f"cluster, 32 x 8 CTAs, 8 rows, {HALF}"),
    ("bfloat16", 100, 16, 512, H100, "cluster, 2 x 16 CTAs, 8 rows"),
    ("bfloat16 backward", 100, 256, 512, H100, "cluster, 32 x 16 CTAs, 8 rows"),
    # Seven clusters of 16 CTAs are active: eight would need two waves.
    ("bfloat16", 100, 64, 512, H100, f"grid, 4 x 32 CTAs, 16 rows, {HALF}"),
    ("bfloat16 two", 100, 64, 512, H100, f"grid, 2 x 32 CTAs, 32 rows, {HALF}"),
    # A device without clusters, or that refuses them, or those of 16 CTAs.
    ("bfloat16", 100, 64, 256, ASKED_IN_VAIN, f"grid, 4 x 16 CTAs, 16 rows, {HALF}"),
    ("bfloat16", 100, 64, 512, NO_CLUSTERS, f"grid, 4 x 32 CTAs, 16 rows, {HALF}"),
    ("bfloat16", 100, 64, 256, NO_CLUSTERS, f"grid, 8 x 16 CTAs, 8 rows, {HALF}, {FEW}"),
    ("bfloat16", 100, 64, 512, SMALL_CLUSTERS, f"grid, 4 x 32 CTAs, 16 rows, {HALF}"),
    ("bfloat16", 100, 64, 256, SMALL_CLUSTERS, f"cluster, 8 x 8 CTAs, 8 rows, {HALF}"),
    # The grid, and what it can't hold.
    ("bfloat16", 100, 16, 256, A100, f"grid, 2 x 16 CTAs, 8 rows, {HALF}, {FEW}"),
    ("bfloat16", 100, 100, 512, A100, f"grid, 3 x 32 CTAs, 48 rows, {HALF}"),
    ("bfloat16", 100, 8, 1024, H100, f"grid, 1 x 64 CTAs, 8 rows, {FEW}"),
    ("bfloat16", 100, 64, 1024, H100, "grid, 2 x 64 CTAs, 32 rows"),
    ("bfloat16", 100, 256, 1024, H100, "stepwise"),  # GEMMs of many rows
    ("bfloat16 backward", 100, 64, 1024, H100, "grid, 2 x 64 CTAs, 32 rows"),
    ("bfloat16 backward", 100, 128, 1024, H100, "stepwise"),  # bytes through L2
    ("bfloat16", 100, 16, 1040, H100, "stepwise"),
    ("float64", 100, 16, 64, H100, "stepwise"),
    # TF32: float16 operands have twice the room, if h is bounded.
    ("tf32", 100, 16, 1024, H100, f"grid, 2 x 64 CTAs, 8 rows, half operands, {FEW}"),
    ("tf32 h0", 100, 16, 1024, H100, "stepwise"),
    ("tf32 backward", 100, 16, 1024, H100, "stepwise"),
    ("tf32 h0", 100, 16, 512, NO_CLUSTERS, f"grid, 2 x 32 CTAs, 8 rows, {FEW}"),
    # IEEE float32: no tensor cores, so no clusters.
    ("ieee", 100, 16, 64, H100, "cta, 16 x 1 CTAs, 1 rows"),
    ("ieee", 100, 1, 256, H100, f"grid, 1 x 16 CTAs, 8 rows, {HALF}, {FEW}"),
    ("ieee", 100, 64, 512, H100, "grid, 4 x 32 CTAs, 16 rows"),
    # Few steps don't pay for the weights' loads.
    ("bfloat16", 1, 16, 64, H100, "stepwise"),
    ("bfloat16", 2, 16, 64, H100, f"cta, 16 x 1 CTAs, 1 rows, {HALF}, {FEW}"),
]


@pytest.mark.parametrize(("text", "steps", "rows", "hidden", "device", "expected"), EXPECTED)
def test_expected(
    text: str, steps: int, rows: int, hidden: int, device: Device, expected: str, library: Library
) -> None:
    plan = library.plan(problem(text, steps, rows, hidden, device))
    assert cuda_plan.described(plan) == expected


def test_stepwise_where_bytes_bound_the_grid(library: Library) -> None:
    """The grid's backward pass reads all gate gradients in each CTA: 134 MB a step here."""
    p = problem("bfloat16 backward", 100, 256, 1024)
    assert library.plan(p) == STEPWISE
    grid = library.plan(replace(p, requested="persistent_grid"))
    cost = library.cost(p, grid)
    assert cost.bound == "L2 bytes"
    assert cost.step_us > 1.5 * library.cost(p, STEPWISE).step_us


def test_no_rows(library: Library) -> None:
    for requested in ("", *ALGORITHMS):
        assert library.plan(Problem(100, 0, 64, requested=requested)) == STEPWISE


def test_counters_suffice(library: Library) -> None:
    """The kernels count steps and arrivals in 32 bits; a launch has 65,535 tiles at most."""
    assert library.plan(Problem(2**31 - 1, 1, 16)).algorithm != "stepwise"
    assert library.plan(Problem(2**31, 1, 16)) == STEPWISE
    assert library.plan(Problem(2**30, 1, 33)) == STEPWISE
    assert library.plan(Problem(10, 65535 * 8, 64, device=A100)).groups == 65535
    assert library.plan(Problem(10, 65535 * 8 + 1, 64, device=A100)) == STEPWISE


@pytest.mark.parametrize("requested", ALGORITHMS)
def test_requested(requested: str, library: Library) -> None:
    """The requested algorithm's cheapest launch, or an error where it has none."""
    refused = 0
    for p in random_problems(200):
        p = replace(p, requested=requested)
        plans = [plan for plan in launches(p, library) if plan.algorithm == requested]
        if plans:
            plan = library.plan(p)
            assert plan.algorithm == requested
            assert library.cost(p, plan).us == min(library.cost(p, other).us for other in plans)
            continue
        refused += 1
        with pytest.raises(RuntimeError, match=rf"can't run .* {p.H} hidden units"):
            library.plan(p)
    assert (refused > 0) == (requested != "stepwise")


# ---- modelled ratios ----------------------------------------------------------------------------


def test_table(tmp_path: Path) -> None:
    """Each case has a row for each mode, whose ratio is its own times'."""
    assert table.main(["--output", str(tmp_path / "table.md")]) == 0
    text = (tmp_path / "table.md").read_text()
    before, of_cases = text.split("## The benchmarks' cases")
    rows = [line.strip("| ").split(" | ") for line in of_cases.splitlines() if line[:1] == "|"][2:]
    assert [tuple(row[:2]) for row in rows] == [
        (case.name, mode) for case in CASES + CUDA_CASES for mode in MODES
    ]
    with_ratio = [row for row in rows if row[6].strip()]
    assert len(with_ratio) > len(rows) / 2
    for row in with_ratio:
        ours, cudnn, ratio = map(float, row[4:7])
        assert math.isclose(cudnn / ours, ratio, rel_tol=0.03)
    lost = [line.split(" | ") for line in before.splitlines() if line.startswith("| B")][1:]
    assert all(float(row[6]) <= 1 for row in lost)


def test_ratios_are_the_cost_functions(library: Library) -> None:
    """A call's time is its passes' costs, by the function that chooses plans, and the shared."""
    case = Case("", B=64, T=100, H=256, dtype="bfloat16", layers=2)
    forward, backward = (problem(f"bfloat16{word}", 100, 64, 256) for word in ("", " backward"))
    passes = [replace(forward, saves=True), backward]
    costs = [library.cost(p, library.plan(p)).us for p in passes]
    shared = [library.shared_us(p, 256) for p in passes]
    found = table.modelled(case, "training")
    assert math.isclose(found.us, 2 * sum(costs) + 2 * sum(shared) + table.CALL_US["training"])
    assert found.bound == "chain"


def test_cudnn_times() -> None:
    """The one published time, and times between neighbours."""
    assert math.isclose(table.cudnn_step_us("float16", 768, 16), 1.96)
    assert 1.4 < table.cudnn_step_us("float16", 256, 32) < 2.0
    assert 1.4 < table.cudnn_step_us("float16", 300, 1) < 1.7
    assert table.cudnn_step_us("tf32", 4096, 4096) == table.cudnn_step_us("tf32", 1024, 256)


# ---- mutations ----------------------------------------------------------------------------------

COST, PLAN = "csrc/cuda/cost.h", "csrc/cuda/plan.cpp"
MUTATIONS = [
    ("clusters that the device refuses", PLAN, "if (*active > 0) consider(*plan, *active);",
     "consider(*plan, std::max<int64_t>(*active, 1));"),
    ("clusters on a device without them", PLAN, "if (p_.capability < 90) return;", ""),
    ("clusters are never taken", COST, "of_tile(k.cluster[half])",
     "10 * of_tile(k.cluster[half])"),
    ("one wave for any number of CTAs", COST, "is_grid ? 1 :", "true ? 1 :"),
    ("bytes through L2 are free", COST, "rows * row_bytes / k.l2_bytes_per_cycle", "0"),
    ("no prologue", COST, "double(waves) * prologue_us(plan)", "0"),
    ("more groups than multiprocessors", PLAN, "p_.multiprocessors / (p_.directions * plan->ctas)",
     "p_.multiprocessors / plan->ctas"),
    ("float16 operands where h has no bound", PLAN, "&& p_.is_bounded ", ""),
    ("more shared memory than the device has", PLAN, " && bytes <= p_.shared_limit", ""),
    ("the dearest plan", PLAN, "if (us < best_us_)", "if (us > best_us_ || best_us_ > 1e9)"),
    ("tiles of 8 rows alone", PLAN, "for (int64_t rows = 1; rows <= most; ++rows)",
     "for (int64_t rows = most; rows <= most; ++rows)"),
    ("steps past the counters", PLAN, "16) <= INT32_MAX;", "16) <= INT64_MAX;"),
]  # fmt: skip


@pytest.mark.long  # a compilation each
@pytest.mark.parametrize(("name", "file", "old", "new"), MUTATIONS, ids=[m[0] for m in MUTATIONS])
def test_mutations(name: str, file: str, old: str, new: str, tmp_path: Path) -> None:
    """Each mutation fails at least one of the tests above."""
    for folder in ("csrc", "tests/emulator", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    path = tmp_path / file
    text = path.read_text()
    assert text.count(old) == 1, f"the text of {name!r} is not once in {file}"
    path.write_text(text.replace(old, new))
    mutant = Library(cuda_plan.build(tmp_path, tmp_path / "build"))
    assert fails(mutant), f"not seen: {name}"


def fails(library: Library) -> bool:
    try:
        for row in EXPECTED:
            test_expected(*row, library)
        test_counters_suffice(library)
        for p in random_problems(500):
            check(p, library)
    except (AssertionError, RuntimeError):
        return True
    return False

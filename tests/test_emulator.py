"""The CUDA backend in the emulator, kernels and host code, against the ops on the CPU."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import test_cuda
import torch
from helpers import emulated
from helpers.cells import cell_named
from helpers.device_work import device_work
from torch import Tensor

from fusedrnn import _ops

pytestmark = pytest.mark.long  # a minute of compilation

HALVES = (torch.bfloat16, torch.float16)
# A GEMM operand's rounding.
ROUNDING = {
    (torch.float64, "ieee"): 2.0**-53,
    (torch.float32, "ieee"): 2.0**-24,
    (torch.float32, "tf32"): 2.0**-11,
    (torch.bfloat16, "ieee"): 2.0**-9,
    (torch.float16, "ieee"): 2.0**-12,
}


@pytest.fixture(scope="module", autouse=True)
def ops() -> Any:
    torch.ops.load_library(emulated.build_ops())
    return torch.ops.fusedrnn_emulated


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FUSEDRNN_CUDA_REGIME", raising=False)
    monkeypatch.delenv("FUSEDRNN_EMULATOR_PRECISION", raising=False)
    yield
    torch.ops.fusedrnn_emulated.set(0, 8)


@dataclasses.dataclass(frozen=True)
class Case:
    cell: str = "lstm"
    dtype: torch.dtype = torch.float32
    precision: str = "ieee"
    regime: str = ""
    layout: str = "padded"
    bidirectional: bool = False
    T: int = 5
    B: int = 3
    I: int = 7
    H: int = 21
    proj_size: int = 0
    bias: bool = True
    hx: bool = True
    used: tuple[bool, bool, bool] = (True, True, True)  # y, h_n, c_n
    multiprocessors: int = 8
    seed: int = 0

    def __str__(self) -> str:
        changed = [
            str(getattr(self, f.name)).removeprefix("torch.")
            if f.type == "str" or f.name == "dtype"
            else f"{f.name}{getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return "-".join(changed).replace(" ", "") or "plain"


class Problem:
    """A case's arguments, rounded to its type and held as any type."""

    def __init__(self, c: Case) -> None:
        self.c = c
        self.generator = torch.Generator().manual_seed(c.seed)
        G, D, P = _ops.CELLS[c.cell].gates, 2 if c.bidirectional else 1, c.proj_size or c.H
        self.batch_sizes = self.lengths = None
        rng = random.Random(c.seed)
        rows: tuple[int, ...] = (c.T, c.B)
        if c.layout == "packed":
            lengths = sorted([c.T, *(rng.randint(1, c.T) for _ in range(c.B - 1))], reverse=True)
            self.batch_sizes = torch.tensor([sum(n > t for n in lengths) for t in range(c.T)])
            rows = (sum(lengths),)
        elif c.layout == "lengths":
            self.lengths = torch.tensor([rng.randint(0, c.T) for _ in range(c.B)])
        self.x = self.values(*rows, c.I)
        widths = [P, c.H][: _ops.CELLS[c.cell].states]
        self.states = [self.values(D, c.B, n) if c.hx else None for n in widths]
        scale = 1.5 * c.H**-0.5
        shapes: list[tuple[int, ...]] = [(G * c.H, c.I), (G * c.H, P)]
        shapes += [(G * c.H,)] * 2 if c.bias else []
        shapes += [(P, c.H)] if c.proj_size else []
        self.weights = [scale * self.values(*s) for _ in range(D) for s in shapes]
        self.weights = [w.to(c.dtype).double() for w in self.weights]
        outputs = [(*rows, D * P), *((D, c.B, n) for n in widths)]
        self.gradients = [
            self.values(*s) if used else None for s, used in zip(outputs, c.used, strict=False)
        ]

    @property
    def is_sensitive(self) -> bool:
        """Whether a result can change by much more than the roundings of its arguments."""
        return cell_named(self.c.cell).has_dead_units

    def values(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.c.dtype).double()

    def near(self, t: Tensor, eps: float) -> Tensor:
        noise = torch.rand(t.shape, generator=self.generator, dtype=torch.float64)
        return t * (1 + eps * (2 * noise - 1))

    def floors(self, exact: list[Tensor]) -> list[float]:
        """The problem's own sensitivity, for each result.

        relu's gradient jumps at zero, and so does the result where a pre-activation rounds across
        it. Each of eight draws rounds all values once. The floor is ten times the largest change.
        """
        found = [0.0] * len(exact)
        if not self.is_sensitive:
            return found
        eps = ROUNDING[self.c.dtype, self.c.precision]
        for _ in range(8):
            other = copy.copy(self)
            other.x, other.weights = (
                self.near(self.x, eps),
                [self.near(w, eps) for w in self.weights],
            )
            other.states = [None if s is None else self.near(s, eps) for s in self.states]
            results = other.run(torch.ops.fusedrnn, torch.float64)
            for i, (t, e) in enumerate(zip(results, exact, strict=True)):
                if e.numel():
                    found[i] = max(found[i], 10 * (t - e).abs().max().item())
        return found

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        return (
            self.x.to(dtype),
            *(None if t is None else t.to(dtype) for t in self.states),
            [w.to(dtype) for w in self.weights],
            self.c.bidirectional,
            self.batch_sizes,
            self.lengths,
        )

    def forward(self, arguments: tuple[Any, ...], ops: Any) -> list[Tensor]:
        """Outputs and what is saved for the backward pass."""
        return list(getattr(ops, self.c.cell)(*arguments, True))

    def backward(
        self,
        arguments: tuple[Any, ...],
        gradients: list[Any],
        results: list[Tensor],
        ops: Any,
        mask: list[bool],
    ) -> list[Tensor]:
        output = results[0] if self.c.proj_size else None
        *of_inputs, of_weights = getattr(ops, f"{self.c.cell}_backward")(
            *gradients, *arguments, output, results[-1], mask
        )
        return [*of_inputs, *of_weights]

    def gradients_in(self, dtype: torch.dtype) -> list[Tensor | None]:
        return [None if t is None else t.to(dtype) for t in self.gradients]

    def run(self, ops: Any, dtype: torch.dtype) -> list[Tensor]:
        """Outputs and gradients."""
        arguments = self.arguments(dtype)
        results = self.forward(arguments, ops)
        mask = [True] * (1 + len(self.states) + len(self.weights))
        found = self.backward(arguments, self.gradients_in(dtype), results, ops, mask)
        return [*results[:-1], *found]


def check(c: Case, monkeypatch: pytest.MonkeyPatch, problem: Problem | None = None) -> list[Tensor]:
    monkeypatch.setenv("FUSEDRNN_CUDA_REGIME", c.regime)
    monkeypatch.setenv("FUSEDRNN_EMULATOR_PRECISION", c.precision)
    torch.ops.fusedrnn_emulated.set(c.seed, c.multiprocessors)
    problem = problem or Problem(c)
    exact = problem.run(torch.ops.fusedrnn, torch.float64)
    floors = problem.floors(exact)
    results = problem.run(torch.ops.fusedrnn_emulated, c.dtype)
    # A few operand roundings, for operands as large as the largest value. Over many steps they
    # accumulate like a random walk.
    unit = ROUNDING[c.dtype, c.precision] * max(1, c.T**0.5 / 4)
    if c.regime and c.B:
        assert torch.ops.fusedrnn_emulated._cuda_algorithm() == test_cuda.ALGORITHMS[c.regime]
    for i, (ours, e, floor) in enumerate(zip(results, exact, floors, strict=True)):
        assert ours.shape == e.shape
        assert ours.dtype == c.dtype
        if not e.numel():
            continue
        error = (ours.double() - e).abs().max().item()
        scale = max(1.0, e.abs().max().item())
        allowed = 16 * unit * scale + floor
        assert error <= allowed, f"tensor {i}: {error / unit / scale:.3g} roundings"
    return results


def covering() -> list[Case]:
    """Every regime, type, layout, cell and direction, each with its own sizes."""
    rng = random.Random(1)
    cases = []
    kinds = [(torch.float64, "ieee", ["step"])]
    kinds += [(torch.float32, "ieee", ["step", "alone", "grid"])]
    kinds += [(t, "ieee", ["step", "alone", "cluster", "grid"]) for t in HALVES]
    kinds += [(torch.float32, "tf32", ["alone", "cluster", "grid"])]
    for (dtype, precision, regimes), cell, layout, bidirectional in itertools.product(
        kinds, test_cuda.CELLS, ("padded", "packed", "lengths"), (False, True)
    ):
        for regime in regimes:
            H = rng.choice([32, 33, 50, 70] if regime == "cluster" else [1, 5, 16, 21, 24, 33])
            projected = cell in test_cuda.PROJECTED and regime == "step" and rng.random() < 0.5
            used = (rng.random() < 0.7, rng.random() < 0.7, rng.random() < 0.7)
            cases.append(
                Case(
                    cell,
                    dtype,
                    precision,
                    regime,
                    layout,
                    bidirectional,
                    T=rng.randint(1, 6),
                    B=rng.choice([1, 2, 3, 8, 17, 19, 33]),
                    I=rng.choice([1, 3, 8, 13]),
                    H=H,
                    proj_size=rng.choice([4, 3, 1]) if projected and H > 4 else 0,
                    bias=rng.random() < 0.8,
                    hx=rng.random() < 0.7,
                    used=used if any(used) else (True, True, True),
                    multiprocessors=rng.choice([6, 8, 16]),
                    seed=len(cases),
                )
            )
    return cases


@pytest.mark.parametrize("case", covering(), ids=str)
def test_like_the_cpu(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


@pytest.mark.parametrize(
    "case",
    [
        Case(dtype=torch.bfloat16, H=128, T=6, regime="alone"),
        Case(dtype=torch.bfloat16, H=129, T=6, B=9, regime="grid", multiprocessors=9),
        Case(dtype=torch.bfloat16, H=100, T=3, B=37, regime="alone"),  # tiles of 5 rows
        Case(cell="gru", dtype=torch.float16, H=530, T=2, B=2, regime="grid", multiprocessors=34),
        Case(cell="gru", dtype=torch.float32, H=64, T=6, B=16),
        Case(cell="rnn_tanh", dtype=torch.float32, H=64, T=6, B=16),
        Case(cell="rnn_relu", dtype=torch.float16, H=129, T=3, B=2, regime="cluster"),
        Case(dtype=torch.float32, H=65, T=6, B=40, regime="grid", multiprocessors=5),
        Case(dtype=torch.float32, H=260, T=2, B=2, regime="grid", multiprocessors=17),
        Case(cell="gru", dtype=torch.float32, precision="tf32", H=290, T=2, B=2, regime="grid",
             multiprocessors=19),
        Case(dtype=torch.bfloat16, H=257, T=3, B=9, regime="cluster", multiprocessors=16),
        Case(cell="gru", dtype=torch.float16, H=512, T=2, B=2, regime="cluster",
             multiprocessors=16),
        Case(cell="gru", dtype=torch.float32, precision="tf32", H=129, T=3, B=2, regime="cluster"),
        Case(dtype=torch.bfloat16, H=33, T=5, B=70, regime="cluster", multiprocessors=2),
    ],
    ids=str,
)  # fmt: skip
def test_sizes_where_kernels_change(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


# Every persistent kernel's way to multiply by tensor cores: a case's cell, type, precision, regime.
WITH_TENSOR_CORES = pytest.mark.parametrize(
    "kind",
    [
        (cell, dtype, precision, regime)
        for dtype, precision in (
            (torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32"),
        )
        for regime in ("alone", "cluster", "grid")
        for cell in ("lstm", "gru", "rnn_tanh")
    ],
    ids=lambda kind: "-".join(str(part).removeprefix("torch.") for part in kind),
)  # fmt: skip
Kind = tuple[str, torch.dtype, str, str]


def rounding(c: Case) -> float:
    return ROUNDING[c.dtype, c.precision]


def both(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[Tensor]]:
    """A problem's results in float64 on the CPU, and in its own type in the emulator."""
    c = problem.c
    monkeypatch.setenv("FUSEDRNN_CUDA_REGIME", c.regime)
    monkeypatch.setenv("FUSEDRNN_EMULATOR_PRECISION", c.precision)
    torch.ops.fusedrnn_emulated.set(c.seed, c.multiprocessors)
    exact = problem.run(torch.ops.fusedrnn, torch.float64)
    ours = [t.double() for t in problem.run(torch.ops.fusedrnn_emulated, c.dtype)]
    assert torch.ops.fusedrnn_emulated._cuda_algorithm() == test_cuda.ALGORITHMS[c.regime]
    return exact, ours


@WITH_TENSOR_CORES
def test_small_outputs(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs far below 1 are as exact, relative to the largest."""
    c = Case(*kind, T=6, B=3, H=33, bias=False, hx=False)
    problem = Problem(c)
    problem.x = (problem.x * 2.0**-9).to(c.dtype).double()
    exact, ours = both(problem, monkeypatch)
    for e, o in zip(exact[:2], ours[:2], strict=True):  # y, h_n
        largest = e.abs().max().item()
        assert largest < 0.1
        assert (o - e).abs().max().item() <= 16 * rounding(c) * largest


@WITH_TENSOR_CORES
@pytest.mark.parametrize("hx", [False, True], ids=["zeros", "hx"])
def test_whole_range(kind: Kind, hx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saturated gates, large states, weights that are tiny, zero or vary widely within a row."""
    c = Case(*kind, T=6, B=3, H=33, hx=hx)
    problem = Problem(c)
    problem.x[:, 0] *= 30
    if hx:
        # A GRU's h decays slowly, and the roundings of a large h would decide its gates.
        large = 4 if c.cell == "gru" else 1e6 if c.dtype == torch.float32 else 1e3
        problem.states[0][:, 1] *= large
    hh = problem.weights[1]
    hh[0] = 0
    hh[1] *= 1e-30 if c.dtype != torch.float16 else 1e-4
    hh[2, 1:] *= 1e-6
    hh[3] *= 20
    problem.x, hh[:] = problem.x.to(c.dtype).double(), hh.to(c.dtype).double()
    exact, ours = both(problem, monkeypatch)
    for i, (e, o) in enumerate(zip(exact, ours, strict=True)):
        scale = max(1.0, e.abs().max().item())
        error = (o - e).abs().max().item()
        assert error <= 32 * rounding(c) * scale, f"tensor {i}"


@WITH_TENSOR_CORES
def test_no_numbers(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Infinities and NaN in the input or in weights are what they are on the CPU."""
    c = Case(*kind, T=4, B=4, H=33, bias=False, hx=False)
    problem = Problem(c)
    problem.x[1, 0, 0] = float("inf")
    problem.x[2, 1, 0] = float("nan")
    compare_no_numbers(problem, monkeypatch)
    problem = Problem(c)
    problem.weights[1][7, 5] = float("inf")
    compare_no_numbers(problem, monkeypatch)


def compare_no_numbers(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, ours = both(problem, monkeypatch)
    states = 2 + (len(problem.states) > 1)
    assert any(e.isnan().any() for e in exact[:states])
    for e, o in zip(exact[:states], ours[:states], strict=True):
        assert torch.equal(e.isnan(), o.isnan())
        finite = e.isfinite()
        assert torch.equal(e[~finite & ~e.isnan()], o[~finite & ~e.isnan()])
        error, scale = ((t[finite].abs().max().item() if finite.any() else 0.0) for t in (o - e, e))
        assert error <= 16 * rounding(problem.c) * max(1.0, scale)


def test_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """test_cuda's cases and the variants' run every compiled kernel, and agree with the CPU."""
    before = dict(reversed(k.split(" ", 1)) for k in torch.ops.fusedrnn_emulated.kernels())
    monkeypatch.setattr(test_cuda, "DEVICE", "cpu")
    cases = [(64, regime, c) for regime, c in test_cuda.every_kernel(None)]
    for multiprocessors, regime, c in [*cases, *test_cuda.full_tiles(None)]:
        torch.ops.fusedrnn_emulated.set(0, multiprocessors)
        monkeypatch.setenv("FUSEDRNN_CUDA_REGIME", regime)
        monkeypatch.setenv("FUSEDRNN_EMULATOR_PRECISION", "tf32" if c.kind == "tf32" else "ieee")
        test_cuda.compare(c, torch.ops.fusedrnn_emulated)
    projected = [
        Case("lstm", dtype, H=21, proj_size=3) for dtype in (torch.float64, torch.float32, *HALVES)
    ]
    for case in [*variant_cases(), *projected]:
        check(case, monkeypatch, VariantProblem(case))
    torch.ops.fusedrnn_emulated._random_mask(torch.tensor(1), [300], 0.5)
    after = dict(reversed(k.split(" ", 1)) for k in torch.ops.fusedrnn_emulated.kernels())
    assert len(after) > 90
    assert not [name for name, times in after.items() if times == before[name]]


def launches(c: Case, monkeypatch: pytest.MonkeyPatch) -> int:
    before = torch.ops.fusedrnn_emulated.counts()[0]
    check(c, monkeypatch)
    return int(torch.ops.fusedrnn_emulated.counts()[0] - before)


STEPWISE, CTA, CLUSTER, GRID = (
    test_cuda.ALGORITHMS[regime] for regime in ("step", "alone", "cluster", "grid")
)


@pytest.mark.parametrize(
    ("case", "algorithm", "expected"),
    [
        (Case(T=8), CTA, 3),  # forward, backward, biases
        (Case(bidirectional=True, layout="lengths"), CTA, 5),  # twice biases; the input's padding
        (Case(T=8, layout="packed"), CTA, 5),  # the step offsets are uploaded too
        (Case(dtype=torch.bfloat16, H=129, multiprocessors=5), CLUSTER, 3),
        # Five CTAs don't fit, neither as a cluster nor as a grid.
        (Case(dtype=torch.bfloat16, H=129, multiprocessors=4), STEPWISE, 12),
        (Case(precision="tf32", H=100, multiprocessors=4), CLUSTER, 3),
        (Case(T=20, H=70, multiprocessors=5), GRID, 3),  # clusters need tensor cores
        (Case(H=70, multiprocessors=4), STEPWISE, 12),
        (Case(H=70, B=129, multiprocessors=10), STEPWISE, 12),  # many rows for two groups
        (Case(H=70, B=129, multiprocessors=10, regime="grid"), GRID, 3),
        (Case(dtype=torch.float64), STEPWISE, 12),
        # One step: a kernel with its GEMMs. Back, one CTA's weights load sooner than the host calls
        # a GEMM and a kernel.
        (Case(T=1), CTA, 3),
        (Case(proj_size=3), STEPWISE, 22),
        (Case(regime="step"), STEPWISE, 12),
        (Case(regime="cluster", precision="tf32"), CLUSTER, 3),
        (Case(regime="cluster", precision="tf32", H=256, T=1, multiprocessors=16), CLUSTER, 3),
        (Case(B=0), STEPWISE, 1),
        *((Case(B=0, regime=regime), STEPWISE, 1) for regime in test_cuda.REGIMES),
    ],
    ids=str,
)
def test_plans(case: Case, algorithm: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheapest plan. A pass is a kernel if persistent, else one or two a step."""
    assert launches(case, monkeypatch) == expected
    assert torch.ops.fusedrnn_emulated._cuda_algorithm() == algorithm


def work(**numbers: int) -> dict[str, int]:
    return numbers


PLAIN: dict[str, Any] = {"hx": False, "used": (True, False, False)}  # a layer in a model
BF16 = torch.bfloat16
# A call's work in the device's stream, forward and backward.
WORK = [
    *(
        (Case(dtype=dtype, precision=precision, regime=regime, hx=hx, used=(True, hx, hx)),
         work(kernel=1, gemm=1), work(kernel=2, gemm=3))
        for dtype, precision, regime in (
            (torch.float32, "ieee", "alone"), (torch.float32, "tf32", "cluster"),
            (BF16, "ieee", "alone"), (BF16, "ieee", "cluster"), (torch.float16, "ieee", "alone"),
        )
        for hx in (True, False)
    ),
    *(
        (Case(dtype=dtype, regime="grid", hx=hx, used=(True, hx, hx)),
         work(kernel=1, gemm=1, memset=1), work(kernel=2, gemm=3, memset=1))
        for dtype in (torch.float32, BF16, torch.float16)
        for hx in (True, False)
    ),
    # A GRU's weight_hh has two GEMMs.
    (Case("gru", BF16, regime="alone"), work(kernel=1, gemm=1), work(kernel=2, gemm=4)),
    (Case("rnn_relu", BF16, regime="alone"), work(kernel=1, gemm=1), work(kernel=2, gemm=3)),
    # The lengths are checked by the kernel; backward, a kernel masks the padding of the input.
    (Case(dtype=BF16, regime="alone", layout="lengths"), work(kernel=1, gemm=1),
     work(kernel=3, gemm=3)),
    (Case(dtype=BF16, regime="grid", layout="lengths"), work(kernel=1, gemm=1, memset=1),
     work(kernel=3, gemm=3, memset=1)),
    # The step offsets are uploaded.
    (Case(dtype=BF16, regime="alone", layout="packed"), work(kernel=2, gemm=1),
     work(kernel=3, gemm=3)),
    (Case(dtype=BF16, regime="alone", bidirectional=True), work(kernel=1, gemm=2),
     work(kernel=3, gemm=6)),
    (Case(regime="alone", bias=False), work(kernel=1, gemm=1), work(kernel=1, gemm=3)),
    # One step: a kernel for few rows. The gradients of h0 and c0 are a GEMM and a kernel.
    *(
        (Case(dtype=dtype, T=1, B=rows, **PLAIN), work(kernel=1), work(kernel=2, gemm=3))
        for dtype in (torch.float32, torch.float64, BF16)
        for rows in (1, 16)
    ),
    (Case(dtype=BF16, T=1), work(kernel=1), work(kernel=2, gemm=3)),
    (Case(dtype=BF16, T=1, layout="lengths"), work(kernel=1), work(kernel=3, gemm=3)),
    (Case(dtype=BF16, T=1, B=17, **PLAIN), work(kernel=1, gemm=1), work(kernel=2, gemm=3)),
    (Case(dtype=BF16, T=1, B=17), work(kernel=1, gemm=1), work(kernel=2, gemm=3)),
    # T = 5 steps one by one: 16 rows have a kernel a step, more a GEMM too.
    *(
        (Case(dtype=dtype, regime="step", B=rows),
         work(kernel=5, gemm=1 + 5 * (rows > 16)), work(kernel=7, gemm=8))
        for dtype in (torch.float32, torch.float64, BF16)
        for rows in (16, 17)
    ),
    (Case(dtype=BF16, regime="step", layout="packed", **PLAIN), work(kernel=5, gemm=1),
     work(kernel=6, gemm=7)),
    (Case(dtype=BF16, regime="step", layout="lengths", **PLAIN), work(kernel=5, gemm=1),
     work(kernel=7, gemm=7)),
    (Case(dtype=BF16, regime="step", proj_size=3), work(kernel=10, gemm=11),
     work(kernel=12, gemm=14)),
]  # fmt: skip


@pytest.mark.parametrize(("case", "forward", "backward"), WORK, ids=str)
def test_device_work(
    case: Case,
    forward: dict[str, int],
    backward: dict[str, int],
    ops: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each launch costs the host microseconds, whatever the size."""
    monkeypatch.setenv("FUSEDRNN_CUDA_REGIME", case.regime)
    monkeypatch.setenv("FUSEDRNN_EMULATOR_PRECISION", case.precision)
    ops.set(0, case.multiprocessors)
    problem, results = Problem(case), list[Tensor]()
    arguments, gradients = problem.arguments(case.dtype), problem.gradients_in(case.dtype)
    assert device_work(lambda: results.extend(problem.forward(arguments, ops))) == forward
    # Without states as arguments nobody wants their gradients.
    mask = [True, *([case.hx] * len(problem.states)), *([True] * len(problem.weights))]
    found = device_work(lambda: problem.backward(arguments, gradients, results, ops, mask))
    assert found == backward


@pytest.mark.parametrize(
    "case",
    [
        Case(regime="alone", H=65),
        Case(regime="alone", dtype=torch.float64),
        Case(regime="grid", proj_size=3),
        Case(regime="grid", H=129, multiprocessors=8),  # nine CTAs don't fit
        Case(regime="grid", H=70, B=129, multiprocessors=9),  # a tile has 128 rows at most
        Case(regime="cluster"),  # clusters need tensor cores
        Case(regime="cluster", precision="tf32", H=100, multiprocessors=3),  # no room for one
        Case(regime="cluster", precision="tf32", H=257, T=1, multiprocessors=16),
        Case(regime="cluster", dtype=torch.float64),
    ],
    ids=str,
)
def test_requested_algorithm_that_cannot_run(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error, and no other algorithm takes its place."""
    before = torch.ops.fusedrnn_emulated.counts()[0]
    message = f"FUSEDRNN_CUDA_REGIME={case.regime}: this device can't run .* {case.H} hidden units"
    with pytest.raises(RuntimeError, match=message):
        check(case, monkeypatch)
    assert torch.ops.fusedrnn_emulated.counts()[0] == before


def test_no_room(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device with less room than it reports the layer runs stepwise, with the same results."""
    problem = Problem(Case(H=70, layout="packed"))
    exact = problem.run(torch.ops.fusedrnn, torch.float64)
    before = ops.counts()[0]
    ops.set(0, 8, 2)
    results = problem.run(ops, torch.float32)
    # An upload by each pass, whose grid is refused; a launch a step; dh0 and dc0; biases.
    assert ops.counts()[0] - before == 14
    assert ops._cuda_algorithm() == STEPWISE
    for ours, e in zip(results, exact, strict=True):
        torch.testing.assert_close(ours.double(), e, rtol=1e-5, atol=1e-5)
    monkeypatch.setenv("FUSEDRNN_CUDA_REGIME", "grid")
    with pytest.raises(RuntimeError, match="FUSEDRNN_CUDA_REGIME=grid: this device can't run"):
        problem.run(ops, torch.float32)


# Stride changes for a GEMM operand.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "rows apart": lambda t: torch.cat((t, t), 1)[:, : t.size(1)],
    "columns apart": lambda t: torch.stack((t, t), -1)[..., 0],
    "transposed, apart": lambda t: torch.cat((t, t)).t().contiguous().t()[: t.size(0)],
    "one row for all": lambda t: t[:1].expand_as(t),
    "one column for all": lambda t: t[:, :1].expand_as(t),
}


@pytest.mark.parametrize(
    "sizes", [(5, 4, 3), (1, 4, 3), (5, 1, 3), (5, 4, 1), (1, 1, 1), (5, 4, 0)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_gemms_of_any_strides(sizes: tuple[int, ...], dtype: torch.dtype, ops: Any) -> None:
    """The emulator multiplies by the description given to cuBLAS."""
    rows, columns, k = sizes
    for (x, left), (y, right) in itertools.product(VIEWS.items(), repeat=2):
        a = left(torch.randn(rows, k)).to(dtype)
        b = right(torch.randn(k, columns)).to(dtype)
        for add, result in ((False, torch.float32), (False, dtype), (True, dtype)):
            if dtype == torch.float64 != result:
                continue
            room = torch.ones(rows, columns + 2, dtype=result)
            out = room[:, 1:-1]
            expected = a.double() @ b.double() + add
            ops.multiply(out, a, b, add)
            tolerance = {torch.bfloat16: 0.03, torch.float16: 0.005}.get(result, 1e-5)
            torch.testing.assert_close(
                out.double(),
                expected,
                rtol=tolerance,
                atol=tolerance,
                msg=lambda m: f"{x}, {y}: {m}",  # noqa: B023
            )
            assert room[:, 0].eq(1).all()
            assert room[:, -1].eq(1).all()


def test_unknown_regime(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRNN_CUDA_REGIME", "fast")
    with pytest.raises(RuntimeError, match="fast is none of step, alone, cluster and grid"):
        Problem(Case()).run(ops, torch.float32)


@pytest.mark.parametrize("regime", test_cuda.REGIMES)
@pytest.mark.parametrize("cell", test_cuda.CELLS)
def test_same_bits_in_any_order(cell: str, regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(cell, torch.bfloat16, regime=regime, layout="lengths", B=19, bidirectional=True)
    monkeypatch.setenv("FUSEDRNN_CUDA_REGIME", regime)
    problem, runs = Problem(case), []
    for seed in range(5):
        torch.ops.fusedrnn_emulated.set(seed, 8)
        runs.append(problem.run(torch.ops.fusedrnn_emulated, case.dtype))
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert torch.equal(a, b)


def test_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """More step offsets than one upload kernel's arguments hold."""
    check(Case(T=1000, B=2, H=3, layout="packed", regime="step"), monkeypatch)
    check(Case(T=600, B=2, H=3, layout="packed", regime="grid"), monkeypatch)
    check(Case(T=300, B=2, H=33, layout="packed", regime="cluster", precision="tf32"), monkeypatch)


@pytest.mark.parametrize("regime", test_cuda.REGIMES)
def test_inputs_stay_as_they_are(regime: str, ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for strided inputs, shared memory, and padding that must not be read."""
    monkeypatch.setenv("FUSEDRNN_CUDA_REGIME", regime)
    precision = test_cuda.float32_of(regime)
    monkeypatch.setenv("FUSEDRNN_EMULATOR_PRECISION", precision)
    T, B, I, H = 5, 3, 4, 8
    lengths = torch.tensor([2, 5, 0])
    x = torch.randn(B, I, T).permute(2, 0, 1)
    x[2:, 0] = float("nan")
    x[:, 2] = float("inf")
    h0 = torch.randn(1, 1, H).expand(1, B, H)
    flat = torch.randn(4 * H * I + 4 * H * H + 1)[1:]  # nothing is aligned to more than a float
    weights = [flat[: 4 * H * I].view(4 * H, I), flat[4 * H * I :].view(4 * H, H)]
    clones = [t.clone() for t in (x, h0, lengths, *weights)]
    arguments = (x, h0, h0, weights, False, None, lengths)
    y, h_n, c_n, saved = ops.lstm(*arguments, True)
    expected = torch.ops.fusedrnn.lstm(*arguments, True)[:3]
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if precision == "tf32" else {}
    torch.testing.assert_close((y, h_n, c_n), tuple(expected), **tolerance)
    saved_clone = saved.clone()
    masks = [True] * 5
    grads = (torch.ones_like(y), None, None)
    first = ops.lstm_backward(*grads, *arguments, None, saved, masks)
    second = ops.lstm_backward(*grads, *arguments, None, saved, masks)
    assert all(g.isfinite().all() for g in (*first[:3], *first[3]))
    for a, b in zip((*first[:3], *first[3]), (*second[:3], *second[3]), strict=True):
        assert torch.equal(a, b)
    for t, clone in zip((x, h0, lengths, *weights), clones, strict=True):
        assert torch.equal(t.nan_to_num(), clone.nan_to_num())
    taken = torch.arange(T)[:, None] < lengths
    of_padding = (saved == saved_clone) | ~taken.view(1, T * B, 1, 1)
    assert of_padding.all()


def test_masked_gradients(ops: Any) -> None:
    problem = Problem(Case(bidirectional=True))
    full = problem.run(ops, torch.float32)[3:]
    arguments = (
        problem.x.float(),
        *(s.float() for s in problem.states if s is not None),
        [w.float() for w in problem.weights],
        True,
        None,
        None,
    )
    saved = ops.lstm(*arguments, True)[3]
    mask = [i % 2 == 0 for i in range(len(full))]
    grads = [g.float() for g in problem.gradients if g is not None]
    *of_inputs, of_weights = ops.lstm_backward(*grads, *arguments, None, saved, mask)
    for wanted, g, all_of_it in zip(mask, (*of_inputs, *of_weights), full, strict=True):
        assert torch.equal(g, all_of_it) if wanted else g.numel() == 0


@pytest.mark.parametrize("lengths", [[1, 2, 6], [1, -1, 2]])
def test_lengths_out_of_range(lengths: list[int], ops: Any) -> None:
    x, w = torch.randn(5, 3, 2), [torch.randn(16, 2), torch.randn(16, 4)]
    with pytest.raises(RuntimeError, match="lengths must be from 0 to the sequence length"):
        ops.lstm(x, None, None, w, False, None, torch.tensor(lengths), False)


# ---- variants -----------------------------------------------------------------------------------

VARIANT_ARGUMENTS = (
    "reset_mask",
    "reset_to_initial",
    "hidden_mask",
    "candidate_mask",
    "candidate_scale",
    "zoneout_h_mask",
    "zoneout_c_mask",
    "zoneout_h",
    "zoneout_c",
)


class VariantProblem(Problem):
    """A case with a random composition of variants, or with those named alone."""

    def __init__(self, c: Case, features: Sequence[str] | None = None) -> None:
        super().__init__(c)
        rng = random.Random(c.seed)
        cell = _ops.CELLS[c.cell]
        D, P = 2 if c.bidirectional else 1, c.proj_size or c.H
        tokens = self.x.shape[:-1]

        def has(feature: str) -> bool:
            drawn = rng.random() < 0.5
            return drawn if features is None else feature in features

        def mask(*shape: int) -> Tensor:
            return torch.rand(shape, generator=self.generator) < 0.4

        given: dict[str, Any] = dict.fromkeys(VARIANT_ARGUMENTS)
        given |= {"candidate_scale": 1.0, "zoneout_h": 0.0, "zoneout_c": 0.0}
        if has("reset"):
            given["reset_mask"] = mask(*tokens)
        given["reset_to_initial"] = rng.random() < 0.5
        if has("hidden_mask"):
            given["hidden_mask"] = 1.75 * mask(D, c.B, P)
        if has("candidate_mask") and cell.has_candidate:
            given |= {"candidate_mask": mask(D, *tokens, c.H), "candidate_scale": 1.5}
        for state, width in (("h", P), ("c", c.H))[: cell.states]:
            if has("zoneout_masks"):
                given[f"zoneout_{state}_mask"] = mask(D, *tokens, width)
            elif has("zoneout"):
                given[f"zoneout_{state}"] = 0.25
        self.variant = given
        self.norms: list[Tensor] = []
        if has("norms") and c.H > 1:  # one value has no variance
            scale = [1.0, 1.0, 1.0, 0.0]
            sizes = [cell.gates * c.H] * 2 + [c.H] * 2 * cell.has_cell_state
            for _ in range(D):
                self.norms += [m + 0.25 * self.values(n) for m, n in zip(scale, sizes)]  # noqa: B905
            self.norms = [n.to(c.dtype).double() for n in self.norms]
        self.grad_cells = None
        if cell.has_cell_state and rng.random() < 0.7:
            self.grad_cells = self.values(*tokens, D * c.H)

    @property
    def is_sensitive(self) -> bool:
        return True  # norms and scaled candidates amplify roundings

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        given = dict(self.variant)
        if given["hidden_mask"] is not None:
            given["hidden_mask"] = given["hidden_mask"].to(dtype)
        norms = [n.to(dtype) for n in self.norms]
        return (*super().arguments(dtype), *given.values(), norms)

    def forward(self, arguments: tuple[Any, ...], ops: Any) -> list[Tensor]:
        return list(getattr(ops, f"{self.c.cell}_variant")(*arguments, True))

    def backward(
        self,
        arguments: tuple[Any, ...],
        gradients: list[Any],
        results: list[Tensor],
        ops: Any,
        mask: list[bool],
    ) -> list[Tensor]:
        grad_cells = None if self.grad_cells is None else self.grad_cells.to(arguments[0].dtype)
        *of_inputs, of_weights = getattr(ops, f"{self.c.cell}_variant_backward")(
            *gradients, *arguments, grad_cells, results[-1], mask + [True] * len(self.norms)
        )
        return [*of_inputs, *of_weights]


def variant_cases() -> list[Case]:
    """Every cell, type, layout and direction, each with its own sizes and composition."""
    rng = random.Random(2)
    cases: list[Case] = []
    types = (torch.float64, torch.float64, torch.float32, *HALVES)
    for dtype, cell, layout, bidirectional in itertools.product(
        types, test_cuda.CELLS, ("padded", "packed", "lengths"), (False, True)
    ):
        # More than a CTA's threads need exact sums.
        H = rng.choice([1, 3, 5, 8, 21, 40] + [257, 300] * (dtype == torch.float64))
        projected = cell in test_cuda.PROJECTED and H > 4 and rng.random() < 0.5
        cases.append(
            Case(
                cell,
                dtype,
                layout=layout,
                bidirectional=bidirectional,
                T=rng.randint(1, 6),
                B=rng.randint(1, 5),
                # A norm of one feature's multiples does not depend on it but for roundings.
                I=rng.choice([3, 8, 13]),
                H=H,
                proj_size=rng.choice([3, 4]) if projected else 0,
                bias=rng.random() < 0.7,
                hx=rng.random() < 0.7,
                seed=len(cases),
            )
        )
    return cases


@pytest.mark.parametrize("case", variant_cases(), ids=str)
def test_variants_like_the_cpu(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch, VariantProblem(case))
    assert torch.ops.fusedrnn_emulated._cuda_algorithm() == STEPWISE


def test_random_masks_like_the_cpu(ops: Any) -> None:
    for seed, size, p in itertools.product(
        (0, 1, 2**62 + 12345, -7),
        ((1,), (0, 3), (3, 5, 7), (256,), (257,), (1023,), (4, 1000)),
        (0.0, 0.25, 0.5, 1.0),
    ):
        seed_tensor = torch.tensor(seed)
        ours = ops._random_mask(seed_tensor, size, p)
        assert ours.shape == size
        assert torch.equal(ours, torch.ops.fusedrnn._random_mask(seed_tensor, size, p))
    many = ops._random_mask(torch.tensor([3]), [1 << 16], 0.25)
    assert abs(many.double().mean().item() - 0.25) < 0.01


@pytest.mark.parametrize("cell", test_cuda.CELLS)
def test_variants_do_not_read_the_padding(cell: str, ops: Any) -> None:
    case = Case(cell, layout="lengths", bidirectional=True, T=6, B=4, H=9, seed=3)
    problem = VariantProblem(case, ("reset", "hidden_mask", "zoneout_masks", "norms"))
    problem.lengths = torch.tensor([0, 6, 2, 5])
    clean = problem.run(ops, torch.float32)
    problem.x[torch.arange(case.T)[:, None] >= problem.lengths] = float("nan")
    assert problem.variant["reset_mask"] is not None
    problem.variant["reset_mask"] |= torch.arange(case.T)[:, None] >= problem.lengths
    for a, b in zip(problem.run(ops, torch.float32), clean, strict=True):
        assert torch.equal(a, b)


def test_variants_unwanted_results(ops: Any) -> None:
    case = Case(bidirectional=True, layout="packed", H=9, seed=4)
    problem = VariantProblem(case, ("reset", "zoneout", "norms"))
    full = problem.run(ops, torch.float32)[4:]
    arguments = problem.arguments(torch.float32)
    results = problem.forward(arguments, ops)
    *outputs, nothing = ops.lstm_variant(*arguments, False)
    assert nothing.numel() == 0
    for a, b in zip(outputs, results[:-1], strict=True):
        assert torch.equal(a, b)
    gradients = problem.gradients_in(torch.float32)
    grad_cells = None if problem.grad_cells is None else problem.grad_cells.float()
    for parity in (0, 1):
        mask = [i % 2 == parity for i in range(len(full))]
        *of_inputs, of_weights = ops.lstm_variant_backward(
            *gradients, *arguments, grad_cells, results[-1], mask
        )
        for wanted, g, all_of_it in zip(mask, (*of_inputs, *of_weights), full, strict=True):
            assert torch.equal(g, all_of_it) if wanted else g.numel() == 0


def test_variants_same_bits_in_any_order(ops: Any) -> None:
    case = Case(layout="lengths", bidirectional=True, B=6, H=300, seed=5)
    problem, runs = VariantProblem(case, ("norms", "reset")), []
    for seed in range(4):
        ops.set(seed, 8)
        runs.append(problem.run(ops, torch.float32))
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert torch.equal(a, b)

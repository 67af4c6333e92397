"""The CUDA kernels on a GPU against the CPU's ops, cuDNN and themselves, by every algorithm."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import dataclasses
import gc
import io
import itertools
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.parity import FUSED, Nearby, assert_as_exact, double, fused_like
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from test_gradients import COVERING, problem
from test_parity import Configuration, check, configurations
from test_variant_ops import gradients as gradients_of_variant
from test_variant_ops import problem as problem_of_variant
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn
from fusedrnn import _ops, functional
from fusedrnn._cells import Cell

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and "cuda" in _ops.devices()),
    reason="needs a GPU and a build with its kernels",
)

# FUSEDRNN_CUDA_REGIME's values and the algorithms they request.
ALGORITHMS = {
    "step": "stepwise",
    "alone": "persistent_cta",
    "cluster": "persistent_cluster",
    "grid": "persistent_grid",
}
REGIMES = tuple(ALGORITHMS)
# The types a layer computes in. float32 GEMMs have two precisions.
KINDS = {
    "float64": torch.float64,
    "ieee": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
TF32_EPS = 2.0**-10
CELLS = tuple(_ops.CELLS)
PROJECTED = tuple(name for name, cell in _ops.CELLS.items() if cell.has_projection)
LAYERS = tuple(kind.__name__ for kind in FUSED if issubclass(kind, nn.RNNBase))
LAYOUTS = ("padded", "packed", "lengths")


def cell_of(kind: type[nn.Module]) -> Cell:
    """The cell for a torch module, a plain RNN's by tanh; KeyError if it has none."""
    name = kind.__name__.removesuffix("Cell").lower()
    return _ops.CELLS["rnn_tanh" if name == "rnn" else name]


def runs_in(regime: str, kind: str, hidden: int = 1, proj_size: int = 0) -> bool:
    """Whether a regime has kernels for a layer, on a GPU with room for it."""
    if regime == "step":
        return True
    most = {"alone": (64, 128), "cluster": (256, 512), "grid": (512, 1024)}[regime]
    is_half = KINDS[kind] in (torch.bfloat16, torch.float16)
    if kind == "float64" or proj_size or hidden > most[is_half]:
        return False
    return (regime, kind) != ("cluster", "ieee")  # clusters are for tensor cores


def lacks_clusters(regime: str | None) -> bool:
    """Whether this GPU lacks the regime's clusters of 16 CTAs with all their shared memory."""
    return (
        regime == "cluster"
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() not in {(9, 0), (10, 0)}
    )


def float32_of(regime: str | None) -> str:
    """The most exact float32 in a regime's kernels."""
    return "tf32" if regime == "cluster" else "ieee"


@contextlib.contextmanager
def running(regime: str | None, kind: str | None = None) -> Iterator[None]:
    """Layers run in this regime and in this kind's precision. None: in the best regime.

    A layer unable to run in the regime is an error.
    """
    if lacks_clusters(regime):
        pytest.skip("clusters need a GPU of sm_90 or sm_100")
    rnn: Any = torch.backends.cudnn.rnn
    before, precision = os.environ.get("FUSEDRNN_CUDA_REGIME"), rnn.fp32_precision
    os.environ["FUSEDRNN_CUDA_REGIME"] = regime or ""
    rnn.fp32_precision = "tf32" if (kind or float32_of(regime)) == "tf32" else "ieee"
    try:
        yield
    finally:
        rnn.fp32_precision = precision
        os.environ["FUSEDRNN_CUDA_REGIME"] = before or ""


def eps_of(kind: str) -> float:
    return TF32_EPS if kind == "tf32" else torch.finfo(KINDS[kind]).eps


def is_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- the ops against the CPU's in float64 -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    cell: str
    kind: str
    T: int
    B: int
    I: int
    H: int
    layout: str = "padded"
    bidirectional: bool = False
    bias: bool = True
    proj_size: int = 0
    hx: bool = True
    strided: bool = False

    def __str__(self) -> str:
        sizes = f"T{self.T}B{self.B}I{self.I}H{self.H}"
        flags = [n for n in ("bidirectional", "bias", "hx", "strided") if getattr(self, n)]
        return "-".join([self.cell, self.kind, sizes, f"P{self.proj_size}", self.layout, *flags])


def op_of(
    c: Case,
    device: str,
    dtype: torch.dtype,
    change: Callable[[Tensor], Tensor] = lambda t: t,
    ops: Any = torch.ops.fusedrnn,
    after_each: Callable[[], object] = lambda: None,
) -> Callable[[], list[Tensor]]:
    """A call that gives the op's outputs and all gradients from its backward op.

    It calls `after_each` after both ops.
    """
    generator = torch.Generator().manual_seed(0)
    cell, P, D = _ops.CELLS[c.cell], c.proj_size or c.H, 2 if c.bidirectional else 1
    rows = torch.randint(1, c.T + 1, (c.B,), generator=generator)
    rows[c.B // 2] = c.T

    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(shape, generator=generator)
        return change(values.to(KINDS[c.kind]).to(dtype)).to(device)

    batch_sizes = lengths = None
    x, dy = tensor(c.T, c.B, c.I), tensor(c.T, c.B, D * P)
    if c.layout == "packed":
        batch_sizes = (rows > torch.arange(c.T).unsqueeze(1)).sum(1)
        x, dy = (t.flatten(0, 1)[: int(batch_sizes.sum())] for t in (x, dy))
    if c.layout == "lengths":
        rows[0] = 0
        lengths = rows.to(device)
        x[torch.arange(c.T).unsqueeze(1) >= rows] = float("nan")  # is not read
    states = [tensor(D, c.B, P), tensor(D, c.B, c.H)][: cell.states]
    dstates = [tensor(*s.shape) for s in states]
    weights = []
    for _ in range(D):
        shapes = [(cell.gates * c.H, c.I), (cell.gates * c.H, P)]
        shapes += [(cell.gates * c.H,)] * 2 if c.bias else []
        shapes += [(P, c.H)] if c.proj_size else []
        weights += [tensor(*s, scale=s[-1] ** -0.5) for s in shapes]
    if c.strided:  # features apart, rows expanded, weights transposed
        x = torch.stack((x, x), -1)[..., 0]
        states = [s[:, :1].expand_as(s) for s in states]
        dstates = [s.transpose(0, 2).contiguous().transpose(0, 2) for s in dstates]
        weights = [w.t().contiguous().t() if w.dim() == 2 else w for w in weights]
    given = states if c.hx else [None] * len(states)
    forward, backward = getattr(ops, c.cell), getattr(ops, f"{c.cell}_backward")
    batch = (weights, c.bidirectional, batch_sizes, lengths)
    mask = [True, *([c.hx] * len(states)), *([True] * len(weights))]

    def call() -> list[Tensor]:
        *outputs, saved = forward(x, *given, *batch, True)
        after_each()
        *grads, dweights = backward(dy, *dstates, x, *given, *batch, outputs[0], saved, mask)
        after_each()
        return [*outputs, *grads, *dweights]

    return call


def run_op(
    c: Case, device: str, dtype: torch.dtype, change: Callable[[Tensor], Tensor] = lambda t: t
) -> list[Tensor]:
    return op_of(c, device, dtype, change)()


def compare(c: Case, ops: Any = torch.ops.fusedrnn) -> None:
    """Our errors are a few roundings of the type, as the problem amplifies them.

    A requested algorithm must have run.
    """
    dtype, eps = KINDS[c.kind], eps_of(c.kind)
    exact = run_op(c, "cpu", torch.float64)
    close = run_op(c, "cpu", torch.float64, Nearby(dtype, eps))
    ran: set[str] = set()
    found = op_of(c, DEVICE, dtype, ops=ops, after_each=lambda: ran.add(ops._cuda_algorithm()))()
    if regime := os.environ.get("FUSEDRNN_CUDA_REGIME"):
        assert ran == {ALGORITHMS[regime]}
    assert_as_exact(found, None, exact, close, dtype, eps=eps)


SIZES = [(5, 3, 7, 21), (6, 17, 5, 33), (4, 1, 1, 1), (7, 20, 16, 64), (3, 33, 12, 50)]


def small_cases() -> Iterator[tuple[str, Case]]:
    """Every regime, cell, kind, layout and direction. Sizes, bias, hx and strides vary too."""
    modes = itertools.product(REGIMES, CELLS, KINDS, LAYOUTS, (False, True))
    for i, (regime, cell, kind, layout, both) in enumerate(modes):
        if runs_in(regime, kind):
            case = Case(cell, kind, *SIZES[i % 5], layout, both)
            yield regime, dataclasses.replace(case, bias=i % 3 > 0, hx=i % 4 > 0, strided=i % 7 > 4)


def device_multiprocessors() -> int:
    """This GPU's; an H100's without one."""
    if not torch.cuda.is_available():
        return 132
    return int(torch.cuda.get_device_properties("cuda").multi_processor_count)


def full_tiles(multiprocessors: int | None) -> Iterator[tuple[int, str, Case]]:
    """So many rows that tiles must be large: the kernels for them, by each regime.

    The row counts come from plan.cpp's: one more than tiles of the size before have room for.

    Args:
        multiprocessors: the device's. None: as many as one group of CTAs needs.

    Yields:
        A group's CTAs, the regime and the case.
    """
    kinds = [(kind, True) for kind in KINDS if kind != "float64"] + [("tf32", False)]
    for cell, (kind, hx) in itertools.product(CELLS, kinds):
        if cell == "rnn_relu" and not hx:
            continue  # its h is not bounded
        is_half = KINDS[kind] != torch.float32 or not hx  # the forward pass's operands
        # Regime, hidden units, units a CTA, the tile size that must not suffice.
        sizes = [("grid", hidden, 16, rows)
                 for hidden in ((512, 528) if is_half else (256, 272))
                 for rows in (8, 16)]  # fmt: skip
        if kind != "ieee":
            sizes += [("alone", 21, 21, 4), ("cluster", 40, 32, 8)]
            sizes += [("cluster", 258 if is_half else 130, 32, 8)]
        if is_half:
            sizes += [("alone", 72, 72, 1), ("alone", 72, 72, 2)]
        for regime, hidden, units, rows in sizes:
            ctas = -(-hidden // units)
            groups = multiprocessors // ctas if multiprocessors else 1
            c = Case(cell, kind, 2, rows * groups + 1, 4, hidden, hx=hx)
            if not runs_in(regime, kind, hidden):
                # The backward pass of TF32 has room for half the units. Forward the regime is the
                # cheapest if there are some steps, at once where steps one by one are dear.
                is_dear = regime == "grid" and cell != "rnn_tanh"
                regime, c = "", c if is_dear else dataclasses.replace(c, T=8)
            yield ctas, regime, c


def every_kernel(multiprocessors: int | None) -> list[tuple[str, Case]]:
    """Each regime, cell, kind and layout, in both directions; odd sizes; two tiles of rows.

    Args:
        multiprocessors: the device's, for full tiles. None: without them.
    """
    modes = itertools.product(REGIMES, CELLS, KINDS, LAYOUTS)
    small = [
        (
            regime,
            Case(
                cell,
                kind,
                3,
                17 if layout == "packed" else 3,
                4,
                40 if regime == "cluster" else 21,
                layout,
                True,
            ),
        )
        for regime, cell, kind, layout in modes
        if runs_in(regime, kind)
    ]
    # Vector accesses, where sizes allow them; then larger groups and projections. A fused step has
    # 1, 4 or 8 rows a warp, and more than 16 rows have no fused step.
    wide = [
        ("step", Case(cell, kind, 2, rows, 4, 8))
        for cell in CELLS
        for kind in KINDS
        for rows in (1, 5, 17)
    ]
    padded = [
        ("step", Case("lstm", kind, 2, 3, inputs, 8, "lengths"))
        for kind in KINDS
        for inputs in (3, 8)
    ]
    large = [
        ("grid", Case(cell, kind, 2, 3, 4, 272 if kind in ("ieee", "tf32") else 528))
        for cell in CELLS
        for kind in KINDS
        if kind != "float64"
    ]
    large += [
        ("cluster", Case(cell, kind, 2, 3, 4, 130 if kind == "tf32" else 258))
        for cell in CELLS
        for kind in ("tf32", "bfloat16", "float16")
    ]
    # TF32 from float16 operands, where h starts at zero and is bounded. The backward pass has room
    # for half the units, so the largest layers run by default.
    bounded = [
        (regime, Case(cell, "tf32", 5, 3, 4, hidden, hx=False))
        for cell in CELLS
        if cell != "rnn_relu"
        for regime, hidden in (("alone", 21), ("cluster", 40), ("grid", 21), ("", 258), ("", 528))
    ]
    projected = [
        ("step", Case(cell, kind, 3, 3, 4, 8, proj_size=P))
        for cell in PROJECTED
        for kind in KINDS
        for P in (3, 4)
    ]
    full = [(regime, c) for _, regime, c in full_tiles(multiprocessors)] if multiprocessors else []
    return [*small, *wide, *padded, *large, *bounded, *projected, *full]


@pytest.mark.parametrize(("regime", "c"), list(small_cases()), ids=str)
def test_ops_are_the_cpus(regime: str, c: Case) -> None:
    with running(regime, c.kind):
        compare(c)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("both", "proj_size"), [(False, 1), (True, 8), (True, 15)])
def test_projections(kind: str, layout: str, both: bool, proj_size: int) -> None:
    c = Case("lstm", kind, 5, 6, 9, 16, layout, both, bias=both, proj_size=proj_size, hx=not both)
    with running(None, c.kind):
        compare(c)


# All units in one CTA; CTA groups with half and all registers in use; tiles with several chunks;
# sizes with room only in the stepwise algorithm.
LARGE = [
    Case("lstm", "float16", 6, 70, 40, 100),
    Case("gru", "bfloat16", 6, 33, 128, 128, "lengths", True),
    Case("lstm", "tf32", 6, 5, 65, 65),
    Case("rnn_tanh", "ieee", 6, 17, 64, 129, "lengths", True),
    Case("rnn_relu", "bfloat16", 6, 40, 100, 512, "packed"),
    Case("gru", "ieee", 6, 40, 100, 200, "packed"),
    Case("lstm", "ieee", 6, 16, 256, 256, "lengths", True),
    Case("gru", "tf32", 6, 3, 30, 300),
    Case("lstm", "tf32", 6, 100, 64, 512, "packed"),
    Case("lstm", "ieee", 6, 35, 64, 512),
    Case("gru", "bfloat16", 6, 9, 64, 129, "packed", True),
    Case("lstm", "float16", 6, 64, 100, 512, "lengths"),
    Case("lstm", "bfloat16", 6, 17, 64, 600),
    Case("gru", "float16", 6, 70, 64, 1000, "packed", True),
    Case("lstm", "bfloat16", 6, 128, 64, 1024),
    Case("lstm", "ieee", 6, 4, 32, 520),
    Case("gru", "float16", 6, 4, 32, 1030, "lengths", True),
    Case("lstm", "float16", 6, 600, 32, 1024),
    Case("lstm", "float64", 6, 33, 30, 200, "lengths", True),
]


@pytest.mark.parametrize("c", LARGE, ids=str)
def test_large_layers(c: Case) -> None:
    with running(None, c.kind):
        compare(c)


# Clusters of 8 and 16 CTAs, whose last CTA is partly idle; rows for one tile, and for more.
CLUSTERS = [
    Case("lstm", "float16", 6, 64, 100, 256),
    Case("gru", "bfloat16", 6, 600, 30, 256, "packed", True),
    Case("lstm", "tf32", 6, 17, 64, 256, "lengths", True),
    Case("rnn_tanh", "float16", 6, 70, 64, 256, "packed", True),
    Case("gru", "tf32", 6, 600, 64, 200, "packed"),
    Case("lstm", "bfloat16", 6, 300, 64, 512),
    Case("gru", "float16", 6, 70, 64, 300, "lengths", True),
    Case("lstm", "bfloat16", 700, 9, 64, 512, "packed", True),
]


@pytest.mark.parametrize("c", CLUSTERS, ids=str)
def test_large_clusters(c: Case) -> None:
    with running("cluster", c.kind):
        compare(c)


@pytest.mark.parametrize(
    ("regime", "kind", "hidden", "expected"),
    [
        # By default the cheapest; which one depends on the GPU, and may differ in the two passes.
        ("", "ieee", 64, "alone"),
        *(("", kind, 64, "alone cluster") for kind in ("tf32", "bfloat16", "float16")),
        *(("", kind, 128, "alone cluster") for kind in ("bfloat16", "float16")),
        ("", "ieee", 512, "grid step"),
        *(("", kind, 512, "cluster grid") for kind in ("tf32", "bfloat16", "float16")),
        ("", "float16", 1024, "grid"),
        ("", "float16", 1040, "step"),
        ("", "ieee", 528, "step"),
        ("", "float64", 64, "step"),
        ("step", "tf32", 64, "step"),
        ("grid", "tf32", 64, "grid"),
        ("alone", "tf32", 80, None),
        *(("cluster", kind, 64, "cluster") for kind in ("tf32", "bfloat16", "float16")),
        *(("cluster", kind, 256, "cluster") for kind in ("tf32", "bfloat16", "float16")),
        ("cluster", "ieee", 64, None),
        ("cluster", "tf32", 257, None),
        ("cluster", "float16", 513, None),
    ],
)
def test_what_runs(regime: str, kind: str, hidden: int, expected: str | None) -> None:
    """Each regime requests an algorithm: that one runs, or the call is an error.

    `expected`: regimes of which each may run; None for an error.
    """
    c, ran = Case("lstm", kind, 6, 3, 8, hidden), set[str]()
    algorithm = torch.ops.fusedrnn._cuda_algorithm
    call = op_of(c, DEVICE, KINDS[kind], after_each=lambda: ran.add(algorithm()))
    with running(regime, kind):
        if expected is None:
            assert not runs_in(regime, kind, hidden)
            with pytest.raises(RuntimeError, match=f"FUSEDRNN_CUDA_REGIME={regime}: this device"):
                call()
            return
        call()
    assert ran <= {ALGORITHMS[of] for of in expected.split()}


# ---- modules against cuDNN ----------------------------------------------------------------------


@settings(
    max_examples=int(os.environ.get("FUSEDRNN_TEST_EXAMPLES", "600")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(configurations(), st.integers(0, 2), st.sampled_from(["ieee", "tf32"]))
@pytest.mark.parametrize("regimes", [("step", "alone", "grid"), ("cluster",)], ids="-".join)
def test_as_exact_as_cudnn(
    regimes: tuple[str, ...], c: Configuration, which: int, precision: str
) -> None:
    """Random layers, layouts, strides and states; by the tolerance of parity.py."""
    kind = precision
    if c.dtype != torch.float32:
        kind = next(k for k, dtype in KINDS.items() if dtype == c.dtype)
    regime = regimes[which % len(regimes)]
    if not runs_in(regime, kind, c.hidden_size, c.proj_size):
        reject()
    with running(regime, kind):
        try:
            check(c, DEVICE, TF32_EPS if kind == "tf32" else None)
        except RuntimeError as error:
            if "CUDNN_STATUS_NOT_SUPPORTED" not in str(error):
                raise
            reject()


@pytest.mark.parametrize("kind", [kind for kind in FUSED if issubclass(kind, nn.RNNCellBase)])
@pytest.mark.parametrize("of", KINDS)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (40,)])
def test_cells(kind: type[nn.RNNCellBase], of: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    dtype, eps = KINDS[of], eps_of(of)
    theirs = kind(11, 35, bias=shape != (1,), dtype=dtype)
    values = [torch.randn(*shape, n).to(dtype) for n in (11, 35, 35)]

    def run(module: nn.Module, change: Callable[[Tensor], Tensor] = lambda t: t) -> list[Tensor]:
        weight = next(module.parameters())
        leaves = [change(t.to(weight.dtype)).to(weight.device) for t in values]
        leaves = [t.requires_grad_() for t in leaves[: 1 + cell_of(kind).states]]
        out = module(leaves[0], tuple(leaves[1:]) if len(leaves) > 2 else leaves[1])
        out = out if isinstance(out, tuple) else (out,)
        loss = sum((i + 1) * t.square().sum() for i, t in enumerate(out))
        return [*out, *torch.autograd.grad(loss, [*leaves, *module.parameters()])]

    nearby = Nearby(dtype, eps)
    with running(None, of):
        ours = run(fused_like(theirs).to(DEVICE))
        torchs = run(copy.deepcopy(theirs).to(DEVICE))
    exact, close = run(double(theirs)), run(nearby.weights(theirs), nearby)
    assert_as_exact(ours, torchs, exact, close, dtype, eps=eps)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("cell", LAYERS)
def test_precisions(regime: str, cell: str) -> None:
    """IEEE is as exact as torch's, TF32 differs, and torch's settings stay unchanged."""
    torch.manual_seed(0)
    theirs = getattr(nn, cell)(64, 64, bidirectional=True).to(DEVICE)
    x = torch.randn(8, 20, 64)

    def run(module: nn.Module) -> list[Tensor]:
        weight = next(module.parameters())
        leaf = x.to(weight).requires_grad_()
        y = module(leaf)[0]
        return [y, *torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()])]

    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    found = {}
    for kind in ("ieee", "tf32"):
        with running(regime if runs_in(regime, kind) else "step", kind):
            found[kind] = run(fused_like(theirs))
    assert matmul.fp32_precision == before
    with running(None, "ieee"):
        torchs = run(theirs)
    exact, nearby = run(double(theirs)), Nearby(torch.float32)
    close = run(nearby.weights(theirs))
    assert_as_exact(found["ieee"], torchs, exact, close, torch.float32)
    assert_as_exact(found["tf32"], None, exact, close, torch.float32, eps=TF32_EPS)
    assert not is_equal(found["ieee"], found["tf32"])


MATMUL_SETTINGS: dict[str, dict[str, Any]] = {
    "sums in float16": {"allow_fp16_accumulation": True},
    "no sums in float16": {"allow_fp16_reduced_precision_reduction": False},
    "no sums in float16, nor split": {"allow_fp16_reduced_precision_reduction": (False, False)},
    "no sums in bfloat16, nor split": {"allow_bf16_reduced_precision_reduction": (False, False)},
    "TF32": {"fp32_precision": "tf32"},
    "TF32 by cuBLASLt": {"fp32_precision": "tf32", "preferred": "cublaslt"},
}


@pytest.mark.parametrize("setting", MATMUL_SETTINGS)
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "float64"])
@pytest.mark.parametrize("regime", ["step", "grid"])
def test_settings_of_torchs_matmul(regime: str, kind: str, setting: str) -> None:
    """They do not apply to recurrent layers: results stay the same bits, and so do the settings."""
    matmul: Any = torch.backends.cuda.matmul
    settings = dict(MATMUL_SETTINGS[setting])
    library = settings.pop("preferred", None)
    for name in settings:
        if not hasattr(matmul, name):
            pytest.skip(f"torch {torch.__version__} has no {name}")
    call = op_of(Case("lstm", kind, 6, 20, 64, 64, bidirectional=True), DEVICE, KINDS[kind])
    with running(regime, kind):
        expected = call()
    before = {name: getattr(matmul, name) for name in settings}
    preferred = torch.backends.cuda.preferred_blas_library()
    try:
        for name, value in settings.items():
            try:
                setattr(matmul, name, value)
            except (RuntimeError, TypeError) as error:
                pytest.skip(f"torch {torch.__version__}: {name}={value}: {error}")
        if library:
            torch.backends.cuda.preferred_blas_library(library)
        during = {name: getattr(matmul, name) for name in settings}
        with running(regime, kind):
            found = call()
        assert {name: getattr(matmul, name) for name in settings} == during
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)
        torch.backends.cuda.preferred_blas_library(preferred)
    assert is_equal(found, expected)


# ---- derivatives --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", COVERING, ids=lambda m: "-".join(map(str, m)))
def test_gradcheck(mode: tuple) -> None:
    assert torch.autograd.gradcheck(*problem(mode, DEVICE), fast_mode=True)


@pytest.mark.parametrize("mode", COVERING[::2], ids=lambda m: "-".join(map(str, m)))
def test_gradgradcheck(mode: tuple) -> None:
    """Second derivatives are torch's own ops, whose sums may differ by a rounding."""
    assert torch.autograd.gradgradcheck(*problem(mode, DEVICE), fast_mode=True, nondet_tol=1e-10)


@pytest.mark.parametrize("first", range(0, 200, 25))
def test_variants(first: int) -> None:
    """Values and gradients are the CPU's, in float64."""
    for seed in range(first, first + 25):
        on_cpu = problem_of_variant(seed)
        problems = (on_cpu, on_cpu.to(DEVICE))
        results = [p.run(_ops.variant_layer) for p in problems]
        for p, found in zip(problems, results, strict=True):
            found += gradients_of_variant(p, found, seed)
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b.cpu(), rtol=1e-8, atol=1e-8)


def test_random_masks() -> None:
    """The CPU's for the same seed, without a wait."""
    seed = torch.tensor(2**62 + 12345)
    for count in (0, 1, 257, 1 << 20):
        expected = torch.ops.fusedrnn._random_mask(seed, [count], 0.3)
        on_device = seed.to(DEVICE)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = torch.ops.fusedrnn._random_mask(on_device, [count], 0.3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(expected, found.cpu())


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("cell", LAYERS)
def test_any_subset_of_outputs_in_eval_mode(regime: str, cell: str) -> None:
    """cuDNN has no gradients in eval mode; ours equal the training mode's."""
    torch.manual_seed(0)
    theirs = getattr(nn, cell)(3, 20, num_layers=2, bidirectional=True)
    count = 1 + cell_of(getattr(nn, cell)).states
    x = torch.randn(6, 2, 3)
    with running(regime):
        ours = fused_like(theirs).to(DEVICE).eval()
        for used in itertools.product((0, 1), repeat=count):
            if not any(used):
                continue
            results = []
            for module in (theirs, ours):
                leaf = x.to(next(module.parameters())).requires_grad_()
                y, final = module(leaf)
                outputs = list(flat((y, final)))
                loss = sum(t.square().sum() for t, use in zip(outputs, used, strict=True) if use)
                wanted = [leaf, *module.parameters()]
                results.append(torch.autograd.grad(loss, wanted, materialize_grads=True))
            rtol, atol = (0.05, 0.02) if float32_of(regime) == "tf32" else (1e-4, 1e-5)
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b.cpu(), rtol=rtol, atol=atol)


def test_gradient_penalty_and_transforms() -> None:
    """A second derivative through a module, and torch.func: the CPU's."""
    torch.manual_seed(0)
    cpu = fusedrnn.FusedGRU(3, 4, num_layers=2, bidirectional=True).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    results = []
    for module in (cpu, copy.deepcopy(cpu).to(DEVICE)):
        leaf = x.to(next(module.parameters())).requires_grad_()
        (g,) = torch.autograd.grad(module(leaf)[0].square().sum(), leaf, create_graph=True)
        penalty = (g.norm(2, -1) - 1).square().mean()
        found = torch.autograd.grad(penalty, [leaf, *module.parameters()], allow_unused=True)
        one = torch.func.vmap(lambda r, m=module: m(r)[0], in_dims=1, out_dims=1)(leaf.detach())
        tangents = torch.ones_like(leaf)
        _, moved = torch.func.jvp(lambda t, m=module: m(t)[0], (leaf.detach(),), (tangents,))
        results.append([*(g for g in found if g is not None), one, moved])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b.cpu())


# ---- a module at work ---------------------------------------------------------------------------


class Work:
    """A module and a batch in one layout; new values may be copied into x."""

    def __init__(
        self,
        cell: str,
        layout: str,
        dtype: torch.dtype = torch.float32,
        hidden: int = 40,
        device: str = "",
    ) -> None:
        torch.manual_seed(0)
        device = device or DEVICE
        self.cell, self.layout = cell, layout
        kind = getattr(fusedrnn, f"Fused{cell}")
        self.module = kind(9, hidden, 2, bidirectional=True).to(device, dtype)
        self.x = torch.randn(7, 20, 9).to(device, dtype)
        lengths = torch.tensor([7, *range(1, 8), *range(1, 8), *range(3, 8)])
        self.lengths = lengths.to(device) if layout == "lengths" else None
        self.packed = pack_padded_sequence(self.x, lengths, enforce_sorted=False)
        if layout == "packed":
            self.x = self.packed.data.detach().clone()
        self.x.requires_grad_()

    def values(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.x.shape, generator=generator).to(self.x)

    def forward(self) -> list[Tensor]:
        if self.layout == "packed":
            y, final = self.module(PackedSequence(self.x, *self.packed[1:]))
            y = y.data
        elif self.layout == "lengths":
            y, final = self.module(self.x, lengths=self.lengths)
        else:
            y, final = self.module(self.x)
        return list(flat((y, final)))

    def loss(self) -> Tensor:
        return torch.stack([t.float().square().mean() for t in self.forward()]).sum()

    def run(self) -> list[Tensor]:
        """Outputs and all gradients."""
        outputs = self.forward()
        loss = sum(t.float().square().sum() for t in outputs)
        grads = torch.autograd.grad(loss, [self.x, *self.module.parameters()])
        return [*(t.detach() for t in outputs), *grads]


EVERY = pytest.mark.parametrize(
    ("regime", "cell", "layout"), list(itertools.product(REGIMES, LAYERS, LAYOUTS))
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@EVERY
def test_same_bits_twice(regime: str, cell: str, layout: str, dtype: torch.dtype) -> None:
    """The same while another stream keeps the device busy."""
    work = Work(cell, layout, dtype)
    with running(regime, "tf32"):
        first = work.run()
        assert is_equal(first, work.run())
        if DEVICE == "cuda":
            side, busy = torch.cuda.Stream(), torch.randn(2048, 2048, device=DEVICE)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(20):
                    busy = (busy @ busy).clamp(-1, 1)
            for _ in range(5):
                assert is_equal(first, work.run())
            torch.cuda.synchronize()


@pytest.mark.parametrize(("regime", "c"), every_kernel(device_multiprocessors()), ids=str)
def test_same_bits_in_a_hundred_runs(regime: str, c: Case) -> None:
    """Each kernel, one run after the other without a wait."""
    call = op_of(c, DEVICE, KINDS[c.kind])
    with running(regime, c.kind):
        first = call()
        differing = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for _ in range(100):
            for a, b in zip(first, call(), strict=True):
                differing += (a != b).sum()
    assert differing == 0


@EVERY
def test_another_stream(regime: str, cell: str, layout: str) -> None:
    """The input comes late on another stream. A kernel that does not wait for it reads NaN."""
    work = Work(cell, layout)
    values, stream = work.values(1), torch.cuda.Stream()
    with running(regime):
        with torch.no_grad():
            work.x.copy_(values)
        expected = work.run()
        with torch.no_grad():
            work.x.fill_(float("nan"))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            with torch.no_grad():
                work.x.copy_(values)
            found = work.run()
        stream.synchronize()
        assert is_equal(expected, found)


@EVERY
def test_no_synchronisation(regime: str, cell: str, layout: str) -> None:
    work = Work(cell, layout)
    with running(regime):
        work.run()  # handles and workspaces are made
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                work.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@EVERY
def test_graph_of_inference(regime: str, cell: str, layout: str) -> None:
    """Captured once, replayed twice with other values."""
    work = Work(cell, layout)
    with running(regime), torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                work.forward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = work.forward()
        for seed in (1, 2):
            work.x.copy_(work.values(seed))
            graph.replay()
            replayed = [t.clone() for t in outputs]
            for a, b in zip(work.forward(), replayed, strict=True):
                torch.testing.assert_close(a, b)


@EVERY
def test_graph_of_a_training_step(regime: str, cell: str, layout: str) -> None:
    """Forward, backward and the optimizer, replayed twice, beside the same steps uncaptured."""

    def step(work: Work, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = work.loss()
        loss.backward()
        optimizer.step()
        return loss

    work = Work(cell, layout)
    work.x.requires_grad_(False)
    optimizer = torch.optim.SGD(work.module.parameters(), lr=0.1)
    with running(regime):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(work, optimizer)
        torch.cuda.current_stream().wait_stream(side)
        other = Work(cell, layout)
        other.x.requires_grad_(False)
        other.module.load_state_dict(work.module.state_dict())
        optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step(work, optimizer)
        others = torch.optim.SGD(other.module.parameters(), lr=0.1)
        for seed in (1, 2):
            for w in (work, other):
                w.x.copy_(w.values(seed))
            graph.replay()
            torch.testing.assert_close(loss, step(other, others))
            for p, q in zip(work.module.parameters(), other.module.parameters(), strict=True):
                torch.testing.assert_close(p, q)


@pytest.mark.parametrize("regime", REGIMES)
def test_eight_threads(regime: str) -> None:
    """Each on its own stream, in all layouts, with one module for each pair of threads."""
    works = [Work(LAYERS[1 - i % 2], LAYOUTS[i % 3], hidden=64) for i in range(8)]
    for i in (2, 4):
        works[i].module = works[0].module
    with running(regime):
        expected = [work.run() for work in works]
        if DEVICE == "cuda":
            torch.cuda.synchronize()

        def many(i: int) -> bool:
            if DEVICE != "cuda":
                return is_equal(works[i].run(), expected[i])
            with torch.cuda.stream(torch.cuda.Stream()):
                results = [works[i].run() for _ in range(20)]
                torch.cuda.current_stream().synchronize()
            return all(is_equal(found, expected[i]) for found in results)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert list(pool.map(many, range(8))) == [True] * 8


@pytest.mark.parametrize("regime", REGIMES)
def test_eight_streams(regime: str) -> None:
    """One thread gives them work in turn, so that their kernels compete for the device."""
    works = [Work(LAYERS[1 - i % 2], LAYOUTS[i % 3], hidden=64) for i in range(8)]
    streams = [torch.cuda.Stream() for _ in works]
    with running(regime):
        expected = [work.run() for work in works]
        torch.cuda.synchronize()
        found = []
        for _ in range(20):
            for work, stream in zip(works, streams, strict=True):
                with torch.cuda.stream(stream):
                    found.append(work.run())
        torch.cuda.synchronize()
    assert all(is_equal(f, expected[i % 8]) for i, f in enumerate(found))


@pytest.mark.parametrize("regime", REGIMES)
def test_memory(regime: str) -> None:
    """All memory comes from torch's allocator and is returned."""
    works = [Work(cell, layout) for cell in LAYERS for layout in LAYOUTS]
    with running(regime):

        def held() -> tuple[int, int]:
            """Device bytes outside torch's allocator, and bytes in tensors."""
            gc.collect()
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info()
            return total - free - torch.cuda.memory_reserved(), torch.cuda.memory_allocated()

        for _ in range(3):
            for work in works:
                work.run()
        before = held()
        for _ in range(20):
            for work in works:
                work.run()
        assert held() == before


# ---- sizes, devices, types ----------------------------------------------------------------------


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("cell", CELLS)
def test_many_steps(regime: str, cell: str) -> None:
    with running(regime):
        compare(Case(cell, float32_of(regime), 70_000, 2, 3, 8))


@pytest.mark.parametrize("regime", ["alone", "grid"])
def test_offsets_beyond_32_bits(regime: str) -> None:
    """More than 2^31 elements: the last rows give the same results alone."""
    if torch.cuda.mem_get_info()[0] < 50 << 30:
        pytest.skip("needs 50 GiB")
    T, B, H, last = 300, 14400, 128, 32
    torch.manual_seed(0)
    module = fusedrnn.FusedLSTM(2, H, device=DEVICE, dtype=torch.bfloat16)
    if regime == "grid":  # a tile holds 128 rows
        T, B = 8200, 512
    x = torch.randn(T, B, 2, device=DEVICE, dtype=torch.bfloat16)
    assert T * B * 4 * H > 2**31
    results = []
    with running(regime):
        for part in (x, x[:, -last:].contiguous()):
            leaf = part.requires_grad_()
            y = module(leaf)[0][:, -last:]
            (grad,) = torch.autograd.grad(y.float().square().sum(), leaf)
            results.append((y.detach(), grad[:, -last:]))
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("kind", list(FUSED))
def test_batch_of_zero(regime: str, kind: type[nn.Module]) -> None:
    module = FUSED[kind](4, 6).to(DEVICE)
    is_cell = isinstance(module, nn.RNNCellBase)
    x = torch.randn((0, 4) if is_cell else (5, 0, 4), device=DEVICE, requires_grad=True)
    with running(regime):
        result = module(x)
        results = list(flat(result))
        assert all(t.shape == ((0, 6) if is_cell else (t.size(0), 0, 6)) for t in results)
        sum(t.sum() for t in results).backward()
    for p in (x, *module.parameters()):
        assert p.grad is not None
        assert torch.equal(p.grad, torch.zeros_like(p))


def arguments(**changes: Any) -> list[Any]:
    """Arguments for torch.ops.fusedrnn.lstm."""
    T, B, I, H = 6, 3, 2, 5
    shapes = [(4 * H, I), (4 * H, H), (4 * H,), (4 * H,)]
    given = {
        "input": torch.randn(T, B, I, device=DEVICE),
        "h0": torch.randn(1, B, H, device=DEVICE),
        "c0": torch.randn(1, B, H, device=DEVICE),
        "weights": [torch.randn(s, device=DEVICE) for s in shapes],
        "bidirectional": False,
        "batch_sizes": None,
        "lengths": None,
        "save": True,
    }
    return [(changes[n](v) if n in changes else v) for n, v in given.items()]


@pytest.mark.parametrize("name", ["input", "h0", "c0", "weights"])
def test_other_devices(name: str) -> None:
    def move(value: Any) -> Any:
        return [value[0].cpu(), *value[1:]] if isinstance(value, list) else value.cpu()

    torch.ops.fusedrnn.lstm(*arguments())
    with pytest.raises(RuntimeError, match=r"input is on c\S+ but \w+ is on c"):
        torch.ops.fusedrnn.lstm(*arguments(**{name: move}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h0": Tensor.double}, "input has type Float but h0 has type Double"),
        ({"input": Tensor.double}, "input has type Double but weight_ih has type Float"),
        ({"input": Tensor.long}, "must be float32, float64, bfloat16 or"),
        ({"h0": lambda t: t[0]}, r"Expected h0 size \[1, 3, 5\], got \[3, 5\]"),
        ({"weights": lambda w: w[:1]}, "got 1 weights for 1 direction"),
        ({"lengths": lambda _: torch.tensor([1, 2, 3])}, "on the device of input"),
        ({"lengths": lambda _: torch.ones(3, device=DEVICE)}, "lengths must be an int64 tensor"),
        (
            {
                "input": lambda t: t.flatten(0, 1),
                "batch_sizes": lambda _: torch.full((6,), 3, device=DEVICE),
            },
            "batch_sizes must be a 1-D int64 tensor on the CPU",
        ),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fusedrnn.lstm(*arguments(**changes))


def test_module_on_another_device() -> None:
    message = "Input and parameter tensors are not at the same device, found input tensor at cpu"
    with pytest.raises(RuntimeError, match=message):
        fusedrnn.FusedLSTM(3, 4).to(DEVICE)(torch.randn(5, 2, 3))


def test_bad_lengths_on_the_host() -> None:
    """They are an error before any launch, and the device stays usable."""
    module = fusedrnn.FusedLSTM(3, 4).to(DEVICE)
    x = torch.randn(5, 2, 3, device=DEVICE)
    for lengths in ([6, 4], torch.tensor([4, -1])):
        with pytest.raises(RuntimeError, match="lengths must be from 0 to the sequence length 5"):
            module(x, lengths=lengths)
    assert module(x, lengths=[5, 4])[0].isfinite().all()


@pytest.mark.parametrize("lengths", [[6, 4], [5, -1]])
@pytest.mark.parametrize("regime", REGIMES)
def test_bad_lengths(regime: str, lengths: list[int]) -> None:
    """On the device they are found later, and the process can't use the device any more."""
    if lacks_clusters(regime):
        pytest.skip("clusters need a GPU of sm_90 or sm_100")
    code = (
        "import torch, fusedrnn\n"
        "module = fusedrnn.FusedLSTM(3, 4).cuda()\n"
        f"lengths = torch.tensor({lengths}).cuda()\n"
        "module(torch.randn(5, 2, 3).cuda(), lengths=lengths)\n"
        "torch.cuda.synchronize()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FUSEDRNN_CUDA_REGIME": regime, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode != 0
    assert re.search("lengths must be from 0|device-side assert", process.stderr), process.stderr
    assert not re.search(r"length 5, got|can't run", process.stderr), "the host found it"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@EVERY
def test_not_the_current_device(regime: str, cell: str, layout: str) -> None:
    with running(regime):
        expected, found = (Work(cell, layout, device=f"cuda:{i}").run() for i in (0, 1))
        assert torch.cuda.current_device() == 0
        assert {t.device.index for t in found} == {1}
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a.cpu(), b.cpu())


# ---- modules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("theirs", "ours"), list(FUSED.items()))
def test_state_moves(theirs: type[nn.Module], ours: type[nn.Module]) -> None:
    """To the device and back, through copies and files, from and to torch's module."""
    torch.manual_seed(0)
    module = ours(3, 4)
    x = torch.randn(5, 3)
    expected = list(flat(module(x)))
    moved = copy.deepcopy(module).to(DEVICE)
    assert {p.device.type for p in moved.parameters()} == {torch.device(DEVICE).type}
    file = io.BytesIO()
    torch.save(moved.state_dict(), file)
    file.seek(0)
    loaded = ours(3, 4, device=DEVICE)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    torchs = theirs(3, 4).to(DEVICE)
    torchs.load_state_dict(moved.state_dict())
    with running(None):
        for other in (moved, copy.deepcopy(moved), loaded, torchs):
            for a, b in zip(expected, flat(other(x.to(DEVICE))), strict=True):
                torch.testing.assert_close(a, b.cpu())
    back = moved.cpu()
    assert is_equal(expected, list(flat(back(x))))
    half = ours(3, 4).to(DEVICE, torch.float16)
    assert next(flat(half(x.to(DEVICE).half()))).dtype == torch.float16


def flat(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    else:
        for o in out:
            yield from flat(o)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("theirs", list(FUSED))
def test_autocast(theirs: type[nn.Module], given: torch.dtype, dtype: torch.dtype) -> None:
    """Output types are torch's own; parameter gradients stay float32."""
    torch.manual_seed(0)
    a = theirs(3, 4).to(DEVICE)
    x = torch.randn(5, 3).to(DEVICE, given)
    results = []
    for module in (a, fused_like(a)):
        with torch.autocast(DEVICE, dtype):
            out = list(flat(module(x)))
            loss = sum(t.float().sum() for t in out)
            results.append([*out, *torch.autograd.grad(loss, list(module.parameters()))])
    for p, q in zip(*results, strict=True):
        assert p.dtype == q.dtype
        torch.testing.assert_close(p, q, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("cell", LAYERS)
def test_grad_scaler(cell: str, regime: str, dtype: torch.dtype) -> None:
    """Some mixed-precision training steps, beside torch's layer."""
    torch.manual_seed(0)
    theirs = getattr(nn, cell)(10, 40, 2, bidirectional=True).to(DEVICE)
    x, target = torch.randn(8, 6, 10).to(DEVICE), torch.randn(8, 6, 80).to(DEVICE)
    results = []
    with running(regime, "tf32"):
        for module in (theirs, fused_like(theirs)):
            scaler = torch.amp.GradScaler(DEVICE)
            optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
            losses = []
            for _ in range(5):
                optimizer.zero_grad()
                with torch.autocast(DEVICE, dtype):
                    loss = (module(x)[0] - target).square().mean()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                losses.append(loss.detach())
            assert losses[-1] < losses[0]
            results.append(torch.stack(losses))
    torch.testing.assert_close(*results, rtol=0.02, atol=0.0)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("cell", LAYERS)
def test_compiles_without_a_graph_break(cell: str, regime: str) -> None:
    module = getattr(fusedrnn, f"Fused{cell}")(3, 4, num_layers=2, bidirectional=True).to(DEVICE)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 2, 3).to(DEVICE)
    results = []
    with running(regime):
        for call in (module, compiled):
            module.zero_grad()
            y = call(x)[0]
            y.square().sum().backward()
            results.append([y, *(p.grad.clone() for p in module.parameters())])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q)


def test_dropout_between_layers_draws_what_torch_draws() -> None:
    """In torch.nn.functional.dropout's order on the GPU, not cuDNN's."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = fusedrnn.FusedLSTM(5, 8, num_layers=2, dropout=0.4).to(DEVICE)
    x = torch.randn(6, 4, 5).to(DEVICE)
    torch.manual_seed(1)
    y = module(x)[0]
    weights = list(module.parameters())
    torch.manual_seed(1)
    first = functional.lstm(x, None, weights[:4])[0]
    dropped = nn.functional.dropout(first, 0.4, True)
    torch.testing.assert_close(y, functional.lstm(dropped, None, weights[4:])[0])


def test_doctor() -> None:
    report = subprocess.run(
        [sys.executable, "-m", "fusedrnn"], capture_output=True, text=True, check=False
    )
    assert report.returncode == 0, report.stdout + report.stderr
    assert re.search(r"^  kernels +cpu, cuda$", report.stdout, re.M)
    assert re.search(r"^  GPU 0 +.*, capability", report.stdout, re.M)
    assert re.search(r"^  cuda +LSTM ", report.stdout, re.M)
    assert "self-check passed" in report.stdout

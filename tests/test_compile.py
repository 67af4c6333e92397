"""torch.compile, torch.export, AOTInductor, opcheck."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cells import CELLS, EACH_CELL, EACH_LAYER, Cell, Make, Pair
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing import assert_close

from fusedrnn import FusedLSTM, fuse

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
T, B, I, H = 4, 3, 5, 6
LENGTHS = [2, 4, 0]
BATCH_SIZES = [3, 2, 2, 1]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


# The ops.


def arguments(
    cell: Cell, both: bool, layout: str, projected: bool, given: bool, device: str, grad: bool
) -> tuple[Any, ...]:
    """The forward op's arguments, without save."""
    directions, proj_size = 1 + both, 2 if projected else 0

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).mul_(0.3).requires_grad_(grad)

    weights: list[Tensor] = []
    for _ in range(directions):
        weights += [new(*shape) for shape in cell.weight_shapes(I, H, proj_size=proj_size)]
    states = [new(directions, B, width) for width in cell.state_widths(H, proj_size)]
    packed = layout == "packed"
    return (
        new(8, I) if packed else new(T, B, I),
        *(states if given else [None] * len(states)),
        weights,
        both,
        torch.tensor(BATCH_SIZES) if packed else None,
        torch.tensor(LENGTHS, device=device) if layout == "lengths" else None,
    )


CASES = [
    (cell, both, layout, projected)
    for cell, both, layout, projected in itertools.product(
        CELLS, [False, True], ["padded", "packed", "lengths"], [False, True]
    )
    if cell.projects or not projected
]
OPS = pytest.mark.parametrize(("cell", "both", "layout", "projected"), CASES, ids=str)


@OPS
@pytest.mark.parametrize("given", [False, True])
def test_opcheck_of_the_forward_ops(
    cell: Cell, both: bool, layout: str, projected: bool, given: bool, device: str
) -> None:
    op = cell.forward_op().default
    for grad in (False, True):
        args = arguments(cell, both, layout, projected, given, device, grad)
        torch.library.opcheck(op, (*args, grad))


@OPS
def test_opcheck_of_the_backward_ops(
    cell: Cell, both: bool, layout: str, projected: bool, device: str
) -> None:
    args = arguments(cell, both, layout, projected, True, device, False)
    out = cell.forward_op()(*args, True)
    input, *states, weights = args[: 2 + len(cell.states)]
    grads = [torch.randn_like(y) for y in out[:-1]]
    mask = [True] * (1 + len(states) + len(weights))
    of_op = (*grads, input, *states, weights, *args[-3:], out[0], out[-1], mask)
    torch.library.opcheck(cell.backward_op().default, of_op)
    # It uses torch's ops, for second derivatives, which torch does not compile.
    torch.library.opcheck(
        getattr(torch.ops.fusedrnn, f"_{cell}_backward_differentiable").default,
        of_op,
        test_utils=("test_schema", "test_autograd_registration"),
    )


@EACH_CELL
def test_opcheck_of_second_derivatives(cell: Cell, device: str) -> None:
    """Only in eager mode: torch does not compile them."""
    args = arguments(cell, False, "padded", False, False, device, True)
    with torch.no_grad():
        out = cell.forward_op()(*args, True)
    states = len(cell.states)
    torch.library.opcheck(
        cell.backward_op().default,
        (
            *(torch.randn_like(y, requires_grad=True) for y in out[:-1]),
            *args[: 2 + states],
            False,
            None,
            None,
            None,
            out[-1],
            [True, *[False] * states, *[True] * 4],
        ),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


# torch.compile.


class Model(nn.Module):
    def __init__(self, make: Make, **settings: Any) -> None:
        super().__init__()
        self.before = nn.Linear(7, I)
        self.layers = make(I, H, 2, bidirectional=True, **settings)
        self.after = nn.Linear(2 * H, 3)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        y, _ = self.layers(self.before(x).tanh(), lengths=lengths)
        return self.after(y).relu().sum(-1)


def gradients(module: nn.Module, result: Any) -> list[Tensor]:
    leaves = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
    loss = sum(t.square().sum() for t in leaves if t.is_floating_point())
    return list(torch.autograd.grad(loss, list(module.parameters())))


def check(module: nn.Module, compiled: Any, *args: Any, **settings: Any) -> None:
    expected, found = module(*args, **settings), compiled(*args, **settings)
    assert_close(found, expected)
    assert_close(gradients(module, found), gradients(module, expected), rtol=1e-4, atol=1e-5)


@EACH_LAYER
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_two_graphs_for_all_sizes(
    pair: Pair, backend: str, with_lengths: bool, device: str
) -> None:
    """One graph for the first sizes and one for all others; torch specialises on a size of 1."""
    model = Model(pair.make_fused).to(device)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for steps, rows in [(4, 3), (9, 2), (7, 8), (5, 5), (11, 3), (30, 7), (2, 2), (65, 4)]:
        x = torch.randn(steps, rows, 7, device=device)
        lengths = torch.randint(0, steps + 1, (rows,), device=device) if with_lengths else None
        check(model, compiled, x, lengths)
    assert counter.frame_count <= 2


def packed() -> PackedSequence:
    return pack_padded_sequence(torch.randn(T, B, I), torch.tensor([4, 2, 1]), enforce_sorted=False)


def states() -> tuple[Tensor, Tensor]:
    return torch.randn(4, B, H), torch.randn(4, B, H)


X = torch.randn(T, B, I)
CALLS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "hx": (lambda: deep(), lambda: (X, states()), {}),
    "lengths": (lambda: deep(), lambda: (X,), {"lengths": torch.tensor(LENGTHS)}),
    "int32 lengths": (lambda: deep(), lambda: (X,), {"lengths": torch.tensor(LENGTHS).int()}),
    "list of lengths": (lambda: deep(), lambda: (X,), {"lengths": LENGTHS}),
    "lengths and hx": (lambda: deep(), lambda: (X, states()), {"lengths": torch.tensor(LENGTHS)}),
    "packed": (lambda: deep(), lambda: (packed(),), {}),
    "packed and hx": (lambda: deep(), lambda: (packed(), states()), {}),
    "unbatched": (lambda: deep(), lambda: (X[:, 0],), {}),
    "projected": (lambda: FusedLSTM(I, H, proj_size=2, batch_first=True), lambda: (X,), {}),
    "eval": (lambda: FusedLSTM(I, H, 2, dropout=0.5).eval(), lambda: (X,), {}),
    "swapped": (lambda: fuse(nn.LSTM(I, H)), lambda: (X,), {}),
    "parametrized": (
        lambda: fuse(parametrizations.weight_norm(nn.LSTM(I, H), "weight_hh_l0")),
        lambda: (X,),
        {},
    ),
}
for cell in CELLS:
    layer = functools.partial(cell.layer.make_fused, I, H)
    step = functools.partial(cell.step.make_fused, I, H)
    CALLS[f"{cell}, hx"] = layer, lambda c=cell: (X, c.to_hx(torch.randn(2, 1, B, H))), {}
    CALLS[f"{cell} cell"] = step, lambda: (X[0],), {}
    CALLS[f"{cell} cell, hx"] = step, lambda c=cell: (X[0], c.to_hx(torch.randn(2, B, H))), {}


def deep() -> nn.Module:
    return FusedLSTM(I, H, 2, bidirectional=True)


@pytest.mark.parametrize("case", CALLS)
def test_no_graph_break(case: str) -> None:
    make, inputs, settings = CALLS[case]
    module, args = make(), inputs()
    check(module, torch.compile(module, backend="aot_eager", fullgraph=True), *args, **settings)


def test_wrong_states_of_a_packed_batch() -> None:
    """The row count is unknown before the run; then the op checks it."""
    module = deep()
    h, c = states()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"Expected h0 size \[2, 3, 6\], got \[2, 2, 6\]"):
        compiled(packed()._replace(sorted_indices=None), (h[:, :2], c[:, :2]))


def test_compiled_under_autocast_and_no_grad() -> None:
    module = deep()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found, expected = compiled(X), module(X)
    assert found[0].dtype == torch.bfloat16
    assert_close(found, expected)


def test_compiled_training_step_with_dropout() -> None:
    module = FusedLSTM(I, H, 2, dropout=0.5)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    expected = module(X)
    torch.manual_seed(3)
    assert_close(compiled(X), expected)


# torch.export.


class BatchFirst(Model):
    def __init__(self, make: Make) -> None:
        super().__init__(make, batch_first=True)


def exported(model: nn.Module, *, strict: bool = False) -> torch.export.ExportedProgram:
    rows, steps = Dim("rows"), Dim("steps")
    return torch.export.export(
        model,
        (torch.randn(3, 4, 7), torch.tensor(LENGTHS)),
        dynamic_shapes=({0: rows, 1: steps}, {0: rows}),
        strict=strict,
    )


def check_sizes(model: nn.Module, found: Any) -> None:
    for rows, steps in [(1, 1), (5, 9), (2, 30)]:
        x, lengths = torch.randn(rows, steps, 7), torch.randint(0, steps + 1, (rows,))
        with torch.no_grad():
            assert_close(found(x, lengths), model(x, lengths))


@EACH_LAYER
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_export_of_any_sizes(pair: Pair, strict: bool, tmp_path: Path) -> None:
    model = BatchFirst(pair.make_fused).eval()
    program = exported(model, strict=strict)
    check_sizes(model, program.module())
    torch.export.save(program, tmp_path / "model.pt2")
    check_sizes(model, torch.export.load(tmp_path / "model.pt2").module())
    kept = [n for n in program.run_decompositions().graph.nodes if "fusedrnn" in str(n.target)]
    assert len(kept) == 2  # one op a layer for all sizes


RUN = """
import sys, torch, fusedrnn
model = torch._inductor.aoti_load_package(sys.argv[1])
for x, lengths, expected in torch.load(sys.argv[2]):
    torch.testing.assert_close(model(x, lengths), expected)
print("same")
"""


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.long
def test_aot_inductor(tmp_path: Path) -> None:
    """A compiled package runs with any sizes in a process without the model."""
    model = BatchFirst(FusedLSTM).eval()
    package = torch._inductor.aoti_compile_and_package(
        exported(model), package_path=str(tmp_path / "model.pt2")
    )
    cases = []
    for rows, steps in [(1, 1), (5, 9), (2, 30)]:
        x, lengths = torch.randn(rows, steps, 7), torch.randint(0, steps + 1, (rows,))
        with torch.no_grad():
            cases.append((x, lengths, model(x, lengths)))
    torch.save(cases, tmp_path / "cases.pt")
    run = subprocess.run(
        [sys.executable, "-c", RUN, package, str(tmp_path / "cases.pt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.endswith("same\n"), run.stderr

"""Derivatives: numerical checks, second order, any subset of outputs, torch.func."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cells import CELLS, EACH_LAYER, EACH_MODULE, LAYERS, STEPS, Cell, Pair, cell_named
from helpers.parity import fused_like
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

import fusedrnn
from fusedrnn import _ops, _reference, functional

MODES = [
    (cell, layers, bidirectional, bias, proj, layout, states)
    for cell, layers, bidirectional, bias, proj, layout, states in itertools.product(
        map(str, CELLS),
        [1, 2],
        [False, True],
        [False, True],
        [0, 2],
        ["padded", "packed", "lengths"],
        [False, True],
    )
    if not proj or cell_named(cell).projects
]
# A twelfth of the modes, with every pair of settings.
COVERING = MODES[::13] + MODES[5::29]


def problem(mode: tuple, device: str = "cpu") -> tuple:
    """A layer as a function of all its tensors, and the tensors."""
    name, layers, bidirectional, bias, proj, layout, states = mode
    cell = cell_named(name)
    torch.manual_seed(0)
    T, B, I, H = 3, 3, 2, 3
    P, D = proj or H, 2 if bidirectional else 1

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(device).requires_grad_()

    batch_sizes = torch.tensor([3, 2, 1]) if layout == "packed" else None
    lengths = torch.tensor([2, 0, 3], device=device) if layout == "lengths" else None
    x = tensor(6, I) if layout == "packed" else tensor(T, B, I)
    hx = [tensor(layers * D, B, width) for width in cell.state_widths(H, proj)]
    weights = []
    for layer, _ in itertools.product(range(layers), range(D)):
        shapes = cell.weight_shapes(I if layer == 0 else D * P, H, bias=bias, proj_size=proj)
        weights += [tensor(*shape) for shape in shapes]
    n = len(hx) if states else 0

    def call(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return cell.function(
            x,
            cell.to_hx(rest) if n else None,
            rest[n:],
            num_layers=layers,
            bidirectional=bidirectional,
            batch_sizes=batch_sizes,
            lengths=lengths,
        )

    return call, (x, *hx[:n], *weights)


@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(map(str, m)))
def test_gradcheck(mode: tuple) -> None:
    assert torch.autograd.gradcheck(*problem(mode), fast_mode=True)


@pytest.mark.parametrize("mode", COVERING, ids=lambda m: "-".join(map(str, m)))
def test_gradcheck_every_element(mode: tuple) -> None:
    assert torch.autograd.gradcheck(*problem(mode))


@pytest.mark.parametrize("mode", COVERING, ids=lambda m: "-".join(map(str, m)))
def test_gradgradcheck(mode: tuple) -> None:
    assert torch.autograd.gradgradcheck(*problem(mode), fast_mode=True)


@pytest.mark.parametrize(
    ("pair", "used"),
    [
        (cell.layer, used)
        for cell in CELLS
        for used in itertools.product((0, 1), repeat=1 + len(cell.states))
        if any(used)
    ],
    ids=str,
)
def test_any_subset_of_outputs_in_eval_mode(pair: Pair, used: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    theirs = pair.make_plain(3, 5, num_layers=2, bidirectional=True).double().eval()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    results = []
    for module in (theirs, fused_like(theirs)):
        leaf = x.clone().requires_grad_()
        y, final = module(leaf)
        outputs = [y, *pair.cell.from_hx(final)]
        loss = sum(t.square().sum() for t, use in zip(outputs, used, strict=True) if use)
        results.append(
            torch.autograd.grad(loss, [leaf, *module.parameters()], materialize_grads=True)
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", ["all", "weight_ih", "weight_hh", "bias", "reverse"])
def test_frozen_weights_let_the_gradient_through(frozen: str) -> None:
    torch.manual_seed(0)
    theirs = nn.LSTM(3, 5, num_layers=2, bidirectional=True).double()
    for name, p in theirs.named_parameters():
        p.requires_grad_(not (frozen == "all" or frozen in name))
    results = []
    for module in (theirs, fused_like(theirs)):
        x = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        module(x)[0].square().sum().backward()
        results.append([x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_only_what_requires_grad_is_computed() -> None:
    """With frozen weights and a constant input no graph is kept."""
    module = fusedrnn.FusedLSTM(3, 5)
    for p in module.parameters():
        p.requires_grad_(False)
    y, (h, c) = module(torch.randn(4, 2, 3))
    assert not any(t.requires_grad for t in (y, h, c))
    with torch.no_grad():
        assert fusedrnn.FusedLSTM(3, 5)(torch.randn(4, 2, 3))[0].grad_fn is None


@EACH_MODULE
def test_batch_of_zero(pair: Pair) -> None:
    theirs = pair.make_plain(4, 6)
    ours = fused_like(theirs)
    for module in (theirs, ours):
        x = torch.randn((5, 0, 4) if pair.is_layer else (0, 4), requires_grad=True)
        flat = tree_leaves(module(x))
        assert len(flat) == len(pair.cell.states) + pair.is_layer
        assert all(t.shape == ((t.size(0), 0, 6) if pair.is_layer else (0, 6)) for t in flat)
        sum(t.sum() for t in flat).backward()
        for p in (x, *module.parameters()):
            assert p.grad is not None
            assert torch.equal(p.grad, torch.zeros_like(p))


def test_retain_graph_and_accumulation() -> None:
    module = fusedrnn.FusedLSTM(3, 5).double()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    loss = module(x)[0].square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in module.parameters()]
    loss.backward()
    for a, p in zip(once, module.parameters(), strict=True):
        torch.testing.assert_close(2 * a, p.grad)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("proj_size", [0, 2])
def test_outputs_may_be_changed_in_place(proj_size: int) -> None:
    """Such as by relu_ or inplace dropout: the backward pass does not need outputs."""
    torch.manual_seed(0)
    modules = []
    for cell in CELLS:
        settings = {"proj_size": proj_size} if cell.projects else {}
        modules.append(cell.layer.make_fused(3, 5, **settings))
        modules.append(cell.layer.make_fused(3, 5, num_layers=2, bidirectional=True, **settings))
    for module in modules:
        x = torch.randn(4, 2, 3)
        results = []
        for in_place in (False, True):
            y = module(x)[0]
            y = y.relu_() if in_place else y.relu()
            results.append(torch.autograd.grad(y.square().sum(), list(module.parameters())))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_penalty() -> None:
    """Second derivatives through a whole module, as in WGAN-GP."""
    torch.manual_seed(0)
    theirs = nn.GRU(3, 4, num_layers=2, bidirectional=True).double()
    results = []
    for module in (theirs, fused_like(theirs)):
        x = torch.randn(
            5, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        ).requires_grad_()
        y = module(x)[0].square().sum()
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        (g.norm(2, -1) - 1).square().mean().backward()
        results.append([x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def unrolled(module: nn.Module, _: Cell) -> Callable[[Tensor], Tensor]:
    """A loop over a cell: each state depends on the weights of the next step."""

    def call(x: Tensor) -> Tensor:
        hx = None
        for t in range(3):
            hx = module(x[t], hx)
        return hx[0] if isinstance(hx, tuple) else hx

    return call


def state_from_input(module: nn.Module, cell: Cell) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        h = x[:1] * 2
        return module(x, cell.to_hx([h, h]))[0]

    return call


def tied(module: nn.Module, _: Cell) -> Callable[[Tensor], Tensor]:
    module.weight_hh_l0 = module.weight_ih_l0
    return lambda x: module(x)[0]


@pytest.mark.parametrize(
    ("make_call", "pair"),
    [
        *((unrolled, pair) for pair in STEPS),
        *itertools.product((state_from_input, tied), LAYERS),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_arguments_that_depend_on_each_other(make_call: Any, pair: Pair) -> None:
    """First and second derivatives with create_graph count every path once."""
    results = []
    for make in pair.makers:
        torch.manual_seed(0)
        module = make(3, 3).double()
        call = make_call(module, pair.cell)
        x = torch.randn(3, 2, 3, dtype=torch.float64).requires_grad_()
        leaves = [x, *module.parameters()]
        first = torch.autograd.grad(call(x).square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append([*first, *second])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("lengths", [None, [3, 0, 2]])
@pytest.mark.parametrize(("hidden", "proj"), [(8, 100), (70, 100), (8, 65), (70, 3)])
def test_projection_of_any_size(hidden: int, proj: int, lengths: list[int] | None) -> None:
    """nn.LSTM requires proj_size < hidden_size; the op does not."""
    torch.manual_seed(0)
    shapes = [(4 * hidden, 5), (4 * hidden, proj), (4 * hidden,), (4 * hidden,), (proj, hidden)]
    weights = [torch.randn(s, dtype=torch.float64).mul(0.1).requires_grad_() for s in shapes]
    h0 = torch.randn(1, 3, proj, dtype=torch.float64, requires_grad=True)
    c0 = torch.randn(1, 3, hidden, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 3, 5, dtype=torch.float64, requires_grad=True)
    given = None if lengths is None else torch.tensor(lengths)
    results = []
    for reference in (False, True):
        if reference:
            y, (h, c) = _reference.layer(
                _ops.CELLS["lstm"], x, (h0, c0), weights, False, None, given
            )
        else:
            y, h, c = functional.lstm(x, (h0, c0), weights, lengths=given)
        loss = y.square().sum() + h.sum() + c.square().sum()
        results.append([y, h, c, *torch.autograd.grad(loss, [x, h0, c0, *weights])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_padding_is_not_read_by_higher_derivatives() -> None:
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    x[3:, 0] = float("nan")
    x.requires_grad_()
    module = fusedrnn.FusedLSTM(3, 4).double()
    y = module(x, lengths=[3, 5])[0]
    gradients = torch.autograd.grad(y.square().sum(), [x, *module.parameters()], create_graph=True)
    assert all(g.isfinite().all() for g in gradients)


@EACH_LAYER
def test_torch_func(pair: Pair) -> None:
    """functional_call, grad, vmap(grad), jvp and hessian agree with plain calls."""
    torch.manual_seed(0)
    module = pair.make_fused(3, 4).double()
    parameters = {k: v.detach() for k, v in module.named_parameters()}
    x = torch.randn(6, 5, 3, dtype=torch.float64)  # [samples, T, I]

    def loss(p: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(module, p, (sample,))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        module.zero_grad()
        module(x[i])[0].square().sum().backward()
        for name, p in module.named_parameters():
            torch.testing.assert_close(each[name][i], p.grad)
    tangents = {k: torch.randn_like(v) for k, v in parameters.items()}
    _, directional = torch.func.jvp(lambda p: loss(p, x[0]), (parameters,), (tangents,))
    gradient = torch.func.grad(loss)(parameters, x[0])
    expected = sum((gradient[k] * tangents[k]).sum() for k in parameters)
    torch.testing.assert_close(directional, expected)
    hessian = torch.func.hessian(lambda s: loss(parameters, s))(x[0, :2])
    assert hessian.shape == (2, 3, 2, 3)
    torch.testing.assert_close(hessian, hessian.permute(2, 3, 0, 1))


@EACH_LAYER
def test_nan_propagates(pair: Pair) -> None:
    """NaN in one row spreads from its step in that row; NaN in a weight spreads everywhere."""
    module = pair.make_fused(3, 20)
    x = torch.randn(5, 3, 3)
    x[2, 1, 0] = float("nan")
    y = module(x)[0]
    assert y[2:, 1].isnan().all()
    assert y[:2].isfinite().all()
    assert y[:, ::2].isfinite().all()
    for name, p in module.named_parameters():
        changed = pair.make_fused(3, 20)
        changed.load_state_dict(module.state_dict())
        with torch.no_grad():
            dict(changed.named_parameters())[name].fill_(float("nan"))
        assert changed(torch.randn(2, 7, 3))[0].isnan().all(), (name, p.shape)
    huge = module(torch.full((2, 2, 3), 1e30))[0]
    assert huge.isfinite().all()


@EACH_LAYER
def test_same_bits_on_a_second_run(pair: Pair) -> None:
    """Forward and backward, with rows, units or directions shared by threads."""
    torch.manual_seed(0)
    for rows, hidden, bidirectional in [(1, 256, False), (3, 200, False), (40, 96, True)]:
        module = pair.make_fused(50, hidden, bidirectional=bidirectional)
        x = torch.randn(30, rows, 50)
        runs = []
        for _ in range(4):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            y, final = module(leaf)
            y.square().sum().backward()
            final = pair.cell.from_hx(final)
            runs.append([y, *final, leaf.grad, *(p.grad.clone() for p in module.parameters())])
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_no_tensor_outlives_its_graph() -> None:
    gc.collect()
    gc.disable()
    try:
        module = fusedrnn.FusedLSTM(3, 5, num_layers=2)

        def live() -> int:
            return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

        module(torch.randn(4, 2, 3))[0].sum().backward()
        before = live()
        for _ in range(5):
            module(torch.randn(4, 2, 3))[0].sum().backward()
        assert live() == before
    finally:
        gc.enable()


def test_packed_input_gets_its_gradient() -> None:
    data = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    packed = PackedSequence(data, torch.tensor([3, 2, 1]))
    y, _ = fusedrnn.FusedGRU(3, 5).double()(packed)
    y.data.sum().backward()
    assert data.grad.shape == (6, 3)
    assert (data.grad != 0).all()


@EACH_LAYER
@pytest.mark.parametrize("hidden", [16, 72, 200])
def test_rows_keep_their_bits_beside_others(pair: Pair, hidden: int) -> None:
    """Output and input gradient, for tiles of two rows and more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        module = pair.make_fused(40, hidden)
        x = torch.randn(7, 24, 40)
        for rows in (7, 8, 9, 13, 24):
            found = []
            for batch in (x[:, :6], x[:, :rows]):
                leaf = batch.clone().requires_grad_()
                y = module(leaf)[0]
                (gradient,) = torch.autograd.grad(y[:, :6].square().sum(), leaf)
                found.append((y[:, :6], gradient[:, :6]))
            assert all(map(torch.equal, *found)), rows
    finally:
        torch.set_num_threads(threads)

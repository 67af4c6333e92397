"""torch.func's transforms equal a loop over plain calls, by the expected ops."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.cells import EACH_LAYER, EACH_STEP, LAYERS, Pair, cell_named, pair_of
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.testing import assert_close

import fusedrnn
from fusedrnn import _ops

V, T, B, I, H = 4, 5, 3, 2, 4
LSTM = cell_named("lstm").layer
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layers-bidirectional": {"num_layers": 2, "bidirectional": True},
    "no-bias": {"bias": False, "batch_first": True},
    "projected": {"proj_size": 2, "bidirectional": True},
}
CASES = [
    (pair, name)
    for pair, name in itertools.product(LAYERS, SETTINGS)
    if pair.cell.projects or name != "projected"
]
EVERY = pytest.mark.parametrize(("pair", "settings"), CASES, ids=str)
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def made(pair: Pair, settings: str, device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return pair.make_fused(I, H, dtype=torch.float64, device=device, **SETTINGS[settings])


def random(*shape: int, seed: int = 1, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


def hx(module: nn.Module, *samples: int, rows: int = B, device: str = "cpu") -> Any:
    layers = module.num_layers * (2 if module.bidirectional else 1)
    h = random(*samples, layers, rows, module.proj_size or H, seed=2, device=device)
    c = random(*samples, layers, rows, H, seed=3, device=device)
    return pair_of(module).cell.to_hx([h, c])


def looped(function: Callable[..., Any], dims: tuple[Any, ...], *args: Any) -> Any:
    """vmap by its definition: a loop over a dimension in each argument's tensors."""
    leaves, results = torch.utils._pytree, []
    for i in range(V):
        sample = [
            leaves.tree_map(lambda t, d=d, i=i: t if d is None else t.select(d, i), a)
            for a, d in zip(args, dims, strict=True)
        ]
        results.append(function(*sample))
    return leaves.tree_map(lambda *t: torch.stack(t), *results)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts op calls and reference calls."""
    count: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            count[name] += 1
            return function(*args)

        return call

    for table, name in ((_ops._FORWARD, "forward"), (_ops._BACKWARD, "backward")):
        for cell, op in table.items():
            monkeypatch.setitem(table, cell, counted(name, op))
    reference = _ops._reference
    monkeypatch.setattr(reference, "layer", counted("reference", reference.layer))
    return count


@EVERY
def test_vmap_over_inputs_and_states(
    pair: Pair, settings: str, device: str, calls: Counter[str]
) -> None:
    module = made(pair, settings, device).requires_grad_(False)
    first = module.batch_first
    x = random(V, B if first else T, T if first else B, I, device=device)
    states = hx(module, V, device=device)
    for dims, args in (
        ((0,), (x,)),
        ((1,), (x.movedim(0, 1),)),
        ((3,), (x.movedim(0, 3),)),
        ((0, 0), (x, states)),
        ((0, None), (x, hx(module, device=device))),
        ((None, 0), (x[0], states)),
    ):
        calls.clear()
        found = vmap(module, in_dims=dims)(*args)
        assert calls == {"forward": module.num_layers}  # all samples as one batch
        assert_close(found, looped(module, dims, *args))


@EACH_LAYER
def test_vmap_over_lengths(pair: Pair, device: str, calls: Counter[str]) -> None:
    module = made(pair, "layers-bidirectional", device).requires_grad_(False)
    x = random(V, T, B, I, device=device)
    lengths = torch.tensor([[5, 0, 2], [1, 1, 5], [0, 0, 0], [3, 4, 5]], device=device)

    def run(x: Tensor, lengths: Any) -> Any:
        return module(x, lengths=lengths)

    for dims, args in (
        ((0, 0), (x, lengths)),
        ((None, 1), (x[0], lengths.T)),
        ((0, None), (x, lengths[0])),
    ):
        assert_close(vmap(run, in_dims=dims)(*args), looped(run, dims, *args))
    assert_close(vmap(lambda x: run(x, [5, 0, 2]))(x), looped(lambda x: run(x, [5, 0, 2]), (0,), x))
    assert calls["reference"] == 0
    if device == "cpu":
        with pytest.raises(RuntimeError, match="lengths must be from 0 to"):
            vmap(run)(x, lengths + 1)


@EACH_LAYER
def test_vmap_over_packed(pair: Pair, device: str, calls: Counter[str]) -> None:
    module = made(pair, "layers-bidirectional", device).requires_grad_(False)
    sizes = torch.tensor([3, 2, 2, 1])
    data = random(V, 8, I, device=device)

    def run(data: Tensor, states: Any) -> Any:
        output, state = module(PackedSequence(data, sizes), states)
        return output.data, state

    states = hx(module, V, device=device)
    assert_close(vmap(run)(data, states), looped(run, (0, 0), data, states))
    assert calls["forward"] == 2 + 2 * V

    def over_sizes(sizes: Tensor) -> Tensor:
        return module(PackedSequence(data[0], sizes))[0].data

    with pytest.raises(ValueError, match=r"^fusedrnn: vmap can't map over batch_sizes$"):
        vmap(over_sizes)(sizes.expand(V, -1))


def test_vmap_of_vmap(calls: Counter[str]) -> None:
    module = made(LSTM, "plain").requires_grad_(False)
    x, h, c = random(V, 2, T, B, I), random(2, V, 1, B, H), random(1, B, H)

    def inner(x: Tensor, h: Tensor) -> Any:
        return module(x, (h, c))

    found = vmap(vmap(inner), in_dims=(0, 1))(x, h)
    assert calls == {"forward": 1}
    expected = [[inner(x[i, j], h[j, i])[0] for j in range(2)] for i in range(V)]
    assert_close(found[0], torch.stack([torch.stack(r) for r in expected]))


@EVERY
def test_ensemble(pair: Pair, settings: str, device: str, calls: Counter[str]) -> None:
    """Each sample has its own weights."""
    modules = [made(pair, settings, device) for _ in range(V)]
    for i, m in enumerate(modules):
        for p in m.parameters():
            p.data.mul_(1 - 0.1 * i)
    weights, _ = torch.func.stack_module_state(modules)
    weights = {k: v.detach().requires_grad_() for k, v in weights.items()}
    x = random(B if modules[0].batch_first else T, T if modules[0].batch_first else B, I)
    x = x.to(device)

    def run(w: dict[str, Tensor], x: Tensor) -> Any:
        return functional_call(modules[0], w, (x,))[0]

    found = vmap(run, in_dims=(0, None))(weights, x)
    expected = [m(x)[0] for m in modules]
    assert_close(found, torch.stack(expected))
    gradients = torch.autograd.grad(found.square().sum(), list(weights.values()))
    for i, m in enumerate(modules):
        alone = torch.autograd.grad(expected[i].square().sum(), list(m.parameters()))
        assert_close([g[i] for g in gradients], list(alone))
    assert calls["reference"] == 0


@EVERY
def test_per_sample_gradients(pair: Pair, settings: str, device: str, calls: Counter[str]) -> None:
    module = made(pair, settings, device)
    x = random(V, *((B, T) if module.batch_first else (T, B)), I, device=device)
    weights = {k: v.detach() for k, v in module.named_parameters()}
    states = hx(module, V, device=device)

    def loss(w: dict[str, Tensor], x: Tensor, s: Any) -> Tensor:
        output, final = functional_call(module, w, (x, s))
        final = pair.cell.from_hx(final)
        return output.square().sum() + sum((f * f.cos()).sum() for f in final)

    dims = (None, 0, 0)
    found = vmap(grad(loss, argnums=(0, 1, 2)), in_dims=dims)(weights, x, states)
    assert calls == {"forward": module.num_layers, "backward": module.num_layers * V}
    for i in range(V):
        leaves = [
            weights,
            x[i],
            states[i] if isinstance(states, Tensor) else [s[i] for s in states],
        ]
        leaves = torch.utils._pytree.tree_map(lambda t: t.detach().clone().requires_grad_(), leaves)
        leaves[2] = tuple(leaves[2]) if isinstance(leaves[2], list) else leaves[2]
        flat = torch.utils._pytree.tree_leaves(leaves)
        alone = torch.autograd.grad(loss(*leaves), flat)
        assert_close([g[i] for g in torch.utils._pytree.tree_leaves(found)], list(alone))
    # Input gradients alone need one call for all samples.
    calls.clear()
    of_input = vmap(grad(loss, argnums=(1, 2)), in_dims=dims)(weights, x, states)
    assert calls == {"forward": module.num_layers, "backward": module.num_layers}
    assert_close(of_input, found[1:])


@pytest.mark.parametrize("layout", ["lengths", "packed"])
@EACH_LAYER
def test_per_sample_gradients_of_other_layouts(
    pair: Pair, layout: str, calls: Counter[str]
) -> None:
    module = made(pair, "layers-bidirectional")
    x = random(V, 8, I) if layout == "packed" else random(V, T, B, I)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        if layout == "packed":
            args, settings = (PackedSequence(x, torch.tensor([3, 2, 2, 1])),), {}
        else:
            args, settings = (x,), {"lengths": torch.tensor([2, 5, 0])}
        output, _ = functional_call(module, weights, args, settings)
        return (output.data if layout == "packed" else output).square().sum()

    weights = {k: v.detach() for k, v in module.named_parameters()}
    for argnums in (0, 1):
        gradient = grad(loss, argnums=argnums)
        found = vmap(gradient, in_dims=(None, 0))(weights, x)
        assert_close(found, looped(lambda x, g=gradient: g(weights, x), (0,), x))
    assert calls["reference"] == 0


@EVERY
def test_jacobians(pair: Pair, settings: str, calls: Counter[str]) -> None:
    """jacrev maps over output gradients, jacfwd over tangents."""
    module = made(pair, settings).requires_grad_(False)
    x = random(2, 2, I)
    expected = torch.autograd.functional.jacobian(lambda x: module(x)[0], x)
    calls.clear()
    assert_close(jacrev(lambda x: module(x)[0])(x), expected)
    assert calls == {"forward": module.num_layers, "backward": module.num_layers}
    assert_close(jacfwd(lambda x: module(x)[0])(x), expected)
    weights = {k: v.detach() for k, v in module.named_parameters()}

    def of_weights(w: dict[str, Tensor]) -> Tensor:
        return functional_call(module, w, (x,))[0]

    assert_close(jacrev(of_weights)(weights), jacfwd(of_weights)(weights))


@EACH_LAYER
def test_higher_derivatives(pair: Pair) -> None:
    """grad(grad), hessian and three levels, each against torch's own layer."""
    module = made(pair, "layers-bidirectional")
    theirs = fusedrnn.unfuse(made(pair, "layers-bidirectional"))
    weights = {k: v.detach() for k, v in module.named_parameters()}
    x = random(3, 2, I)

    def loss(m: nn.Module) -> Callable[..., Tensor]:
        return lambda w, x: functional_call(m, w, (x,))[0].tanh().square().sum()

    def penalty(m: nn.Module) -> Callable[..., Tensor]:
        return lambda w, x: grad(loss(m), argnums=1)(w, x).square().sum()

    ours_, theirs_ = loss(module), loss(theirs)
    assert_close(grad(penalty(module))(weights, x), grad(penalty(theirs))(weights, x))
    thrice = [
        grad(lambda x, m=m: grad(penalty(m), argnums=1)(weights, x).sum())(x)
        for m in (module, theirs)
    ]
    assert_close(*thrice)
    assert_close(hessian(ours_, argnums=1)(weights, x), hessian(theirs_, argnums=1)(weights, x))
    assert_close(
        jacrev(jacrev(ours_, argnums=1), argnums=1)(weights, x),
        hessian(theirs_, argnums=1)(weights, x),
    )
    assert_close(
        vmap(grad(penalty(module)), in_dims=(None, 0))(weights, random(2, 3, 2, I)),
        torch.utils._pytree.tree_map(
            lambda *t: torch.stack(t),
            *(grad(penalty(theirs))(weights, s) for s in random(2, 3, 2, I)),
        ),
    )


@pytest.mark.parametrize("lengths", [[6, 0, 1], [2, -1, 1]])
def test_lengths_out_of_range_on_the_reference(lengths: list[int]) -> None:
    module = made(LSTM, "plain").requires_grad_(False)
    x = random(T, B, I)
    with pytest.raises(RuntimeError, match=r"lengths must be from 0 to the sequence length 5"):
        jvp(lambda x: module(x, lengths=lengths)[0], (x,), (x,))
    with pytest.raises(RuntimeError, match=r"lengths must be from 0 to the sequence length 5"):
        vmap(lambda n: jvp(lambda x: module(x, lengths=n)[0], (x,), (x,))[1])(
            torch.tensor([[1, 2, 3], lengths])
        )


@EACH_LAYER
def test_jvp_and_vjp(pair: Pair) -> None:
    module = made(pair, "layers-bidirectional").requires_grad_(False)
    x, dx = random(T, B, I), random(T, B, I, seed=5)
    output, tangent = jvp(lambda x: module(x)[0], (x,), (dx,))
    found, pull = vjp(lambda x: module(x)[0], x)
    assert_close(output, found)
    dy = random(*output.shape, seed=6)
    assert_close((tangent * dy).sum(), (pull(dy)[0] * dx).sum())
    step = 1e-6
    finite = (module(x + step * dx)[0] - module(x - step * dx)[0]) / (2 * step)
    assert_close(tangent, finite, rtol=1e-6, atol=1e-8)


@EACH_STEP
def test_cells(pair: Pair, calls: Counter[str]) -> None:
    torch.manual_seed(0)
    module = pair.make_fused(I, H, dtype=torch.float64)
    x = random(V, B, I)
    weights = {k: v.detach() for k, v in module.named_parameters()}

    def loss(w: dict[str, Tensor], x: Tensor) -> Tensor:
        states = pair.cell.from_hx(functional_call(module, w, (x,)))
        return sum(s.square().sum() for s in states)

    found = vmap(module)(x)
    assert_close(found, looped(module, (0,), x))
    each = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    assert calls["reference"] == 0
    assert_close(each, looped(lambda x: grad(loss)(weights, x), (0,), x))
    assert_close(vmap(module)(x[:, 0]), looped(module, (0,), x[:, 0]))


def test_gradients_reach_what_is_outside() -> None:
    """vmap over a module with trainable parameters, and backward() outside vmap."""
    module = made(LSTM, "layers-bidirectional")
    x = random(V, T, B, I).requires_grad_()
    leaves = [x, *module.parameters()]
    found = torch.autograd.grad(vmap(module)(x)[0].square().sum(), leaves)
    expected = torch.autograd.grad(looped(lambda x: module(x)[0], (0,), x).square().sum(), leaves)
    assert_close(found, expected)
    with torch.no_grad():
        assert not vmap(module)(x)[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EACH_LAYER
def test_other_types(pair: Pair, dtype: torch.dtype) -> None:
    module = made(pair, "plain").to(dtype)
    x = random(V, T, B, I).to(dtype)

    def loss(x: Tensor) -> Tensor:
        return module(x)[0].square().sum()

    assert_close(vmap(grad(loss))(x), looped(grad(loss), (0,), x))


def test_per_sample_gradients_compiled() -> None:
    module = made(LSTM, "plain")
    weights = {k: v.detach() for k, v in module.named_parameters()}

    def each(w: dict[str, Tensor], x: Tensor) -> Any:
        def loss(w: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(module, w, (x,))[0].square().sum()

        return vmap(grad(loss), in_dims=(None, 0))(w, x)

    x = random(V, T, B, I)
    compiled = torch.compile(each, backend="aot_eager", fullgraph=True)
    assert_close(compiled(weights, x), each(weights, x))


def test_vmap_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"^fusedrnn: vmap can't map over a dimension of size 0$"):
        vmap(made(LSTM, "plain"))(torch.zeros(0, T, B, I, dtype=torch.float64))


@pytest.mark.parametrize("settings", ["plain", "projected"])
def test_output_changed_in_place(settings: str) -> None:
    module = made(LSTM, settings)
    x = random(T, B, I)

    def loss(w: dict[str, Tensor], change: bool) -> Tensor:
        output, _ = functional_call(module, w, (x,))
        return (output.mul_(2) if change else output * 2).square().sum()

    weights = {k: v.detach() for k, v in module.named_parameters()}
    assert_close(grad(loss)(weights, True), grad(loss)(weights, False))


def test_vmap_in_a_checkpoint() -> None:
    module = made(LSTM, "projected")
    x = random(V, T, B, I).requires_grad_()
    leaves = [x, *module.parameters()]

    def run(x: Tensor) -> Tensor:
        return vmap(lambda s: module(s)[0])(x).square().sum()

    found = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(run(x), leaves))


@EACH_LAYER
@pytest.mark.parametrize("settings", ["plain", "layers-bidirectional"])
def test_vmap_over_gradients_of_one_call(pair: Pair, settings: str) -> None:
    module = made(pair, settings)
    x = random(T, B, I).requires_grad_()
    y = module(x, lengths=[5, 0, 2])[0]
    leaves = [x, *module.parameters()]
    dy = random(V, *y.shape, seed=3)

    def pull(g: Tensor) -> Any:
        return torch.autograd.grad(y, leaves, g, retain_graph=True)

    assert_close(vmap(pull)(dy), looped(pull, (0,), dy))


def test_random_dropout() -> None:
    """vmap needs its `randomness` argument for dropout."""
    module = LSTM.make_fused(I, H, 2, dropout=0.5)
    x = random(T, B, I).float().expand(V, -1, -1, -1)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(module)(x)
    output = vmap(module, randomness="different")(x)[0]
    assert not torch.equal(output[0], output[1])
    output = vmap(module, randomness="same")(x)[0]
    assert torch.equal(output[0], output[1])

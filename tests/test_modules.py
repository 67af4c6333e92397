"""The modules beside torch's own: construction, layouts, copies, autocast, torch's samples."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cells import CELLS, EACH_LAYER, EACH_MODULE, LAYERS, MODULES, Pair
from helpers.parity import Nearby, assert_as_exact, autocast_result, double, fused_like
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import fusedrnn


@EACH_LAYER
def test_constructor_accepts_what_torch_accepts(pair: Pair) -> None:
    for make in pair.makers:
        with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
            make(3, 4, dropout=0.5)
        make(3, 4, 2, dropout=1.0)
        make(3, 4, 2, True, True, 0.0, True)
        assert make(3, 4, dtype=torch.float64, device="meta").weight_ih_l0.is_meta


@EACH_MODULE
def test_one_seed_gives_the_same_weights_names_and_repr(pair: Pair) -> None:
    variants: list[dict] = [{}, {"bias": False}]
    if pair.is_layer:
        variants.append(
            {"num_layers": 2, "bidirectional": True, "dropout": 0.5, "batch_first": True}
        )
        variants += [{"proj_size": 2, "num_layers": 2}] if pair.cell.projects else []
    for keywords in variants:
        modules = []
        for make in pair.makers:
            torch.manual_seed(7)
            modules.append(make(3, 4, **keywords))
        a, b = modules
        assert list(a.state_dict()) == list(b.state_dict())
        for (name, p), (other, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
            assert name == other
            assert torch.equal(p, q)
        assert repr(b) == "Fused" + repr(a)
        b.load_state_dict(a.state_dict())
        a.load_state_dict(b.state_dict())
        if pair.is_layer:
            assert a.mode == b.mode == pair.cell.mode
            assert a._flat_weights_names == b._flat_weights_names
            assert [len(w) for w in a.all_weights] == [len(w) for w in b.all_weights]
            assert b.flatten_parameters() is None


def test_constructors_name_their_arguments() -> None:
    base = list(inspect.signature(nn.RNNBase.__init__).parameters)
    base.remove("mode")
    for pair in LAYERS:
        names = list(base)
        names[4:4] = pair.cell.options  # after num_layers, as in nn.RNN
        parameters = inspect.signature(pair.fused.__init__).parameters
        assert [n for n, p in parameters.items() if p.kind is not p.KEYWORD_ONLY] == names
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'hidden_size"):
            pair.make_fused(3)


def test_positional_signature_is_torchs() -> None:
    for pair in LAYERS:
        for kind in (pair.plain, pair.fused):
            assert [
                n
                for n, p in inspect.signature(kind.forward).parameters.items()
                if p.kind is not p.KEYWORD_ONLY
            ] == ["self", "input", "hx"]


@EACH_LAYER
def test_layouts_and_strides(pair: Pair) -> None:
    torch.manual_seed(0)
    a = pair.make_plain(3, 4, num_layers=2, batch_first=True)
    b = fused_like(a)
    x = torch.randn(2, 5, 3)
    h = torch.randn(2, 2, 4)
    hx = pair.cell.to_hx([h, h])
    y, final = b(input=x, hx=list(hx) if isinstance(hx, tuple) else hx)
    torch.testing.assert_close(y, a(input=x, hx=hx)[0])
    assert y.stride() == a(x, hx)[0].stride()
    h_n = pair.cell.from_hx(final)[0]
    assert h_n.untyped_storage().data_ptr() != y.untyped_storage().data_ptr()
    for strange in (
        x.flip(1),
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x[:, ::2],
        x.expand(2, 5, 3),
        x[:1].expand(4, 5, 3),
        torch.randn(2, 3, 5).transpose(1, 2),
        torch.randn(2, 5, 6)[..., 1:4],
        torch.randn(2, 5, 6)[..., ::2],
    ):
        torch.testing.assert_close(b(strange), a(strange))
    unbatched = torch.randn(5, 3)
    torch.testing.assert_close(b(unbatched), a(unbatched))


@EACH_LAYER
def test_packed_order_is_the_callers(pair: Pair) -> None:
    torch.manual_seed(0)
    a = pair.make_plain(3, 4, num_layers=2, bidirectional=True)
    b = fused_like(a)
    packed = pack_sequence([torch.randn(n, 3) for n in (2, 5, 1, 5)], enforce_sorted=False)
    h0 = torch.randn(4, 4, 4)
    hx = pair.cell.to_hx([h0, h0 + 1])
    (y, final), (expected, expected_final) = b(packed, hx), a(packed, hx)
    torch.testing.assert_close(y.data, expected.data)
    torch.testing.assert_close(final, expected_final)
    assert y.sorted_indices is packed.sorted_indices
    assert y.unsorted_indices is packed.unsorted_indices
    assert y.batch_sizes is packed.batch_sizes


@EACH_MODULE
def test_copies_pickles_and_moves(pair: Pair) -> None:
    torch.manual_seed(0)
    module = pair.make_fused(3, 4)
    x = torch.randn(5, 3)
    expected = module(x)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    again = pair.make_fused(3, 4)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), again):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    meta = pair.make_fused(3, 4, device="meta").to_empty(device="cpu")
    meta.load_state_dict(module.state_dict())
    torch.testing.assert_close(meta(x), expected, rtol=0, atol=0)
    assert str(module.to(torch.bfloat16)(x.bfloat16())[0].dtype) == "torch.bfloat16"


@EACH_MODULE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(pair: Pair, dtype: torch.dtype) -> None:
    """Output types are torch's; parameter gradients stay float32."""
    torch.manual_seed(0)
    a = pair.make_plain(3, 4)
    x = torch.randn(5, 3).to(dtype)
    results = []
    for module in (a, fused_like(a)):
        flat = list(tensors(autocast_result(module, x)))
        (first,) = torch.autograd.grad(
            sum(t.float().sum() for t in flat), [next(module.parameters())], create_graph=True
        )
        results.append([*flat, first])
    for p, q in zip(*results, strict=True):
        assert p.dtype == q.dtype
        torch.testing.assert_close(p, q, rtol=0.05, atol=0.05)
    wrong = pair.make_fused(3, 4).double()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises((RuntimeError, ValueError)):
        wrong(x)


def test_trace() -> None:
    """A trace, saved and loaded, gives the same values and gradients."""
    module = fusedrnn.FusedLSTM(3, 4)
    x = torch.randn(5, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, x)
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        again = torch.jit.load(buffer)
    longer = torch.randn(7, 3, 3)
    for call in (module, again):
        call(longer)[0].square().sum().backward()
    torch.testing.assert_close(again(longer), module(longer))
    for theirs, ours in zip(again.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad)


def test_the_fast_path_agrees_with_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """csrc/python.cpp is used, and gives the same bits as modules.py alone."""
    calls = {"taken": 0}

    def fast_path(name: str) -> Any:
        function = getattr(fusedrnn._ops, name)

        def counted(*arguments: Any) -> Any:
            result = function(*arguments)
            calls["taken"] += result is not None
            return result

        return counted

    x, states = torch.randn(5, 2, 3), torch.randn(2, 4, 2, 4)
    cases: list[Callable[[], Any]] = []
    for cell in CELLS:
        first = cell.layer.make_fused(3, 4, 2, bidirectional=True, batch_first=True)
        layer = cell.layer.make_fused(3, 4, 2, bidirectional=True)
        step, unbiased = cell.step.make_fused(3, 4), cell.step.make_fused(3, 4, bias=False)
        hx, hx_of_step = cell.to_hx(states), cell.to_hx(states[:, 0])
        cases += [
            functools.partial(first, x.transpose(0, 1), hx),
            functools.partial(layer, x),
            functools.partial(layer, x, hx),
            functools.partial(step, x[0], hx_of_step),
            functools.partial(step, x[0]),
            functools.partial(unbiased, x[0], hx_of_step),
        ]
    for name in ("fast_layers", "fast_cell"):
        monkeypatch.setattr(fusedrnn._ops, name, fast_path(name))
    fast = [case() for case in cases]
    with torch.no_grad():
        without_gradient = [case() for case in cases]
    assert calls["taken"] == 2 * len(cases)
    for name in ("fast_layers", "fast_cell"):
        monkeypatch.setattr(fusedrnn._ops, name, lambda *_: None)
    slow = [case() for case in cases]
    torch.testing.assert_close(fast, slow, rtol=0, atol=0)
    torch.testing.assert_close(without_gradient, slow, rtol=0, atol=0)


DEEP = {"num_layers": 2, "bidirectional": True, "batch_first": True}
CALLED = pytest.mark.parametrize(
    ("pair", "settings"),
    [*((pair, {}) for pair in MODULES), *((pair, DEEP) for pair in LAYERS)],
    ids=lambda value: str(value) if isinstance(value, Pair) else "deep" if value else "plain",
)


class Stopped(BaseException):
    """`except Exception` does not catch it; torch.utils.checkpoint may raise such."""


@pytest.mark.parametrize(
    "error", [KeyError, KeyboardInterrupt, Stopped, torch.OutOfMemoryError, MemoryError]
)
@CALLED
def test_exceptions_of_hooks_reach_the_caller(
    pair: Pair, settings: dict[str, Any], error: type[BaseException]
) -> None:
    """A hook may raise at any saved tensor. Its exception arrives unchanged, and no hook reruns."""
    module = pair.make_fused(3, 4, **settings)
    x = torch.randn((5, 2, 3) if pair.is_layer else (2, 3))

    def saved(fails: int) -> tuple[list[Tensor], BaseException | None]:
        packed: list[Tensor] = []

        def pack(t: Tensor) -> Tensor:
            packed.append(t)
            if len(packed) == fails:
                raise reason
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            try:
                module(x)
            except BaseException as caught:
                return packed, caught
        return packed, None

    reason = error("of the hook")
    count = len(saved(0)[0])
    assert count >= 5
    for fails in range(1, count + 1):
        packed, caught = saved(fails)
        assert caught is reason
        assert len(packed) == fails


@CALLED
def test_checkpoints_that_stop_early(pair: Pair, settings: dict[str, Any]) -> None:
    """torch.utils.checkpoint ends a recomputation by raising in a hook."""
    module = pair.make_fused(3, 4, **settings)
    x = torch.randn((5, 2, 3) if pair.is_layer else (2, 3), requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return next(tensors(module(x)))

    results = []
    for call in (run, lambda x: checkpoint(run, x, use_reentrant=False)):
        y = call(x)
        results.append(torch.autograd.grad(y.square().sum(), [x, *module.parameters()]))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_meta_device_gives_shapes() -> None:
    module = fusedrnn.FusedLSTM(3, 4, num_layers=2, bidirectional=True, device="meta")
    y, (h, c) = module(torch.randn(5, 2, 3, device="meta"))
    assert (y.shape, h.shape, c.shape) == ((5, 2, 8), (4, 2, 4), (4, 2, 4))
    assert y.is_meta


def test_weights_are_read_at_each_call() -> None:
    """weight_norm, parametrizations and assignment change weights without telling the module."""
    torch.manual_seed(0)
    x = torch.randn(5, 2, 3)
    module = fusedrnn.FusedLSTM(3, 4)
    plain = copy.deepcopy(module)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    torch.testing.assert_close(module(x), plain(x))
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(2)
        plain.weight_hh_l0.mul_(2)
    torch.testing.assert_close(module(x), plain(x))
    module(x)[0].sum().backward()
    assert module.parametrizations.weight_hh_l0.original0.grad is not None
    plain.weight_ih_l0 = nn.Parameter(torch.zeros(16, 3))
    assert torch.equal(plain(x)[0][0], plain(x * 5)[0][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@EACH_MODULE
def test_torchs_own_samples(pair: Pair, dtype: torch.dtype) -> None:
    """Values and gradients for torch's own test inputs."""
    (info,) = [m for m in module_db if m.module_cls is pair.plain]
    torch.manual_seed(0)  # the samples must not depend on test order
    count = 0
    for training in (True, False):
        for requires_grad in (True, False):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                samples = info.module_inputs_func(
                    info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training
                )
            for sample in samples:
                construct, forward = sample.constructor_input, sample.forward_input
                torch.manual_seed(0)
                a = pair.plain(*construct.args, **{**construct.kwargs, "dtype": dtype})
                a.train(training)
                if not pair.matches(a):  # another cell with the same class
                    continue
                nearby = Nearby(dtype)
                args, kwargs = forward.args, forward.kwargs
                assert_as_exact(
                    *(
                        outputs_and_gradients(module, args, kwargs, lambda t: t)
                        for module in (fused_like(a), a, double(a))
                    ),
                    outputs_and_gradients(nearby.weights(a), args, kwargs, nearby),
                    dtype,
                )
                count += 1
    assert count >= 4


def outputs_and_gradients(
    module: nn.Module, args: tuple, kwargs: dict, change: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    dtype = next(module.parameters()).dtype

    def cast(t: Any) -> Any:
        return change(t.to(dtype)) if isinstance(t, Tensor) and t.is_floating_point() else t

    torch.manual_seed(1)  # for dropout
    out = module(*tree_map(cast, args), **tree_map(cast, kwargs))
    flat = list(tensors(out))
    loss = sum(t.double().square().sum() for t in flat)
    return [*flat, *torch.autograd.grad(loss, list(module.parameters()))]


def tensors(out: Any) -> Any:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, PackedSequence):
        yield out.data
    else:
        for o in out:
            yield from tensors(o)

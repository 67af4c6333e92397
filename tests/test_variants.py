"""Variants of the layers: dropout, zoneout, layer norm, resets, cell states, less memory."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.cells import CELLS, EACH_CELL, EACH_LAYER, EACH_STEP, Cell, Pair
from helpers.parity import Nearby, assert_as_exact, fused_like
from helpers.variants import (
    FEATURES,
    FEATURES_OF_CELLS,
    LAYOUTS,
    Arguments,
    Case,
    arguments,
    call,
    has,
    oracle,
    random_case,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.testing import assert_close

import fusedrnn
from fusedrnn import FusedGRU, FusedLSTM, FusedLSTMCell, FusedRNN, _ops, _variant, functional

OF_CELLS = pytest.mark.parametrize(("cell", "feature"), FEATURES_OF_CELLS, ids=str)
COMPOSITIONS, BATCH = 500, 25


def leaves(given: Arguments, module: nn.Module) -> list[Tensor]:
    return [given.x, *given.states, *module.parameters()]


def weighted(results: list[Tensor]) -> Tensor:
    """A loss with another weight for each value."""
    total = torch.zeros((), dtype=torch.float64)
    for i, r in enumerate(results):
        generator = torch.Generator().manual_seed(i)
        factors = torch.randn(r.shape, generator=generator, dtype=torch.float64)
        total = total + (r.double() * factors).sum()
    return total


def exact(case: Case, module: nn.Module, given: Arguments, nudge: Any) -> list[Tensor]:
    """The oracle's results, and its gradients where the type is wide enough for ours."""
    args = given.map(lambda t: nudge(t.detach()).requires_grad_())
    weights = {n: nudge(p.detach()).requires_grad_() for n, p in module.named_parameters()}
    results = oracle(case, weights, args)
    if case.dtype not in (torch.float64, torch.float32):
        return [r.detach() for r in results]
    wanted = [args.x, *args.states, *weights.values()]
    # An empty batch of lengths uses no tensor.
    loss = weighted(results) + 0 * args.x.sum()
    gradients = torch.autograd.grad(loss, wanted, materialize_grads=True)
    return [*(r.detach() for r in results), *gradients]


def check(case: Case) -> None:
    """Our results and gradients beside the oracle's."""
    module, given = case.make(), arguments(case)
    results, _ = call(case, module, given)
    ours = [r.detach() for r in results]
    if case.dtype in (torch.float64, torch.float32):
        ours += torch.autograd.grad(
            weighted(results), leaves(given, module), materialize_grads=True
        )
    expected = exact(case, module, given, lambda t: t.double().clone())
    # Each layer rounds its input anew.
    eps = case.num_layers * torch.finfo(case.dtype).eps
    nearby = exact(case, module, given, Nearby(case.dtype, eps))
    try:
        assert_as_exact(ours, None, expected, nearby, case.dtype)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{case}") from None


# Values and gradients.


@pytest.mark.parametrize("layout", LAYOUTS)
@OF_CELLS
def test_each_feature(cell: Cell, feature: str, layout: str) -> None:
    lengths = {"packed": (4, 2, 2), "unsorted": (2, 4, 1), "lengths": (3, 0, 4), "unbatched": (4,)}
    for training in (True, False):
        check(
            Case(
                cell,
                layout=layout,
                num_layers=2,
                bidirectional=True,
                training=training,
                lengths=lengths.get(layout, (4, 4)),
                **FEATURES[feature],
            )
        )


@pytest.mark.parametrize("first", range(0, COMPOSITIONS, BATCH))
def test_compositions(first: int) -> None:
    for seed in range(first, first + BATCH):
        check(random_case(seed))


def test_the_compositions_cover_everything() -> None:
    cases = [random_case(seed) for seed in range(COMPOSITIONS)]
    for layout in LAYOUTS:
        for cell in CELLS:
            found = [c for c in cases if c.layout == layout and c.cell is cell]
            assert {name for c in found for name in c.options} >= {
                "recurrent_dropout",
                "zoneout",
                "weight_dropout",
                "layer_norm",
            }
            assert any(c.reset for c in found)
    for cell in CELLS:
        found = [c for c in cases if c.cell is cell and c.reset and c.with_hx]
        assert {c.reset_to for c in found} == {"zero", "initial"}
    full = [c for c in cases if len(c.options) >= 4 and c.reset and c.cells and c.training]
    assert len(full) > 5
    assert {c.dtype for c in cases} >= {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def function_of(cell: Cell, feature: str, **changes: Any) -> tuple[Any, list[Tensor]]:
    """The stateless form as a function of all its tensors, which draws the same masks each time."""
    settings = {"lengths": (2, 1), "layout": "lengths", "bidirectional": True, "hidden_size": 3}
    case = Case(cell, **{**settings, **FEATURES[feature], **changes})
    module, given = case.make(), arguments(case)
    weights = [p for n, p in module.named_parameters() if not n.startswith("norm")]
    norms = [p for n, p in module.named_parameters() if n.startswith("norm")]
    options = {n: v for n, v in case.options.items() if n != "layer_norm"}
    if case.cells:
        options["return_cell_states"] = True
    if given.reset is not None:
        options |= {"reset_mask": given.reset, "reset_to": case.reset_to}
    n = len(given.states)

    def function(x: Tensor, *rest: Tensor) -> Any:
        torch.manual_seed(case.seed + 2)
        return cell.function(
            x,
            cell.to_hx(rest[:n]),
            rest[n : n + len(weights)],
            training=case.training,
            bidirectional=True,
            lengths=torch.tensor(case.lengths),
            norms=rest[n + len(weights) :] if norms else None,
            **options,
        )

    return function, [given.x, *given.states, *weights, *norms]


@OF_CELLS
def test_gradcheck(cell: Cell, feature: str) -> None:
    function, tensors = function_of(cell, feature)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@OF_CELLS
def test_gradgradcheck(cell: Cell, feature: str) -> None:
    function, tensors = function_of(cell, feature)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@OF_CELLS
def test_stateless_form(cell: Cell, feature: str) -> None:
    function, tensors = function_of(cell, feature)
    settings = {"lengths": (2, 1), "layout": "lengths", "bidirectional": True, "hidden_size": 3}
    case = Case(cell, **settings, **FEATURES[feature])
    expected, _ = call(case, case.make(), arguments(case))
    assert_close(list(function(*tensors)), expected, rtol=0, atol=0)


def test_a_reset_stops_the_gradient() -> None:
    module = FusedLSTM(3, 4, bidirectional=True, dtype=torch.float64)
    x = torch.randn(6, 1, 3, dtype=torch.float64, requires_grad=True)
    states = [torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True) for _ in "hc"]
    reset = torch.zeros(6, 1, dtype=torch.bool)
    reset[3] = True
    y, _ = module(x, tuple(states), reset_mask=reset)
    y[3:, :, :4].sum().backward(retain_graph=True)
    assert not x.grad[:3].any()
    assert x.grad[3:].all()
    assert states[0].grad is None or not states[0].grad.any()
    x.grad = None
    y[:4, :, 4:].sum().backward()  # reversed: the state before step 3 is the one after step 4
    assert not x.grad[4:].any()
    assert x.grad[:4].all()


def test_zoneout_of_one_keeps_the_initial_state() -> None:
    for training in (True, False):
        module = FusedLSTM(3, 4, zoneout=1.0).train(training)
        h, c = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
        y, final, cells = module(torch.randn(5, 2, 3), (h, c), return_cell_states=True)
        assert_close(final, (h, c))
        assert_close(y, h.expand(5, 2, 4))
        assert_close(cells, c.expand(5, 2, 4))


@EACH_CELL
def test_dropout_of_one_leaves_no_recurrence(cell: Cell) -> None:
    """Nothing of h goes through weight_hh, and nothing is NaN."""
    for options in ({"recurrent_dropout": 1.0}, {"weight_dropout": 1.0}):
        module = cell.layer.make_fused(3, 4, **options)
        expected = cell.layer.make_fused(3, 4)
        expected.load_state_dict(module.state_dict())
        nn.init.zeros_(expected.weight_hh_l0)
        x = torch.randn(5, 2, 3)
        assert_close(module(x), expected(x))


# Randomness.


def test_random_mask() -> None:
    torch.manual_seed(0)
    for p in (0.0, 0.2, 0.9, 1.0):
        mask = _variant.random_mask((100, 1000), p, torch.device("cpu"))
        assert mask.dtype == torch.bool
        assert abs(mask.double().mean().item() - p) < 0.005
        assert mask.all() == (p == 1)


def random_options(cell: Cell) -> dict[str, Any]:
    options = {"recurrent_dropout": 0.5, "zoneout": 0.3, "weight_dropout": 0.5}
    return {**options, "layer_norm": True} if cell.gates > 1 else options


@EACH_CELL
def test_seeds(cell: Cell) -> None:
    module = cell.layer.make_fused(3, 8, 2, bidirectional=True, **random_options(cell))
    x = torch.randn(5, 4, 3)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(module(x)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@EACH_CELL
def test_nothing_is_drawn_in_eval_mode_nor_without_a_probability(cell: Cell) -> None:
    x = torch.randn(5, 4, 3)
    for module in (
        cell.layer.make_fused(3, 8, **random_options(cell)).eval(),
        cell.layer.make_fused(3, 8, recurrent_dropout=0, zoneout=0, weight_dropout=0.0),
        cell.layer.make_fused(3, 8, save_memory=True),
    ):
        before = torch.get_rng_state()
        first, second = module(x), module(x)
        assert torch.equal(torch.get_rng_state(), before)
        assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("feature", ["recurrent dropout", "candidate dropout", "weight dropout"])
@EACH_CELL
def test_dropout_in_eval_mode_is_the_plain_layer(cell: Cell, feature: str) -> None:
    if not has(cell, feature):
        return
    module = cell.layer.make_fused(3, 4, **FEATURES[feature]["options"]).eval()
    plain = cell.layer.make_plain(3, 4)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(5, 2, 3)
    assert_close(module(x), plain(x))


def test_sequence_masks_are_one_for_the_call() -> None:
    """With weight_hh the identity, h's dropped units are the same at each step."""
    module = FusedRNN(4, 4, recurrent_dropout=0.5, bias=False, nonlinearity="relu")
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.eye(4))
        module.weight_hh_l0.copy_(torch.eye(4))
    torch.manual_seed(0)
    y, _ = module(torch.ones(5, 16, 4))
    increments = y[1:] - 1 - 2 * y[:-1]  # 0 where kept and scaled by 2, else -2 y
    kept = increments.abs() < 1e-5
    assert (kept == kept[:1]).all()
    assert 0.2 < kept.float().mean() < 0.8


# Attributes.


def test_options_may_change_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast path runs exactly while all options have their defaults."""
    fast = _ops.fast_layers
    taken: list[bool] = []

    def counted(*args: Any) -> Any:
        result = fast(*args)
        taken.append(result is not None)
        return result

    monkeypatch.setattr(_ops, "fast_layers", counted)
    module = FusedGRU(3, 4)
    x = torch.randn(5, 2, 3)

    def is_fast() -> bool:
        taken.clear()
        module(x)
        return taken == [True]

    plain = module(x)
    assert is_fast()
    for name, value in {
        "recurrent_dropout": 0.5,
        "zoneout": 0.5,
        "weight_dropout": 0.5,
        "save_memory": True,
    }.items():
        default = getattr(module, name)
        setattr(module, name, value)
        assert getattr(module, name) == value
        assert not is_fast()
        setattr(module, name, default)
        assert is_fast()
    module.zoneout = 0.25
    assert not torch.equal(module(x)[0], plain[0])
    del module.zoneout
    assert module.zoneout == 0.0
    assert is_fast()
    module.train(False)
    assert is_fast()
    module(x, reset_mask=torch.ones(5, 2, dtype=torch.bool))
    assert taken == [True]


@EACH_LAYER
def test_repr_names_changed_options(pair: Pair) -> None:
    assert repr(pair.make_fused(3, 4, zoneout=0, recurrent_dropout=0.0)) == "Fused" + repr(
        pair.make_plain(3, 4)
    )
    module = pair.make_fused(3, 4, weight_dropout=0.5, layer_norm=True)
    assert repr(module).endswith("weight_dropout=0.5, layer_norm=True)")
    module.layer_norm = False
    assert "layer_norm" not in repr(module)


@EACH_LAYER
def test_parameters_of_layer_norm(pair: Pair) -> None:
    options = {"num_layers": 2, "bidirectional": True}
    torch.manual_seed(0)
    plain = pair.make_plain(3, 4, **options)
    torch.manual_seed(0)
    module = pair.make_fused(3, 4, layer_norm=True, **options)
    torch.manual_seed(1)
    plain.reset_parameters()
    for _ in range(2):
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(3)
        torch.manual_seed(1)
        module.reset_parameters()
    after = torch.get_rng_state()
    torch.manual_seed(1)
    plain.reset_parameters()
    assert torch.equal(torch.get_rng_state(), after)
    assert module._flat_weights_names == plain._flat_weights_names
    assert list(module.state_dict())[: len(plain.state_dict())] == list(plain.state_dict())
    for name, p in module.named_parameters():
        if not name.startswith("norm"):
            assert torch.equal(p, plain.state_dict()[name])
            continue
        assert (p == (0 if "bias" in name else 1)).all()
        assert p.shape == ((4,) if name.startswith("norm_c") else (pair.cell.gates * 4,))
    norms = [n for n, _ in module.named_parameters() if n.startswith("norm")]
    names = ["norm_ih", "norm_hh"]
    names += ["norm_c", "norm_c_bias"] if "c" in pair.cell.states else []
    ends = [f"_l{i}{d}" for i in range(2) for d in ("", "_reverse")]
    assert norms == [name + end for end in ends for name in names]
    result = module.load_state_dict(plain.state_dict(), strict=False)
    assert result.missing_keys == norms
    without = pair.make_fused(3, 4, zoneout=0.1, save_memory=True, **options)
    without.load_state_dict(plain.state_dict())
    assert module.double().norm_ih_l0.dtype == torch.float64
    assert pair.make_fused(3, 4, layer_norm=True, device="meta").norm_ih_l0.is_meta


@EACH_LAYER
def test_copies(pair: Pair) -> None:
    module = pair.make_fused(3, 4, layer_norm=True, zoneout=0.2, recurrent_dropout=0.3)
    x = torch.randn(5, 2, 3)
    torch.manual_seed(0)
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.manual_seed(0)
        assert_close(other(x), expected, rtol=0, atol=0)
        assert repr(other) == repr(module)
        other.zoneout = 0.0
        assert module.zoneout == 0.2


# fuse, unfuse, freeze.


class Own(nn.LSTM):
    """A subclass with members of the options' names."""

    weight_dropout = 0.7

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.layer_norm = nn.LayerNorm(self.hidden_size)
        self.zoneout = 0.5
        self.save_memory = True
        self.norm_ih_l0 = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        self.recurrent_dropout = 0.9
        assert not hasattr(self, "recurrent_dropout_mode")
        y, _ = super().forward(x)
        return self.layer_norm(y) * self.zoneout


def test_fuse_switches_nothing_on() -> None:
    x = torch.randn(5, 2, 3)
    module = Own(3, 4)
    expected = module(x)
    fusedrnn.fuse(module)
    assert isinstance(module, FusedLSTM)
    assert_close(module(x), expected)
    assert module.weight_dropout == 0.7
    assert repr(module).startswith("FusedOwn(\n  3, 4\n")
    for _ in range(2):
        assert_close(copy.deepcopy(module)(x), expected)
    again = copy.deepcopy(module)
    again.reset_parameters()
    assert 0 < again.norm_ih_l0.abs() < 0.5  # drawn as every parameter of torch's layer
    fusedrnn.unfuse(module)
    assert type(module) is Own
    assert_close(module(x), expected)


class Derived(FusedLSTM):
    """A subclass of ours with a submodule of an option's name."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.layer_norm = nn.LayerNorm(self.hidden_size)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return self.layer_norm(super().forward(x)[0])  # type: ignore[operator]


def test_a_submodule_of_an_options_name() -> None:
    module = Derived(3, 4)
    x = torch.randn(5, 2, 3)
    plain = FusedLSTM(3, 4)
    plain.load_state_dict(module.state_dict(), strict=False)
    assert_close(module(x), nn.functional.layer_norm(plain(x)[0], (4,)))


def test_a_fused_module_takes_options() -> None:
    x = torch.randn(5, 2, 3)
    for subclass in (False, True):
        plain = nn.GRU(3, 4)
        expected = plain(x)
        module: Any = fusedrnn.fuse(plain, subclass=subclass)
        assert module.zoneout == 0.0
        assert module.layer_norm is False
        assert_close(module(x), expected)
        module.zoneout = 1.0
        assert not module(x)[0].any()
        module.zoneout = 0.0
        module.save_memory = True
        fusedrnn.unfuse(module)
        assert type(module) is nn.GRU
        assert not hasattr(module, "save_memory")
        assert_close(module(x), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"recurrent_dropout": 0.1},
        {"zoneout": 0.1},
        {"zoneout": (0.0, 0.1)},
        {"weight_dropout": 0.1},
        {"layer_norm": True},
    ],
    ids=str,
)
def test_unfuse_refuses_what_torch_has_not(options: dict[str, Any]) -> None:
    model = nn.ModuleDict({"a": FusedGRU(3, 4), "b": FusedLSTM(3, 4, **options)})
    ((name, value),) = options.items()
    text = rf"unfuse: b \(FusedLSTM\) has {name}={value}, which"
    with pytest.raises(RuntimeError, match=text.replace("(0.0, 0.1)", r"\(0.0, 0.1\)")):
        fusedrnn.unfuse(model)
    assert type(model["a"]) is FusedGRU  # nothing was swapped
    setattr(model["b"], name, False if name == "layer_norm" else 0.0)
    fusedrnn.unfuse(model)
    assert type(model["b"]) is nn.LSTM


def test_freeze() -> None:
    """Dropout has no effect on a frozen module; one with zoneout or layer norm is left alone."""
    x = torch.randn(5, 2, 3)
    for options in (
        {"recurrent_dropout": 0.5, "weight_dropout": 0.5, "save_memory": True},
        {"zoneout": (0.1, 0.2)},
        {"layer_norm": True},
    ):
        model = nn.ModuleDict({"a": nn.LSTM(3, 4), "b": FusedLSTM(3, 4, **options)}).eval()
        if "weight_dropout" in options:
            frozen = fusedrnn.freeze(model)
            assert isinstance(frozen["b"], fusedrnn.FrozenLSTM)
        else:
            (name,) = options
            with pytest.warns(UserWarning, match=rf"left these .*: b \(FusedLSTM: {name}="):
                frozen = fusedrnn.freeze(model)
            assert type(frozen["b"]) is FusedLSTM
        assert isinstance(frozen["a"], fusedrnn.FrozenLSTM)
        with torch.no_grad():
            assert_close(frozen["b"](x), model["b"](x))


# Single steps.


@EACH_STEP
@pytest.mark.parametrize("training", [True, False])
def test_single_steps(pair: Pair, training: bool) -> None:
    """A step is a layer of one step."""
    cell = pair.cell
    options: dict[str, Any] = {"zoneout": 0.4, "layer_norm": True}
    of_layer = dict(options)
    if has(cell, "candidate dropout"):
        options["recurrent_dropout"] = 0.5
        of_layer |= {"recurrent_dropout": 0.5, "recurrent_dropout_mode": "candidate"}
    step = pair.make_fused(3, 4, dtype=torch.float64, **options).train(training)
    layer = cell.layer.make_fused(3, 4, dtype=torch.float64, **of_layer).train(training)
    layer.load_state_dict({f"{n}_l0": p for n, p in step.state_dict().items()})
    x = torch.randn(2, 3, dtype=torch.float64)
    states = [torch.randn(2, 4, dtype=torch.float64) for _ in "hc"]
    for rows in (slice(None), 0):
        hx = [s[rows] for s in states]
        torch.manual_seed(0)
        found = step(x[rows], cell.to_hx(hx))
        torch.manual_seed(0)
        _, expected = layer(x[rows].unsqueeze(0), cell.to_hx([s.unsqueeze(0) for s in hx]))
        assert_close(cell.from_hx(found), tuple(s[0] for s in cell.from_hx(expected)))
    again = pickle.loads(pickle.dumps(step))
    assert repr(again) == repr(step)
    assert "layer_norm=True" in repr(step)
    with pytest.raises(RuntimeError, match=r"zoneout=0.4"):
        fusedrnn.unfuse(step)
    step.zoneout, step.layer_norm = 0.0, False
    step.eval()
    plain = pair.make_plain(3, 4, dtype=torch.float64)
    plain.load_state_dict({n: p for n, p in step.state_dict().items() if "norm" not in n})
    assert_close(step(x), plain(x))


# Errors.

NOT_PROBABILITIES = [-0.1, 1.5, True, "0.5", None, torch.tensor(0.5), float("nan"), 1j]


@pytest.mark.parametrize("value", NOT_PROBABILITIES, ids=str)
@pytest.mark.parametrize("name", ["recurrent_dropout", "zoneout", "weight_dropout"])
@EACH_LAYER
def test_probabilities(pair: Pair, name: str, value: Any) -> None:
    match = rf"^{name} should be a number in range \[0, 1\] representing the probability of "
    with pytest.raises(ValueError, match=match):
        pair.make_fused(3, 4, **{name: value})
    module = pair.make_fused(3, 4)
    setattr(module, name, value)
    with pytest.raises(ValueError, match=match):
        module(torch.randn(5, 2, 3))


@pytest.mark.parametrize("name", ["layer_norm", "save_memory"])
@EACH_LAYER
def test_flags(pair: Pair, name: str) -> None:
    for value in (1, 0, None, "yes"):
        match = f"^{name} should be of type bool, got: {type(value).__name__}$"
        with pytest.raises(TypeError, match=match):
            pair.make_fused(3, 4, **{name: value})
        module = pair.make_fused(3, 4)
        setattr(module, name, value)
        with pytest.raises(TypeError, match=match):
            module(torch.randn(5, 2, 3))


def test_modes() -> None:
    with pytest.raises(
        ValueError, match=r"^Unknown recurrent_dropout_mode 'each'. Select from 'seq"
    ):
        FusedLSTM(3, 4, recurrent_dropout_mode="each")  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"^recurrent_dropout_mode should be of type str, got: int$"
    ):
        FusedGRU(3, 4, recurrent_dropout_mode=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="only supported for LSTM and GRU"):
        FusedRNN(3, 4, recurrent_dropout_mode="candidate")  # type: ignore[arg-type]


def test_pairs() -> None:
    with pytest.raises(ValueError, match=r"^zoneout should be one number for a GRU, which has no"):
        FusedGRU(3, 4, zoneout=(0.1, 0.1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^zoneout should be a number or a pair \(h, c\), got 3$"):
        FusedLSTM(3, 4, zoneout=(0.1, 0.1, 0.1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^zoneout should be a number in range"):
        FusedLSTM(3, 4, zoneout=(0.1, 2))


def test_layer_norm_switched_on_without_parameters() -> None:
    module = FusedGRU(3, 4)
    module.layer_norm = True
    with pytest.raises(
        RuntimeError, match="needs the parameters norm_ih_l0, norm_hh_l0: construct"
    ):
        module(torch.randn(5, 2, 3))
    plain, x = FusedLSTM(3, 4), torch.randn(5, 2, 3)
    with pytest.raises(ValueError, match=r"^lstm: got 1 norms, expected 4$"):
        functional.lstm(x, None, list(plain.parameters()), norms=[torch.ones(16)])


def test_arguments_of_a_call() -> None:
    x = torch.randn(5, 2, 3)
    lstm = FusedLSTM(3, 4)
    batch_first = FusedGRU(3, 4, batch_first=True)
    mask = torch.zeros(5, 2, dtype=torch.bool)
    batch_first(x.transpose(0, 1), reset_mask=mask.t())
    for module, given, wrong in (
        (lstm, x, mask.t()),
        (lstm, x, mask[:, 0]),
        (lstm, x, mask[:4]),
        (lstm, x[:, 0], mask),
        (batch_first, x.transpose(0, 1), mask),
    ):
        with pytest.raises(RuntimeError, match=r"^Expected reset_mask size \(\d,.*\), got \[\d"):
            module(given, reset_mask=wrong)
    with pytest.raises(
        TypeError, match=r"^reset_mask should be a tensor of type torch.bool, got: "
    ):
        lstm(x, reset_mask=mask.float())
    with pytest.raises(TypeError, match=r"^Expected reset_mask to be a tensor, got list$"):
        lstm(x, reset_mask=[[False] * 2] * 5)
    with pytest.raises(
        RuntimeError, match="found input tensor at cpu and reset_mask tensor at meta"
    ):
        lstm(x, reset_mask=mask.to("meta"))
    with pytest.raises(
        ValueError, match=r"^Unknown reset_to 'one'. Select from 'zero' or 'initial'"
    ):
        lstm(x, reset_mask=mask, reset_to="one")
    with pytest.raises(TypeError, match=r"^reset_to should be of type str, got: int$"):
        batch_first(x, reset_to=0)
    with pytest.raises(TypeError, match=r"^return_cell_states should be of type bool, got: int$"):
        lstm(x, return_cell_states=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'return_cell_states'"):
        batch_first(x, return_cell_states=True)
    with pytest.raises(RuntimeError, match="lengths must be from 0"):
        lstm(x, lengths=[6, 1], reset_mask=mask)


def test_packed_reset_masks() -> None:
    module = FusedGRU(3, 4)
    x = pack_sequence([torch.randn(n, 3) for n in (2, 4)], enforce_sorted=False)
    rows = [torch.zeros(n, dtype=torch.bool) for n in (2, 4)]
    module(x, reset_mask=pack_sequence(rows, enforce_sorted=False))
    with pytest.raises(TypeError, match="should be a PackedSequence if the input is one"):
        module(x, reset_mask=torch.zeros(4, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="should be a PackedSequence if the input is one"):
        module(torch.randn(4, 2, 3), reset_mask=pack_sequence(rows, enforce_sorted=False))
    for wrong in (pack_sequence(rows[::-1]), pack_sequence([rows[1], rows[1]])):
        with pytest.raises(RuntimeError, match=r"^Expected reset_mask to be packed as the input"):
            module(x, reset_mask=wrong)


# torch's systems.


def small(cell: Cell, feature: str, **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A module and a call's keywords."""
    settings = {"num_layers": 2, "bidirectional": True, **settings}
    found = FEATURES[feature]
    torch.manual_seed(0)
    module = cell.layer.make_fused(3, 4, **settings, **found.get("options", {}))
    keywords: dict[str, Any] = {}
    if "reset" in found:
        mask = torch.zeros(4, 2, dtype=torch.bool)
        mask[2, 0] = mask[1, 1] = True
        keywords = {"reset_mask": mask, "reset_to": found.get("reset_to", "zero")}
    if "cells" in found:
        keywords["return_cell_states"] = True
    return module, keywords


def flat(result: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]


def gradients(module: nn.Module, result: Any) -> list[Tensor]:
    loss = sum(t.square().sum() for t in flat(result))
    return list(torch.autograd.grad(loss, list(module.parameters())))


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


EACH_LSTM = pytest.mark.parametrize(
    ("cell", "feature"),
    [
        pytest.param(c, f, marks=[] if len(c.states) > 1 else [pytest.mark.long])
        for c, f in FEATURES_OF_CELLS
    ],
    ids=str,
)


def check_compiled(module: nn.Module, x: Tensor, keywords: dict[str, Any]) -> None:
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    results = []
    for function in (module, compiled):
        torch.manual_seed(3)
        found = function(x, **keywords)
        results.append([*flat(found), *gradients(module, found)])
    assert_close(*results)


@EACH_LSTM
@pytest.mark.usefixtures("fresh")
def test_compile(cell: Cell, feature: str) -> None:
    module, keywords = small(cell, feature, num_layers=1)
    keywords |= {n: m[:3] for n, m in keywords.items() if isinstance(m, Tensor)}
    check_compiled(module, torch.randn(3, 2, 3), keywords)


@pytest.mark.parametrize("save_memory", [False, True])
@EACH_CELL
@pytest.mark.usefixtures("fresh")
def test_compile_of_a_composition(cell: Cell, save_memory: bool) -> None:
    options = {**random_options(cell), "save_memory": save_memory}
    module = cell.layer.make_fused(3, 4, 2, **options)
    mask = torch.tensor([[False, True], [True, False]])
    for training in (True, False):
        check_compiled(module.train(training), torch.randn(2, 2, 3), {"reset_mask": mask})


@pytest.mark.usefixtures("fresh")
def test_compiled_modules_read_changed_options() -> None:
    module = FusedGRU(3, 4)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 2, 3)
    for value in (0.0, 1.0, 0.5, 0.0):
        module.zoneout = value
        torch.manual_seed(0)
        expected = module(x)
        torch.manual_seed(0)
        assert_close(compiled(x), expected)


class WithKeywords(nn.Module):
    def __init__(self, module: nn.Module, keywords: dict[str, Any]) -> None:
        super().__init__()
        self.module = module
        self.keywords = keywords

    def forward(self, x: Tensor, mask: Tensor | None) -> Any:
        keywords = self.keywords if mask is None else {**self.keywords, "reset_mask": mask}
        return self.module(x, **keywords)


@EACH_LSTM
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_export(cell: Cell, feature: str) -> None:
    module, keywords = small(cell, feature, num_layers=1)
    mask = keywords.pop("reset_mask", None)
    x = torch.randn(4, 2, 3)
    for training in (True, False):
        model = WithKeywords(module, keywords).train(training)
        program = torch.export.export(model, (torch.randn(4, 2, 3), mask))
        results = []
        for function in (model, program.module()):
            torch.manual_seed(3)
            results.append(flat(function(x, mask)))
        assert_close(*results)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_export_of_a_composition(strict: bool) -> None:
    options = {**random_options(CELLS[0]), "save_memory": True}
    module = FusedLSTM(3, 4, 2, **options)
    x = torch.randn(2, 2, 3)
    program = torch.export.export(
        module, (x,), dynamic_shapes=({1: torch.export.Dim("rows")},), strict=strict
    )
    x = torch.randn(2, 5, 3)
    results = []
    for function in (module, program.module()):
        torch.manual_seed(3)
        results.append(function(x))
    assert_close(*results)


@OF_CELLS
def test_vmap_and_grad(cell: Cell, feature: str) -> None:
    """Gradients of each sample, by a loop and by vmap, with the masks that vmap's rules ask for."""
    module, keywords = small(cell, feature, num_layers=1)
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    x = torch.randn(3, 4, 2, 3)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        result = torch.func.functional_call(module, parameters, (x,), keywords)
        return torch.stack([t.square().sum() for t in flat(result)]).sum()

    torch.manual_seed(0)
    found = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="same")(parameters, x)
    for i, sample in enumerate(x):
        torch.manual_seed(0)
        expected = torch.func.grad(loss)(parameters, sample)
        assert_close({n: g[i] for n, g in found.items()}, expected)


def test_randomness_of_vmap() -> None:
    module = FusedLSTM(3, 4, zoneout=0.5, recurrent_dropout=0.5, weight_dropout=0.5)
    x = torch.randn(4, 2, 3).expand(3, 4, 2, 3)

    def output(x: Tensor) -> Tensor:
        return module(x)[0]

    same = torch.func.vmap(output, randomness="same")(x)
    assert torch.equal(same[0], same[1])
    different = torch.func.vmap(output, randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="called random operation while in randomness error"):
        torch.func.vmap(output)(x)
    module.eval()
    assert_close(torch.func.vmap(output)(x)[0], output(x[0]))


@OF_CELLS
def test_forward_mode(cell: Cell, feature: str) -> None:
    """jvp against the reverse mode's vjp: u (J v) = (u J) v."""
    function, tensors = function_of(cell, feature)
    values = tuple(t.detach() for t in tensors)
    tangents = tuple(torch.randn_like(t) for t in values)
    results, forward = torch.func.jvp(lambda *a: tuple(flat(function(*a))), values, tangents)
    cotangents = tuple(torch.randn_like(r) for r in results)
    _, pull = torch.func.vjp(lambda *a: tuple(flat(function(*a))), *values)
    left = sum((u * v).sum() for u, v in zip(cotangents, forward, strict=True))
    right = sum((u * v).sum() for u, v in zip(pull(cotangents), tangents, strict=True))
    assert_close(left, right)


@OF_CELLS
def test_autocast(cell: Cell, feature: str) -> None:
    """Types are the plain layer's. Norms take part in the cast, and gradients stay float32."""
    module, keywords = small(cell, feature)
    plain = cell.layer.make_fused(3, 4, 2, bidirectional=True)
    x = torch.randn(4, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found, types = module(x, **keywords), plain(x)
    for a, b in zip(flat(found), flat(types), strict=False):
        assert a.dtype == b.dtype
    for gradient in gradients(module, found):
        assert gradient.dtype == torch.float32
        assert not gradient.isnan().any()
    torch.manual_seed(0)
    expected = module(x, **keywords)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x, **keywords)
    assert_close(
        [t.float() for t in flat(found)], [t.float() for t in flat(expected)], rtol=0.1, atol=0.1
    )


@EACH_CELL
def test_half_types_are_float32_inside(cell: Cell) -> None:
    """The error is one of the results' rounding, not of each step's."""
    case = Case(cell, {"zoneout": 0.2}, lengths=(60, 60), dtype=torch.bfloat16, training=False)
    module, given = case.make(), arguments(case)
    found, _ = call(case, module, given)
    wide = dataclasses.replace(case, dtype=torch.float64)
    expected, _ = call(wide, copy.deepcopy(module).double(), given.map(lambda t: t.double()))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 2**-8 * b.abs().max()


# Less memory.


def bytes_saved(call: Any, known: list[Tensor]) -> int:
    """Bytes that autograd keeps, in storages other than these tensors'."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    for t in known:
        storages.pop(t.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@pytest.mark.parametrize("options", [{}, {"zoneout": 0.1, "layer_norm": True}], ids=str)
@EACH_LAYER
def test_save_memory(pair: Pair, options: dict[str, Any]) -> None:
    x = torch.randn(50, 4, 32, requires_grad=True)
    sizes, results = [], []
    for save_memory in (False, True):
        torch.manual_seed(0)
        module = pair.make_fused(32, 32, 2, save_memory=save_memory, **options)
        known = [x, *module.parameters()]
        sizes.append(bytes_saved(lambda m=module: m(x), known))
        torch.manual_seed(1)
        result = module(x)
        loss = sum(t.square().sum() for t in flat(result))
        results.append([*flat(result), *torch.autograd.grad(loss, known)])
    assert_close(*results, rtol=0, atol=0)
    # A plain RNN's layer saves h alone, as much as the next layer's input.
    assert sizes[1] <= (0.4 if pair.cell.saved > 1 or options else 1.0) * sizes[0]


def test_saved_memory_in_detail() -> None:
    """One layer keeps nothing but its arguments, with masks as bytes."""
    x = torch.randn(50, 4, 32, requires_grad=True)
    module = FusedLSTM(32, 32, save_memory=True)
    known = [x, *module.parameters()]
    assert bytes_saved(lambda: module(x), known) == 0
    module.zoneout = 0.1
    assert bytes_saved(lambda: module(x), known) == 2 * 50 * 4 * 32
    module.zoneout = 0.0
    with torch.no_grad():
        assert bytes_saved(lambda: module(x), known) == 0


@pytest.mark.usefixtures("fresh")
def test_a_compiled_layer_saves_as_little() -> None:
    x = torch.randn(6, 4, 32, requires_grad=True)
    module = FusedLSTM(32, 32, save_memory=True, zoneout=0.1)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    compiled(x)
    known = [x, *module.parameters()]
    assert bytes_saved(lambda: compiled(x), known) == 2 * 6 * 4 * 32


@OF_CELLS
def test_save_memory_with_each_feature(cell: Cell, feature: str) -> None:
    results = []
    for save_memory in (False, True):
        found = dict(FEATURES[feature])
        options = {**found.pop("options", {}), "save_memory": save_memory}
        case = Case(cell, options, "unsorted", num_layers=2, lengths=(2, 4, 1), **found)
        module, given = case.make(), arguments(case)
        values, _ = call(case, module, given)
        first = torch.autograd.grad(weighted(values), leaves(given, module), create_graph=True)
        used = [g for g in first if g.grad_fn is not None]
        second = torch.autograd.grad(
            sum(g.square().sum() for g in used), leaves(given, module), materialize_grads=True
        )
        results.append([*values, *first, *second])
    assert_close(*results)


def test_save_memory_of_what_autograd_does_not_reach() -> None:
    """torch.func's transforms know no checkpoint; the call then is the plain one."""
    module = FusedLSTM(3, 4, save_memory=True)
    x = torch.randn(4, 2, 3)
    found = torch.func.grad(lambda x: module(x)[0].square().sum())(x)
    leaf = x.clone().requires_grad_()
    module(leaf)[0].square().sum().backward()
    assert_close(found, leaf.grad)
    _, tangent = torch.func.jvp(lambda x: module(x)[0], (x,), (torch.ones_like(x),))
    assert tangent.shape == (4, 2, 4)


def test_unused_names() -> None:
    """A single step has only the options that make sense for it."""
    assert not hasattr(FusedLSTMCell(3, 4), "weight_dropout")
    assert isinstance(
        FusedLSTM(3, 4)(pack_sequence([torch.randn(2, 3)]), return_cell_states=True)[2],
        PackedSequence,
    )
    assert fused_like(nn.LSTM(3, 4)).zoneout == 0.0

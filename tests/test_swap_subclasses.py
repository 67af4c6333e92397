"""fuse() on subclasses of torch's layers, and fused layers that are instances of torch's."""

from __future__ import annotations

import abc
import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cells import EACH_MODULE, MODULES, Pair, pair_of
from helpers.swapped import inputs, made, results, weight_name
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing import assert_close

from fusedrnn import FusedGRU, FusedGRUCell, FusedLSTM, FusedLSTMCell, _ops, fuse, unfuse

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


class Initialised(nn.LSTM):
    """Overrides no method used in a call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.note = "kept"

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            self.bias_hh_l0[self.hidden_size : 2 * self.hidden_size] = 1

    def last(self, x: Tensor) -> Tensor:
        return self(x)[0][-1]


class InitialisedCell(nn.GRUCell):
    pass


def test_subclasses_without_a_forward() -> None:
    module = made(Initialised)
    expected = results(module)
    cell = made(InitialisedCell)
    of_cell = results(cell)
    fuse(nn.ModuleList([module, cell]))
    assert isinstance(module, FusedLSTM)
    assert isinstance(module, Initialised)
    assert isinstance(cell, FusedGRUCell)
    assert_close(results(module), expected)
    assert_close(results(cell), of_cell)
    assert_close(module.last(inputs(module)), expected[0][0][-1])
    assert module.note == "kept"
    output, _ = module(inputs(module), lengths=[4, 0, 2])  # an argument only FusedLSTM has
    assert not output[:, 1].any()
    module.reset_parameters()  # its super() still works
    assert type(type(module)(5, 6, 2)) is type(module)
    assert type(type(cell)(5, 6)(torch.zeros(2, 5))) is Tensor
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        assert_close(results(other), results(module), rtol=0, atol=0)
    unfuse(module)
    unfuse(cell)
    assert type(module) is Initialised
    assert type(cell) is InitialisedCell


class Rows(abc.ABC, nn.RNNBase):
    """A forward around torch's, as packages write it: hx by name, and not in every case."""

    @abc.abstractmethod
    def start(self) -> Any: ...

    def forward(self, x: Tensor, hx: Any = None, lengths: Tensor | None = None) -> Any:
        if lengths is None:
            return super().forward(x, hx=hx)
        if not lengths.any():
            return x.new_zeros(*x.shape[:2], self.hidden_size), self.start()
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, final = super().forward(packed, hx=hx)
        return nn.utils.rnn.pad_packed_sequence(y, total_length=x.size(0))[0], final


class RowsLSTM(Rows, nn.LSTM):
    def start(self) -> Any:
        return None


class RowsGRU(Rows, nn.GRU):
    def start(self) -> Any:
        return None


def doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(self: Any, x: Tensor, *args: Any) -> Any:
        return function(self, x * 2, *args)

    return wrapper


class Around(nn.LSTM):
    @doubled
    def forward(self, x: Tensor, hx: Any = None) -> Any:
        run = lambda: super(Around, self).forward(x + 1, hx)  # noqa: E731
        return run()


class AroundCell(nn.LSTMCell):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        h, c = super().forward(input, hx)
        return h.relu(), c


class Stateful(nn.LSTM):
    """Uses every attribute name the fused modules might use."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._states = None
        for name in ("_forward", "_layers", "_lengths", "_weight_names", "_weights", "_cell"):
            setattr(self, name, "mine")

    def _check_states(self) -> None:
        raise AssertionError

    def forward(self, x: Tensor | PackedSequence) -> Any:
        y, self._states = super().forward(x, self._states)
        return y, self._states


def test_names_of_a_subclass_are_its_own() -> None:
    """On every path of a call."""
    plain = made(Stateful)
    fused = fuse(copy.deepcopy(plain))
    assert isinstance(fused, FusedLSTM)
    x = inputs(plain)
    packed = pack_padded_sequence(x, torch.tensor([4, 2, 1]))
    for given in (x, packed, x[:, 0]):
        plain._states = fused._states = None
        for _ in range(2):
            assert_close(fused(given), plain(given))
    mine = [name for name in vars(FusedLSTM) if name.startswith("_") and not name.startswith("__")]
    assert not mine


AROUND = [RowsLSTM, RowsGRU, Around, AroundCell]


@pytest.mark.parametrize("kind", AROUND)
def test_a_forward_around_torchs(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward still runs, and calls the kernels."""
    module = made(kind)
    expected = results(module)
    calls: list[int] = []
    for name in ("fast_layers", "fast_cell"):
        function = getattr(_ops, name)
        monkeypatch.setattr(_ops, name, lambda *a, f=function: (calls.append(1), f(*a))[1])
    assert fuse(module) is module
    assert isinstance(module, kind)
    assert isinstance(module, (FusedLSTM, FusedGRU, FusedLSTMCell))
    assert_close(results(module), expected)
    assert len(calls) == 1
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        assert_close(results(other), expected)
    assert type(unfuse(module)) is kind
    assert_close(results(module), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [RowsLSTM, RowsGRU])
def test_arguments_of_a_forward_around_torchs(kind: type[nn.Module]) -> None:
    module = made(kind)
    fused = fuse(copy.deepcopy(module))
    x = inputs(module)
    h = torch.ones(1, 3, 6, dtype=torch.float64)
    hx = pair_of(module).cell.to_hx([h, h])
    for lengths in (None, torch.tensor([2, 4, 1]), torch.tensor([0, 0, 0])):
        assert_close(fused(x, hx=hx, lengths=lengths), module(x, hx=hx, lengths=lengths))


@EACH_MODULE
def test_layers_that_stay_instances_of_torchs(pair: Pair) -> None:
    module = made(pair.make_plain)
    expected = results(module)
    assert fuse(module, subclass=True) is module
    assert isinstance(module, pair.plain)
    assert isinstance(module, pair.fused)
    assert_close(results(module), expected)
    assert repr(module).startswith(pair.fused.__name__)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        type(module)(5, 6, dtype=torch.float64, **pair.cell.options),
    ):
        assert type(other) is type(module)
        other.load_state_dict(module.state_dict())
        assert_close(results(other), expected)
    both = type(module)
    assert type(fuse(module, subclass=True)) is both
    assert type(fuse(module)) is both  # as when a parent model is fused
    assert type(unfuse(module)) is pair.plain
    assert_close(results(module), expected, rtol=0, atol=0)
    assert type(fuse(module)) is pair.fused
    assert type(fuse(module, subclass=True)) is both


def test_a_class_derived_from_one_that_fuse_made() -> None:
    """Copies and pickles keep the class."""
    module = fuse(made(nn.LSTM), subclass=True)
    module.__class__ = type("Loud", (type(module),), {"__module__": __name__, "loud": True})
    globals()["Loud"] = type(module)  # where pickle finds it
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        assert other.loud


@EACH_MODULE
def test_parametrized_layers_that_stay_instances_of_torchs(pair: Pair) -> None:
    module = made(pair.make_plain)
    parametrizations.weight_norm(module, weight_name(module))
    expected = results(module)
    for subclass in (False, True):
        fuse(module, subclass=subclass)
        assert isinstance(module, pair.plain) == subclass
        assert isinstance(module, pair.fused)
        kind = type(module)
        assert type(fuse(module, subclass=subclass)) is kind
        assert_close(results(module), expected)
    assert parametrize.type_before_parametrizations(unfuse(module)) is pair.plain
    assert_close(results(module), expected, rtol=0, atol=0)


def test_instances_of_torchs_classes_under_torch_compile() -> None:
    """dynamo uses isinstance: it breaks the graph there, unless allow_rnn is set."""
    module = nn.Sequential(nn.LSTM(5, 6))
    x = torch.randn(4, 3, 5)
    expected = module(x)
    fuse(module, subclass=True)
    torch._dynamo.reset()
    assert_close(torch.compile(module, backend="eager")(x), expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(module, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert_close(compiled(x), expected)
    torch._dynamo.reset()


def test_a_class_with_the_attributes_of_another() -> None:
    """Packages copy attributes between classes, including attributes stored by fuse."""

    class First(nn.LSTM):
        pass

    fuse(made(First))

    class Second(nn.LSTM):
        pass

    for name in vars(First):
        if name not in vars(Second):
            setattr(Second, name, vars(First)[name])
    module = fuse(made(Second))
    assert isinstance(module, Second)
    assert type(unfuse(module)) is Second
    for pair in MODULES:
        assert not any("fused" in name for name in vars(pair.plain))

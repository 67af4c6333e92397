"""Modules that fuse() and unfuse() skip, and how they report them."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusedrnn import FusedGRU, FusedLSTM, fuse, unfuse

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


class Masked(nn.LSTM):
    def forward(self, x: Tensor, hx: Any = None) -> Any:
        return nn.LSTM.forward(self, x * 2, hx)


class MaskedOnTop(Masked):
    """Its super().forward is not torch's."""

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        return super().forward(x * 2, hx)


class MaskedElsewhere(nn.LSTM):
    """It uses super() for another method."""

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        assert super().extra_repr()
        return nn.LSTM.forward(self, x, hx)


class MaskedBefore(nn.LSTM):
    def __call__(self, *args: Any) -> Any:
        return super().__call__(*args)


class Flat(nn.LSTM):
    @property
    def _flat_weights(self) -> list[Tensor]:
        return [p * 2 for p in self.__dict__["_own"]]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Tensor]) -> None:
        self.__dict__["_own"] = value


class Strict(nn.LSTM):
    def __init_subclass__(cls, *, wanted: bool, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)


class Final(nn.LSTM):
    def __init_subclass__(cls) -> None:
        raise RuntimeError("Final can't be derived from")


class Closed(type):
    def __setattr__(cls, name: str, value: Any) -> None:
        raise AttributeError(name)


class ClosedLSTM(nn.LSTM, metaclass=Closed):
    pass


class Reduced(nn.LSTM):
    def __reduce__(self) -> Any:
        return Reduced, (5, 6)


def own_weights() -> nn.Module:
    module = nn.LSTM(5, 6)
    module._flat_weights = [w.detach() * 2 for w in module._flat_weights]
    return module


class Permuted(nn.GRU):
    def permute_hidden(self, hx: Tensor, permutation: Tensor | None) -> Tensor:
        return hx


class OwnLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(5, 24)


class LSTMTagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(5, 6)


def test_other_recurrent_modules_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Only at INFO: a module named like a recurrent layer, but not torch's."""
    model = nn.ModuleDict({"own": OwnLSTM(), "tagger": LSTMTagger(), "head": nn.Linear(2, 2)})
    fuse(copy.deepcopy(model))
    assert not caplog.records
    with caplog.at_level(logging.INFO, "fusedrnn"):
        fuse(model)
    assert [record.getMessage() for record in caplog.records] == [
        "fuse: own (OwnLSTM) is named as a recurrent layer and has none of torch's inside: nothing "
        "to swap"
    ]


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.good = nn.GRU(2, 2)
        self.layer = layer


def own_forward() -> nn.Module:
    module = nn.LSTM(5, 6)
    module.forward = lambda *_: "mine"  # type: ignore[method-assign]
    return module


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.nn.quantized.dynamic.LSTM(5, 6)


def quantisable() -> nn.Module:
    import torch.ao.nn.quantizable

    return torch.ao.nn.quantizable.LSTM(5, 6)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.LSTM(5, 6))


LEFT = {
    "own forward": (lambda: Masked(5, 6), r"Masked: forward of its own"),
    "own forward below": (lambda: MaskedOnTop(5, 6), r"MaskedOnTop: forward of its own"),
    "own forward beside super": (
        lambda: MaskedElsewhere(5, 6),
        r"MaskedElsewhere: forward of its own",
    ),
    "own call": (lambda: MaskedBefore(5, 6), r"MaskedBefore: __call__ of its own"),
    "own part of it": (lambda: Permuted(5, 6), r"Permuted: permute_hidden of its own"),
    "forward of the object": (own_forward, r"LSTM: forward of its own"),
    "own weights": (lambda: Flat(5, 6), r"Flat: _flat_weights of its own"),
    "weights of the object": (own_weights, r"LSTM: _flat_weights of its own"),
    "a class that can't be extended": (
        lambda: Strict(5, 6),
        r"Strict: its class can't be extended",
    ),
    "a class that refuses to be": (lambda: Final(5, 6), r"Final: its class can't be extended"),
    "a class that keeps nothing": (
        lambda: ClosedLSTM(5, 6),
        r"ClosedLSTM: its class can't be extended",
    ),
    "own pickling": (lambda: Reduced(5, 6), r"Reduced: __reduce__ of its own"),
    "a layer's base class": (lambda: nn.RNNBase("GRU", 5, 6), r"RNNBase: no counterpart"),
    "a cell's base class": (
        lambda: nn.RNNCellBase(5, 6, True, 2),
        r"RNNCellBase: no counterpart",
    ),
    "quantised": (quantised, r"LSTM: scripted or quantised"),
    "quantisable": (quantisable, r"LSTM: scripted or quantised"),
    "scripted": (scripted, r"RecursiveScriptModule: scripted or quantised"),
}


@pytest.mark.parametrize("case", LEFT)
def test_skipped_modules_are_listed(case: str) -> None:
    make, why = LEFT[case]
    model = Model(make())
    kind = type(model.layer)
    with pytest.warns(UserWarning, match=rf"^fuse left these as they are: layer \({why}\)$") as w:
        fuse(model)
    assert w[0].filename == __file__
    assert type(model.layer) is kind
    assert type(model.good) is FusedGRU
    with pytest.warns(UserWarning, match=rf"^fuse left these as they are: the model \({why}\)$"):
        assert fuse(model.layer) is model.layer
    unfuse(model)  # no warning: model.layer is not fused
    assert type(model.good) is nn.GRU


def test_modules_inside_skipped_modules() -> None:
    """A layer inside a skipped module is swapped, there and where it is shared."""

    class Holder(nn.LSTM):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[0]

    model = Model(Holder(5, 6))
    model.layer.inner = model.shared = nn.GRU(5, 6)
    with pytest.warns(UserWarning, match="Holder: forward of its own"):
        fuse(model)
    assert type(model.shared) is FusedGRU
    unfuse(model)
    assert type(model.layer.inner) is nn.GRU


def test_unfuse_leaves_subclasses_of_ours() -> None:
    class Mine(FusedLSTM):
        pass

    model = nn.ModuleList([Mine(5, 6), FusedGRU(5, 6)])
    with pytest.warns(UserWarning, match=r"^unfuse left these as they are: 0 \(Mine: a subclass\)"):
        unfuse(model)
    assert type(model[0]) is Mine
    assert type(model[1]) is nn.GRU


@pytest.mark.parametrize("function", [fuse, unfuse])
@pytest.mark.parametrize("model", [None, nn.LSTM, {"lstm": nn.LSTM(2, 2)}, torch.zeros(2)])
def test_models_that_are_no_module(function: Callable[[Any], Any], model: Any) -> None:
    with pytest.raises(TypeError, match=f"^{function.__name__}: Expected model to be a module"):
        function(model)


class RNN(nn.Module):
    """A class that only has the name of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_a_scripted_module_with_a_layers_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of scripting
        scripted_one = torch.jit.script(RNN())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(nn.Sequential(scripted_one, nn.Linear(4, 5)))

"""Attributes changed after construction: modules read them as torch's do."""

from __future__ import annotations

import warnings
from typing import Any

import numpy
import pytest
import torch
from helpers.cells import EACH_LAYER, EACH_STEP, Pair
from helpers.errors import assert_same_error, raised
from helpers.parity import fused_like
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves

import fusedrnn

# Flags and numbers in types other than Python's own, and values that are neither.
ODD = {
    "1": 1,
    "0": 0,
    "2": 2,
    "numpy's True": numpy.bool_(True),
    "numpy's False": numpy.bool_(False),
    "tensor of True": torch.tensor(True),
    "tensor of False": torch.tensor(False),
    "numpy's 1": numpy.int64(1),
    "numpy's 0.0": numpy.float64(0.0),
    "None": None,
    "text": "yes",
}
FLAGS = ("bias", "batch_first", "bidirectional", "training")
SIZES = ("input_size", "hidden_size", "proj_size")
READ = (*FLAGS, "dropout", "num_layers")


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("attribute", READ)
@EACH_LAYER
def test_attributes_changed_after_construction(attribute: str, value: str, pair: Pair) -> None:
    """Every attribute gives torch's result, or an exception where torch has no result."""
    given = ODD[value]
    torch.manual_seed(0)
    a = pair.make_plain(3, 4, 2, bidirectional=True)
    b = fused_like(a)
    x = torch.randn(5, 5, 3)
    results: list[Any] = []
    for module in (a, b):
        setattr(module, attribute, given)
        torch.manual_seed(1)  # for dropout
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # from a division in numpy
            error = raised(lambda m=module: results.append(m(x)))
        if error is not None:
            results.append(error)
    expected, found = results
    if not isinstance(expected, Exception):
        torch.testing.assert_close(found, expected)
    elif attribute in FLAGS:
        assert type(found) is type(expected) is TypeError
        assert str(found) == f"{attribute} should be of type bool, got: {type(given).__name__}"
    elif attribute == "dropout" or value in ("0", "2", "numpy's 0.0", "None", "text"):
        assert isinstance(found, (TypeError, ValueError))


@pytest.mark.parametrize("attribute", SIZES)
@EACH_LAYER
def test_sizes_changed_after_construction(attribute: str, pair: Pair) -> None:
    """Sizes that do not fit the weights are an error in every layout, as in torch."""
    x, hx = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    module = pair.make_fused(3, 4)
    setattr(module, attribute, 2)
    state = pair.cell.to_hx([hx, hx])
    for given in (x, x[:, 0], pack_sequence([x[:, 0]])):
        if attribute != "hidden_size":  # torch compares it only with a state
            with pytest.raises(RuntimeError):
                module(given)
    with pytest.raises(RuntimeError):
        module(x, state)
    if attribute == "proj_size" and pair.cell.projects:
        projected = pair.make_fused(3, 4, proj_size=2)
        projected.proj_size = 0
        with pytest.raises(RuntimeError, match=r"^Expected 4 weights for num_layers=1.* got 5$"):
            projected(x)


@EACH_STEP
@pytest.mark.parametrize("attribute", ["input_size", "hidden_size"])
def test_sizes_of_a_cell_changed_after_construction(attribute: str, pair: Pair) -> None:
    """A cell reads only its weights, as torch's does."""
    torch.manual_seed(0)
    a = pair.make_plain(3, 4)
    b = fused_like(a)
    for module in (a, b):
        setattr(module, attribute, 2)
    x, state = torch.randn(2, 3), torch.randn(2, 4)
    for batch in (slice(None), 0):
        hx = pair.cell.to_hx([state[batch], state[batch]])
        torch.testing.assert_close(b(x[batch], hx), a(x[batch], hx))
    modules = {pair.make_plain: a, pair.make_fused: b}
    assert_same_error(lambda make: modules[make](torch.randn(2, 2)), pair)


def test_invalid_attributes() -> None:
    """An exception is raised, and none is left pending."""
    x = torch.randn(5, 2, 3)
    for name in ([], 5, None):  # not names, and [] cannot even be hashed
        module = fusedrnn.FusedLSTM(3, 4)
        module._flat_weights_names[0] = name
        with pytest.raises((TypeError, AttributeError)):
            module(x)
    for count in (2**62, 2**80, -1, 0):
        module = fusedrnn.FusedLSTM(3, 4)
        module.num_layers = count
        with pytest.raises((ValueError, RuntimeError, OverflowError, MemoryError)):
            module(x)
        module.proj_size = count
        with pytest.raises((ValueError, RuntimeError, OverflowError, MemoryError)):
            module(x)
        module._flat_weights_names.clear()
        with pytest.raises((ValueError, RuntimeError, OverflowError, MemoryError)):
            module(x)


@pytest.mark.parametrize(
    "kept", [{"num_layers": 2}, {"num_layers": 1}, {"bias": False}, {"bidirectional": False}]
)
@EACH_LAYER
def test_attributes_that_leave_weights_out(kept: dict, pair: Pair) -> None:
    """The layer computes as if constructed so, with the weights of these names."""
    torch.manual_seed(0)
    made = {"num_layers": 1 if "bidirectional" in kept else 3, "bias": True, "bidirectional": True}
    module = pair.make_fused(3, 4, **made)
    expected = pair.make_plain(3, 4, **{**made, **kept})
    expected.load_state_dict({n: module.state_dict()[n] for n in expected.state_dict()})
    for name, value in kept.items():
        setattr(module, name, value)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(module(x), expected(x))
    torch.testing.assert_close(module(x, lengths=[5, 5]), expected(x))


def test_attributes_that_need_more_weights() -> None:
    x = torch.randn(5, 2, 3)
    for name, value in {"num_layers": 2, "bias": True, "bidirectional": True}.items():
        module = fusedrnn.FusedGRU(3, 4, bias=False)
        setattr(module, name, value)
        with pytest.raises(RuntimeError, match=r"^Expected 4 weights for num_layers=.*, got 2$"):
            module(x)
    module.num_layers = 0
    with pytest.raises(ValueError, match="num_layers must be greater than zero"):
        module(x)


@pytest.mark.parametrize("swap", [False, True], ids=["made", "fused"])
@pytest.mark.parametrize("value", [*ODD, "True", "False"])
@pytest.mark.parametrize("when", ["constructed", "changed"])
@EACH_STEP
def test_bias_of_a_cell(when: str, value: str, swap: bool, pair: Pair) -> None:
    """Existing biases are used whatever `bias` is, as in torch."""
    given = ODD.get(value, value == "True")
    modules = []
    for make in (pair.make_plain, pair.make_plain if swap else pair.make_fused):
        torch.manual_seed(0)
        module = make(3, 4, given) if when == "constructed" else make(3, 4)
        if when == "changed":
            module.bias = given
        modules.append(module)
    if swap:
        fusedrnn.fuse(modules[1])
        assert type(modules[1]) is pair.fused
    x = torch.randn(2, 3)
    results = []
    for module in modules:
        flat = tree_leaves(module(x))
        loss = sum(t.square().sum() for t in flat)
        results.append([*flat, *torch.autograd.grad(loss, list(module.parameters()))])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("absent", [("bias_ih",), ("bias_hh",), ("bias_ih", "bias_hh")])
@EACH_STEP
def test_a_cell_whose_biases_were_removed(absent: tuple, pair: Pair) -> None:
    torch.manual_seed(0)
    a = pair.make_plain(3, 4)
    b = fused_like(a)
    for module in (a, b):
        for name in absent:
            setattr(module, name, None)
    x = torch.randn(2, 3)
    torch.testing.assert_close(b(x), a(x))


@EACH_LAYER
def test_a_mode_that_is_a_users_attribute(pair: Pair) -> None:
    """Like torch's on the CPU, layers go by their class. An nn.RNN alone reads its mode."""
    torch.manual_seed(0)
    a = pair.make_plain(3, 4)
    b = fused_like(a)
    x = torch.randn(5, 2, 3)
    expected = a(x)
    a.mode = b.mode = "train"
    if issubclass(pair.plain, torch.nn.RNN):
        assert_same_error(lambda make: changed_mode(make)(x), pair)
    else:
        torch.testing.assert_close(b(x), expected)
        torch.testing.assert_close(b(x, lengths=[5, 5]), expected)


def changed_mode(make: Any) -> torch.nn.Module:
    module: torch.nn.Module = make(3, 4)
    module.mode = "train"  # type: ignore[assignment]
    return module


@pytest.mark.parametrize("value", ["sigmoid", [1], None])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 2, 3)], ids=str)
def test_nonlinearities_of_a_cell(value: Any, shape: tuple[int, ...]) -> None:
    """The dimensions are checked before an unknown nonlinearity."""
    messages = []
    for kind in (torch.nn.RNNCell, fusedrnn.FusedRNNCell):
        cell = kind(3, 4)
        cell.nonlinearity = value
        error = raised(lambda m=cell: m(torch.randn(shape)))
        assert error is not None
        messages.append((type(error), str(error)))
    assert messages[0] == messages[1]

"""Errors from constructors and calls have torch's types and messages."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cells import EACH_LAYER, EACH_MODULE, EACH_STEP, Make, Pair, cell_named
from helpers.errors import assert_same_error, given
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import fusedrnn


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        ((3, 4.0), {}),
        ((3.0, 4), {}),
        ((3, "4"), {}),
        ((0, 4), {}),
        ((3, 0), {}),
        ((3, -1), {}),
        ((3, 4, 0), {}),
        ((3, 4, 1, 1), {}),
        ((3, 4, 1, True, 1), {}),
        ((3, 4), {"dropout": 1.5}),
        ((3, 4), {"dropout": -0.1}),
        ((3, 4), {"dropout": True}),
        ((3, 4), {"dropout": "much"}),
        ((3, 4), {"proj_size": -1}),
        ((3, 4), {"proj_size": 4}),
        ((3, 4), {"proj_size": 9}),
    ],
)
@EACH_LAYER
def test_constructor_errors(arguments: tuple, keywords: dict, pair: Pair) -> None:
    assert_same_error(lambda make: make(*arguments, **keywords), pair)


INPUT_ERRORS: dict[str, Callable[[Make], Any]] = {
    "1-D": lambda k: k(3, 4)(torch.randn(3)),
    "4-D": lambda k: k(3, 4)(torch.randn(2, 2, 2, 3)),
    "features": lambda k: k(3, 4)(torch.randn(5, 2, 7)),
    "features, unbatched": lambda k: k(3, 4)(torch.randn(5, 7)),
    "type": lambda k: k(3, 4)(torch.randn(5, 2, 3).double()),
    "integers": lambda k: k(3, 4)(torch.ones(5, 2, 3, dtype=torch.int64)),
    "type, half": lambda k: k(3, 4, dtype=torch.bfloat16)(torch.randn(5, 2, 3)),
    "no steps": lambda k: k(3, 4)(torch.randn(0, 2, 3)),
    "no steps, batch first": lambda k: k(3, 4, batch_first=True)(torch.randn(2, 0, 3)),
}


@pytest.mark.parametrize("case", list(INPUT_ERRORS))
@EACH_LAYER
def test_input_errors(case: str, pair: Pair) -> None:
    assert_same_error(INPUT_ERRORS[case], pair)


def packed_data(data: Tensor) -> PackedSequence:
    """A PackedSequence made by hand, without the packing functions' checks."""
    return PackedSequence(data, torch.tensor([2, 1]))


X, X2, H, H2 = torch.randn(5, 2, 3), torch.randn(5, 3), torch.randn(1, 2, 4), torch.randn(1, 4)
HX_ERRORS: dict[str, Callable[[Make], Any]] = {
    "rows of h": lambda k: given(k, X, torch.randn(1, 3, 4), H),
    "rows of both": lambda k: given(k, X, torch.randn(1, 3, 4), torch.randn(1, 3, 4)),
    "layers": lambda k: given(k, X, torch.randn(2, 2, 4), torch.randn(2, 2, 4)),
    "width": lambda k: given(k, X, torch.randn(1, 2, 5), torch.randn(1, 2, 5)),
    "2-D for batched": lambda k: given(k, X, H2, H2),
    "3-D for unbatched": lambda k: given(k, X2, H, H),
    "unbatched width": lambda k: given(k, X2, torch.randn(1, 5), torch.randn(1, 5)),
    "batch first": lambda k: given(
        k, X, torch.randn(1, 2, 4), torch.randn(1, 2, 4), batch_first=True
    ),
}


@pytest.mark.parametrize("case", list(HX_ERRORS))
@EACH_LAYER
def test_hx_errors(case: str, pair: Pair) -> None:
    assert_same_error(HX_ERRORS[case], pair)


def test_hx_errors_of_the_cell_state() -> None:
    for call in (
        lambda k: given(k, X, H, torch.randn(1, 3, 4)),
        lambda k: given(k, X, H, torch.randn(1, 2, 5), proj_size=0),
        lambda k: given(k, X, H, H, proj_size=2),
        lambda k: given(k, X, torch.randn(1, 2, 2), torch.randn(1, 2, 2), proj_size=2),
        lambda k: given(k, X, H, H2),
    ):
        assert_same_error(call, cell_named("lstm").layer)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: fusedrnn.FusedLSTM(3, 4)(X, H),
            TypeError,
            "LSTM: Expected hx to be a tuple of two tensors (h_0, c_0), got Tensor",
        ),
        (
            lambda: fusedrnn.FusedLSTM(3, 4)(X, (H, H, H)),
            TypeError,
            "LSTM: Expected hx to be a tuple of two tensors (h_0, c_0), got tuple of 3",
        ),
        (
            lambda: fusedrnn.FusedGRU(3, 4)(X, (H, H)),
            TypeError,
            "GRU: Expected hx to be a tensor, got tuple",
        ),
        (
            lambda: fusedrnn.FusedLSTM(3, 4)(X, (H.double(), H.double())),
            ValueError,
            "RNN hidden[0] dtype (torch.float64) does not match input dtype (torch.float32)",
        ),
        (
            lambda: fusedrnn.FusedGRU(3, 4)(X, H.double()),
            ValueError,
            "RNN hidden dtype (torch.float64) does not match input dtype (torch.float32)",
        ),
        (
            lambda: fusedrnn.FusedLSTM(3, 4)(
                pack_sequence([torch.randn(2, 3)]), (torch.randn(1, 2, 4), torch.randn(1, 1, 4))
            ),
            RuntimeError,
            "Expected hidden[0] size (1, 1, 4), got [1, 2, 4]",
        ),
        (
            lambda: fusedrnn.FusedGRU(3, 4)(pack_sequence([torch.randn(2, 3)]), H2),
            RuntimeError,
            "Expected hidden size (1, 1, 4), got [1, 4]",
        ),
        (
            lambda: fusedrnn.FusedLSTM(3, 4)(packed_data(torch.randn(3, 7))),
            RuntimeError,
            "input.size(-1) must be equal to input_size. Expected 3, got 7",
        ),
        (
            lambda: fusedrnn.FusedLSTM(3, 4)(packed_data(torch.randn(3, 1, 3))),
            RuntimeError,
            "input must have 2 dimensions, got 3",
        ),
        (
            lambda: fusedrnn.FusedLSTM(3, 4)(packed_data(torch.randn(4, 3))),
            RuntimeError,
            "fusedrnn::lstm: batch_sizes add up to 3 but input has 4 rows",
        ),
        (
            lambda: fusedrnn.FusedLSTM(3, 4)(X.to("meta")),
            RuntimeError,
            "Input and parameter tensors are not at the same device, found input tensor at meta "
            "and parameter tensor at cpu",
        ),
        (
            lambda: fusedrnn.FusedGRU(3, 4)(X, H.to("meta")),
            RuntimeError,
            "Input and hidden tensors are not at the same device, found input tensor at cpu and "
            "hidden tensor at meta",
        ),
        (
            lambda: fusedrnn.FusedLSTM(3, 4)(X, lengths=[5, 4, 3]),
            ValueError,
            "Expected lengths to have size [2], one for each row of the batch, got [3]",
        ),
        (
            lambda: fusedrnn.FusedLSTM(3, 4)(X, lengths=torch.tensor([5.0, 4.0])),
            TypeError,
            "lengths should be integers, got: torch.float32",
        ),
        (
            lambda: fusedrnn.FusedLSTM(3, 4)(X, lengths=[6, 4]),
            RuntimeError,
            "fusedrnn::lstm: lengths must be from 0 to the sequence length 5, got 6",
        ),
        (
            lambda: fusedrnn.FusedLSTM(3, 4)(X, lengths=[-1, 4]),
            RuntimeError,
            "fusedrnn::lstm: lengths must be from 0 to the sequence length 5, got -1",
        ),
        (
            lambda: fusedrnn.FusedGRU(3, 4)(X2, lengths=[5]),
            ValueError,
            "lengths needs batched 3-D input",
        ),
        (
            lambda: fusedrnn.FusedGRU(3, 4)(pack_sequence([torch.randn(2, 3)]), lengths=[2]),
            ValueError,
            "lengths can't be given with a PackedSequence, which has its own",
        ),
    ],
)
def test_own_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    """Where torch has no clear error, ours follows torch's message for a similar case."""
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


def test_gru_has_no_projection() -> None:
    message = "proj_size argument is only supported for LSTM, not RNN or GRU"
    with pytest.raises(ValueError, match=message):
        fusedrnn.FusedGRU(3, 4, proj_size=2)
    with pytest.raises(ValueError, match=message):
        fusedrnn.FusedGRU(3, 4, 1, True, False, 0.0, False, 2)


@EACH_MODULE
def test_missing_arguments(pair: Pair) -> None:
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'hidden_size'"):
        pair.make_fused(3)


def test_errors_of_packing_come_from_torch() -> None:
    with pytest.raises(RuntimeError, match="Length of all samples has to be greater than 0"):
        pack_padded_sequence(X, torch.tensor([5, 0]))
    with pytest.raises(RuntimeError, match="Cannot pack empty tensors"):
        pack_padded_sequence(torch.randn(0, 2, 3), torch.tensor([1, 1]))


CELL_ERRORS: dict[str, Callable[[Make], Any]] = {
    "3-D": lambda k: k(3, 4)(torch.randn(1, 2, 3)),
    "0-D": lambda k: k(3, 4)(torch.tensor(1.0)),
    "features": lambda k: k(3, 4)(torch.randn(2, 7)),
    "rows": lambda k: given(k, torch.randn(2, 3), *torch.randn(2, 3, 4)),
    "width": lambda k: given(k, torch.randn(2, 3), *torch.randn(2, 2, 5)),
    "3-D hx": lambda k: given(k, torch.randn(2, 3), *torch.randn(2, 1, 2, 4)),
}


@pytest.mark.parametrize("case", list(CELL_ERRORS))
@EACH_STEP
def test_cell_errors(case: str, pair: Pair) -> None:
    assert_same_error(CELL_ERRORS[case], pair)


@EACH_STEP
def test_unbatched_cell_needs_unbatched_hx(pair: Pair) -> None:
    """Torch's message for it changed between releases."""
    with pytest.raises(RuntimeError, match="hidden0 has inconsistent hidden_size: got 1, expected"):
        given(pair.make_fused, torch.randn(3), *torch.randn(2, 1, 4))


def test_cell_needs_a_pair() -> None:
    for state in (torch.randn(2, 4), torch.randn(4), (torch.randn(2, 4),)):
        with pytest.raises(TypeError, match="LSTMCell: Expected hx to be a tuple of two tensors"):
            fusedrnn.FusedLSTMCell(3, 4)(torch.randn(2, 3), state)
    with pytest.raises(TypeError, match="GRUCell: Expected hx to be a tensor, got tuple"):
        fusedrnn.FusedGRUCell(3, 4)(torch.randn(2, 3), (torch.randn(2, 4),))

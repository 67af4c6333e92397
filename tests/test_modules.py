"""The modules beside torch's own: construction, state, errors, layouts, torch's samples."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from helpers.parity import FUSED, Nearby, assert_as_exact, autocast_result, double, fused_like
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import fusedrnn

PAIRS = list(FUSED.items())
LAYERS = [(nn.LSTM, fusedrnn.FusedLSTM), (nn.GRU, fusedrnn.FusedGRU)]


def raised(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as e:
        return e
    return None


def assert_same_error(call: Callable[[type[nn.Module]], Any], theirs: type, ours: type) -> None:
    """Both raise, with the same type and the same words."""
    expected, got = raised(lambda: call(theirs)), raised(lambda: call(ours))
    assert expected is not None, "torch accepts this"
    assert type(got) is type(expected), (got, expected)
    assert str(got) == str(expected)


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
@pytest.mark.parametrize(("theirs", "ours"), LAYERS)
def test_constructor_errors(arguments: tuple, keywords: dict, theirs: type, ours: type) -> None:
    def call(kind: type) -> None:
        kind(*arguments, **keywords)

    assert_same_error(call, theirs, ours)


@pytest.mark.parametrize(("theirs", "ours"), LAYERS)
def test_constructor_accepts_what_torch_accepts(theirs: type, ours: type) -> None:
    for kind in (theirs, ours):
        with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
            kind(3, 4, dropout=0.5)
        kind(3, 4, 2, dropout=1.0)
        kind(3, 4, 2, True, True, 0.0, True)
        assert kind(3, 4, dtype=torch.float64, device="meta").weight_ih_l0.is_meta


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_one_seed_gives_the_same_weights_names_and_repr(theirs: type, ours: type) -> None:
    variants: list[dict] = [{}, {"bias": False}]
    if issubclass(theirs, nn.RNNBase):
        variants += [
            {"num_layers": 2, "bidirectional": True, "dropout": 0.5, "batch_first": True},
            *([{"proj_size": 2, "num_layers": 2}] if theirs is nn.LSTM else []),
        ]
    for keywords in variants:
        modules = []
        for kind in (theirs, ours):
            torch.manual_seed(7)
            modules.append(kind(3, 4, **keywords))
        a, b = modules
        assert list(a.state_dict()) == list(b.state_dict())
        for (name, p), (other, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
            assert name == other
            assert torch.equal(p, q)
        assert repr(b) == "Fused" + repr(a)
        b.load_state_dict(a.state_dict())
        a.load_state_dict(b.state_dict())
        if issubclass(theirs, nn.RNNBase):
            assert a.mode == b.mode
            assert a._flat_weights_names == b._flat_weights_names
            assert [len(w) for w in a.all_weights] == [len(w) for w in b.all_weights]
            assert b.flatten_parameters() is None


def test_constructors_name_their_arguments() -> None:
    base = list(inspect.signature(nn.RNNBase.__init__).parameters)
    base.remove("mode")
    for _, ours in LAYERS:
        assert list(inspect.signature(ours.__init__).parameters) == base
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'hidden_size"):
            ours(3)


def test_positional_signature_is_torchs() -> None:
    for theirs, ours in LAYERS:
        for kind in (theirs, ours):
            assert [
                n
                for n, p in inspect.signature(kind.forward).parameters.items()
                if p.kind is not p.KEYWORD_ONLY
            ] == ["self", "input", "hx"]


INPUT_ERRORS: dict[str, Callable[[type], Any]] = {
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
@pytest.mark.parametrize(("theirs", "ours"), LAYERS)
def test_input_errors(case: str, theirs: type, ours: type) -> None:
    assert_same_error(INPUT_ERRORS[case], theirs, ours)


def given(kind: type, x: Tensor | PackedSequence, *states: Tensor, **keywords: Any) -> Any:
    return kind(3, 4, **keywords)(x, states if issubclass(kind, FAMILY["LSTM"]) else states[0])


def packed_data(data: Tensor) -> PackedSequence:
    """What a caller can make by hand, past the checks of the packing functions."""
    return PackedSequence(data, torch.tensor([2, 1]))


FAMILY = {"LSTM": (nn.LSTM, fusedrnn.FusedLSTM), "GRU": (nn.GRU, fusedrnn.FusedGRU)}
X, X2, H, H2 = torch.randn(5, 2, 3), torch.randn(5, 3), torch.randn(1, 2, 4), torch.randn(1, 4)
HX_ERRORS: dict[str, Callable[[type], Any]] = {
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
@pytest.mark.parametrize(("theirs", "ours"), LAYERS)
def test_hx_errors(case: str, theirs: type, ours: type) -> None:
    assert_same_error(HX_ERRORS[case], theirs, ours)


def test_hx_errors_of_the_cell_state() -> None:
    for call in (
        lambda k: given(k, X, H, torch.randn(1, 3, 4)),
        lambda k: given(k, X, H, torch.randn(1, 2, 5), proj_size=0),
        lambda k: given(k, X, H, H, proj_size=2),
        lambda k: given(k, X, torch.randn(1, 2, 2), torch.randn(1, 2, 2), proj_size=2),
        lambda k: given(k, X, H, H2),
    ):
        assert_same_error(call, nn.LSTM, fusedrnn.FusedLSTM)


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
    """Where torch has no clear error: its own form where it has one for a like case."""
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


def test_gru_has_no_projection() -> None:
    message = "proj_size argument is only supported for LSTM, not RNN or GRU"
    with pytest.raises(ValueError, match=message):
        fusedrnn.FusedGRU(3, 4, proj_size=2)
    with pytest.raises(ValueError, match=message):
        fusedrnn.FusedGRU(3, 4, 1, True, False, 0.0, False, 2)


@pytest.mark.parametrize("kind", [k for _, k in PAIRS])
def test_missing_arguments(kind: type[nn.Module]) -> None:
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'hidden_size'"):
        kind(3)


def test_errors_of_packing_come_from_torch() -> None:
    with pytest.raises(RuntimeError, match="Length of all samples has to be greater than 0"):
        pack_padded_sequence(X, torch.tensor([5, 0]))
    with pytest.raises(RuntimeError, match="Cannot pack empty tensors"):
        pack_padded_sequence(torch.randn(0, 2, 3), torch.tensor([1, 1]))


CELL_ERRORS: dict[str, Callable[[type], Any]] = {
    "3-D": lambda k: k(3, 4)(torch.randn(1, 2, 3)),
    "0-D": lambda k: k(3, 4)(torch.tensor(1.0)),
    "features": lambda k: k(3, 4)(torch.randn(2, 7)),
    "rows": lambda k: k(3, 4)(torch.randn(2, 3), pair(k, torch.randn(3, 4))),
    "width": lambda k: k(3, 4)(torch.randn(2, 3), pair(k, torch.randn(2, 5))),
    "3-D hx": lambda k: k(3, 4)(torch.randn(2, 3), pair(k, torch.randn(1, 2, 4))),
}


def pair(kind: type, state: Tensor) -> Any:
    return (state, state) if kind in (nn.LSTMCell, fusedrnn.FusedLSTMCell) else state


@pytest.mark.parametrize("case", list(CELL_ERRORS))
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(nn.LSTMCell, fusedrnn.FusedLSTMCell), (nn.GRUCell, fusedrnn.FusedGRUCell)],
)
def test_cell_errors(case: str, theirs: type, ours: type) -> None:
    assert_same_error(CELL_ERRORS[case], theirs, ours)


@pytest.mark.parametrize("kind", [fusedrnn.FusedLSTMCell, fusedrnn.FusedGRUCell])
def test_unbatched_cell_wants_unbatched_hx(kind: type) -> None:
    """Torch's words for it changed between releases."""
    with pytest.raises(RuntimeError, match="hidden0 has inconsistent hidden_size: got 1, expected"):
        kind(3, 4)(torch.randn(3), pair(kind, torch.randn(1, 4)))


def test_cell_wants_a_pair() -> None:
    for state in (torch.randn(2, 4), torch.randn(4), (torch.randn(2, 4),)):
        with pytest.raises(TypeError, match="LSTMCell: Expected hx to be a tuple of two tensors"):
            fusedrnn.FusedLSTMCell(3, 4)(torch.randn(2, 3), state)
    with pytest.raises(TypeError, match="GRUCell: Expected hx to be a tensor, got tuple"):
        fusedrnn.FusedGRUCell(3, 4)(torch.randn(2, 3), (torch.randn(2, 4),))


@pytest.mark.parametrize(("theirs", "ours"), LAYERS)
def test_layouts_and_strides(theirs: type, ours: type) -> None:
    torch.manual_seed(0)
    a = theirs(3, 4, num_layers=2, batch_first=True)
    b = fused_like(a)
    x = torch.randn(2, 5, 3)
    hx = torch.randn(2, 2, 4)
    hx = (hx, hx) if theirs is nn.LSTM else hx
    y, final = b(input=x, hx=list(hx) if theirs is nn.LSTM else hx)
    torch.testing.assert_close(y, a(input=x, hx=hx)[0])
    assert y.stride() == a(x, hx)[0].stride()
    h_n = final[0] if theirs is nn.LSTM else final
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


@pytest.mark.parametrize(("theirs", "ours"), LAYERS)
def test_packed_order_is_the_callers(theirs: type, ours: type) -> None:
    torch.manual_seed(0)
    a = theirs(3, 4, num_layers=2, bidirectional=True)
    b = fused_like(a)
    packed = pack_sequence([torch.randn(n, 3) for n in (2, 5, 1, 5)], enforce_sorted=False)
    h0 = torch.randn(4, 4, 4)
    hx = (h0, h0 + 1) if theirs is nn.LSTM else h0
    (y, final), (expected, expected_final) = b(packed, hx), a(packed, hx)
    torch.testing.assert_close(y.data, expected.data)
    torch.testing.assert_close(final, expected_final)
    assert y.sorted_indices is packed.sorted_indices
    assert y.unsorted_indices is packed.unsorted_indices
    assert y.batch_sizes is packed.batch_sizes


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_copies_pickles_and_moves(theirs: type, ours: type) -> None:
    torch.manual_seed(0)
    module = ours(3, 4)
    x = torch.randn(5, 3)
    expected = module(x)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    again = ours(3, 4)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), again):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    meta = ours(3, 4, device="meta").to_empty(device="cpu")
    meta.load_state_dict(module.state_dict())
    torch.testing.assert_close(meta(x), expected, rtol=0, atol=0)
    assert str(module.to(torch.bfloat16)(x.bfloat16())[0].dtype) == "torch.bfloat16"


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(theirs: type, ours: type, dtype: torch.dtype) -> None:
    """Output types are torch's own; gradients of the parameters stay float32."""
    torch.manual_seed(0)
    a = theirs(3, 4)
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
    wrong = ours(3, 4).double()
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


def test_the_short_way_agrees_with_the_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What csrc/python.cpp does and what the modules do without it, and that it is taken."""
    calls = {"taken": 0}

    def short(name: str) -> Any:
        function = getattr(fusedrnn._ops, name)

        def counted(*arguments: Any) -> Any:
            result = function(*arguments)
            calls["taken"] += result is not None
            return result

        return counted

    x, hx = torch.randn(5, 2, 3), torch.randn(4, 2, 4)
    module = fusedrnn.FusedLSTM(3, 4, 2, bidirectional=True, batch_first=True)
    gru = fusedrnn.FusedGRU(3, 4, 2, bidirectional=True)
    cell, gru_cell = fusedrnn.FusedLSTMCell(3, 4), fusedrnn.FusedGRUCell(3, 4, bias=False)
    cases = [
        lambda: module(x.transpose(0, 1), (hx, hx)),
        lambda: module(x),
        lambda: gru(x, hx),
        lambda: cell(x[0], (hx[0], hx[1])),
        lambda: cell(x[0]),
        lambda: gru_cell(x[0], hx[0]),
    ]
    for name in ("fast_layers", "fast_cell"):
        monkeypatch.setattr(fusedrnn._ops, name, short(name))
    fast = [case() for case in cases]
    with torch.no_grad():
        without_gradient = [case() for case in cases]
    assert calls["taken"] == 2 * len(cases)
    for name in ("fast_layers", "fast_cell"):
        monkeypatch.setattr(fusedrnn._ops, name, lambda *_: None)
    slow = [case() for case in cases]
    torch.testing.assert_close(fast, slow, rtol=0, atol=0)
    torch.testing.assert_close(without_gradient, slow, rtol=0, atol=0)


# What is true or false, or a number, without being Python's own; and what is neither.
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
@pytest.mark.parametrize(("theirs", "ours"), LAYERS)
def test_attributes_changed_after_construction(
    attribute: str, value: str, theirs: type, ours: type
) -> None:
    """Each that a call reads: torch's result where torch has one, else an exception."""
    given = ODD[value]
    torch.manual_seed(0)
    a = theirs(3, 4, 2, bidirectional=True)
    b = fused_like(a)
    x = torch.randn(5, 5, 3)
    results: list[Any] = []
    for module in (a, b):
        setattr(module, attribute, given)
        torch.manual_seed(1)  # of dropout
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of a division
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
@pytest.mark.parametrize(("theirs", "ours"), LAYERS)
def test_sizes_changed_after_construction(attribute: str, theirs: type, ours: type) -> None:
    """They are no longer those of the weights: an error in every layout, as in torch."""
    x, hx = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    module = ours(3, 4)
    setattr(module, attribute, 2)
    state = (hx, hx) if theirs is nn.LSTM else hx
    for given in (x, x[:, 0], pack_sequence([x[:, 0]])):
        if attribute != "hidden_size":  # which torch compares with a state alone
            with pytest.raises(RuntimeError):
                module(given)
    with pytest.raises(RuntimeError):
        module(x, state)
    if attribute == "proj_size" and theirs is nn.LSTM:
        projected = ours(3, 4, proj_size=2)
        projected.proj_size = 0
        with pytest.raises(RuntimeError, match=r"^Expected 4 weights for num_layers=1.* got 5$"):
            projected(x)


@pytest.mark.parametrize(("theirs", "ours"), PAIRS[2:])
@pytest.mark.parametrize("attribute", ["input_size", "hidden_size"])
def test_sizes_of_a_cell_changed_after_construction(
    attribute: str, theirs: type, ours: type
) -> None:
    """As torch, a cell goes by its weights alone."""
    torch.manual_seed(0)
    a = theirs(3, 4)
    b = fused_like(a)
    for module in (a, b):
        setattr(module, attribute, 2)
    x, state = torch.randn(2, 3), torch.randn(2, 4)
    torch.testing.assert_close(b(x, pair(ours, state)), a(x, pair(theirs, state)))
    torch.testing.assert_close(b(x[0], pair(ours, state[0])), a(x[0], pair(theirs, state[0])))

    def call(kind: type) -> None:
        module = a if kind is theirs else b
        module(torch.randn(2, 2))

    assert_same_error(call, theirs, ours)


def test_attributes_that_make_no_sense() -> None:
    """An exception, and none that was set and forgotten."""
    x = torch.randn(5, 2, 3)
    for name in ([], 5, None):  # no name, one that can't be looked up among them
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
@pytest.mark.parametrize(("theirs", "ours"), LAYERS)
def test_attributes_that_leave_weights_out(kept: dict, theirs: type, ours: type) -> None:
    """The layer is the one that would have been made so, with the weights of these names."""
    torch.manual_seed(0)
    made = {"num_layers": 1 if "bidirectional" in kept else 3, "bias": True, "bidirectional": True}
    module = ours(3, 4, **made)
    expected = theirs(3, 4, **{**made, **kept})
    expected.load_state_dict({n: module.state_dict()[n] for n in expected.state_dict()})
    for name, value in kept.items():
        setattr(module, name, value)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(module(x), expected(x))
    torch.testing.assert_close(module(x, lengths=[5, 5]), expected(x))


def test_attributes_that_want_more_weights() -> None:
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
@pytest.mark.parametrize(("theirs", "ours"), PAIRS[2:])
def test_bias_of_a_cell(when: str, value: str, swap: bool, theirs: type, ours: type) -> None:
    """Whatever `bias` is, the biases that are there take part, as in torch."""
    given = ODD.get(value, value == "True")
    modules = []
    for kind in (theirs, theirs if swap else ours):
        torch.manual_seed(0)
        module = kind(3, 4, given) if when == "constructed" else kind(3, 4)
        if when == "changed":
            module.bias = given
        modules.append(module)
    if swap:
        fusedrnn.fuse(modules[1])
        assert type(modules[1]) is ours
    x = torch.randn(2, 3)
    results = []
    for module in modules:
        flat = list(tensors(module(x)))
        loss = sum(t.square().sum() for t in flat)
        results.append([*flat, *torch.autograd.grad(loss, list(module.parameters()))])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("absent", [("bias_ih",), ("bias_hh",), ("bias_ih", "bias_hh")])
@pytest.mark.parametrize(("theirs", "ours"), PAIRS[2:])
def test_a_cell_whose_biases_were_taken_away(absent: tuple, theirs: type, ours: type) -> None:
    torch.manual_seed(0)
    a = theirs(3, 4)
    b = fused_like(a)
    for module in (a, b):
        for name in absent:
            setattr(module, name, None)
    x = torch.randn(2, 3)
    torch.testing.assert_close(b(x), a(x))


LAYERS_AND_CELLS = {
    "LSTM": lambda: fusedrnn.FusedLSTM(3, 4),
    "LSTM of two layers": lambda: fusedrnn.FusedLSTM(3, 4, 2, bidirectional=True),
    "GRU": lambda: fusedrnn.FusedGRU(3, 4),
    "GRU of two layers": lambda: fusedrnn.FusedGRU(3, 4, 2, batch_first=True),
    "LSTMCell": lambda: fusedrnn.FusedLSTMCell(3, 4),
    "GRUCell": lambda: fusedrnn.FusedGRUCell(3, 4),
}


class Stopped(BaseException):
    """What `except Exception` does not see, as torch.utils.checkpoint may raise."""


@pytest.mark.parametrize(
    "error", [KeyError, KeyboardInterrupt, Stopped, torch.OutOfMemoryError, MemoryError]
)
@pytest.mark.parametrize("name", LAYERS_AND_CELLS)
def test_what_a_hook_raises_is_the_callers(name: str, error: type[BaseException]) -> None:
    """At any of the tensors that a call saves: as it is, and no hook runs again."""
    module = LAYERS_AND_CELLS[name]()
    x = torch.randn((2, 3) if "Cell" in name else (5, 2, 3))

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


@pytest.mark.parametrize("name", LAYERS_AND_CELLS)
def test_checkpoints_that_stop_early(name: str) -> None:
    """torch.utils.checkpoint ends a recomputation by an exception of a hook."""
    module = LAYERS_AND_CELLS[name]()
    x = torch.randn((2, 3) if "Cell" in name else (5, 2, 3), requires_grad=True)

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
    """weight_norm, parametrizations and assignment change the weights behind nn.LSTM's back."""
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
@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_torchs_own_samples(theirs: type, ours: type, dtype: torch.dtype) -> None:
    """The inputs that torch tests its modules with, values and gradients."""
    (info,) = [m for m in module_db if m.module_cls is theirs]
    torch.manual_seed(0)  # of the samples, which are the same in any order of the tests
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
                a = theirs(*construct.args, **{**construct.kwargs, "dtype": dtype}).train(training)
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

    torch.manual_seed(1)  # of dropout
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

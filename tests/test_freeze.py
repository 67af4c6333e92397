"""freeze(model): packed weights in float32, bfloat16 and int8."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import threading
import warnings
from typing import Any

import pytest
import torch
from helpers.cells import CELLS, EACH_MODULE, Cell, Pair, cell_named
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing import assert_close

import fusedrnn
from fusedrnn import FrozenLSTM, _ops, freeze

OPS = torch.ops.fusedrnn
DTYPES = [torch.float32, torch.bfloat16, torch.int8]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
INT8_CELLS = [cell for cell in CELLS if not cell.has_dead_units]  # their states are bounded
# Where the CPU multiplies bytes, four weights to a lane, it quantises the input to 8 bits.
LARGEST_INPUT = 127 if _ops.cpu_panel_layout().endswith("x4") else 32767


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


# The ops.


class Problem:
    """One layer with random sizes, and its arguments."""

    def __init__(self, cell: Cell, seed: int, projected: bool = False) -> None:
        random = torch.Generator().manual_seed(seed)

        def pick(*options: int) -> int:
            return options[int(torch.randint(len(options), (1,), generator=random))]

        self.cell = cell
        self.T, self.B, self.I = (
            pick(1, 2, 6, 9),
            pick(1, 2, 3, 5, 7, 13, 40),
            pick(1, 3, 8, 17, 40),
        )
        self.H = pick(2, 5, 16, 21, 64, 70)
        self.P = max(1, self.H // 2) if projected else self.H
        self.D = pick(1, 2)
        shapes = cell.weight_shapes(
            self.I, self.H, bias=pick(0, 1) == 1, proj_size=self.P if projected else 0
        )
        bound = self.H**-0.5
        self.weights = [
            (torch.rand(shape, generator=random) * 2 - 1) * bound
            for _ in range(self.D)
            for shape in shapes
        ]
        self.states: list[Tensor | None] = [None] * len(cell.states)
        if pick(0, 1):
            self.states = [
                torch.randn(self.D, self.B, width, generator=random)
                for width in cell.state_widths(self.H, self.P if projected else 0)
            ]
        self.lengths: Tensor | None = None
        self.batch_sizes: Tensor | None = None
        self.x = torch.randn(self.T, self.B, self.I, generator=random)
        layout = pick(0, 1, 2)
        if layout == 1:
            self.lengths = torch.randint(self.T + 1, (self.B,), generator=random)
        elif layout == 2:
            sizes = torch.randint(1, self.B + 1, (self.T,), generator=random)
            self.batch_sizes = sizes.sort(descending=True).values
            self.B = int(self.batch_sizes[0])
            self.x = torch.randn(int(sizes.sum()), self.I, generator=random)
            self.states = [None if s is None else s[:, : self.B] for s in self.states]

    def plain(self, weights: list[Tensor], x: Tensor) -> tuple[Tensor, ...]:
        args = (self.D == 2, self.batch_sizes, self.lengths, False)
        return self.cell.forward_op()(x, *self.states, weights, *args)[:-1]

    def frozen(self, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The packed weights and the results."""
        packed = OPS._freeze(self.cell.name, self.weights, self.D == 2, dtype)
        return packed, self.call(packed)

    def quantised_input(self) -> Tensor:
        """The input as int8 weights meet it, in float64."""
        most = self.x.abs().amax(-1, keepdim=True)
        return quantised(self.x.double(), most, min(LARGEST_INPUT, largest(self.I)))

    def call(self, packed: Tensor) -> tuple[Tensor, ...]:
        op = getattr(OPS, f"{self.cell.name}_frozen")
        args = (self.H, self.P, self.D == 2, self.batch_sizes, self.lengths)
        return op(self.x, *self.states, packed, *args)


CASES = [(cell, False) for cell in CELLS] + [(c, True) for c in CELLS if c.projects]


@EACH_DTYPE
@pytest.mark.parametrize(("cell", "projected"), CASES, ids=str)
def test_results_are_those_of_the_rounded_weights(
    cell: Cell, projected: bool, dtype: torch.dtype
) -> None:
    """As the plain op's with the weights that _unfreeze gives. int8 also quantises operands."""
    if dtype == torch.int8 and (projected or cell not in INT8_CELLS):
        pytest.skip("states without a bound")
    for seed in range(60):
        problem = Problem(cell, seed, projected)
        packed, found = problem.frozen(dtype)
        weights = OPS._unfreeze(packed)
        x = problem.quantised_input().float() if dtype == torch.int8 else problem.x
        expected = problem.plain(weights, x)
        tolerance = 2e-4 if dtype == torch.int8 else 4e-6
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, atol=tolerance, rtol=tolerance)
        for w, original in zip(weights, problem.weights, strict=True):
            if dtype == torch.float32 or w.dim() == 1:
                assert torch.equal(w, original)
            elif dtype == torch.bfloat16:
                assert torch.equal(w, original.bfloat16().float()) or projected
            else:
                scale = original.abs().amax(1, keepdim=True) / 127
                assert ((w - original).abs() <= 0.501 * scale).all()


def quantised(values: Tensor, most: Tensor, largest: int) -> Tensor:
    # The kernels multiply by a float32.
    inverse = (largest / most.float()).double()
    return (values * inverse).round() * (most.double() / largest)


def largest(columns: int) -> int:
    return min(32767, (2**31 - 1) // 127 // columns)


def oracle(problem: Problem, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One direction in float64, its operands quantised as ops.cpp says."""
    cell = _ops.CELLS[problem.cell.name]
    ih, hh, *biases = [w.double() for w in weights]
    bias_ih, bias_hh = biases if biases else (None, None)
    widths = problem.cell.state_widths(problem.H)
    states = [
        torch.zeros(problem.B, width, dtype=torch.float64) if s is None else s[0].double()
        for s, width in zip(problem.states, widths, strict=True)
    ]
    most = states[0].abs().amax(-1, keepdim=True).clamp(min=1)
    outputs = []
    for step in problem.quantised_input():
        product = nn.functional.linear(step, ih, bias_ih)
        h = quantised(states[0], most, largest(problem.H))
        # A GRU multiplies h itself by z: the step gets both, by a product of its own.
        new = cell.step(product, (h, *states[1:]), hh, bias_hh, None)
        if cell.name == "gru":
            z = (product + nn.functional.linear(h, hh, bias_hh)).chunk(3, -1)[1].sigmoid()
            new = (new[0] + z * (states[0] - h),)
        states = list(new)
        outputs.append(states[0])
    return torch.stack(outputs), states


@pytest.mark.parametrize("cell", INT8_CELLS, ids=str)
def test_int8_against_an_oracle(cell: Cell) -> None:
    count = 0
    for seed in range(200):
        problem = Problem(cell, seed)
        if problem.D == 2 or problem.batch_sizes is not None or problem.lengths is not None:
            continue
        count += 1
        packed, (output, *final) = problem.frozen(torch.int8)
        expected, states = oracle(problem, OPS._unfreeze(packed))
        # Quantised operands may round the other way: units of 1 / 32767, times a weight.
        for a, b in zip((output, *(f[0] for f in final)), (expected, *states), strict=True):
            assert_close(a.double(), b, atol=8e-5, rtol=0)
    assert count > 20


def test_int8_sums_do_not_overflow() -> None:
    """The largest operands times the largest weights, along a K that leaves no room."""
    for K in (515, 516, 517, 4096):
        weights = [torch.ones(4, K), torch.ones(4, 1)]
        packed = OPS._freeze("lstm", weights, False, torch.int8)
        x = torch.full((1, 1, K), 1e-3)
        h, c = OPS.lstm_frozen(x, None, None, packed, 1, 1, False, None, None)[1:]
        expected = OPS.lstm(x, None, None, weights, False, None, None, False)[1:3]
        assert_close(h, expected[0], atol=1e-4, rtol=0)
        assert_close(c, expected[1], atol=1e-4, rtol=0)
    for H in (515, 516, 517):
        weights = [torch.ones(4 * H, 1), torch.full((4 * H, H), 1e-3)]
        packed = OPS._freeze("lstm", weights, False, torch.int8)
        x, h0, c0 = torch.zeros(1, 1, 1), torch.ones(1, 1, H), torch.zeros(1, 1, H)
        found = OPS.lstm_frozen(x, h0, c0, packed, H, H, False, None, None)[1:]
        expected = OPS.lstm(x, h0, c0, weights, False, None, None, False)[1:3]
        assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cell", INT8_CELLS, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, 7])
def test_int8_same_bits_with_and_without_an_input_gemm(cell: Cell, rows: int) -> None:
    """Four steps multiply the input step by step, twelve may do so in one GEMM."""
    weights = [torch.randn(s) * 0.2 for s in cell.weight_shapes(37, 50)]
    packed = OPS._freeze(cell.name, weights, False, torch.int8)
    op, nones = getattr(OPS, f"{cell.name}_frozen"), [None] * len(cell.states)
    x = torch.randn(12, rows, 37)
    many = op(x, *nones, packed, 50, 50, False, None, None)[0]
    few = op(x[:4], *nones, packed, 50, 50, False, None, None)[0]
    assert torch.equal(many[:4], few)


@EACH_DTYPE
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_same_bits_with_any_number_of_threads(cell: Cell, dtype: torch.dtype) -> None:
    if dtype == torch.int8 and cell not in INT8_CELLS:
        pytest.skip("states without a bound")
    weights = [torch.randn(s) * 0.05 for s in cell.weight_shapes(96, 160)]
    packed = OPS._freeze(cell.name, weights, False, dtype)
    op = getattr(OPS, f"{cell.name}_frozen")
    before = torch.get_num_threads()
    try:
        for T, B in ((30, 1), (12, 7), (6, 40), (1, 64)):
            x = torch.randn(T, B, 96)
            found = []
            for threads in (1, 2, 3, 5, 7):
                torch.set_num_threads(threads)
                nones = [None] * len(cell.states)
                found += [op(x, *nones, packed, 160, 160, False, None, None) for _ in range(3)]
            for other in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("cell", INT8_CELLS, ids=str)
@pytest.mark.parametrize("steps", [1, 3, 12])
@pytest.mark.parametrize("rows", [2, 20])
def test_int8_rows_that_are_not_finite(cell: Cell, steps: int, rows: int) -> None:
    """A bad token or state makes its row NaN from there on, and no other row."""
    T, B = steps, rows
    weights = [torch.randn(s) * 0.2 for s in cell.weight_shapes(5, 9)]
    packed = OPS._freeze(cell.name, weights * 2, True, torch.int8)
    op = getattr(OPS, f"{cell.name}_frozen")
    for bad in (float("nan"), float("inf"), -float("inf")):
        x, nones = torch.randn(T, B, 5), [None] * len(cell.states)
        good = op(x, *nones, packed, 9, 9, True, None, None)[0]
        x[T // 2, 1, 3] = bad
        y = op(x, *nones, packed, 9, 9, True, None, None)[0]
        assert torch.equal(y[:, [0, *range(2, B)]], good[:, [0, *range(2, B)]])
        assert y[T // 2 :, 1, :9].isnan().all()
        assert y[: T // 2 + 1, 1, 9:].isnan().all()
        assert torch.equal(y[: T // 2, 1, :9], good[: T // 2, 1, :9])
        for i in range(len(cell.states)):
            states = [torch.zeros(2, B, 9) for _ in cell.states]
            states[i][0, 0, 2] = bad
            y = op(torch.randn(T, B, 5), *states, packed, 9, 9, True, None, None)[0]
            assert y[:, 0, :9].isnan().all()
            assert y[:, 0, 9:].isfinite().all()
            assert y[:, 1:].isfinite().all()


def test_int8_reads_no_padding() -> None:
    weights = [torch.randn(s) * 0.2 for s in cell_named("lstm").weight_shapes(5, 9)]
    packed = OPS._freeze("lstm", weights, False, torch.int8)
    x, lengths = torch.randn(7, 3, 5), torch.tensor([7, 0, 4])
    expected = OPS.lstm_frozen(x, None, None, packed, 9, 9, False, None, lengths)
    for row, length in enumerate(lengths.tolist()):
        x[length:, row] = float("nan")
    found = OPS.lstm_frozen(x, None, None, packed, 9, 9, False, None, lengths)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_zero_and_tiny_values() -> None:
    for scale in (0.0, 1e-44, 1e-38):
        weights = [torch.randn(s) * scale for s in cell_named("gru").weight_shapes(4, 6)]
        packed = OPS._freeze("gru", weights, False, torch.int8)
        y, _ = OPS.gru_frozen(torch.randn(3, 2, 4) * scale, None, packed, 6, 6, False, None, None)
        assert y.abs().max() < 1e-3


@EACH_DTYPE
def test_no_changed_byte_of_the_header_crashes(dtype: torch.dtype) -> None:
    weights = [torch.randn(s) for s in cell_named("lstm").weight_shapes(3, 5, proj_size=0)]
    packed = OPS._freeze("lstm", weights, False, dtype)
    x = torch.randn(2, 3, 3)
    raised = 0
    for i in range(128):
        for value in (0, 1, 2, 4, 8, 16, 127, 128, 255):
            changed = packed.clone()
            changed[i] = value
            try:
                OPS.lstm_frozen(x, None, None, changed, 5, 5, False, None, None)
            except RuntimeError:
                raised += 1
    assert raised > 300
    for wrong in (packed[:-1], packed[:50], packed.to(torch.int8), packed[None], x):
        with pytest.raises(RuntimeError, match="Expected weights from"):
            OPS.lstm_frozen(x, None, None, wrong, 5, 5, False, None, None)
    unaligned = torch.cat([packed[:1], packed])[1:]
    assert torch.equal(
        OPS.lstm_frozen(x, None, None, unaligned, 5, 5, False, None, None)[0],
        OPS.lstm_frozen(x, None, None, packed, 5, 5, False, None, None)[0],
    )


def test_errors_of_the_ops() -> None:
    lstm = [torch.randn(s) for s in cell_named("lstm").weight_shapes(3, 5)]
    packed = OPS._freeze("lstm", lstm, False, torch.float32)
    x = torch.randn(2, 3, 3)

    def call(x: Tensor, hidden: int = 5, out: int = 5, both: bool = False) -> Any:
        return OPS.lstm_frozen(x, None, None, packed, hidden, out, both, None, None)

    for wrong, text in (
        (lambda: call(x, hidden=6), "Expected hidden_size 5 and output_size 5, got 6 and 5"),
        (lambda: call(x, both=True), "frozen for 1 direction, got 2"),
        (lambda: call(torch.randn(2, 3, 4)), "Expected 3, got 4"),
        (lambda: call(x.double()), "no float64 input"),
        (lambda: call(torch.randn(0, 3, 3)), "Expected sequence length to be larger than 0"),
        (lambda: OPS.gru_frozen(x, None, packed, 5, 5, False, None, None), "frozen for lstm"),
        (lambda: OPS._freeze("lstm", [w.double() for w in lstm], False, torch.int8), "be float32"),
        (lambda: OPS._freeze("mlstm", lstm, False, torch.int8), "there is no cell mlstm"),
        (lambda: OPS._freeze("lstm", [], False, torch.int8), "no tensor arguments"),
        (lambda: OPS._freeze("lstm", lstm[:1], False, torch.int8), "got 1 weights"),
        (lambda: OPS._freeze("lstm", lstm, False, torch.float16), "must be float32, bfloat16 or"),
        (lambda: OPS._freeze("rnn_relu", [w[:5] for w in lstm], False, torch.int8), "not bounded"),
        (
            lambda: OPS._freeze("lstm", [w * float("inf") for w in lstm], False, torch.int8),
            "must be finite",
        ),
    ):
        with pytest.raises(RuntimeError, match=text):
            wrong()


@EACH_DTYPE
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_opcheck(cell: Cell, dtype: torch.dtype) -> None:
    if dtype == torch.int8 and cell not in INT8_CELLS:
        pytest.skip("states without a bound")
    for seed in range(3):
        problem = Problem(cell, seed)
        packed, _ = problem.frozen(dtype)
        torch.library.opcheck(
            getattr(OPS, f"{cell.name}_frozen"),
            (
                problem.x,
                *problem.states,
                packed,
                problem.H,
                problem.P,
                problem.D == 2,
                problem.batch_sizes,
                problem.lengths,
            ),
            test_utils=("test_schema", "test_faketensor"),
        )


# The modules.


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """For modules of few units: bfloat16 has 8 bits, int8 7."""
    return {"atol": {4: 1e-5, 2: 0.02, 1: 0.03}[dtype.itemsize], "rtol": 0}


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, PackedSequence):
        return [result.data]
    return [result] if isinstance(result, Tensor) else [t for r in result for t in flat(r)]


@EACH_DTYPE
@EACH_MODULE
def test_modules_are_called_as_before(pair: Pair, dtype: torch.dtype) -> None:
    for module in (pair.make_plain(7, 11), pair.make_fused(7, 11, bias=False)):
        frozen = freeze(module, dtype)
        assert type(frozen).__name__ == f"Frozen{pair.plain.__name__}"
        assert not list(frozen.parameters())
        assert frozen.dtype in (dtype, torch.bfloat16)
        shape = (5, 3, 7) if pair.is_layer else (3, 7)
        inputs = [torch.randn(shape), torch.randn(*shape[:-2], 7)]
        with torch.no_grad():
            for x in inputs:
                first = module(x)
                assert_close(flat(frozen(x)), flat(first), **tolerance(dtype))
                hx = first[1] if pair.is_layer else first
                assert_close(flat(frozen(x, hx)), flat(module(x, hx)), **tolerance(dtype))
                compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
                assert_close(flat(compiled(x, hx)), flat(frozen(x, hx)), atol=0, rtol=0)
            for half in (torch.bfloat16, torch.float16):
                found = flat(frozen(inputs[0].to(half)))
                assert all(t.dtype == half for t in found)
                assert_close(found[0].float(), flat(module(inputs[0]))[0], atol=0.03, rtol=0)


@EACH_DTYPE
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_layers_in_every_layout(kind: Any, first: bool, dtype: torch.dtype) -> None:
    plain = kind(5, 6, 2, bidirectional=True, batch_first=first, dropout=0.5).eval()
    frozen = freeze(plain, dtype)
    x, lengths = torch.randn(3, 4, 5), torch.tensor([2, 4, 1] if first else [2, 3, 1, 2])
    packed = pack_padded_sequence(x, lengths, first, enforce_sorted=False)
    with torch.no_grad():
        assert_close(flat(frozen(x)), flat(plain(x)), **tolerance(dtype))
        assert_close(flat(frozen(packed)), flat(plain(packed)), **tolerance(dtype))
        output, hx = frozen(x, lengths=lengths)
        padded, _ = nn.utils.rnn.pad_packed_sequence(frozen(packed)[0], first)
        assert_close(output, padded, atol=1e-6, rtol=0)
        assert_close(flat(hx), flat(frozen(packed)[1]), atol=1e-6, rtol=0)
        training = flat(frozen.train()(x))  # no dropout
        assert_close(training, flat(frozen.eval()(x)), atol=0, rtol=0)


@EACH_DTYPE
def test_projection_and_relu(dtype: torch.dtype) -> None:
    for module in (nn.LSTM(5, 8, 2, proj_size=3), nn.RNN(5, 8, nonlinearity="relu")):
        frozen = freeze(module, dtype)
        assert frozen.dtype == (torch.bfloat16 if dtype == torch.int8 else dtype)
        x = torch.randn(4, 2, 5)
        with torch.no_grad():
            assert_close(flat(frozen(x)), flat(module(x)), **tolerance(dtype))


def test_errors_of_calls() -> None:
    frozen = freeze(nn.LSTM(3, 4))
    x = torch.randn(5, 2, 3)
    with pytest.raises(RuntimeError, match="no gradient"):
        frozen(x.requires_grad_())
    x = x.detach()
    with pytest.raises(RuntimeError, match="no gradient"):
        torch.func.jvp(lambda x: frozen(x)[0], (x,), (x,))
    with pytest.raises(RuntimeError, match="no gradient"):
        torch.func.grad(lambda x: frozen(x)[0].sum())(x)
    with pytest.raises(RuntimeError, match=r"must be equal to input_size\. Expected 3, got 4"):
        frozen(torch.randn(5, 2, 4))
    with pytest.raises(ValueError, match="LSTM: Expected input to be 2D or 3D, got 1D instead"):
        frozen(torch.randn(3))
    with pytest.raises(RuntimeError, match="Expected hidden"):
        frozen(x, (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)))
    with pytest.raises(TypeError, match="tuple of two tensors"):
        frozen(x, torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="lengths can't be given with a PackedSequence"):
        frozen(pack_padded_sequence(x, [5, 2]), lengths=[5, 2])
    with pytest.raises(AttributeError, match=r"no weight_ih_l0: freeze\(\) packed the weights"):
        _ = frozen.weight_ih_l0
    with pytest.raises(RuntimeError, match="inconsistent input_size: got 4 expected 3"):
        freeze(nn.GRUCell(3, 4))(torch.randn(2, 4))
    with pytest.raises(TypeError, match="hx to be a tensor"):
        freeze(nn.GRUCell(3, 4))(torch.randn(2, 3), (torch.zeros(2, 4),))


def test_errors_of_freeze() -> None:
    with pytest.raises(TypeError, match="Expected model to be a module, got int"):
        freeze(3)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="must be float32, bfloat16 or int8"):
        freeze(nn.LSTM(3, 4), torch.float16)
    with pytest.raises(RuntimeError, match="must be float32"):
        freeze(nn.LSTM(3, 4, dtype=torch.float64))


class Tagger(nn.Module):
    """A model with a layer in two places, a cell, and other modules."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True)
        self.again = self.lstm
        self.cells = nn.ModuleList([nn.GRUCell(10, 4), fusedrnn.FusedGRUCell(10, 4)])
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.lstm.flatten_parameters()
        y, _ = self.again(x)
        return self.out(self.cells[0](y[:, -1]) + self.cells[1](y[:, 0]))


@EACH_DTYPE
def test_a_model(dtype: torch.dtype) -> None:
    model = Tagger().eval()
    x = torch.randn(3, 4, 6)
    with torch.no_grad():
        expected = model(x)
        frozen = freeze(model, dtype)
        assert model.lstm is model.again
        assert isinstance(model.lstm, nn.LSTM)
        assert frozen.lstm is frozen.again
        assert isinstance(frozen.lstm, FrozenLSTM)
        assert frozen.out.weight.dtype == torch.float32
        assert not frozen.training
        assert_close(frozen(x), expected, **tolerance(dtype))
        assert freeze(fusedrnn.fuse(model), dtype, inplace=True) is model
        assert torch.equal(model(x), frozen(x))
        assert_close(torch.compile(frozen, fullgraph=True)(x), frozen(x))


@EACH_DTYPE
def test_copies_and_state_dict(dtype: torch.dtype) -> None:
    plain = Tagger()
    frozen = freeze(plain, dtype)
    x = torch.randn(2, 3, 6)
    with torch.no_grad():
        expected = frozen(x)
        file = io.BytesIO()
        torch.save(frozen, file)
        file.seek(0)
        for other in (
            copy.deepcopy(frozen),
            pickle.loads(pickle.dumps(frozen)),
            torch.load(file, weights_only=False),
        ):
            assert torch.equal(other(x), expected)
        state = frozen.state_dict()
        assert list(state) == list(plain.state_dict())
        if dtype == torch.float32:
            assert all(torch.equal(state[k], v) for k, v in plain.state_dict().items())
        other = Tagger()
        other.load_state_dict(state)
        assert_close(other(x), expected, **tolerance(dtype))
        new = freeze(Tagger(), dtype)
        assert not new.load_state_dict(plain.state_dict()).missing_keys
        assert torch.equal(new(x), expected)
        state.pop("lstm.weight_ih_l0")
        with pytest.raises(RuntimeError, match=r'Missing key.*"lstm.weight_ih_l0"'):
            new.load_state_dict(state)
        state = plain.state_dict() | {"lstm.weight_hh_l0": torch.zeros(3, 3)}
        with pytest.raises(RuntimeError, match=r"size mismatch for lstm\.weight_hh_l0"):
            new.load_state_dict(state)
        with pytest.raises(RuntimeError, match=r"Unexpected key.*lstm\.more"):
            new.load_state_dict(plain.state_dict() | {"lstm.more": x})


def test_hooks_parametrizations_and_subclasses() -> None:
    lstm = nn.LSTM(3, 4)
    calls: list[str] = []
    lstm.register_forward_hook(lambda *_: calls.append("after"))
    lstm.register_forward_pre_hook(lambda *_: calls.append("before"))
    freeze(lstm)(torch.randn(2, 1, 3))
    assert calls == ["before", "after"]

    normed = parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0")
    x = torch.randn(2, 1, 3)
    for module in (normed, fusedrnn.fuse(copy.deepcopy(normed))):
        with torch.no_grad():
            assert_close(flat(freeze(module)(x)), flat(normed(x)))

    class Own(nn.LSTM):
        pass

    model = nn.ModuleList([Own(3, 4), nn.LSTM(3, 4)])
    with pytest.warns(UserWarning, match=r"freeze left these as they are: 0 \(Own\)"):
        frozen = freeze(model)
    assert type(frozen[0]) is Own
    assert type(frozen[1]) is FrozenLSTM
    both = fusedrnn.fuse(nn.LSTM(3, 4), subclass=True)
    assert type(freeze(both)) is FrozenLSTM


def test_repr() -> None:
    frozen = freeze(nn.LSTM(3, 4, 2, bias=False, proj_size=2), torch.bfloat16)
    assert repr(frozen) == (
        "FrozenLSTM(3, 4, num_layers=2, bias=False, proj_size=2, dtype=bfloat16)"
    )
    assert repr(freeze(nn.GRUCell(3, 4), torch.qint8)) == "FrozenGRUCell(3, 4, dtype=int8)"


@EACH_DTYPE
def test_weights_packed_for_other_vectors(dtype: torch.dtype, tmp_path: Any) -> None:
    """A pickle from a machine with narrower vectors is packed anew; an op packs in each call."""
    if _ops.cpu_isa() == "baseline":
        pytest.skip("no narrower vectors here")
    script = (
        "import sys, torch, fusedrnn; torch.manual_seed(3); m = torch.nn.LSTM(5, 18, 2);"
        f"f = fusedrnn.freeze(m, {dtype}); x = torch.randn(4, 3, 5);"
        f"torch.save((m.state_dict(), f, x, f(x)[0], f.packed_l0), sys.argv[1])"
    )
    file = tmp_path / "frozen.pt"
    environment = {**os.environ, "FUSEDRNN_CPU_ISA": "baseline"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", script, str(file)], env=environment, check=True)
    state, frozen, x, expected, packed = torch.load(file, weights_only=False)
    # The baseline has 15 bits for the input, as other CPUs without VNNI.
    has_8_bits = dtype == torch.int8 and LARGEST_INPUT == 127
    assert_close(frozen(x)[0], expected, atol=0.02 if has_8_bits else 1e-5, rtol=0)
    assert frozen.packed_l0.numel() != packed.numel()
    plain = nn.LSTM(5, 18, 2)
    plain.load_state_dict(state)
    assert torch.equal(freeze(plain, dtype).packed_l0, frozen.packed_l0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once a process
        args = (None, None, packed, 18, 18, False, None, None)
        found = OPS.lstm_frozen(x, *args)
    args = (None, None, frozen.packed_l0, 18, 18, False, None, None)
    assert all(torch.equal(a, b) for a, b in zip(found, OPS.lstm_frozen(x, *args), strict=True))


@EACH_DTYPE
def test_several_threads(dtype: torch.dtype) -> None:
    frozen = freeze(nn.LSTM(32, 64, 2), dtype)
    inputs = [torch.randn(9, 1 + i, 32) for i in range(8)]
    expected = [frozen(x)[0] for x in inputs]
    wrong: list[int] = []

    def run(i: int) -> None:
        for _ in range(50):
            if not torch.equal(frozen(inputs[i])[0], expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@EACH_DTYPE
@pytest.mark.long
def test_export_and_aotinductor(dtype: torch.dtype, tmp_path: Any) -> None:
    model, x = freeze(Tagger(), dtype).eval(), torch.randn(3, 4, 6)
    with torch.no_grad():
        expected = model(x)
        program = torch.export.export(model, (x,))
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        assert torch.equal(torch.export.load(file).module()(x), expected)
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        assert_close(torch._inductor.aoti_load_package(path)(x), expected)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.LSTMCell, nn.GRUCell], ids=lambda k: k.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=lambda d: str(d)[6:])
def test_at_least_as_exact_as_dynamic_quantisation(kind: Any, dtype: torch.dtype) -> None:
    if torch.backends.quantized.engine == "none":
        pytest.skip("torch has no quantised kernels here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated
        for seed in range(5):
            torch.manual_seed(seed)
            model = nn.Sequential(kind(64, 96))
            x = torch.randn((20, 3, 64) if kind is nn.LSTM else (3, 64))
            with torch.no_grad():
                exact = flat(model(x))[0]
                theirs = torch.ao.quantization.quantize_dynamic(model, {kind}, torch.qint8)
                error = (flat(theirs(x))[0] - exact).abs().mean()
                ours = (flat(freeze(model, dtype)(x))[0] - exact).abs().mean()
            assert ours < error

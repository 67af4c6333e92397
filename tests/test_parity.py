"""Random configurations: every module's values and gradients against torch's own."""

from __future__ import annotations

import dataclasses
import os
import statistics
import warnings
from collections.abc import Callable

import pytest
import torch
from helpers.cells import CELLS, EACH_CELL, EACH_LAYER, EACH_STEP, Cell, Pair
from helpers.parity import Nearby, assert_as_exact, double, error, fused_like
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedrnn

# Odd sizes, sizes around the vector widths, and one unit.
SIZES = st.one_of(st.integers(1, 130), st.sampled_from([1, 3, 8, 16, 17, 31, 32, 33, 63, 64, 65]))


@dataclasses.dataclass(frozen=True)
class Configuration:
    cell: Cell
    dtype: torch.dtype
    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    bidirectional: bool
    bias: bool
    batch_first: bool
    layout: str
    lengths: tuple[int, ...]
    hx: str
    strided: bool
    scale: float
    used: tuple[bool, bool, bool]
    seed: int


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    cell = draw(st.sampled_from(CELLS))
    hidden = draw(SIZES)
    layout = draw(st.sampled_from(["padded", "padded", "packed", "unsorted", "unbatched"]))
    steps = draw(st.integers(1, 9))
    rows = 1 if layout == "unbatched" else draw(st.sampled_from([1, 1, 2, 3, 5, 6, 7, 8, 13, 20]))
    lengths = [steps] * rows
    if layout in ("packed", "unsorted"):
        lengths = draw(st.lists(st.integers(1, steps), min_size=rows, max_size=rows))
        if layout == "packed":
            lengths.sort(reverse=True)
    used = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    return Configuration(
        cell=cell,
        dtype=draw(
            st.sampled_from(
                [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]
            )
        ),
        input_size=draw(SIZES),
        hidden_size=hidden,
        proj_size=draw(st.sampled_from([0, 0, 1, hidden // 2, hidden - 1]))
        if cell.projects and hidden > 2
        else 0,
        num_layers=draw(st.sampled_from([1, 1, 2, 3])),
        bidirectional=draw(st.booleans()),
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        layout=layout,
        lengths=tuple(lengths),
        hx=draw(st.sampled_from(["none", "given", "expanded", "strided"])),
        strided=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 1.0, 30.0])),
        used=used if any(used) else (True, True, True),
        seed=draw(st.integers(0, 2**31)),
    )


def states_of(
    c: Configuration, generator: torch.Generator, device: torch.device
) -> list[Tensor] | None:
    if c.hx == "none":
        return None
    layers = c.num_layers * (2 if c.bidirectional else 1)
    rows = len(c.lengths)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    states = []
    for width in c.cell.state_widths(c.hidden_size, c.proj_size):
        if c.hx == "expanded":
            state = random(layers, 1, width).expand(layers, rows, width)
        elif c.hx == "strided":
            state = random(layers, width, rows * 2)[..., ::2].transpose(1, 2)
        else:
            state = random(layers, rows, width)
        states.append(state.squeeze(1) if c.layout == "unbatched" else state)
    return states


def run(
    c: Configuration,
    module: nn.Module,
    dtype: torch.dtype,
    change: Callable[[Tensor], Tensor] = lambda t: t,
) -> list[Tensor]:
    """Output, states and all gradients of a loss over the outputs in `used`."""
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(c.seed)
    steps, rows = max(c.lengths), len(c.lengths)
    x = torch.randn(steps, rows, c.input_size, generator=generator) * c.scale
    # Every type gets values representable in c.dtype.
    x = change(x.to(c.dtype).to(dtype)).to(device)
    if c.strided:
        x = torch.stack((x, x), -1)[..., 0]
    if c.batch_first:
        x = x.transpose(0, 1)
    if c.layout == "unbatched":
        x = x.squeeze(0 if c.batch_first else 1)
    x = x.detach().requires_grad_()
    states = states_of(c, generator, device)
    leaves = [x]
    if states is not None:
        states = [change(s.to(c.dtype).to(dtype)).detach().requires_grad_() for s in states]
        leaves += states
    hx = None
    if states is not None:
        # cuDNN refuses states that are not contiguous.
        is_torchs = isinstance(module, c.cell.plain)
        hx = c.cell.to_hx([s.contiguous() for s in states] if is_torchs else states)
    if c.layout in ("packed", "unsorted"):
        packed = pack_padded_sequence(
            x, torch.tensor(c.lengths), c.batch_first, enforce_sorted=c.layout == "packed"
        )
        y, final = module(packed, hx)
        assert isinstance(y, PackedSequence)
        output = pad_packed_sequence(y, c.batch_first)[0]
    else:
        output, final = module(x, hx)
    outputs = [output, *c.cell.from_hx(final)]
    used = [y for y, use in zip(outputs, c.used, strict=False) if use] or outputs
    weights = [torch.randn(y.shape, generator=generator).to(c.dtype).to(y) for y in used]
    loss = sum((y * w).sum() for y, w in zip(used, weights, strict=True))
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(loss, [*leaves, *parameters], allow_unused=True)
    # An unused tensor's gradient may be None or zero.
    filled = [
        torch.zeros_like(p) if g is None else g
        for g, p in zip(gradients, [*leaves, *parameters], strict=True)
    ]
    return [*outputs, *filled]


def check(c: Configuration, device: str = "cpu", eps: float | None = None) -> None:
    """`eps`: see Nearby."""
    torch.manual_seed(c.seed)
    arguments = {
        "num_layers": c.num_layers,
        "bias": c.bias,
        "batch_first": c.batch_first,
        "bidirectional": c.bidirectional,
        "dtype": c.dtype,
    }
    if c.proj_size:
        arguments["proj_size"] = c.proj_size
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        theirs = c.cell.layer.make_plain(c.input_size, c.hidden_size, **arguments).to(device)
        results = [run(c, m, c.dtype) for m in (fused_like(theirs), theirs)]
        exact = run(c, double(theirs), torch.float64)
        nearby = Nearby(c.dtype, eps)
        # relu's gradient jumps where a pre-activation is near zero: a single draw may miss it.
        draws = 8 if c.cell.has_dead_units else 4
        close = [run(c, nearby.weights(theirs), torch.float64, nearby) for _ in range(draws)]
    farthest = [
        max(tensors, key=lambda t: error(t, e)) for e, *tensors in zip(exact, *close, strict=True)
    ]
    assert_as_exact(results[0], results[1], exact, farthest, c.dtype, 4 * c.scale, eps)


@settings(
    max_examples=int(os.environ.get("FUSEDRNN_TEST_EXAMPLES", "2000")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(configurations())
def test_random_configurations(c: Configuration) -> None:
    check(c)


@EACH_LAYER
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_as_exact_as_torch_on_average(pair: Pair, scale: float) -> None:
    """The mean ratio of our root mean square errors to torch's."""
    ratios: dict[int, list[float]] = {}
    for seed in range(20):
        torch.manual_seed(seed)
        theirs = pair.make_plain(100, 60)
        x, weight = torch.randn(6, 5, 100) * scale, torch.randn(6, 5, 60)
        results = []
        for module, dtype in (
            (fused_like(theirs), torch.float32),
            (theirs, torch.float32),
            (double(theirs), torch.float64),
        ):
            leaf = x.to(dtype).requires_grad_()
            y = module(leaf)[0]
            loss = (y * weight.to(dtype)).sum()
            results.append([y, *torch.autograd.grad(loss, [leaf, *module.parameters()])])
        for i, (a, b, e) in enumerate(zip(*results, strict=True)):
            ours, torchs = ((t.double() - e).square().mean().sqrt().item() for t in (a, b))
            ratios.setdefault(i, []).append(ours / torchs)
    for i, of_tensor in ratios.items():
        mean = statistics.geometric_mean(of_tensor)
        assert mean < 1.4, f"tensor {i}: errors {mean:.2f} times torch's"


@EACH_CELL
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    ("rows", "steps", "hidden"), [(1, 40, 256), (3, 30, 200), (33, 12, 130), (64, 20, 192)]
)
def test_shared_between_threads(
    cell: Cell, bidirectional: bool, rows: int, steps: int, hidden: int
) -> None:
    """Sizes at which threads share a layer by rows, by units or by directions."""
    for layout in ("padded", "unsorted"):
        check(
            Configuration(
                cell=cell,
                dtype=torch.float32,
                input_size=hidden - 3,
                hidden_size=hidden,
                proj_size=0,
                num_layers=1,
                bidirectional=bidirectional,
                bias=True,
                batch_first=False,
                layout=layout,
                lengths=tuple(max(1, (steps * (7 * b + 5)) % (steps + 1)) for b in range(rows)),
                hx="given",
                strided=False,
                scale=1.0,
                used=(True, True, True),
                seed=rows,
            )
        )


@EACH_LAYER
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_are_a_packed_batch(pair: Pair, bidirectional: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([3, 7, 1, 7, 5])
    module = pair.make_fused(
        5,
        19,
        num_layers=2,
        bidirectional=bidirectional,
        batch_first=batch_first,
        dtype=torch.float64,
    )
    x = torch.randn(5, 7, 5, dtype=torch.float64)
    x = x if batch_first else x.transpose(0, 1).contiguous()
    results = []
    for form in ("packed", "lengths", "list"):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        if form == "packed":
            packed = pack_padded_sequence(leaf, lengths, batch_first, enforce_sorted=False)
            y, final = module(packed)
            y = pad_packed_sequence(y, batch_first)[0]
        else:
            y, final = module(leaf, lengths=lengths if form == "lengths" else lengths.tolist())
        final = pair.cell.from_hx(final)
        loss = y.square().sum() + sum(s.square().sum() for s in final)
        loss.backward()
        results.append([y, *final, leaf.grad, *(p.grad.clone() for p in module.parameters())])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


@EACH_LAYER
@pytest.mark.parametrize("bidirectional", [False, True])
def test_lengths_of_zero_and_padding(pair: Pair, bidirectional: bool) -> None:
    """A row without steps keeps its state, and padding is not read."""
    torch.manual_seed(0)
    module = pair.make_fused(4, 6, bidirectional=bidirectional)
    x = torch.randn(5, 3, 4)
    x[3:, 0] = float("nan")
    x[:, 1] = float("inf")
    x.requires_grad_()
    directions = 2 if bidirectional else 1
    h0 = torch.randn(directions, 3, 6, requires_grad=True)
    c0 = torch.randn(directions, 3, 6, requires_grad=True)
    y, final = module(x, pair.cell.to_hx([h0, c0]), lengths=[3, 0, 5])
    h_n = pair.cell.from_hx(final)[0]
    assert torch.equal(h_n[:, 1], h0[:, 1])
    assert torch.equal(y[:, 1], torch.zeros(5, 6 * directions))
    assert torch.equal(y[3:, 0], torch.zeros(2, 6 * directions))
    (y.sum() + 2 * h_n.sum()).backward()
    assert torch.equal(x.grad[3:, 0], torch.zeros(2, 4))
    assert torch.equal(x.grad[:, 1], torch.zeros(5, 4))
    assert torch.equal(h0.grad[:, 1], torch.full((directions, 6), 2.0))
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_dropout_between_layers_draws_what_torch_draws() -> None:
    torch.manual_seed(0)
    theirs = nn.LSTM(5, 8, num_layers=3, dropout=0.4)
    ours = fused_like(theirs)
    x = torch.randn(6, 4, 5)
    for training in (True, False):
        results = []
        for module in (theirs.train(training), ours.train(training)):
            torch.manual_seed(1)
            results.append(module(x))
        torch.testing.assert_close(results[0], results[1])
    ours.train().dropout = 1.0
    top = {n: p for n, p in ours.named_parameters() if n.endswith("l2")}
    alone = fusedrnn.FusedLSTM(8, 8)
    alone.load_state_dict({n.replace("l2", "l0"): p for n, p in top.items()})
    torch.testing.assert_close(ours(x)[0], alone(torch.zeros(6, 4, 8))[0])


@EACH_STEP
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (40,)])
def test_cells(pair: Pair, dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    theirs = pair.make_plain(11, 35, bias, dtype=dtype)
    states = [torch.randn(*shape, 35, dtype=dtype) for _ in range(2)]
    x = torch.randn(*shape, 11, dtype=dtype)
    for with_hx in (True, False):

        def run(
            module: nn.Module,
            dtype: torch.dtype,
            change: Callable[[Tensor], Tensor] = lambda t: t,
            with_hx: bool = with_hx,
        ) -> list[Tensor]:
            leaves = [change(t.to(dtype)).detach().requires_grad_() for t in (x, *states)]
            hx = pair.cell.to_hx(leaves[1:]) if with_hx else None
            out = pair.cell.from_hx(module(leaves[0], hx))
            loss = sum((i + 1) * t.square().sum() for i, t in enumerate(out))
            wanted = [*(leaves if with_hx else leaves[:1]), *module.parameters()]
            grads = torch.autograd.grad(loss, wanted, allow_unused=True)
            return [*out, *(g for g in grads if g is not None)]

        nearby = Nearby(dtype)
        assert_as_exact(
            run(fused_like(theirs), dtype),
            run(theirs, dtype),
            run(double(theirs), torch.float64),
            run(nearby.weights(theirs), torch.float64, nearby),
            dtype,
        )

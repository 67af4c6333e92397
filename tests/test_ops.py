"""Direct calls to torch.ops.fusedrnn.* with any arguments: a result or a clear error."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cells import CELLS, NOT_IN_TORCH, Cell, cell_named
from torch import Tensor

import fusedrnn  # noqa: F401  loads the ops

LSTM = cell_named("lstm")
UNPROJECTED = [cell for cell in CELLS if not cell.projects]
T, B, I, H = 4, 3, 2, 5


def weights(gates: int = LSTM.gates) -> list[Tensor]:
    return [torch.randn(s) for s in [(gates * H, I), (gates * H, H), (gates * H,), (gates * H,)]]


def batch(cell: Cell) -> dict[str, Any]:
    """The arguments shared by a forward op and its backward op."""
    return {
        "input": torch.randn(T, B, I),
        **{f"{state}0": torch.randn(1, B, H) for state in cell.states},
        "weights": weights(cell.gates),
        "bidirectional": False,
        "batch_sizes": None,
        "lengths": None,
    }


def forward(cell: Cell = LSTM, **changes: Any) -> Any:
    return cell.forward_op()(**{**batch(cell), "save": True, **changes})


def backward(cell: Cell = LSTM, **changes: Any) -> Any:
    arguments = {
        "grad_output": torch.randn(T, B, H),
        **{f"grad_{state}_n": torch.randn(1, B, H) for state in cell.states},
        **batch(cell),
        "output": torch.randn(T, B, H),
        "saved": torch.rand(1, T * B, cell.saved, H),
        "output_mask": [True] * (1 + len(cell.states) + 4),
    }
    return cell.backward_op()(**{**arguments, **changes})


def test_the_table_has_every_cell_of_the_library() -> None:
    names = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    ops = {name for library, name in names if library == "fusedrnn"}
    layers = {name for name in ops if f"{name}_backward" in ops}
    variants = {name for name in layers if name.endswith("_variant")}
    assert layers - variants == {*NOT_IN_TORCH, *map(str, CELLS)}
    assert variants == {f"{name}_variant" for name in layers - variants}


def test_the_calls_that_the_errors_vary_work() -> None:
    assert [tuple(t.shape) for t in forward()] == [
        (T, B, H),
        (1, B, H),
        (1, B, H),
        (1, T * B, 5, H),
    ]
    for cell in CELLS:
        states = [(1, B, H) for _ in cell.states]
        outputs = forward(cell)
        assert [tuple(t.shape) for t in outputs] == [(T, B, H), *states, (1, T * B, cell.saved, H)]
        *inputs, w = backward(cell)
        assert [tuple(t.shape) for t in inputs] == [(T, B, I), *states]
        assert [tuple(t.shape) for t in w] == cell.weight_shapes(I, H)
    packed = forward(input=torch.randn(6, I), batch_sizes=torch.tensor([3, 2, 1]))
    assert [tuple(t.shape) for t in packed[:3]] == [(6, H), (1, B, H), (1, B, H)]
    assert forward(save=False)[3].shape == (0,)
    masked = backward(output_mask=[False, True] * 3 + [False])
    assert [t.numel() > 0 for t in (*masked[:3], *masked[3])] == [False, True] * 3 + [False]


PROJECTED: dict[str, Any] = {
    "weights": [torch.randn(20, I), torch.randn(20, 2), torch.randn(2, H)],
    "grad_output": torch.randn(T, B, 2),
    "grad_h_n": torch.randn(1, B, 2),
    "h0": torch.randn(1, B, 2),
}


def freed(*shape: int) -> Tensor:
    """A tensor without memory, like a weight under FSDP between uses."""
    t = torch.randn(shape)
    t.untyped_storage().resize_(0)
    return t


FORWARD_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"input": torch.randn(T, I)}, "Expected input to be 3D, got 2D"),
    ({"input": torch.tensor(1.0)}, "Expected input to be 3D, got 0D"),
    ({"input": torch.ones(T, B, I, dtype=torch.int64)}, "must be float32, float64, bfloat16 or"),
    ({"input": torch.randn(T, B, I, dtype=torch.complex64)}, "must be float32, float64, bfloat16"),
    ({"input": freed(T, B, I)}, "input has elements, but its data is not allocated"),
    ({"c0": freed(1, B, H)}, "c0 has elements, but its data is not allocated"),
    ({"input": torch.randn(T, B, I + 1)}, r"Expected weight_ih size \[20, 3\], got \[20, 2\]"),
    ({"input": torch.randn(0, B, I)}, "Expected sequence length to be larger than 0 in RNN"),
    (
        {"input": torch.randn(T, B, I).double()},
        "input has type Double but weight_ih has type Float",
    ),
    ({"h0": torch.randn(1, B, H).double()}, "input has type Float but h0 has type Double"),
    ({"h0": torch.randn(B, H)}, r"Expected h0 size \[1, 3, 5\], got \[3, 5\]"),
    ({"h0": torch.randn(2, B, H)}, r"Expected h0 size \[1, 3, 5\], got \[2, 3, 5\]"),
    ({"c0": torch.randn(1, B, H + 1)}, r"Expected c0 size \[1, 3, 5\], got \[1, 3, 6\]"),
    ({"weights": []}, "got 0 weights for 1 direction"),
    ({"weights": weights()[:1]}, "got 1 weights for 1 direction"),
    ({"weights": weights() * 2}, "got 8 weights for 1 direction"),
    (
        {"weights": weights(), "bidirectional": True, "h0": None, "c0": None},
        "Expected weight_ih|ih",
    ),
    (
        {"weights": weights() + weights()[:1], "bidirectional": True},
        "got 5 weights for 2 directions",
    ),
    ({"weights": [torch.randn(20, I), torch.randn(19, H)]}, "Expected weight_hh size"),
    ({"weights": [torch.randn(20, I), torch.randn(20, H + 1)]}, "Expected weight_hh size"),
    ({"weights": [torch.randn(20, I), torch.randn(20)]}, "Expected weight_hh size"),
    ({"weights": [torch.randn(0, I), torch.randn(0, 0)]}, "Expected weight_hh size"),
    ({"weights": [*weights()[:3], torch.randn(19)]}, r"Expected bias_hh size \[20\], got \[19\]"),
    ({"weights": [*weights(), torch.randn(H, H + 1)]}, "Expected weight_hr size"),
    ({"batch_sizes": torch.tensor([3])}, "Expected input to be 2D with batch_sizes, got 3D"),
    ({"lengths": torch.tensor([1, 2])}, r"lengths must be an int64 tensor of size \[3\]"),
    ({"lengths": torch.tensor([1.0, 2, 3])}, "lengths must be an int64 tensor"),
    (
        {"lengths": torch.tensor([1, 2, 5])},
        "lengths must be from 0 to the sequence length 4, got 5",
    ),
    ({"lengths": torch.tensor([1, 2, -1])}, "lengths must be from 0 to the sequence length 4"),
]
PACKED_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"batch_sizes": torch.tensor([2, 3, 1])}, "must be positive and never increase"),
    ({"batch_sizes": torch.tensor([3, 3, 0])}, "must be positive and never increase"),
    ({"batch_sizes": torch.tensor([3, 2, -1])}, "must be positive and never increase"),
    ({"batch_sizes": torch.tensor([3, 2])}, "batch_sizes add up to 5 but input has 6 rows"),
    ({"batch_sizes": torch.tensor([3, 2, 1, 1])}, "add up to 7 but input has 6 rows"),
    ({"batch_sizes": torch.tensor([2**62, 2**62, 2**62])}, "add up to the 6 rows"),
    ({"batch_sizes": torch.tensor([3.0, 2, 1])}, "must be a 1-D int64 tensor on the CPU"),
    ({"batch_sizes": torch.tensor([[3, 2, 1]])}, "must be a 1-D int64 tensor on the CPU"),
    ({"batch_sizes": torch.tensor([], dtype=torch.int64)}, "add up to 0 but input has 6 rows"),
    ({"lengths": torch.tensor([3, 2, 1])}, "batch_sizes and lengths exclude each other"),
    ({"h0": torch.randn(1, 2, H)}, r"Expected h0 size \[1, 3, 5\], got \[1, 2, 5\]"),
]
BACKWARD_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"grad_output": torch.randn(T, B, H + 1)}, "Expected grad_output size"),
    ({"grad_output": torch.randn(T, B, H).double()}, "grad_output has type Double"),
    ({"grad_h_n": torch.randn(B, H)}, "Expected grad_h_n size"),
    ({"grad_c_n": torch.randn(1, B, 1)}, "Expected grad_c_n size"),
    ({**PROJECTED, "output": torch.randn(T, B)}, "Expected output size"),
    ({**PROJECTED, "output": None}, "output is needed with a projection"),
    ({"saved": torch.rand(0)}, "saved must be what the forward op returned with save=True"),
    ({"saved": torch.rand(1, T * B, 4, H)}, "saved must be what the forward op returned"),
    ({"saved": torch.rand(1, T * B, 5, H).double()}, "saved must be what the forward op returned"),
    ({"output_mask": [True] * 6}, "Expected 7 entries in output_mask, got 6"),
    ({"output_mask": []}, "Expected 7 entries in output_mask, got 0"),
    ({"weights": weights(3)}, "Expected weight_hh size"),
    ({"input": torch.randn(T, B, I + 1)}, "Expected weight_ih size"),
]


@pytest.mark.parametrize(("changes", "message"), FORWARD_ERRORS)
def test_forward_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        forward(**changes)


@pytest.mark.parametrize(("changes", "message"), PACKED_ERRORS)
def test_packed_errors(changes: dict[str, Any], message: str) -> None:
    packed = {"input": torch.randn(6, I), "batch_sizes": torch.tensor([3, 2, 1])}
    with pytest.raises(RuntimeError, match=message):
        forward(**{**packed, **changes})


@pytest.mark.parametrize(("changes", "message"), BACKWARD_ERRORS)
def test_backward_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        backward(**changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cell: {"weights": weights(cell.gates + 1)}, "Expected weight_hh size"),
        (
            lambda cell: {"weights": [*weights(cell.gates)[:2], torch.randn(H, H)]},
            "got 3 weights for 1 direction",
        ),
        (lambda _: {"h0": torch.randn(1, B, H + 1)}, "Expected h0 size"),
    ],
    ids=["gates", "projection", "width"],
)
@pytest.mark.parametrize("cell", UNPROJECTED, ids=str)
def test_errors_of_cells_without_a_projection(
    cell: Cell, change: Callable[[Cell], dict[str, Any]], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        forward(cell, **change(cell))


@pytest.mark.parametrize("call", [forward, backward])
@pytest.mark.parametrize("name", ["input", "h0", "c0", "weights"])
def test_other_devices(call: Callable[..., Any], name: str) -> None:
    """Mixed with the meta device: no kernel reads missing memory."""
    shapes = {"input": (T, B, I), "h0": (1, B, H), "c0": (1, B, H)}
    if name == "weights":
        value: Any = [w.to("meta") for w in weights()]
    else:
        value = torch.empty(shapes[name], device="meta")
    with pytest.raises(
        RuntimeError, match="Expected all tensors on one device, found cpu and meta"
    ):
        call(**{name: value})


def test_layouts_without_a_kernel() -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="fusedrnn"):
        forward(input=torch.randn(T, B, I).to_sparse())


def test_a_direct_call_has_gradients() -> None:
    """First and second derivatives, as from a module."""
    tensors = [t.double().requires_grad_() for t in (torch.randn(T, B, I), *weights())]
    call = lambda x, *w: forward(input=x, h0=None, c0=None, weights=w)[:3]  # noqa: E731
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


def test_random_arguments_never_crash() -> None:
    """Random shapes, ranks, types and strides give a result or RuntimeError."""
    rng = random.Random(0)
    small = [0, 1, 2, 3, 5, 17]

    def tensor() -> Tensor:
        shape = [rng.choice(small) for _ in range(rng.choice([0, 1, 2, 2, 3, 3, 4]))]
        dtype = rng.choice([torch.float32] * 5 + [torch.float64, torch.int64, torch.bfloat16])
        t = torch.zeros(shape, dtype=dtype)
        if t.dim() > 1 and rng.random() < 0.2:
            t = t.transpose(0, -1)
        return t

    def maybe(probability: float, make: Callable[[], Tensor]) -> Tensor | None:
        return make() if rng.random() < probability else None

    def integers() -> Tensor:
        return torch.tensor([rng.choice([-1, 0, 1, 2, 3, 2**62]) for _ in range(rng.randint(0, 4))])

    results = errors = 0
    for _ in range(3000):
        changes: dict[str, Any] = {}
        for name, make in {
            "input": tensor,
            "h0": lambda: maybe(0.7, tensor),
            "c0": lambda: maybe(0.7, tensor),
            "weights": lambda: [tensor() for _ in range(rng.randint(0, 6))],
            "bidirectional": lambda: rng.random() < 0.5,
            "batch_sizes": lambda: maybe(0.5, integers),
            "lengths": lambda: maybe(0.5, integers),
        }.items():
            if rng.random() < 0.25:
                changes[name] = make()
        try:
            if rng.random() < 0.5:
                forward(**changes)
            else:
                backward(**changes)
            results += 1
        except (RuntimeError, NotImplementedError):
            errors += 1
    assert results > 100
    assert errors > 1000

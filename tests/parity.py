"""What the tests share: pairs of modules with the same weights, and the tolerance."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fusedrnn

FUSED = {
    nn.LSTM: fusedrnn.FusedLSTM,
    nn.GRU: fusedrnn.FusedGRU,
    nn.LSTMCell: fusedrnn.FusedLSTMCell,
    nn.GRUCell: fusedrnn.FusedGRUCell,
}


def fused_like(theirs: nn.Module) -> nn.Module:
    """The fused module of the same configuration, with the weights of `theirs` copied."""
    if isinstance(theirs, nn.RNNCellBase):
        arguments = {"bias": theirs.bias}
    else:
        arguments = {
            name: getattr(theirs, name)
            for name in ("num_layers", "bias", "batch_first", "dropout", "bidirectional")
        }
        if theirs.proj_size:
            arguments["proj_size"] = theirs.proj_size
    weight = next(theirs.parameters())
    ours = FUSED[type(theirs)](
        theirs.input_size,
        theirs.hidden_size,
        dtype=weight.dtype,
        device=weight.device,
        **arguments,
    )
    ours.load_state_dict(theirs.state_dict())
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        p.requires_grad_(q.requires_grad)
    return ours.train(theirs.training)


def double(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double()


def error(values: Tensor, oracle: Tensor) -> float:
    return (values.double() - oracle).abs().max().item() if oracle.numel() else 0.0


def assert_as_exact(
    ours: Sequence[Tensor | None],
    theirs: Sequence[Tensor | None],
    oracle: Sequence[Tensor | None],
    dtype: torch.dtype,
    depth: int,
    amplitude: float = 1.0,
) -> None:
    """Our error against a float64 oracle is at most twice torch's, plus a rounding floor.

    The floor: a unit in the last place of the largest value, and as many roundings of terms of
    that size as a random walk over the `depth` of the longest sum would leave. `amplitude` is the
    size of the largest input, and so of the terms that the weights' gradients are sums of. For
    float64, where torch is the oracle and its own error unknown, the floor also has what a rounding
    of the sums before the activations, which grow with it, does to those terms.
    """
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64:
        amplitude *= amplitude
    for i, (a, b, exact) in enumerate(zip(ours, theirs, oracle, strict=True)):
        assert (a is None) == (b is None), f"tensor {i}: ours {a}, torch's {b}"
        if a is None or b is None or exact is None:
            continue
        assert a.shape == b.shape, f"tensor {i}: shape {a.shape}, torch's {b.shape}"
        assert a.dtype == b.dtype, f"tensor {i}: type {a.dtype}, torch's {b.dtype}"
        assert not a.isnan().any() or exact.isnan().any(), f"tensor {i} has NaN"
        scale = max(amplitude, exact.abs().max().item()) if exact.numel() else 1.0
        floor = eps * scale * (1 + math.sqrt(depth) / 2)
        limit = 2 * error(b, exact) + floor
        assert error(a, exact) <= limit, (
            f"tensor {i} of shape {list(a.shape)}: error {error(a, exact):.3g}, torch's "
            f"{error(b, exact):.3g}, floor {floor:.3g}"
        )

"""Module pairs with the same weights, and the tolerance."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from helpers.cells import MODULES, pair_of

# For tests on torch's classes without options.
FUSED = {pair.plain: pair.fused for pair in MODULES}


def fused_like(theirs: nn.Module) -> nn.Module:
    """A fused module with the configuration and copied weights of `theirs`."""
    pair = pair_of(theirs)
    names = ["bias"]
    if pair.is_layer:
        names += ["num_layers", "batch_first", "dropout", "bidirectional"]
        names += ["proj_size"] if theirs.proj_size else []
    arguments = {name: getattr(theirs, name) for name in names}
    weight = next(theirs.parameters())
    ours = pair.make_fused(
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


@functools.cache
def has_bfloat16_lstm() -> bool:
    """Whether nn.LSTM runs under autocast on this CPU: oneDNN wants AVX-512 for it on x86-64."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(3, 4)(torch.zeros(2, 1, 3))
    except RuntimeError as error:
        if "could not create a primitive descriptor" not in str(error):
            raise
        return False
    return True


def autocast_result(module: nn.Module, x: Tensor) -> Any:
    """The module's result under autocast to bfloat16 on the CPU.

    Where this CPU cannot run nn.LSTM so, its float32 result is rounded to bfloat16.
    """
    if isinstance(module, nn.LSTM) and not has_bfloat16_lstm():
        with torch.autocast("cpu", enabled=False):
            return tree_map(lambda t: t.bfloat16(), module(x.float()))
    with torch.autocast("cpu", torch.bfloat16):
        return module(x)


def double(module: nn.Module) -> nn.Module:
    """The oracle: the module in float64 on the CPU."""
    return copy.deepcopy(module).cpu().double()


def error(values: Tensor, oracle: Tensor) -> float:
    return (values.cpu().double() - oracle).abs().max().item() if oracle.numel() else 0.0


class Nearby:
    """Perturbs each value by at most one rounding, which no algorithm can tell apart.

    `eps`: the products' rounding, if it differs from the type's.
    """

    def __init__(self, dtype: torch.dtype, eps: float | None = None) -> None:
        self.eps = eps or torch.finfo(dtype).eps
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, t: Tensor) -> Tensor:
        noise = torch.rand(t.shape, generator=self.generator, dtype=torch.float64) * 2 - 1
        return t.double() * (1 + self.eps * noise)

    def weights(self, module: nn.Module) -> nn.Module:
        """The module in float64 with perturbed weights."""
        module = double(module)
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(self(p))
        return module


def assert_as_exact(
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor] | None,
    exact: Sequence[Tensor],
    nearby: Sequence[Tensor],
    dtype: torch.dtype,
    amplitude: float = 4.0,
    eps: float | None = None,
) -> None:
    """Our error against a float64 oracle is at most twice torch's, plus a rounding floor.

    The floor has two parts. The first is one unit in the last place of the largest value or the
    largest input (`amplitude`): gate gradients are multiplied by inputs. The second is ten times
    the oracle's change when every input and weight is rounded once (`nearby`). It is the problem's
    condition times a value's roundings in a step. The floor allows for luck in one of many tensors:
    test_as_exact_as_torch_on_average has no floor. Torch's error counts as the floor in float64,
    where torch is the oracle, and without `theirs`. `eps`: see Nearby.
    """
    eps = eps or torch.finfo(dtype).eps
    for i, (a, b, e, n) in enumerate(zip(ours, theirs or ours, exact, nearby, strict=True)):
        assert a.shape == b.shape, f"tensor {i}: shape {a.shape}, torch's {b.shape}"
        assert a.dtype == b.dtype, f"tensor {i}: type {a.dtype}, torch's {b.dtype}"
        assert not a.isnan().any() or e.isnan().any(), f"tensor {i} has NaN"
        scale = max(amplitude, e.abs().max().item()) if e.numel() else 1.0
        floor = eps * scale + 10 * error(n, e)
        torchs = floor if dtype == torch.float64 or theirs is None else error(b, e)
        assert error(a, e) <= 2 * torchs + floor, (
            f"tensor {i} of shape {list(a.shape)}: error {error(a, e):.3g}, torch's {torchs:.3g}, "
            f"floor {floor:.3g}"
        )

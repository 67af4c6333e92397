"""Small modules in float64 to swap, and their results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from helpers.cells import Make


def made(make: Make, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return make(5, 6, dtype=torch.float64, **settings)


def inputs(module: nn.Module) -> Tensor:
    shape = (3, 5) if isinstance(module, nn.RNNCellBase) else (4, 3, 5)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def results(module: nn.Module) -> tuple[Any, dict[str, Tensor | None]]:
    """Outputs, and every parameter's gradient."""
    module.zero_grad()
    out = module(inputs(module))
    flat = torch.utils._pytree.tree_leaves(out)
    sum(t.square().sum() for t in flat).backward()
    return out, {n: None if p.grad is None else p.grad for n, p in module.named_parameters()}


def weight_name(module: nn.Module) -> str:
    return "weight_hh" if isinstance(module, nn.RNNCellBase) else "weight_hh_l0"

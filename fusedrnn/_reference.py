"""The same layers in plain differentiable torch.

The tests' oracle, the path for second and forward-mode derivatives, and the fallback on
devices without a kernel. Arguments and results are as in csrc/ops.cpp, without `save` and `saved`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrnn._cells import Cell, States, Step


# torch 2.11's dynamo can't look into it.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_autocast(device: str) -> bool:
    """Whether torch.autocast knows this device type; for an unknown one torch raises."""
    return torch.amp.is_autocast_available(device)


def _direction(
    step: Step,
    input: Tensor,
    states: States,
    weights: Sequence[Tensor],
    reverse: bool,
    sizes: Sequence[int] | None,
    lengths: Tensor | None,
) -> tuple[Tensor, States]:
    weight_ih, weight_hh = weights[:2]
    bias_ih, bias_hh = weights[2:4] if len(weights) >= 4 else (None, None)
    weight_hr = weights[-1] if len(weights) % 2 else None
    x = F.linear(input, weight_ih, bias_ih)
    steps = torch.split(x, list(sizes)) if sizes is not None else x.unbind(0)
    outputs: list[Tensor] = []
    order = range(len(steps))
    for t in reversed(order) if reverse else order:
        rows = steps[t].size(0)
        new = step(steps[t], tuple(s[:rows] for s in states), weight_hh, bias_hh, weight_hr)
        output = new[0]
        if lengths is not None:
            valid = (lengths > t).unsqueeze(-1)
            new = tuple(torch.where(valid, n, s) for n, s in zip(new, states, strict=True))
            output = torch.where(valid, output, 0)
        elif rows < states[0].size(0):
            new = tuple(torch.cat((n, s[rows:])) for n, s in zip(new, states, strict=True))
        states = new
        outputs.append(output)
    if reverse:
        outputs.reverse()
    return (torch.cat(outputs) if sizes is not None else torch.stack(outputs)), states


def layer(
    cell: Cell,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    bidirectional: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, States]:
    """One layer, all its directions: the output, and the states after each row's last step."""
    device = input.device.type
    if (
        torch._C._is_any_autocast_enabled()
        and has_autocast(device)
        and torch.is_autocast_enabled(device)
    ):
        with torch.autocast(device, enabled=False):  # the caller has cast
            return layer(cell, input, states, weights, bidirectional, batch_sizes, lengths)
    dtype = input.dtype
    if lengths is not None:  # a zero gradient times NaN is no zero
        steps = torch.arange(input.size(0), device=input.device).unsqueeze(1)
        input = input.masked_fill((steps >= lengths).unsqueeze(-1), 0)
    if dtype in (torch.bfloat16, torch.float16):  # float32 inside, as in the kernels
        input = input.float()
        states = [None if s is None else s.float() for s in states]
        weights = [w.float() for w in weights]
    directions = 2 if bidirectional else 1
    per = len(weights) // directions
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    rows = input.size(1) if sizes is None else sizes[0]
    widths = (weights[1].size(1), weights[1].size(0) // cell.gates)
    outputs, finals = [], []
    for d in range(directions):
        initial = tuple(
            input.new_zeros(rows, width) if s is None else s[d]
            for s, width in zip(states, widths, strict=False)
        )
        output, final = _direction(
            cell.step, input, initial, weights[d * per : (d + 1) * per], d == 1, sizes, lengths
        )
        outputs.append(output)
        finals.append(final)
    output = torch.cat(outputs, -1) if bidirectional else outputs[0]
    final_states = tuple(torch.stack(s) for s in zip(*finals, strict=True))
    return output.to(dtype), tuple(s.to(dtype) for s in final_states)

"""The same layers in plain differentiable torch.

The oracle of the tests, the path for second and forward-mode derivatives, and the fallback on
devices without a kernel. Arguments and results are those of the ops in
csrc/ops.cpp, without `save` and `saved`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

States = tuple[Tensor, ...]
# (input's part of the sums [B, G*H], states, weight_hh, bias_hh, weight_hr) -> next states
Step = Callable[[Tensor, States, Tensor, Tensor | None, Tensor | None], States]


# torch 2.11's dynamo can't look into it.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_autocast(device: str) -> bool:
    """Whether torch.autocast knows this type of device; asked about another it raises."""
    return torch.amp.is_autocast_available(device)


def lstm_step(
    x: Tensor, states: States, weight_hh: Tensor, bias_hh: Tensor | None, weight_hr: Tensor | None
) -> States:
    """One step of an LSTM, equations as in torch.nn.LSTM."""
    h, c = states
    i, f, g, o = (x + F.linear(h, weight_hh, bias_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h if weight_hr is None else F.linear(h, weight_hr), c


def gru_step(
    x: Tensor, states: States, weight_hh: Tensor, bias_hh: Tensor | None, _: Tensor | None
) -> States:
    """One step of a GRU, equations as in torch.nn.GRU."""
    (h,) = states
    x_r, x_z, x_n = x.chunk(3, -1)
    h_r, h_z, h_n = F.linear(h, weight_hh, bias_hh).chunk(3, -1)
    z = (x_z + h_z).sigmoid()
    n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    return ((1 - z) * n + z * h,)


GATES = {"lstm": 4, "gru": 3}
STEPS: dict[str, Step] = {"lstm": lstm_step, "gru": gru_step}


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
    sums = F.linear(input, weight_ih, bias_ih)
    steps = torch.split(sums, list(sizes)) if sizes is not None else sums.unbind(0)
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
    cell: str,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    bidirectional: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, States]:
    """One layer, all its directions: the output, and the states after each row's last step."""
    if torch._C._is_any_autocast_enabled() and has_autocast(input.device.type):
        with torch.autocast(input.device.type, enabled=False):  # whoever calls has cast
            return _layer(cell, input, states, weights, bidirectional, batch_sizes, lengths)
    return _layer(cell, input, states, weights, bidirectional, batch_sizes, lengths)


def _layer(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    bidirectional: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, States]:
    dtype = input.dtype
    if lengths is not None:  # zero gradients don't undo NaN in the padding
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
    widths = (weights[1].size(1), weights[1].size(0) // GATES[cell])
    outputs, finals = [], []
    for d in range(directions):
        initial = tuple(
            input.new_zeros(rows, width) if s is None else s[d]
            for s, width in zip(states, widths, strict=False)
        )
        output, final = _direction(
            STEPS[cell], input, initial, weights[d * per : (d + 1) * per], d == 1, sizes, lengths
        )
        outputs.append(output)
        finals.append(final)
    output = torch.cat(outputs, -1) if bidirectional else outputs[0]
    final_states = tuple(torch.stack(s) for s in zip(*finals, strict=True))
    return output.to(dtype), tuple(s.to(dtype) for s in final_states)

"""The same layers in plain differentiable torch.

The tests' oracle, the path for second and forward-mode derivatives, and the fallback on
devices without a kernel. Arguments and results are as in csrc/ops.cpp, without `save` and `saved`.
Variants (_variant.py) enter a step at its Places, and around it in `_VariantSteps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrnn._cells import Cell, Places, States, Step
from fusedrnn._variant import LAYER_NORM_EPS, Variant


# torch 2.11's dynamo can't look into it.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_autocast(device: str) -> bool:
    """Whether torch.autocast knows this device type; for an unknown one torch raises."""
    return torch.amp.is_autocast_available(device)


def _by_step(tensor: Tensor | None, sizes: Sequence[int] | None) -> Sequence[Tensor] | None:
    """A tensor [T, B, ...], or [N, ...] if packed, as one for each step."""
    if tensor is None:
        return None
    return tensor.unbind(0) if sizes is None else torch.split(tensor, list(sizes))


def _normalised(value: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return F.layer_norm(value, value.shape[-1:], scale, bias, LAYER_NORM_EPS)


class _VariantSteps:
    """A variant's steps in one direction, for every cell."""

    def __init__(
        self,
        cell: Cell,
        variant: Variant,
        direction: int,
        initial: States,
        sizes: Sequence[int] | None,
    ) -> None:
        def of_direction(mask: Tensor | None) -> Sequence[Tensor] | None:
            return None if mask is None else _by_step(mask[direction], sizes)

        self.run = cell.step
        self.initial = initial
        self.resets = _by_step(variant.reset_mask, sizes)
        self.reset_to_initial = variant.reset_to_initial
        hidden = variant.hidden_mask
        self.hidden_mask = None if hidden is None else hidden[direction]
        self.candidates = of_direction(variant.candidate_mask)
        self.candidate_scale = variant.candidate_scale
        self.zoneouts = [
            (of_direction(variant.zoneout_h_mask), variant.zoneout_h),
            (of_direction(variant.zoneout_c_mask), variant.zoneout_c),
        ]
        count = 4 if cell.has_cell_state else 2
        self.norms = variant.norms[direction * count : (direction + 1) * count]

    def input(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The input's part of the pre-activations."""
        if not self.norms:
            return F.linear(input, weight, bias)
        return _normalised(F.linear(input, weight), self.norms[0], bias)

    def step(
        self,
        t: int,
        x: Tensor,
        states: States,
        weight_hh: Tensor,
        bias_hh: Tensor | None,
        weight_hr: Tensor | None,
    ) -> States:
        """The states after step t."""
        if self.resets is not None:
            reset = self.resets[t].unsqueeze(-1)
            to = [
                i[: x.size(0)] if self.reset_to_initial else i.new_zeros(()) for i in self.initial
            ]
            states = tuple(torch.where(reset, i, s) for i, s in zip(to, states, strict=True))

        def hidden(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            operand = h if self.hidden_mask is None else h * self.hidden_mask[: x.size(0)]
            if not self.norms:
                return F.linear(operand, weight, bias)
            return _normalised(F.linear(operand, weight), self.norms[1], bias)

        def candidate(value: Tensor) -> Tensor:
            if self.candidates is None:
                return value
            return value * self.candidates[t] * self.candidate_scale

        def cell(c: Tensor) -> Tensor:
            return _normalised(c, *self.norms[2:]) if self.norms else c

        new = self.run(x, states, weight_hh, bias_hh, weight_hr, Places(hidden, candidate, cell))
        found: list[Tensor] = []
        for before, after, (masks, p) in zip(states, new, self.zoneouts, strict=False):
            if masks is not None:
                after = torch.where(masks[t], before, after)
            elif p:
                after = p * before + (1 - p) * after
            found.append(after)
        return tuple(found)


def _direction(
    step: Step,
    input: Tensor,
    states: States,
    weights: Sequence[Tensor],
    reverse: bool,
    sizes: Sequence[int] | None,
    lengths: Tensor | None,
    variant: _VariantSteps | None = None,
) -> tuple[Tensor, States, Tensor | None]:
    """Output, final states and, of a variant with a cell state, the cell states of all steps."""
    weight_ih, weight_hh = weights[:2]
    bias_ih, bias_hh = weights[2:4] if len(weights) >= 4 else (None, None)
    weight_hr = weights[-1] if len(weights) % 2 else None
    if variant is None:
        x = F.linear(input, weight_ih, bias_ih)
    else:
        x = variant.input(input, weight_ih, bias_ih)
    steps = torch.split(x, list(sizes)) if sizes is not None else x.unbind(0)
    outputs: list[Tensor] = []
    cells: list[Tensor] = []
    order = range(len(steps))
    for t in reversed(order) if reverse else order:
        rows = steps[t].size(0)
        active = tuple(s[:rows] for s in states)
        if variant is None:
            new = step(steps[t], active, weight_hh, bias_hh, weight_hr)
        else:
            new = variant.step(t, steps[t], active, weight_hh, bias_hh, weight_hr)
        output, *cell_state = new
        if lengths is not None:
            valid = (lengths > t).unsqueeze(-1)
            new = tuple(torch.where(valid, n, s) for n, s in zip(new, states, strict=True))
            output, *cell_state = (torch.where(valid, s, 0) for s in (output, *cell_state))
        elif rows < states[0].size(0):
            new = tuple(torch.cat((n, s[rows:])) for n, s in zip(new, states, strict=True))
        states = new
        outputs.append(output)
        cells += cell_state
    if reverse:
        outputs.reverse()
        cells.reverse()
    join = torch.stack if sizes is None else torch.cat
    return join(outputs), states, join(cells) if variant is not None and cells else None


@overload
def layer(
    cell: Cell,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    bidirectional: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    variant: None = None,
) -> tuple[Tensor, States]: ...
@overload
def layer(
    cell: Cell,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    bidirectional: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    variant: Variant,
) -> tuple[Tensor, States, Tensor | None]: ...
def layer(
    cell: Cell,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    bidirectional: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    variant: Variant | None = None,
) -> tuple[Tensor, States] | tuple[Tensor, States, Tensor | None]:
    """One layer, all its directions: the output, and the states after each row's last step.

    With a variant also the cell states of all steps `[T, B, D*H]` or `[N, D*H]`, if it wants them.
    """
    device = input.device.type
    if (
        torch._C._is_any_autocast_enabled()
        and has_autocast(device)
        and torch.is_autocast_enabled(device)
    ):
        with torch.autocast(device, enabled=False):  # the caller has cast
            args = (cell, input, states, weights, bidirectional, batch_sizes, lengths)
            return layer(*args) if variant is None else layer(*args, variant)
    dtype = input.dtype
    if lengths is not None:  # a zero gradient times NaN is no zero
        steps = torch.arange(input.size(0), device=input.device).unsqueeze(1)
        input = input.masked_fill((steps >= lengths).unsqueeze(-1), 0)
    if dtype in (torch.bfloat16, torch.float16):  # float32 inside, as in the kernels
        input = input.float()
        states = [None if s is None else s.float() for s in states]
        weights = [w.float() for w in weights]
        if variant is not None:
            tensors = variant.tensors()
            variant = variant.with_tensors(
                [t.float() if t is not None and t.is_floating_point() else t for t in tensors]
            )
    directions = 2 if bidirectional else 1
    per = len(weights) // directions
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    rows = input.size(1) if sizes is None else sizes[0]
    widths = (weights[1].size(1), weights[1].size(0) // cell.gates)
    outputs, finals, cells = [], [], []
    for d in range(directions):
        initial = tuple(
            input.new_zeros(rows, width) if s is None else s[d]
            for s, width in zip(states, widths, strict=False)
        )
        varied = None if variant is None else _VariantSteps(cell, variant, d, initial, sizes)
        own = weights[d * per : (d + 1) * per]
        output, final, found = _direction(
            cell.step, input, initial, own, d == 1, sizes, lengths, varied
        )
        outputs.append(output)
        finals.append(final)
        cells.append(found)
    output = torch.cat(outputs, -1) if bidirectional else outputs[0]
    final_states = tuple(torch.stack(s) for s in zip(*finals, strict=True))
    result = output.to(dtype), tuple(s.to(dtype) for s in final_states)
    if variant is None:
        return result
    wanted = [c for c in cells if c is not None and variant.return_cells]
    return *result, torch.cat(wanted, -1).to(dtype) if wanted else None

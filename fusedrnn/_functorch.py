"""The layers under torch.func's grad and vmap: derivatives as functions, and rules for vmap.

With shared weights, vmap's samples are folded into the batch: row b of sample v becomes row
b * V + v of V samples, in every layout. With weights per sample, or gradients per sample for them,
the samples run one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusedrnn import _reference
from fusedrnn._cells import Cell

Optional = Tensor | None
Dims = Sequence[int | None]

# The dimension with the rows, counted from the end, for each kind of tensor.
ROWS = -2  # [..., rows, features]
LENGTHS = -1  # [rows]
SAVED = -3  # [D, tokens, values, H]
SIZES = 0  # batch_sizes, each a number of rows
SHARED = 1  # a weight


@dataclass(frozen=True)
class Call:
    """An op's call without its tensors: the cell, its ops in csrc/ops.cpp, and the flags."""

    cell: Cell
    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Any, ...]]
    bidirectional: bool
    save: bool
    needed: tuple[bool, ...] = ()  # of input, states and weights: the output_mask


def _fold(kind: int, t: Optional, dim: int | None, count: int) -> Optional:
    """All samples' rows as one batch."""
    if t is None or kind == SHARED or t.dim() < -kind:  # an empty tensor, for no gradient
        return t
    if kind == SIZES:
        return t * count
    if dim is None:
        shape = list(t.shape)
        t = t.unsqueeze(kind)
        shape.insert(len(shape) + kind + 1, count)
        t = t.expand(shape)
    else:
        t = t.movedim(dim, kind)
    return t.flatten(kind - 1, kind)


def _unfold(kind: int, t: Tensor, count: int) -> tuple[Tensor, int | None]:
    """The samples apart again, and their dimension."""
    if t.dim() < -kind:  # an empty tensor, as `saved` without a backward pass
        return t, None
    return torch.unflatten(t, kind, (t.size(kind) // count, count)).movedim(kind, 0), 0


def _map(
    count: int,
    call: Callable[..., Sequence[Tensor]],
    args: Sequence[Optional],
    dims: Dims,
    kinds: Sequence[int],
    results: Sequence[int],
    can_fold: bool,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """The results of `count` calls, one for each sample."""
    if count == 0:
        raise ValueError("fusedrnn: vmap can't map over a dimension of size 0")
    if any(d is not None for d, k in zip(dims, kinds, strict=True) if k == SIZES):
        raise ValueError("fusedrnn: vmap can't map over batch_sizes")
    if can_fold and all(d is None for d, k in zip(dims, kinds, strict=True) if k == SHARED):
        folded = [_fold(k, t, d, count) for k, t, d in zip(kinds, args, dims, strict=True)]
        both = [_unfold(k, t, count) for k, t in zip(results, call(*folded), strict=True)]
        return tuple(t for t, _ in both), tuple(d for _, d in both)
    samples = [
        call(*(t if d is None else t.select(d, i) for t, d in zip(args, dims, strict=True)))  # type: ignore[union-attr]
        for i in range(count)
    ]
    return tuple(torch.stack(t) for t in zip(*samples, strict=True)), (0,) * len(samples[0])


class _Backward(torch.autograd.Function):
    """The needed gradients, from: grads, batch_sizes, lengths, output, saved, tensors."""

    @staticmethod
    def forward(call: Call, *args: Optional) -> tuple[Tensor, ...]:
        n = call.cell.states + 1
        grads, (batch_sizes, lengths, output, saved), tensors = (
            args[:n],
            args[n : n + 4],
            args[n + 4 :],
        )
        *of_rows, of_weights = call.backward(
            *grads,
            *tensors[:n],
            list(tensors[n:]),
            call.bidirectional,
            batch_sizes,
            lengths,
            output,
            saved,
            list(call.needed),
        )
        gradients = (*of_rows, *of_weights)
        return tuple(g for g, need in zip(gradients, call.needed, strict=True) if need)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, *args = inputs
        ctx.save_for_backward(*args)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Optional) -> tuple[Optional, ...]:
        """By the reference, which has derivatives to every order."""
        call: Call = ctx.call
        n = call.cell.states + 1
        args = list(ctx.saved_tensors)
        batch_sizes, lengths = args[n : n + 2]
        variables = [*range(n), *range(n + 4, len(args))]
        present = [i for i in variables if args[i] is not None]

        def gradients(*values: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(present, values, strict=True))

            def layer(*needed: Tensor) -> tuple[Tensor, ...]:
                tensors = [given.get(i) for i in variables[n:]]
                for i, t in zip(wanted, needed, strict=True):
                    tensors[i] = t
                output, final = _reference.layer(
                    call.cell,
                    tensors[0],  # type: ignore[arg-type]
                    tensors[1:n],
                    tensors[n:],  # type: ignore[arg-type]
                    call.bidirectional,
                    batch_sizes,
                    lengths,
                )
                return output, *final

            wanted = [i for i, need in enumerate(call.needed) if need]
            outputs, pull = torch.func.vjp(layer, *(given[n + 4 + i] for i in wanted))[:2]
            grads = [given.get(i) for i in range(n)]
            found: tuple[Tensor, ...] = pull(
                tuple(
                    torch.zeros_like(y) if g is None else g
                    for g, y in zip(grads, outputs, strict=True)
                )
            )
            return found

        outputs, pull = torch.func.vjp(gradients, *(args[i] for i in present))[:2]
        found = pull(
            tuple(
                torch.zeros_like(y) if g is None else g
                for g, y in zip(cotangents, outputs, strict=True)
            )
        )
        by_place = dict(zip(present, found, strict=True))
        return None, *(by_place.get(i) for i in range(len(args)))

    @staticmethod
    def vmap(info: Any, in_dims: Dims, call: Call, *args: Optional) -> Any:
        n = call.cell.states + 1
        weights = len(args) - 2 * n - 4
        return _map(
            info.batch_size,
            lambda *a: _Backward.apply(call, *a),  # type: ignore[no-untyped-call]
            args,
            in_dims[1:],
            [*[ROWS] * n, SIZES, LENGTHS, ROWS, SAVED, *[ROWS] * n, *[SHARED] * weights],
            [ROWS] * sum(call.needed),
            not any(call.needed[n:]),
        )


class _Layer(torch.autograd.Function):
    """Output, final states, `saved`, and a copy of the output if the backward op needs it.

    Arguments: the call, batch_sizes, lengths, input, states, weights.
    """

    @staticmethod
    def forward(call: Call, *args: Optional) -> tuple[Tensor, ...]:
        n = call.cell.states + 1
        (batch_sizes, lengths), tensors = args[:2], args[2:]
        output, *rest = call.forward(
            *tensors[:n], list(tensors[n:]), call.bidirectional, batch_sizes, lengths, call.save
        )
        projected = (len(tensors) - n) // (2 if call.bidirectional else 1) % 2 == 1
        # A copy: the caller may change the output in place.
        return output, *rest, output.clone() if projected else output.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *args = inputs
        ctx.mark_non_differentiable(*output[-2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:2], output[-1], output[-2], *args[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Optional) -> tuple[Optional, ...]:
        # The first 3 arguments have no gradient; the others, if present and needed.
        needed = ctx.needs_input_grad[3:]
        saved = ctx.saved_tensors  # read once: a checkpoint recomputes them at each access
        needed = tuple(n and t is not None for n, t in zip(needed, saved[4:], strict=True))
        call = replace(ctx.call, needed=needed)
        found = iter(_Backward.apply(call, *grads[:-2], *saved))  # type: ignore[no-untyped-call]
        return None, None, None, *(next(found) if need else None for need in needed)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, call: Call, *args: Optional) -> Any:
        n = call.cell.states + 1
        return _map(
            info.batch_size,
            lambda *a: _Layer.apply(call, *a),  # type: ignore[no-untyped-call]
            args,
            in_dims[1:],
            [SIZES, LENGTHS, *[ROWS] * n, *[SHARED] * (len(args) - 2 - n)],
            [*[ROWS] * n, SAVED, ROWS],
            True,
        )


def layer(
    call: Call,
    input: Tensor,
    states: Sequence[Optional],
    weights: Sequence[Tensor],
    batch_sizes: Optional,
    lengths: Optional,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer: output and final states."""
    output, *final, _, _ = _Layer.apply(call, batch_sizes, lengths, input, *states, *weights)  # type: ignore[no-untyped-call]
    return output, tuple(final)

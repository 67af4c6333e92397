"""The stateless forms: all layers of a recurrent network from a flat list of weights.

Shapes: T steps, B batch rows, I input_size, H hidden_size, P = proj_size or H, D directions,
L layers, N = sum(batch_sizes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrnn import _ops

__all__ = ["gru", "lstm", "rnn"]

States = tuple[Tensor, ...]


def run(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, States]:
    """All layers, for a cell's name: the output and the final states, each [L*D, B, ...]."""
    row, per = _ops.CELLS[cell], len(weights) // num_layers

    def run_layer(i: int, x: Tensor, of_layer: Sequence[Tensor | None]) -> tuple[Tensor, States]:
        if i > 0 and dropout > 0 and training:
            x = F.dropout(x, dropout, True)
        own = weights if num_layers == 1 else weights[i * per : (i + 1) * per]
        return _ops.layer(row, x, of_layer, own, bidirectional, batch_sizes, lengths)

    return over_layers(run_layer, num_layers, bidirectional, input, states)


def over_layers(
    run_layer: Callable[[int, Tensor, Sequence[Tensor | None]], tuple[Tensor, States]],
    num_layers: int,
    bidirectional: bool,
    input: Tensor,
    states: Sequence[Tensor | None],
) -> tuple[Tensor, States]:
    """Calls run_layer(index, input, its states) layer by layer; joins the final states."""
    if num_layers == 1:
        return run_layer(0, input, states)
    directions = 2 if bidirectional else 1
    finals: list[States] = []
    for i in range(num_layers):
        of_layer = [None if s is None else s[i * directions : (i + 1) * directions] for s in states]
        input, final = run_layer(i, input, of_layer)
        finals.append(final)
    return input, tuple(torch.cat(s) for s in zip(*finals, strict=True))


def _check(
    cell: str, weights: Sequence[Tensor], num_layers: int, bidirectional: bool, lengths: object
) -> None:
    directions = 2 if bidirectional else 1
    per = _ops.CELLS[cell].weights
    if num_layers < 1:
        raise ValueError("num_layers must be greater than zero")
    if lengths is not None and not isinstance(lengths, Tensor):
        raise TypeError(f"{cell}: Expected lengths to be a tensor, got {type(lengths).__name__}")
    if len(weights) not in [n * num_layers * directions for n in per]:
        raise ValueError(
            f"{cell}: got {len(weights)} weights for {num_layers} layers and {directions} "
            f"directions, expected {' or '.join(map(str, per))} for each layer and direction"
        )


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All layers of an LSTM (Hochreiter and Schmidhuber 1997; equations of torch.nn.LSTM).

    Args:
        input: [T, B, I] or, with batch_sizes, [N, I] as in PackedSequence.data. float32, float64,
            bfloat16 or float16, as are all other tensors; any strides.
        hx: (h_0 `[L*D, B, P]`, c_0 `[L*D, B, H]`); None for zeros.
        weights: for each layer, for each direction: weight_ih `[4H, I or D*P]`, weight_hh [4H, P],
            bias_ih [4H] and bias_hh [4H] or neither, weight_hr [P, H] if projected.
        num_layers: L.
        dropout: probability of zeroing each output of all layers but the last, while training.
        training: whether dropout applies.
        bidirectional: whether each layer also runs from the last step to the first.
        batch_sizes: [T] int64 on the CPU, as in PackedSequence.batch_sizes.
        lengths: [B] int64 on the device of input, in any order, zeros allowed. Tokens past a
            row's length are not read, and zero in the output.

    Returns:
        output `[T, B, D*P]` or `[N, D*P]`, h_n `[L*D, B, P]`, c_n `[L*D, B, H]`: the states after
        each row's own last step.

    Raises:
        ValueError: the number of weights fits no LSTM.
        TypeError: lengths is no tensor.
        RuntimeError: a shape, type or device doesn't fit; T is 0; bad batch_sizes or lengths.
    """
    _check("lstm", weights, num_layers, bidirectional, lengths)
    output, (h_n, c_n) = run(
        "lstm",
        input,
        (None, None) if hx is None else hx,
        weights,
        num_layers,
        dropout,
        training,
        bidirectional,
        batch_sizes,
        lengths,
    )
    return output, h_n, c_n


def gru(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All layers of a GRU (Cho et al. 2014; equations of torch.nn.GRU, reset after the product).

    Args:
        input: as in `lstm`.
        hx: h_0 `[L*D, B, H]`; None for zeros.
        weights: for each layer, for each direction: weight_ih `[3H, I or D*H]`, weight_hh [3H, H],
            bias_ih [3H] and bias_hh [3H] or neither.
        num_layers: as in `lstm`, and so are the rest.
        dropout: see `lstm`.
        training: see `lstm`.
        bidirectional: see `lstm`.
        batch_sizes: see `lstm`.
        lengths: see `lstm`.

    Returns:
        output `[T, B, D*H]` or `[N, D*H]`, h_n `[L*D, B, H]`.

    Raises:
        ValueError: the number of weights fits no GRU.
        TypeError, RuntimeError: as `lstm`.
    """
    _check("gru", weights, num_layers, bidirectional, lengths)
    output, (h_n,) = run(
        "gru",
        input,
        (hx,),
        weights,
        num_layers,
        dropout,
        training,
        bidirectional,
        batch_sizes,
        lengths,
    )
    return output, h_n


def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    nonlinearity: Literal["tanh", "relu"] = "tanh",
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All layers of a plain RNN (Elman 1990; equations of torch.nn.RNN).

    Args:
        input: as in `lstm`.
        hx: h_0 `[L*D, B, H]`; None for zeros.
        weights: for each layer, for each direction: weight_ih `[H, I or D*H]`, weight_hh [H, H],
            bias_ih [H] and bias_hh [H] or neither.
        num_layers: L.
        nonlinearity: "tanh" or "relu".
        dropout: as in `lstm`, and so are the rest.
        training: see `lstm`.
        bidirectional: see `lstm`.
        batch_sizes: see `lstm`.
        lengths: see `lstm`.

    Returns:
        output `[T, B, D*H]` or `[N, D*H]`, h_n `[L*D, B, H]`.

    Raises:
        ValueError: the number of weights fits no RNN; an unknown nonlinearity.
        TypeError, RuntimeError: as `lstm`.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    cell = f"rnn_{nonlinearity}"
    _check(cell, weights, num_layers, bidirectional, lengths)
    output, (h_n,) = run(
        cell,
        input,
        (hx,),
        weights,
        num_layers,
        dropout,
        training,
        bidirectional,
        batch_sizes,
        lengths,
    )
    return output, h_n

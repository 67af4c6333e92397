"""The stateless forms: all layers of a recurrent network from a flat list of weights.

Shapes: T steps, B batch rows, I input_size, H hidden_size, P = proj_size or H, D directions,
L layers, N = sum(batch_sizes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrnn import _ops
from fusedrnn._variant import Call, Options, Zoneout, call_of, check_reset_mask

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
    variant: Call | None = None,
) -> tuple[Tensor, States, Tensor | None]:
    """All layers, for a cell's name: the output and the final states, each [L*D, B, ...].

    And the last layer's cell states of all steps, if the variant wants them.
    """
    row, per = _ops.CELLS[cell], len(weights) // num_layers
    cells: Tensor | None = None

    def run_layer(i: int, x: Tensor, of_layer: Sequence[Tensor | None]) -> tuple[Tensor, States]:
        nonlocal cells
        if i > 0 and dropout > 0 and training:
            x = F.dropout(x, dropout, True)
        own = weights if num_layers == 1 else weights[i * per : (i + 1) * per]
        if variant is None:
            return _ops.layer(row, x, of_layer, own, bidirectional, batch_sizes, lengths)
        own, drawn = variant.draw(row, i, num_layers, x, of_layer, own, bidirectional, batch_sizes)
        args = (row, x, of_layer, own, bidirectional, batch_sizes, lengths)
        if variant.save_memory:
            output, final, cells = _ops.checkpointed_layer(*args, drawn)
        elif drawn is None:
            return _ops.layer(*args)
        else:
            output, final, cells = _ops.variant_layer(*args, drawn)
        return output, final

    return *over_layers(run_layer, num_layers, bidirectional, input, states), cells


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


def _variant(
    cell: str,
    input: Tensor,
    options: Options,
    norms: Sequence[Tensor] | None,
    num_layers: int,
    training: bool,
    bidirectional: bool,
    reset_mask: Tensor | None,
    reset_to: str,
    return_cell_states: bool = False,
) -> Call | None:
    """The call's variant, checked."""
    row = _ops.CELLS[cell]
    count = num_layers * (2 if bidirectional else 1) * (4 if row.has_cell_state else 2)
    if norms is not None and len(norms) != count:
        raise ValueError(f"{cell}: got {len(norms)} norms, expected {count}")
    if reset_mask is not None:
        check_reset_mask(reset_mask, input.shape[:-1], input)
    options = options._replace(layer_norm=norms is not None)
    return call_of(row, options, training, norms or (), reset_mask, reset_to, return_cell_states)


@overload
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
    recurrent_dropout: float = 0.0,
    recurrent_dropout_mode: Literal["sequence", "candidate"] = "sequence",
    zoneout: Zoneout = 0.0,
    weight_dropout: float = 0.0,
    norms: Sequence[Tensor] | None = None,
    reset_mask: Tensor | None = None,
    reset_to: Literal["zero", "initial"] = "zero",
    save_memory: bool = False,
    return_cell_states: Literal[False] = False,
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
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
    recurrent_dropout: float = 0.0,
    recurrent_dropout_mode: Literal["sequence", "candidate"] = "sequence",
    zoneout: Zoneout = 0.0,
    weight_dropout: float = 0.0,
    norms: Sequence[Tensor] | None = None,
    reset_mask: Tensor | None = None,
    reset_to: Literal["zero", "initial"] = "zero",
    save_memory: bool = False,
    return_cell_states: Literal[True],
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
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
    recurrent_dropout: float = 0.0,
    recurrent_dropout_mode: Literal["sequence", "candidate"] = "sequence",
    zoneout: Zoneout = 0.0,
    weight_dropout: float = 0.0,
    norms: Sequence[Tensor] | None = None,
    reset_mask: Tensor | None = None,
    reset_to: Literal["zero", "initial"] = "zero",
    save_memory: bool = False,
    return_cell_states: bool = False,
) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]:
    """All layers of an LSTM (Hochreiter and Schmidhuber 1997; equations of torch.nn.LSTM).

    Args:
        input: [T, B, I] or, with batch_sizes, [N, I] as in PackedSequence.data. float32, float64,
            bfloat16 or float16, as are all other tensors; any strides.
        hx: (h_0 `[L*D, B, P]`, c_0 `[L*D, B, H]`); None for zeros.
        weights: for each layer, for each direction: weight_ih `[4H, I or D*P]`, weight_hh [4H, P],
            bias_ih [4H] and bias_hh [4H] or neither, weight_hr [P, H] if projected.
        num_layers: L, the layers.
        dropout: probability of zeroing each output of all layers but the last, while training.
        training: whether dropout applies.
        bidirectional: whether each layer also runs from the last step to the first.
        batch_sizes: [T] int64 on the CPU, as in PackedSequence.batch_sizes.
        lengths: [B] int64 on the device of input, in any order, zeros allowed. Tokens past a
            row's length are not read, and zero in the output.
        recurrent_dropout: see FusedLSTM, and so are the next three; they apply while training, but
            for zoneout, which else takes the expectation.
        recurrent_dropout_mode: see FusedLSTM.
        zoneout: see FusedLSTM.
        weight_dropout: see FusedLSTM.
        norms: for each layer, for each direction: norm_ih [4H], norm_hh [4H], norm_c [H],
            norm_c_bias [H]; switches layer norm on.
        reset_mask: [T, B], or [N] with batch_sizes, bool: see FusedLSTM.forward.
        reset_to: "zero" or "initial": see FusedLSTM.forward.
        save_memory: see FusedLSTM.
        return_cell_states: whether the cell states of all steps are returned too.

    Returns:
        output `[T, B, D*P]` or `[N, D*P]`, h_n `[L*D, B, P]`, c_n `[L*D, B, H]`: the states after
        each row's own last step. With return_cell_states also c of every step of the last layer,
        `[T, B, D*H]` or `[N, D*H]`.

    Raises:
        ValueError: the number of weights or norms fits no LSTM; a probability is out of range.
        TypeError: lengths is no tensor.
        RuntimeError: a shape, type or device doesn't fit; T is 0; bad batch_sizes or lengths.
    """
    _check("lstm", weights, num_layers, bidirectional, lengths)
    options = Options(
        recurrent_dropout, recurrent_dropout_mode, zoneout, weight_dropout, save_memory=save_memory
    )
    variant = _variant(
        "lstm",
        input,
        options,
        norms,
        num_layers,
        training,
        bidirectional,
        reset_mask,
        reset_to,
        return_cell_states,
    )
    output, (h_n, c_n), cells = run(
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
        variant,
    )
    return (output, h_n, c_n) if cells is None else (output, h_n, c_n, cells)


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
    recurrent_dropout: float = 0.0,
    recurrent_dropout_mode: Literal["sequence", "candidate"] = "sequence",
    zoneout: float = 0.0,
    weight_dropout: float = 0.0,
    norms: Sequence[Tensor] | None = None,
    reset_mask: Tensor | None = None,
    reset_to: Literal["zero", "initial"] = "zero",
    save_memory: bool = False,
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
        recurrent_dropout: see `lstm`.
        recurrent_dropout_mode: see `lstm`.
        zoneout: see `lstm`; one number.
        weight_dropout: see `lstm`.
        norms: for each layer, for each direction: norm_ih [3H], norm_hh [3H].
        reset_mask: see `lstm`.
        reset_to: see `lstm`.
        save_memory: see `lstm`.

    Returns:
        output `[T, B, D*H]` or `[N, D*H]`, h_n `[L*D, B, H]`.

    Raises:
        ValueError: the number of weights or norms fits no GRU; a probability is out of range.
        TypeError, RuntimeError: as `lstm`.
    """
    _check("gru", weights, num_layers, bidirectional, lengths)
    options = Options(
        recurrent_dropout, recurrent_dropout_mode, zoneout, weight_dropout, save_memory=save_memory
    )
    variant = _variant(
        "gru", input, options, norms, num_layers, training, bidirectional, reset_mask, reset_to
    )
    output, (h_n,), _ = run(
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
        variant,
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
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    weight_dropout: float = 0.0,
    norms: Sequence[Tensor] | None = None,
    reset_mask: Tensor | None = None,
    reset_to: Literal["zero", "initial"] = "zero",
    save_memory: bool = False,
) -> tuple[Tensor, Tensor]:
    """All layers of a plain RNN (Elman 1990; equations of torch.nn.RNN).

    Args:
        input: as in `lstm`.
        hx: h_0 `[L*D, B, H]`; None for zeros.
        weights: for each layer, for each direction: weight_ih `[H, I or D*H]`, weight_hh [H, H],
            bias_ih [H] and bias_hh [H] or neither.
        num_layers: L, the layers.
        nonlinearity: "tanh" or "relu".
        dropout: as in `lstm`, and so are the rest.
        training: see `lstm`.
        bidirectional: see `lstm`.
        batch_sizes: see `lstm`.
        lengths: see `lstm`.
        recurrent_dropout: see `lstm`; always one mask for the sequence.
        zoneout: see `lstm`; one number.
        weight_dropout: see `lstm`.
        norms: for each layer, for each direction: norm_ih [H], norm_hh [H].
        reset_mask: see `lstm`.
        reset_to: see `lstm`.
        save_memory: see `lstm`.

    Returns:
        output `[T, B, D*H]` or `[N, D*H]`, h_n `[L*D, B, H]`.

    Raises:
        ValueError: the number of weights or norms fits no RNN; an unknown nonlinearity; a
            probability is out of range.
        TypeError, RuntimeError: as `lstm`.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    cell = f"rnn_{nonlinearity}"
    _check(cell, weights, num_layers, bidirectional, lengths)
    options = Options(
        recurrent_dropout, "sequence", zoneout, weight_dropout, save_memory=save_memory
    )
    variant = _variant(
        cell, input, options, norms, num_layers, training, bidirectional, reset_mask, reset_to
    )
    output, (h_n,), _ = run(
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
        variant,
    )
    return output, h_n

"""A module's call in Python: layouts, checks and errors, autocast, the weights.

The fast path of csrc/python.cpp takes the plain case. These functions take every other call, and
word errors as torch does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import _ops, _variant
from fusedrnn._cells import Cell
from fusedrnn.functional import run

Lengths = Sequence[int] | Tensor
ResetMask = Tensor | PackedSequence


def _weights(module: nn.Module, names: Sequence[str]) -> list[Tensor]:
    """The current weights: a parametrization or weight_norm may compute them at each access."""
    parameters = module._parameters
    found = [parameters.get(name) for name in names]
    return [getattr(module, n) if w is None else w for n, w in zip(names, found, strict=True)]


def _check_devices(input: Tensor, states: Sequence[Tensor], weight: Tensor) -> None:
    if input.device != weight.device:
        raise RuntimeError(
            "Input and parameter tensors are not at the same device, found input tensor at "
            f"{input.device} and parameter tensor at {weight.device}"
        )
    for state in states:
        if state.device != weight.device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, found input tensor at "
                f"{input.device} and hidden tensor at {state.device}"
            )


def _checked_lengths(lengths: Lengths, input: Tensor, is_batched: bool) -> Tensor:
    if not is_batched:
        raise ValueError("lengths needs batched 3-D input")
    if not isinstance(lengths, Tensor) and len(lengths) == 0:
        lengths = torch.empty(0, dtype=torch.int64)
    found = torch.as_tensor(lengths)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"lengths should be integers, got: {found.dtype}")
    rows = input.size(1)
    if found.shape != (rows,):
        raise ValueError(
            f"Expected lengths to have size [{rows}], one for each row of the batch, got "
            f"{list(found.shape)}"
        )
    if found.device.type == "cpu" != input.device.type and not is_dynamo_compiling():
        # Here an error is an exception; on a GPU it would end all work there.
        _ops.check_lengths(found, input.size(0))
    return found.to(input.device, torch.int64)


def _weight_names(module: nn.RNNBase) -> list[str]:
    """The active weights' names: not all, if an attribute was changed after construction."""
    names: list[str] = module._flat_weights_names
    layers = module.num_layers
    if layers < 1:
        raise ValueError("num_layers must be greater than zero")
    per_layer = (2 if module.bidirectional else 1) * (2 + 2 * module.bias + (module.proj_size > 0))
    if len(names) == layers * per_layer:
        return names
    ends = [f"_l{i}" for i in range(min(layers, len(names)))]
    if module.bidirectional:
        ends += [f"{end}_reverse" for end in ends]
    found = [n for n in names if n.endswith(tuple(ends)) and (module.bias or "bias" not in n)]
    if len(found) != layers * per_layer:
        raise RuntimeError(
            f"Expected {layers * per_layer} weights for num_layers={layers}, bias={module.bias}, "
            f"bidirectional={module.bidirectional} and proj_size={module.proj_size}, got "
            f"{len(found)}"
        )
    return found


def _check_states(module: Any, states: Sequence[Tensor], input: Tensor, rows: int) -> None:
    layers = module.num_layers * (2 if module.bidirectional else 1)
    widths = (module.proj_size or module.hidden_size, module.hidden_size)
    for i, (state, width) in enumerate(zip(states, widths, strict=False)):
        name = "hidden" if len(states) == 1 else f"hidden[{i}]"
        expected = (layers, rows, width)
        if state.shape != expected:
            raise RuntimeError(f"Expected {name} size {expected}, got {list(state.shape)}")
        if state.dtype != input.dtype:
            raise ValueError(
                f"RNN {name} dtype ({state.dtype}) does not match input dtype ({input.dtype})"
            )


def _name(cell: Cell) -> str:
    """Torch's name for the layer, in errors."""
    return cell.name.partition("_")[0].upper()


def _check_flags(module: Any) -> None:
    for name in ("bias", "batch_first", "bidirectional", "training"):
        flag = getattr(module, name)
        if not isinstance(flag, bool):  # torch's call refuses it, its constructor in these words
            raise TypeError(f"{name} should be of type bool, got: {type(flag).__name__}")


def _time_major(
    module: Any, cell: Cell, input: Tensor | PackedSequence, lengths: Lengths | None
) -> Tensor:
    """The input as [T, B, I], or [N, I] if packed."""
    if isinstance(input, PackedSequence):
        if lengths is not None:
            raise ValueError("lengths can't be given with a PackedSequence, which has its own")
        if input.data.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {input.data.dim()}")
        return input.data
    if input.dim() not in (2, 3):
        name = _name(cell)
        got = f"{input.dim()}D tensor" if name == "RNN" else f"{input.dim()}D"
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {got} instead")
    if input.dim() == 2:
        return input.unsqueeze(1)
    return input.transpose(0, 1) if module.batch_first else input


def _check_input(module: nn.RNNBase, input: Tensor, weight: Tensor) -> None:
    if input.dtype != weight.dtype:
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: "
            f"model.to({input.dtype})"
        )
    _check_features(module, input)


def _check_features(module: Any, input: Tensor) -> None:
    if input.size(-1) != module.input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {module.input_size}, got "
            f"{input.size(-1)}"
        )


def _initial_states(
    module: Any,
    input: Tensor,
    states: Sequence[Tensor],
    packed: PackedSequence | None,
    is_batched: bool,
) -> Sequence[Tensor]:
    """The states as the ops take them, [L*D, B, ...] in the batch's order."""
    dims = [s.dim() for s in states]
    if packed is None and any(d != (3 if is_batched else 2) for d in dims):
        kind = "batched 3-D" if is_batched else "unbatched 2-D"
        got = f"({dims[0]}-D, {dims[1]}-D) tensors" if len(dims) == 2 else f"{dims[0]}-D tensor"
        raise RuntimeError(
            f"For {kind} input, {'hx and cx' if len(dims) == 2 else 'hx'} should also be "
            f"{3 if is_batched else 2}-D but got {got}"
        )
    if not is_batched:
        states = [s.unsqueeze(1) for s in states]
    if packed is None:
        rows = input.size(1)
    elif is_dynamo_compiling():  # its value is data: the op checks it
        rows = states[0].size(1)
    else:
        rows = int(packed.batch_sizes[0])
    _check_states(module, states, input, rows)
    if packed is not None and packed.sorted_indices is not None:
        states = [s.index_select(1, packed.sorted_indices) for s in states]
    return states


def _in_layout(
    module: Any,
    output: Tensor,
    final: tuple[Tensor, ...],
    packed: PackedSequence | None,
    is_batched: bool,
) -> tuple[Tensor | PackedSequence, tuple[Tensor, ...]]:
    """Output and final states in the input's layout."""
    output_in_layout = _tokens_in_layout(module, output, packed, is_batched)
    if packed is not None and packed.unsorted_indices is not None:
        final = tuple(s.index_select(1, packed.unsorted_indices) for s in final)
    if not is_batched:
        final = tuple(s.squeeze(1) for s in final)
    return output_in_layout, final


def _tokens_in_layout(
    module: Any, output: Tensor, packed: PackedSequence | None, is_batched: bool
) -> Tensor | PackedSequence:
    """A tensor [T, B, ...] or [N, ...] in the input's layout."""
    if packed is not None:
        return PackedSequence(
            output, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
        )
    if not is_batched:
        return output.squeeze(1)
    if not module.batch_first:
        return output
    return output.transpose_(0, 1) if _ops.can_reshape_in_place() else output.transpose(0, 1)


def _is_same_packing(a: PackedSequence, b: PackedSequence) -> bool:
    if not torch.equal(a.batch_sizes, b.batch_sizes):
        return False
    orders = [a.sorted_indices, b.sorted_indices]
    given = [order for order in orders if order is not None]
    if len(given) < 2:
        return not given
    # A comparison on a GPU would wait for it.
    return any(order.device.type != "cpu" for order in given) or torch.equal(*given)


def _reset_tokens(
    module: Any, mask: ResetMask, x: Tensor, packed: PackedSequence | None, is_batched: bool
) -> Tensor:
    """The mask as [T, B], or [N] if packed. x: the input, time-major."""
    if isinstance(mask, PackedSequence) != (packed is not None):
        raise TypeError(
            "reset_mask should be a PackedSequence if the input is one, and a tensor otherwise, "
            f"got: {type(mask).__name__}"
        )
    if isinstance(mask, PackedSequence):
        assert packed is not None
        if not is_dynamo_compiling() and not _is_same_packing(mask, packed):
            raise RuntimeError("Expected reset_mask to be packed as the input, with its lengths")
        _variant.check_reset_mask(mask.data, x.shape[:1], x)
        return mask.data
    tokens = list(x.shape[:2]) if is_batched else list(x.shape[:1])
    swapped = is_batched and module.batch_first
    _variant.check_reset_mask(mask, tokens[::-1] if swapped else tokens, x)
    if not is_batched:
        return mask.unsqueeze(1)
    return mask.transpose(0, 1) if swapped else mask


def check_states_of_lstm(hx: object) -> None:
    """Raises if hx is neither None nor a pair."""
    if hx is not None and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
        got = type(hx).__name__ + (f" of {len(hx)}" if isinstance(hx, (tuple, list)) else "")
        raise TypeError(f"LSTM: Expected hx to be a tuple of two tensors (h_0, c_0), got {got}")


def layers(
    module: Any,
    cell: Cell,
    input: Tensor | PackedSequence,
    states: Sequence[Tensor] | None,
    lengths: Lengths | None,
    reset_mask: ResetMask | None = None,
    reset_to: str = "zero",
    return_cell_states: bool = False,
) -> tuple[Tensor | PackedSequence, tuple[Tensor, ...], Tensor | PackedSequence | None]:
    """All layers of a module over all steps, in any layout. Errors as torch's where it has them.

    Returns:
        Output, final states and, if wanted, the last layer's cell states of all steps.
    """
    _check_flags(module)
    packed = input if isinstance(input, PackedSequence) else None
    x = _time_major(module, cell, input, lengths)
    is_batched = packed is not None or input.dim() == 3  # type: ignore[union-attr]
    names = _weight_names(module)
    options = module._fused_options or _variant.NEUTRAL
    norms: Sequence[Tensor] = ()
    if options.layer_norm is True:
        ends = _variant.layer_ends(module.num_layers, module.bidirectional)
        norms = _variant.norms_of(module, cell, ends)
    x, states, weights = _ops.autocast(cell, True, x, states, [*_weights(module, names), *norms])
    weights, norms = weights[: len(names)], weights[len(names) :]
    _check_input(module, x, weights[0])
    if states is not None:
        states = _initial_states(module, x, states, packed, is_batched)
    if x.device != weights[0].device or states is not None:
        _check_devices(x, states or (), weights[0])
    if reset_mask is not None:
        reset_mask = _reset_tokens(module, reset_mask, x, packed, is_batched)
    output, final, cells = run(
        cell.name,
        x,
        (None,) * cell.states if states is None else states,
        weights,
        module.num_layers,
        module.dropout,
        module.training,
        module.bidirectional,
        None if packed is None else packed.batch_sizes,
        None if lengths is None else _checked_lengths(lengths, x, is_batched),
        _variant.call_of(
            cell, options, module.training, norms, reset_mask, reset_to, return_cell_states
        ),
    )
    return *_in_layout(module, output, final, packed, is_batched), (
        None if cells is None else _tokens_in_layout(module, cells, packed, is_batched)
    )


def layers_of_h(
    module: Any,
    cell: Cell,
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    lengths: Lengths | None,
    reset_mask: ResetMask | None,
    reset_to: str,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """As `layers`, for a cell whose only state is h."""
    if hx is not None and not isinstance(hx, Tensor):
        raise TypeError(f"{_name(cell)}: Expected hx to be a tensor, got {type(hx).__name__}")
    states = None if hx is None else (hx,)
    output, (h_n,), _ = layers(module, cell, input, states, lengths, reset_mask, reset_to)
    return output, h_n


def cell_step(
    module: Any, cell: Cell, input: Tensor, states: Sequence[Tensor] | None
) -> tuple[Tensor, ...]:
    """One step of a module, as a layer of one step, and of one row if unbatched."""
    # Like torch's cells: the weights decide, not the attribute `bias`.
    ih, hh, *biases = _weights(module, ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    there = [b for b in biases if b is not None]
    if len(there) == 1:
        biases = [torch.zeros_like(there[0]) if b is None else b for b in biases]
    is_batched = input.dim() == 2
    if states is not None and not is_batched:
        states = [s.unsqueeze(0) for s in states]
    check_step(input, states, ih.size(1), hh.size(1))
    plain = [ih, hh, *(biases if there else [])]
    options = module._fused_options or _variant.NEUTRAL
    if cell.has_candidate:
        options = options._replace(recurrent_dropout_mode="candidate")
    norms: Sequence[Tensor] = ()
    if options.layer_norm is True:
        norms = _variant.norms_of(module, cell, ("",))
    input, states, weights = _ops.autocast(cell, False, input, states, [*plain, *norms])
    weights, norms = weights[: len(plain)], weights[len(plain) :]
    _check_devices(input, states or (), weights[0])
    _, final, _ = run(
        cell.name,
        input.unsqueeze(0) if is_batched else input.view(1, 1, -1),
        (None,) * cell.states if states is None else [s.unsqueeze(0) for s in states],
        weights,
        1,
        0.0,
        module.training,
        False,
        None,
        None,
        None
        if module._fused_options is None
        else _variant.call_of(cell, options, module.training, norms),
    )
    if is_batched and _ops.can_reshape_in_place():
        return tuple(s.squeeze_(0) for s in final)
    return tuple(s[0] if is_batched else s[0, 0] for s in final)


def check_step(
    input: Tensor, states: Sequence[Tensor] | None, input_size: int, hidden_size: int
) -> None:
    """Raises torch's error if sizes of input [B, I] or [I] and states [B, H] don't fit a cell."""
    if input.size(-1) != input_size:
        raise RuntimeError(
            f"input has inconsistent input_size: got {input.size(-1)} expected {input_size}"
        )
    rows = input.size(0) if input.dim() == 2 else 1
    for i, s in enumerate(states or ()):
        if s.size(0) != rows:
            raise RuntimeError(
                f"Input batch size {rows} doesn't match hidden{i} batch size {s.size(0)}"
            )
        if s.dim() != 2 or s.size(1) != hidden_size:
            raise RuntimeError(
                f"hidden{i} has inconsistent hidden_size: got {s.size(1)}, expected {hidden_size}"
            )


def check_pair(input: Tensor, hx: tuple[Tensor, Tensor] | None) -> None:
    """Raises if input or hx have a wrong number of dimensions for one step of an LSTM."""
    if input.dim() not in (1, 2):
        raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
    if hx is not None:
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            raise TypeError(
                "LSTMCell: Expected hx to be a tuple of two tensors (h, c), got "
                f"{type(hx).__name__}"
            )
        for i, value in enumerate(hx):
            if value.dim() not in (1, 2):
                raise ValueError(
                    f"LSTMCell: Expected hx[{i}] to be 1D or 2D, got {value.dim()}D instead"
                )


def check_dimensions(name: str, input: Tensor, hx: Tensor | None) -> None:
    """Raises if input or hx have a wrong number of dimensions for one step."""
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    if hx is not None:
        if not isinstance(hx, Tensor):
            raise TypeError(f"{name}: Expected hx to be a tensor, got {type(hx).__name__}")
        if hx.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")


def cell_of_h(module: Any, name: str, cell: Cell, input: Tensor, hx: Tensor | None) -> Tensor:
    """As `cell_step`, for a cell whose only state is h. name: torch's, for errors."""
    check_dimensions(name, input, hx)
    (h,) = cell_step(module, cell, input, None if hx is None else (hx,))
    return h

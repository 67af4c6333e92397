"""torch.nn's recurrent modules on fused kernels.

They derive from nn.RNNBase and nn.RNNCellBase, not from nn.LSTM, because torch.compile refuses its
instances. Parameters, their order and initial values, state_dict and errors are torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from fusedrnn import _ops
from fusedrnn._cells import Cell
from fusedrnn.functional import run

__all__ = [
    "FusedGRU",
    "FusedGRUCell",
    "FusedLSTM",
    "FusedLSTMCell",
    "FusedRNN",
    "FusedRNNCell",
]

Lengths = Sequence[int] | Tensor

_LSTM, _GRU = _ops.CELLS["lstm"], _ops.CELLS["gru"]
_RNN = {"tanh": _ops.CELLS["rnn_tanh"], "relu": _ops.CELLS["rnn_relu"]}

if TYPE_CHECKING:
    F = TypeVar("F")

    def _of(function: F) -> Callable[[object], F]:
        """Gives a call forward's type, where nn.Module's is Any. An alias would keep Any."""
        return lambda _: function


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


def _check_states(module: nn.RNNBase, states: Sequence[Tensor], input: Tensor, rows: int) -> None:
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


def _check_flags(module: nn.RNNBase) -> None:
    for name in ("bias", "batch_first", "bidirectional", "training"):
        flag = getattr(module, name)
        if not isinstance(flag, bool):  # torch's call refuses it, its constructor in these words
            raise TypeError(f"{name} should be of type bool, got: {type(flag).__name__}")


def _time_major(
    module: nn.RNNBase, input: Tensor | PackedSequence, lengths: Lengths | None
) -> Tensor:
    """The input as [T, B, I], or [N, I] if packed."""
    if isinstance(input, PackedSequence):
        if lengths is not None:
            raise ValueError("lengths can't be given with a PackedSequence, which has its own")
        if input.data.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {input.data.dim()}")
        return input.data
    if input.dim() not in (2, 3):
        name = module.mode.partition("_")[0]  # RNN of RNN_TANH
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
    if input.size(-1) != module.input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {module.input_size}, got "
            f"{input.size(-1)}"
        )


def _initial_states(
    module: nn.RNNBase,
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
    module: nn.RNNBase,
    output: Tensor,
    final: tuple[Tensor, ...],
    packed: PackedSequence | None,
    is_batched: bool,
) -> tuple[Tensor | PackedSequence, tuple[Tensor, ...]]:
    """Output and final states in the input's layout."""
    if packed is not None:
        if packed.unsorted_indices is not None:
            final = tuple(s.index_select(1, packed.unsorted_indices) for s in final)
        return PackedSequence(
            output, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
        ), final
    if not is_batched:
        return output.squeeze(1), tuple(s.squeeze(1) for s in final)
    if not module.batch_first:
        return output, final
    if _ops.can_reshape_in_place():
        return output.transpose_(0, 1), final
    return output.transpose(0, 1), final


def _layers(
    module: nn.RNNBase,
    input: Tensor | PackedSequence,
    states: Sequence[Tensor] | None,
    lengths: Lengths | None,
) -> tuple[Tensor | PackedSequence, tuple[Tensor, ...]]:
    """All layers of a module over all steps, in any layout. Errors as torch's where it has them."""
    _check_flags(module)
    packed = input if isinstance(input, PackedSequence) else None
    x = _time_major(module, input, lengths)
    is_batched = packed is not None or input.dim() == 3  # type: ignore[union-attr]
    cell = _ops.CELLS[module.mode.lower()]
    x, states, weights = _ops.autocast(
        cell, True, x, states, _weights(module, _weight_names(module))
    )
    _check_input(module, x, weights[0])
    if states is not None:
        states = _initial_states(module, x, states, packed, is_batched)
    if x.device != weights[0].device or states is not None:
        _check_devices(x, states or (), weights[0])
    output, final = run(
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
    )
    return _in_layout(module, output, final, packed, is_batched)


def _layers_of_h(
    module: nn.RNNBase,
    name: str,
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    lengths: Lengths | None,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """_layers for a cell whose only state is h; `name` is torch's, for errors."""
    if hx is not None and not isinstance(hx, Tensor):
        raise TypeError(f"{name}: Expected hx to be a tensor, got {type(hx).__name__}")
    output, (h_n,) = _layers(module, input, None if hx is None else (hx,), lengths)
    return output, h_n


class _FusedRNN(nn.RNNBase):
    """The layers' base class.

    Their other code is in functions: a user's subclass may use any name for its own members.
    """

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels read the weights in place."""


class FusedLSTM(_FusedRNN):
    """An LSTM of one or more layers that takes the place of torch.nn.LSTM.

    Equations, parameters and their initial values are those of torch.nn.LSTM
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html), and so are the arguments
    and the errors they raise. Shapes: T steps, B batch rows, I input_size, H hidden_size,
    P = proj_size or H, D directions, L layers.

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: L.
        bias: whether there are bias_ih and bias_hh.
        batch_first: whether input and output are [B, T, ...]; states are not changed by it.
        dropout: probability of zeroing each output of all layers but the last, while training.
        bidirectional: whether each layer also runs from the last step to the first.
        proj_size: size of a linear projection of the output; 0 for none.
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16.

    Raises:
        TypeError, ValueError: as torch.nn.LSTM.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )

    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Runs all layers over all steps.

        Args:
            input: [T, B, I], [B, T, I] if batch_first, [T, I] unbatched, or a PackedSequence.
            hx: (h_0 `[L*D, B, P]`, c_0 `[L*D, B, H]`), without B if unbatched, rows in the caller's
                order; None for zeros.
            lengths: B integers from 0 to T, in any order, list or tensor on any device: the steps
                of each row. Padding is not read, and zero in the output; states are those
                after each row's own last step.

        Returns:
            output `[T, B, D*P]` in the layout of the input, (h_n `[L*D, B, P]`, c_n `[L*D, B, H]`).

        Raises:
            RuntimeError, ValueError, TypeError: as torch.nn.LSTM, in its words where it has them.
        """
        if lengths is None and not is_dynamo_compiling():
            result = _ops.fast_layers(self.__dict__, _LSTM.index, input, hx)
            if result is not None:
                return cast("tuple[Tensor, tuple[Tensor, Tensor]]", result)
        if hx is not None and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
            got = f"{type(hx).__name__}" + (
                f" of {len(hx)}" if isinstance(hx, (tuple, list)) else ""
            )
            raise TypeError(f"LSTM: Expected hx to be a tuple of two tensors (h_0, c_0), got {got}")
        output, (h_n, c_n) = _layers(self, input, hx, lengths)
        return output, (h_n, c_n)

    if TYPE_CHECKING:

        @_of(forward)
        def __call__(self) -> None:
            """As forward."""


class FusedGRU(_FusedRNN):
    """A GRU of one or more layers that takes the place of torch.nn.GRU.

    Equations, parameters and their initial values are those of torch.nn.GRU
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html). Arguments: as FusedLSTM,
    without proj_size.

    Raises:
        TypeError, ValueError: as torch.nn.GRU.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: Literal[0] = 0,  # where nn.GRU has it
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if proj_size:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, lengths: Lengths | None = None
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None
    ) -> tuple[PackedSequence, Tensor]: ...
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Runs all layers over all steps.

        Args:
            input: as FusedLSTM.
            hx: h_0 `[L*D, B, H]`, without B if unbatched; None for zeros.
            lengths: as FusedLSTM.

        Returns:
            output `[T, B, D*H]` in the layout of the input, h_n `[L*D, B, H]`.

        Raises:
            RuntimeError, ValueError, TypeError: as torch.nn.GRU, in its words where it has them.
        """
        if lengths is None and not is_dynamo_compiling():
            result = _ops.fast_layers(self.__dict__, _GRU.index, input, hx)
            if result is not None:
                return cast("tuple[Tensor, Tensor]", result)
        return _layers_of_h(self, "GRU", input, hx, lengths)

    if TYPE_CHECKING:

        @_of(forward)
        def __call__(self) -> None:
            """As forward."""


class FusedRNN(_FusedRNN):
    """A plain (Elman) RNN of one or more layers that takes the place of torch.nn.RNN.

    Equations, parameters and their initial values are those of torch.nn.RNN
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html). Arguments: as FusedLSTM,
    without proj_size, and in the place of `bias` first the nonlinearity.

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: L.
        nonlinearity: "tanh" or "relu".
        bias: as FusedLSTM, and so are the rest.
        batch_first: see FusedLSTM.
        dropout: see FusedLSTM.
        bidirectional: see FusedLSTM.
        device: see FusedLSTM.
        dtype: see FusedLSTM.

    Raises:
        TypeError, ValueError: as torch.nn.RNN.
    """

    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: Literal[0] = 0,  # where nn.RNN has it
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if proj_size:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self.nonlinearity = nonlinearity

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, lengths: Lengths | None = None
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None
    ) -> tuple[PackedSequence, Tensor]: ...
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Runs all layers over all steps. Arguments and results: as FusedGRU.

        Raises:
            RuntimeError, ValueError, TypeError: as torch.nn.RNN, in its words where it has them.
        """
        # The mode decides, as in torch's forward: fuse() swaps the class of both kinds.
        if lengths is None and not is_dynamo_compiling():
            cell = _ops.CELLS[self.mode.lower()]
            result = _ops.fast_layers(self.__dict__, cell.index, input, hx)
            if result is not None:
                return cast("tuple[Tensor, Tensor]", result)
        return _layers_of_h(self, "RNN", input, hx, lengths)

    if TYPE_CHECKING:

        @_of(forward)
        def __call__(self) -> None:
            """As forward."""


def _cell(
    module: nn.RNNCellBase, cell: Cell, input: Tensor, states: Sequence[Tensor] | None
) -> tuple[Tensor, ...]:
    """One step of a module, as a layer of one step, and of one row if unbatched."""
    # Like torch's cells: the weights decide, not the attribute `bias`.
    ih, hh, *biases = _weights(module, ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    there = [b for b in biases if b is not None]
    if len(there) == 1:
        biases = [torch.zeros_like(there[0]) if b is None else b for b in biases]
    is_batched = input.dim() == 2
    if input.size(-1) != ih.size(1):
        raise RuntimeError(
            f"input has inconsistent input_size: got {input.size(-1)} expected {ih.size(1)}"
        )
    rows = input.size(0) if is_batched else 1
    if states is not None:
        states = states if is_batched else [s.unsqueeze(0) for s in states]
        for i, s in enumerate(states):
            if s.size(0) != rows:
                raise RuntimeError(
                    f"Input batch size {rows} doesn't match hidden{i} batch size {s.size(0)}"
                )
            if s.dim() != 2 or s.size(1) != hh.size(1):
                raise RuntimeError(
                    f"hidden{i} has inconsistent hidden_size: got {s.size(1)}, expected "
                    f"{hh.size(1)}"
                )
    input, states, weights = _ops.autocast(
        cell, False, input, states, [ih, hh, *(biases if there else [])]
    )
    _check_devices(input, states or (), weights[0])
    _, final = _ops.layer(
        cell,
        input.unsqueeze(0) if is_batched else input.view(1, 1, -1),
        (None,) * cell.states if states is None else [s.unsqueeze(0) for s in states],
        weights,
        False,
        None,
        None,
    )
    if is_batched and _ops.can_reshape_in_place():
        return tuple(s.squeeze_(0) for s in final)
    return tuple(s[0] if is_batched else s[0, 0] for s in final)


def _cell_of_h(
    module: nn.RNNCellBase, name: str, cell: Cell, input: Tensor, hx: Tensor | None
) -> Tensor:
    """_cell for a cell whose only state is h; `name` is torch's, for errors."""
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    if hx is not None:
        if not isinstance(hx, Tensor):
            raise TypeError(f"{name}: Expected hx to be a tensor, got {type(hx).__name__}")
        if hx.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
    (h,) = _cell(module, cell, input, None if hx is None else (hx,))
    return h


class FusedLSTMCell(nn.RNNCellBase):
    """One step of an LSTM; takes the place of torch.nn.LSTMCell.

    Args:
        input_size: I.
        hidden_size: H.
        bias: whether there are bias_ih and bias_hh.
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Runs one step.

        Args:
            input: [B, I] or [I].
            hx: (h [B, H], c [B, H]) or without B; None for zeros.

        Returns:
            The next (h [B, H], c [B, H]), without B if the input had none.

        Raises:
            ValueError, RuntimeError: as torch.nn.LSTMCell.
            TypeError: hx is not a pair of tensors.
        """
        if not is_dynamo_compiling():
            result = _ops.fast_cell(self.__dict__, _LSTM.index, input, hx)
            if result is not None:
                return cast("tuple[Tensor, Tensor]", result)
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
        h, c = _cell(self, _LSTM, input, hx)
        return h, c

    if TYPE_CHECKING:

        @_of(forward)
        def __call__(self) -> None:
            """As forward."""


class FusedGRUCell(nn.RNNCellBase):
    """One step of a GRU; takes the place of torch.nn.GRUCell. Arguments: as FusedLSTMCell."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Runs one step.

        Args:
            input: [B, I] or [I].
            hx: h [B, H] or [H]; None for zeros.

        Returns:
            The next h [B, H], without B if the input had none.

        Raises:
            ValueError, RuntimeError: as torch.nn.GRUCell.
            TypeError: hx is not a tensor.
        """
        if not is_dynamo_compiling():
            result = _ops.fast_cell(self.__dict__, _GRU.index, input, hx)
            if result is not None:
                return cast(Tensor, result[0])
        return _cell_of_h(self, "GRUCell", _GRU, input, hx)

    if TYPE_CHECKING:

        @_of(forward)
        def __call__(self) -> None:
            """As forward."""


class FusedRNNCell(nn.RNNCellBase):
    """One step of a plain RNN; takes the place of torch.nn.RNNCell.

    Args:
        input_size: I.
        hidden_size: H.
        bias: whether there are bias_ih and bias_hh.
        nonlinearity: "tanh" or "relu".
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16.
    """

    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Runs one step.

        Args:
            input: [B, I] or [I].
            hx: h [B, H] or [H]; None for zeros.

        Returns:
            The next h [B, H], without B if the input had none.

        Raises:
            ValueError, RuntimeError: as torch.nn.RNNCell.
            TypeError: hx is not a tensor.
        """
        cell = _RNN.get(self.nonlinearity)
        if cell is None:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        if not is_dynamo_compiling():
            result = _ops.fast_cell(self.__dict__, cell.index, input, hx)
            if result is not None:
                return cast(Tensor, result[0])
        return _cell_of_h(self, "RNNCell", cell, input, hx)

    if TYPE_CHECKING:

        @_of(forward)
        def __call__(self) -> None:
            """As forward."""


# torch's modules with their fused counterparts.
FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: FusedLSTM,
    nn.GRU: FusedGRU,
    nn.LSTMCell: FusedLSTMCell,
    nn.GRUCell: FusedGRUCell,
    nn.RNN: FusedRNN,
    nn.RNNCell: FusedRNNCell,
}

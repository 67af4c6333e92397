"""torch.nn's recurrent modules on fused kernels.

They derive from nn.RNNBase and nn.RNNCellBase, not from nn.LSTM, because torch.compile refuses its
instances. Parameters, their order and initial values, state_dict and errors are torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from fusedrnn import _forward, _ops
from fusedrnn._cells import Cell
from fusedrnn._forward import Lengths

__all__ = [
    "FusedGRU",
    "FusedGRUCell",
    "FusedLSTM",
    "FusedLSTMCell",
    "FusedRNN",
    "FusedRNNCell",
]

_LSTM, _GRU = _ops.CELLS["lstm"], _ops.CELLS["gru"]
_RNN = {"tanh": _ops.CELLS["rnn_tanh"], "relu": _ops.CELLS["rnn_relu"]}

if TYPE_CHECKING:
    F = TypeVar("F")

    def _of(function: F) -> Callable[[object], F]:
        """Gives a call forward's type, where nn.Module's is Any. An alias would keep Any."""
        return lambda _: function


def _cell_of_mode(mode: str) -> Cell:
    """An nn.RNN's cell. Raises torch's error for an unknown mode."""
    if mode not in ("RNN_TANH", "RNN_RELU"):
        raise AssertionError(f"mode must be RNN_TANH or RNN_RELU, got {mode}")
    return _RNN[mode[4:].lower()]


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
        _forward.check_states_of_lstm(hx)
        output, (h_n, c_n) = _forward.layers(self, _LSTM, input, hx, lengths)
        return output, (h_n, c_n)

    if TYPE_CHECKING:

        @_of(forward)
        def __call__(self) -> None:
            """As forward."""


class _LayerOfH(_FusedRNN):
    """A layer whose only state is h."""

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
            RuntimeError, ValueError, TypeError: as torch's layer, in its words where it has them.
        """
        # One class has the modes of tanh and relu. Another class's mode may be a user's attribute.
        cell = _cell_of_mode(self.mode) if isinstance(self, FusedRNN) else _GRU
        if lengths is None and not is_dynamo_compiling():
            result = _ops.fast_layers(self.__dict__, cell.index, input, hx)
            if result is not None:
                return cast("tuple[Tensor, Tensor]", result)
        return _forward.layers_of_h(self, cell, input, hx, lengths)

    if TYPE_CHECKING:

        @_of(forward)
        def __call__(self) -> None:
            """As forward."""


class FusedGRU(_LayerOfH):
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


class FusedRNN(_LayerOfH):
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
        _forward.check_pair(input, hx)
        h, c = _forward.cell_step(self, _LSTM, input, hx)
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
        return _forward.cell_of_h(self, "GRUCell", _GRU, input, hx)

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
        name = self.nonlinearity
        cell = _RNN.get(name) if isinstance(name, str) else None
        if cell is None:
            _forward.check_dimensions("RNNCell", input, hx)
            raise RuntimeError(f"Unknown nonlinearity: {name}")
        if not is_dynamo_compiling():
            result = _ops.fast_cell(self.__dict__, cell.index, input, hx)
            if result is not None:
                return cast(Tensor, result[0])
        return _forward.cell_of_h(self, "RNNCell", cell, input, hx)

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

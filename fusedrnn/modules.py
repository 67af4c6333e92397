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

from fusedrnn import _forward, _ops, _variant
from fusedrnn._cells import Cell
from fusedrnn._forward import Lengths, ResetMask
from fusedrnn._variant import Option, Options, Zoneout

__all__ = [
    "FusedGRU",
    "FusedGRUCell",
    "FusedLSTM",
    "FusedLSTMCell",
    "FusedRNN",
    "FusedRNNCell",
]

ResetTo = Literal["zero", "initial"]

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


def _extra_repr(own: str, options: Options | None) -> str:
    changed = {} if options is None else options.non_default()
    return ", ".join([own, *(f"{name}={value}" for name, value in changed.items())])


class _FusedRNN(nn.RNNBase):
    """The layers' base class.

    Their other code is in functions: a user's subclass may use any name for its own members, also
    the options' names, if fuse() extended it.
    """

    recurrent_dropout = Option(0.0)
    recurrent_dropout_mode = Option[str]("sequence")
    zoneout = Option[Zoneout](0.0)
    weight_dropout = Option(0.0)
    layer_norm = Option(False)
    save_memory = Option(False)
    _fused_options: Options | None = None  # Option writes it

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels read the weights in place."""

    def reset_parameters(self) -> None:
        """Draws new weights as torch's layer does. A layer norm's scales are one, its biases 0."""
        norms = {name: self._parameters.pop(name) for name in _variant.own_norms(self)}
        super().reset_parameters()
        self._parameters.update(norms)
        _variant.reset_norms(self)

    def extra_repr(self) -> str:
        """As torch's layer, and the options that were changed."""
        return _extra_repr(super().extra_repr(), self._fused_options)


class _FusedCell(nn.RNNCellBase):
    """The single steps' base class; see _FusedRNN."""

    zoneout = Option[Zoneout](0.0)
    layer_norm = Option(False)
    _fused_options: Options | None = None  # Option writes it

    def reset_parameters(self) -> None:
        """Draws new weights as torch's cell does. A layer norm's scales are one, its biases 0."""
        norms = {name: self._parameters.pop(name) for name in _variant.own_norms(self)}
        super().reset_parameters()
        self._parameters.update(norms)
        _variant.reset_norms(self)

    def extra_repr(self) -> str:
        """As torch's cell, and the options that were changed."""
        return _extra_repr(super().extra_repr(), self._fused_options)


class FusedLSTM(_FusedRNN):
    """An LSTM of one or more layers that takes the place of torch.nn.LSTM.

    Equations, parameters and their initial values are those of torch.nn.LSTM
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html), and so are the arguments
    and the errors they raise. Shapes: T steps, B batch rows, I input_size, H hidden_size,
    P = proj_size or H, D directions, L layers.

    Args:
        input_size: I, the features of an input.
        hidden_size: H, the hidden units.
        num_layers: L, the layers.
        bias: whether there are bias_ih and bias_hh.
        batch_first: whether input and output are [B, T, ...]; states are not changed by it.
        dropout: probability of zeroing each output of all layers but the last, while training.
        bidirectional: whether each layer also runs from the last step to the first.
        proj_size: size of a linear projection of the output; 0 for none.
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16.
        recurrent_dropout: p, the probability of zeroing a unit of the recurrence while training.
        recurrent_dropout_mode: "sequence" gives weight_hh the operand h * m / (1 - p), with one
            mask m [D, B, P] for all steps (Gal and Ghahramani 2016, arXiv:1512.05287). "candidate"
            has a new mask in each step, for the update of c: c = f * c + i * (g * m / (1 - p))
            (Semeniuta et al. 2016, arXiv:1603.05118).
        zoneout: the probability p of a unit keeping its value of the step before, or a pair (of h,
            of c): h_t = m * h_(t-1) + (1 - m) * h~, with m = p in eval mode, and the same for c.
            h~ is made of the new c before its zoneout (Krueger et al. 2017, arXiv:1606.01305).
        weight_dropout: the probability of zeroing a weight of weight_hh while training, by one mask
            in each call: DropConnect (Merity et al. 2018, arXiv:1708.02182).
        layer_norm: whether LN(weight_ih x) * norm_ih + bias_ih and
            LN(weight_hh h) * norm_hh + bias_hh are the parts of the pre-activations, each LN over
            all 4H values, and h = o * tanh(LN(c) * norm_c + norm_c_bias) (Ba et al. 2016,
            arXiv:1607.06450; placed as in the LayerNormLSTM of Haste). The scales start at one, the
            bias at zero. They are parameters beside torch's: norm_ih_l0, norm_hh_l0, norm_c_l0,
            norm_c_bias_l0 and so on.
        save_memory: whether training calls keep a layer's arguments alone, and run it again in the
            backward pass. Results stay the same.

    These keyword arguments are attributes, and may be changed at any time. Masks come from torch's
    generator of the device: one seed gives the same masks. Each layer draws, where a probability is
    above 0, for `dropout`, weight_dropout (forward, then reverse), recurrent_dropout, zoneout of h
    and of c, in this order. `fuse` switches none on; `unfuse` refuses a module that has one.

    Raises:
        TypeError, ValueError: as torch.nn.LSTM; a probability out of range, an unknown mode.
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
        *,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_mode: Literal["sequence", "candidate"] = "sequence",
        zoneout: Zoneout = 0.0,
        weight_dropout: float = 0.0,
        layer_norm: bool = False,
        save_memory: bool = False,
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
        options = Options(
            recurrent_dropout,
            recurrent_dropout_mode,
            zoneout,
            weight_dropout,
            layer_norm,
            save_memory,
        )
        ends = _variant.layer_ends(num_layers, bidirectional)
        _variant.set_up(self, _LSTM, options, ends, device, dtype)

    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Lengths | None = None,
        return_cell_states: Literal[False] = False,
        reset_mask: Tensor | None = None,
        reset_to: ResetTo = "zero",
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        return_cell_states: Literal[False] = False,
        reset_mask: PackedSequence | None = None,
        reset_to: ResetTo = "zero",
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...
    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Lengths | None = None,
        return_cell_states: Literal[True],
        reset_mask: Tensor | None = None,
        reset_to: ResetTo = "zero",
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        return_cell_states: Literal[True],
        reset_mask: PackedSequence | None = None,
        reset_to: ResetTo = "zero",
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor], PackedSequence]: ...
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Lengths | None = None,
        return_cell_states: bool = False,
        reset_mask: ResetMask | None = None,
        reset_to: ResetTo = "zero",
    ) -> (
        tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]
        | tuple[Tensor | PackedSequence, tuple[Tensor, Tensor], Tensor | PackedSequence]
    ):
        """Runs all layers over all steps.

        Args:
            input: [T, B, I], [B, T, I] if batch_first, [T, I] unbatched, or a PackedSequence.
            hx: (h_0 `[L*D, B, P]`, c_0 `[L*D, B, H]`), without B if unbatched, rows in the caller's
                order; None for zeros.
            lengths: B integers from 0 to T, in any order, list or tensor on any device: the steps
                of each row. Padding is not read, and zero in the output; states are those
                after each row's own last step.
            return_cell_states: whether a third result has the cell states of all steps.
            reset_mask: bool [T, B], [B, T] if batch_first, [T] unbatched, a PackedSequence if the
                input is one. True discards the states before this step, in all layers, as
                for a new episode; the reverse direction's are those after step t + 1.
                Gradients stop there. Padding is not looked at.
            reset_to: "zero" or "initial": the states after a reset, zero or hx.

        Returns:
            output `[T, B, D*P]` in the layout of the input, (h_n `[L*D, B, P]`, c_n `[L*D, B, H]`).
            With return_cell_states also c of every step of the last layer, `[T, B, D*H]` in the
            layout of the input.

        Raises:
            RuntimeError, ValueError, TypeError: as torch.nn.LSTM, in its words where it has them.
        """
        if (
            lengths is None
            and reset_mask is None
            and return_cell_states is False
            and reset_to == "zero"
            and self._fused_options is None
            and not is_dynamo_compiling()
        ):
            result = _ops.fast_layers(self.__dict__, _LSTM.index, input, hx)
            if result is not None:
                return cast("tuple[Tensor, tuple[Tensor, Tensor]]", result)
        _forward.check_states_of_lstm(hx)
        output, (h_n, c_n), cells = _forward.layers(
            self, _LSTM, input, hx, lengths, reset_mask, reset_to, return_cell_states
        )
        return (output, (h_n, c_n)) if cells is None else (output, (h_n, c_n), cells)

    if TYPE_CHECKING:

        @_of(forward)
        def __call__(self) -> None:
            """As forward."""


class _LayerOfH(_FusedRNN):
    """A layer whose only state is h."""

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
        reset_mask: Tensor | None = None,
        reset_to: ResetTo = "zero",
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        reset_mask: PackedSequence | None = None,
        reset_to: ResetTo = "zero",
    ) -> tuple[PackedSequence, Tensor]: ...
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
        reset_mask: ResetMask | None = None,
        reset_to: ResetTo = "zero",
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Runs all layers over all steps.

        Args:
            input: as FusedLSTM.
            hx: h_0 `[L*D, B, H]`, without B if unbatched; None for zeros.
            lengths: as FusedLSTM.
            reset_mask: as FusedLSTM.
            reset_to: as FusedLSTM.

        Returns:
            output `[T, B, D*H]` in the layout of the input, h_n `[L*D, B, H]`.

        Raises:
            RuntimeError, ValueError, TypeError: as torch's layer, in its words where it has them.
        """
        # One class has the modes of tanh and relu. Another class's mode may be a user's attribute.
        cell = _cell_of_mode(self.mode) if isinstance(self, FusedRNN) else _GRU
        if (
            lengths is None
            and reset_mask is None
            and reset_to == "zero"
            and self._fused_options is None
            and not is_dynamo_compiling()
        ):
            result = _ops.fast_layers(self.__dict__, cell.index, input, hx)
            if result is not None:
                return cast("tuple[Tensor, Tensor]", result)
        return _forward.layers_of_h(self, cell, input, hx, lengths, reset_mask, reset_to)

    if TYPE_CHECKING:

        @_of(forward)
        def __call__(self) -> None:
            """As forward."""


class FusedGRU(_LayerOfH):
    """A GRU of one or more layers that takes the place of torch.nn.GRU.

    Equations, parameters and their initial values are those of torch.nn.GRU
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html). Arguments: as FusedLSTM,
    without proj_size.

    The recurrent dropout of the mode "candidate" is that of n:
    h = (1 - z) * (n * m / (1 - p)) + z * h. zoneout is one number. Layer norm is
    LN(weight_ih x) * norm_ih + bias_ih and LN(weight_hh h) * norm_hh + bias_hh, each LN over all 3H
    values, as in the LayerNormGRU of Haste. The reset gate still multiplies the hidden part of n.

    Raises:
        TypeError, ValueError: as torch.nn.GRU; as FusedLSTM for the other arguments.
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
        *,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_mode: Literal["sequence", "candidate"] = "sequence",
        zoneout: float = 0.0,
        weight_dropout: float = 0.0,
        layer_norm: bool = False,
        save_memory: bool = False,
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
        options = Options(
            recurrent_dropout,
            recurrent_dropout_mode,
            zoneout,
            weight_dropout,
            layer_norm,
            save_memory,
        )
        ends = _variant.layer_ends(num_layers, bidirectional)
        _variant.set_up(self, _GRU, options, ends, device, dtype)


class FusedRNN(_LayerOfH):
    """A plain (Elman) RNN of one or more layers that takes the place of torch.nn.RNN.

    Equations, parameters and their initial values are those of torch.nn.RNN
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html). Arguments: as FusedLSTM,
    without proj_size, and in the place of `bias` first the nonlinearity.

    Args:
        input_size: I, the features of an input.
        hidden_size: H, the hidden units.
        num_layers: L, the layers.
        nonlinearity: "tanh" or "relu".
        bias: as FusedLSTM, and so are the rest.
        batch_first: see FusedLSTM.
        dropout: see FusedLSTM.
        bidirectional: see FusedLSTM.
        device: see FusedLSTM.
        dtype: see FusedLSTM.
        recurrent_dropout: see FusedLSTM.
        recurrent_dropout_mode: "sequence": a plain RNN has no candidate.
        zoneout: see FusedLSTM; one number.
        weight_dropout: see FusedLSTM.
        layer_norm: see FusedGRU, with H values.
        save_memory: see FusedLSTM.

    Raises:
        TypeError, ValueError: as torch.nn.RNN; as FusedLSTM for the other arguments.
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
        *,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_mode: Literal["sequence"] = "sequence",
        zoneout: float = 0.0,
        weight_dropout: float = 0.0,
        layer_norm: bool = False,
        save_memory: bool = False,
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
        options = Options(
            recurrent_dropout,
            recurrent_dropout_mode,
            zoneout,
            weight_dropout,
            layer_norm,
            save_memory,
        )
        ends = _variant.layer_ends(num_layers, bidirectional)
        _variant.set_up(self, _RNN[nonlinearity], options, ends, device, dtype)


class FusedLSTMCell(_FusedCell):
    """One step of an LSTM; takes the place of torch.nn.LSTMCell.

    Args:
        input_size: I, the features of an input.
        hidden_size: H, the hidden units.
        bias: whether there are bias_ih and bias_hh.
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16.
        recurrent_dropout: as FusedLSTM with the mode "candidate".
        zoneout: as FusedLSTM.
        layer_norm: as FusedLSTM, with the parameters norm_ih, norm_hh, norm_c and norm_c_bias.
    """

    recurrent_dropout = Option(0.0)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_dropout: float = 0.0,
        zoneout: Zoneout = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        options = Options(recurrent_dropout, zoneout=zoneout, layer_norm=layer_norm)
        _variant.set_up(self, _LSTM, options, ("",), device, dtype)

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
        if self._fused_options is None and not is_dynamo_compiling():
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


class FusedGRUCell(_FusedCell):
    """One step of a GRU; takes the place of torch.nn.GRUCell. Arguments: as FusedLSTMCell."""

    recurrent_dropout = Option(0.0)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)
        options = Options(recurrent_dropout, zoneout=zoneout, layer_norm=layer_norm)
        _variant.set_up(self, _GRU, options, ("",), device, dtype)

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
        if self._fused_options is None and not is_dynamo_compiling():
            result = _ops.fast_cell(self.__dict__, _GRU.index, input, hx)
            if result is not None:
                return cast(Tensor, result[0])
        return _forward.cell_of_h(self, "GRUCell", _GRU, input, hx)

    if TYPE_CHECKING:

        @_of(forward)
        def __call__(self) -> None:
            """As forward."""


class FusedRNNCell(_FusedCell):
    """One step of a plain RNN; takes the place of torch.nn.RNNCell.

    Args:
        input_size: I, the features of an input.
        hidden_size: H, the hidden units.
        bias: whether there are bias_ih and bias_hh.
        nonlinearity: "tanh" or "relu".
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16.
        zoneout: as FusedRNN.
        layer_norm: as FusedRNN, with the parameters norm_ih and norm_hh.
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
        *,
        zoneout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity
        options = Options(zoneout=zoneout, layer_norm=layer_norm)
        _variant.set_up(self, _RNN[nonlinearity], options, ("",), device, dtype)

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
        if self._fused_options is None and not is_dynamo_compiling():
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

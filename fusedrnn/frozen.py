"""freeze(model): recurrent layers for inference on a CPU, their weights packed once.

A frozen module has no parameters. Its weights lie in one buffer a layer, in the order in which the
kernels read them, in float32, bfloat16 or int8.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import _forward, _ops, _variant, functional
from fusedrnn._cells import Cell
from fusedrnn._forward import Lengths
from fusedrnn.modules import FUSED

__all__ = [
    "FrozenGRU",
    "FrozenGRUCell",
    "FrozenLSTM",
    "FrozenLSTMCell",
    "FrozenRNN",
    "FrozenRNNCell",
    "freeze",
]

Model = TypeVar("Model", bound=nn.Module)

_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
# What nn.Module keeps of hooks on a call.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class _Config(NamedTuple):
    """A frozen module's constants, as csrc/python.cpp reads them."""

    cell: int
    num_layers: int
    input_size: int
    hidden_size: int
    output_size: int
    bidirectional: bool
    batch_first: bool
    buffers: tuple[str, ...]  # the layers' packed weights


class _Frozen(nn.Module):
    """A recurrent module with packed weights.

    Attributes:
        dtype: of the packed weights: torch.float32, torch.bfloat16 or torch.int8.
    """

    _config: _Config

    def __init__(self, module: nn.Module, cell: Cell, dtype: torch.dtype) -> None:
        super().__init__()
        is_layer = isinstance(module, nn.RNNBase)
        names = _weight_names(module)
        weights = _forward._weights(module, names)
        self.dtype = dtype
        self.mode: str | None = getattr(module, "mode", None)
        self.input_size: int = module.input_size  # type: ignore[assignment]
        self.hidden_size: int = module.hidden_size  # type: ignore[assignment]
        self.bias = any("bias" in name for name in names)
        self.num_layers: int = module.num_layers if is_layer else 1  # type: ignore[assignment]
        self.bidirectional = is_layer and bool(module.bidirectional)
        self.batch_first = is_layer and bool(module.batch_first)
        self.dropout = float(module.dropout) if is_layer else 0.0  # type: ignore[arg-type]
        self.proj_size: int = module.proj_size if is_layer else 0  # type: ignore[assignment]
        self._cell = cell.name
        self._names = tuple(names)
        self._layout = _ops.cpu_panel_layout()
        self._config = _Config(
            cell.index,
            self.num_layers,
            self.input_size,
            self.hidden_size,
            self.proj_size or self.hidden_size,
            self.bidirectional,
            self.batch_first,
            tuple(f"packed_l{i}" for i in range(self.num_layers)),
        )
        for name, packed in zip(self._config.buffers, self._pack(weights), strict=True):
            self.register_buffer(name, packed, persistent=False)
        for hooks in _HOOKS:
            if hasattr(module, hooks):
                setattr(self, hooks, copy.copy(getattr(module, hooks)))
        self.train(module.training)

    def _pack(self, weights: Sequence[Tensor]) -> Iterator[Tensor]:
        """Each layer's packed weights, from all weights."""
        per = len(weights) // self.num_layers
        for i in range(self.num_layers):
            own = [w.detach() for w in weights[i * per : (i + 1) * per]]
            yield _ops.freeze(_ops.CELLS[self._cell], own, self.bidirectional, self.dtype)

    def _unpacked(self) -> dict[str, Tensor]:
        """The weights by name, in float32: exactly, or as bfloat16 and int8 have rounded them."""
        weights = [w for name in self._config.buffers for w in _ops.unfreeze(self._buffers[name])]  # type: ignore[arg-type]
        return dict(zip(self._names, weights, strict=True))

    def _run_layer(
        self,
        index: int,
        input: Tensor,
        states: Sequence[Tensor | None],
        batch_sizes: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        config = self._config
        return _ops.frozen_layer(
            _ops.CELLS[self._cell],
            input,
            states,
            getattr(self, config.buffers[index]),
            (config.hidden_size, config.output_size),
            config.bidirectional,
            batch_sizes,
            lengths,
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Saves the weights under their names before freeze()."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, weight in self._unpacked().items():
            destination[prefix + name] = weight

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Packs the weights of a plain module's state_dict."""
        given = [state_dict.get(prefix + name) for name in self._names]
        missing = [n for n, w in zip(self._names, given, strict=True) if w is None]
        missing_keys += [prefix + name for name in missing]
        if strict:
            known = {prefix + name for name in self._names}
            own = [k for k in state_dict if k.startswith(prefix) and "." not in k[len(prefix) :]]
            unexpected_keys += [k for k in own if k not in known]
        if missing:
            return
        for name, weight in self._unpacked().items():
            found = cast(Tensor, state_dict[prefix + name])
            if found.shape != weight.shape:
                error_msgs.append(
                    f"size mismatch for {prefix}{name}: copying a param with shape {found.shape} "
                    f"from checkpoint, the shape in current model is {weight.shape}."
                )
                return
        weights = [cast(Tensor, w).detach().to("cpu", torch.float32) for w in given]
        for name, packed in zip(self._config.buffers, self._pack(weights), strict=True):
            self._buffers[name] = packed

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Packs anew on a machine with other vectors."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._layout != _ops.cpu_panel_layout():
            weights = list(self._unpacked().values())
            for name, packed in zip(self._config.buffers, self._pack(weights), strict=True):
                self._buffers[name] = packed
            self._layout = _ops.cpu_panel_layout()

    def __getattr__(self, name: str) -> Any:
        """Says where a parameter has gone."""
        if name in self.__dict__.get("_names", ()):
            raise AttributeError(
                f"{type(self).__name__} has no {name}: freeze() packed the weights. state_dict() "
                "gives them back"
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """As the plain module's, and the type of the weights."""
        parts = [f"{self.input_size}, {self.hidden_size}"]
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "bidirectional": False}
        parts += [f"{n}={getattr(self, n)}" for n, d in defaults.items() if getattr(self, n) != d]
        parts += [f"proj_size={self.proj_size}"] if self.proj_size else []
        return ", ".join([*parts, f"dtype={str(self.dtype).removeprefix('torch.')}"])


class _FrozenLayers(_Frozen):
    """Layers over all steps."""

    def flatten_parameters(self) -> None:
        """Does nothing: there are no parameters."""

    def _layers(
        self,
        input: Tensor | PackedSequence,
        states: Sequence[Tensor] | None,
        lengths: Lengths | None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, ...]]:
        cell = _ops.CELLS[self._cell]
        _forward._check_flags(self)
        packed = input if isinstance(input, PackedSequence) else None
        x = _forward._time_major(self, cell, input, lengths)
        is_batched = packed is not None or cast(Tensor, input).dim() == 3
        _forward._check_features(self, x)
        if states is not None:
            states = _forward._initial_states(self, x, states, packed, is_batched)
        _forward._check_devices(x, states or (), getattr(self, self._config.buffers[0]))
        batch_sizes = None if packed is None else packed.batch_sizes
        steps = None if lengths is None else _forward._checked_lengths(lengths, x, is_batched)
        output, final = functional.over_layers(
            lambda i, x, states: self._run_layer(i, x, states, batch_sizes, steps),
            self.num_layers,
            self.bidirectional,
            x,
            (None,) * cell.states if states is None else states,
        )
        return _forward._in_layout(self, output, final, packed, is_batched)


class FrozenLSTM(_FrozenLayers):
    """An LSTM that freeze() made. Called as FusedLSTM; has no parameters and no gradient.

    Attributes:
        dtype: of the packed weights: torch.float32, torch.bfloat16 or torch.int8.
        input_size: as nn.LSTM's, and so are hidden_size, num_layers, bias, batch_first, dropout
            (never applied), bidirectional and proj_size.
    """

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Runs all layers over all steps. Arguments, results and errors: as FusedLSTM.forward.

        Raises:
            RuntimeError: a gradient is wanted.
        """
        if lengths is None and not is_dynamo_compiling():
            result = _ops.fast_frozen_layers(self.__dict__, input, hx)
            if result is not None:
                return cast("tuple[Tensor, tuple[Tensor, Tensor]]", result)
        _forward.check_states_of_lstm(hx)
        output, (h_n, c_n) = self._layers(input, hx, lengths)
        return output, (h_n, c_n)


class _FrozenLayersOfH(_FrozenLayers):
    """Layers whose only state is h."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Runs all layers over all steps. Arguments, results and errors: as FusedGRU.forward.

        Raises:
            RuntimeError: a gradient is wanted.
        """
        if lengths is None and not is_dynamo_compiling():
            result = _ops.fast_frozen_layers(self.__dict__, input, hx)
            if result is not None:
                return cast("tuple[Tensor, Tensor]", result)
        if hx is not None and not isinstance(hx, Tensor):
            name = _forward._name(_ops.CELLS[self._cell])
            raise TypeError(f"{name}: Expected hx to be a tensor, got {type(hx).__name__}")
        output, (h_n,) = self._layers(input, None if hx is None else (hx,), lengths)
        return output, h_n


class FrozenGRU(_FrozenLayersOfH):
    """A GRU that freeze() made. Called as FusedGRU; attributes as FrozenLSTM."""


class FrozenRNN(_FrozenLayersOfH):
    """A plain RNN that freeze() made. Called as FusedRNN; attributes as FrozenLSTM."""


class _FrozenCell(_Frozen):
    """One step."""

    def _step(self, input: Tensor, states: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        cell = _ops.CELLS[self._cell]
        is_batched = input.dim() == 2
        if states is not None and not is_batched:
            states = [s.unsqueeze(0) for s in states]
        _forward.check_step(input, states, self.input_size, self.hidden_size)
        _forward._check_devices(input, states or (), getattr(self, self._config.buffers[0]))
        _, final = self._run_layer(
            0,
            input.unsqueeze(0) if is_batched else input.view(1, 1, -1),
            (None,) * cell.states if states is None else [s.unsqueeze(0) for s in states],
        )
        return tuple(s[0] if is_batched else s[0, 0] for s in final)


class FrozenLSTMCell(_FrozenCell):
    """One step of an LSTM, made by freeze(). Called as FusedLSTMCell."""

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Runs one step. Arguments, results and errors: as FusedLSTMCell.forward.

        Raises:
            RuntimeError: a gradient is wanted.
        """
        if not is_dynamo_compiling():
            result = _ops.fast_frozen_cell(self.__dict__, input, hx)
            if result is not None:
                return cast("tuple[Tensor, Tensor]", result)
        _forward.check_pair(input, hx)
        h, c = self._step(input, hx)
        return h, c


class _FrozenCellOfH(_FrozenCell):
    """One step of a cell whose only state is h."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Runs one step. Arguments, results and errors: as FusedGRUCell.forward.

        Raises:
            RuntimeError: a gradient is wanted.
        """
        if not is_dynamo_compiling():
            result = _ops.fast_frozen_cell(self.__dict__, input, hx)
            if result is not None:
                return cast(Tensor, result[0])
        _forward.check_dimensions(type(self).__name__.removeprefix("Frozen"), input, hx)
        (h,) = self._step(input, None if hx is None else (hx,))
        return h


class FrozenGRUCell(_FrozenCellOfH):
    """One step of a GRU, made by freeze(). Called as FusedGRUCell."""


class FrozenRNNCell(_FrozenCellOfH):
    """One step of a plain RNN, made by freeze(). Called as FusedRNNCell."""


_FROZEN: dict[type[nn.Module], type[_Frozen]] = {
    nn.LSTM: FrozenLSTM,
    nn.GRU: FrozenGRU,
    nn.RNN: FrozenRNN,
    nn.LSTMCell: FrozenLSTMCell,
    nn.GRUCell: FrozenGRUCell,
    nn.RNNCell: FrozenRNNCell,
}


def _weight_names(module: nn.Module) -> list[str]:
    if isinstance(module, nn.RNNBase):
        return _forward._weight_names(module)
    # As torch's cells: the weights decide, not the attribute `bias`.
    return [n for n in _CELL_WEIGHTS if getattr(module, n) is not None]


def _plain_class(module: nn.Module) -> type[nn.Module] | None:
    """Torch's class of a recurrent module: None for a subclass that may compute differently."""
    cls = type(module)
    if is_parametrized(module):
        cls = cls.__bases__[0]
    for plain, fused in FUSED.items():
        if cls in (plain, fused) or vars(cls).get("_unfused_class") is plain:
            return plain
    return None


def _cell_name(module: nn.Module, plain: type[nn.Module]) -> str:
    name = plain.__name__.removesuffix("Cell").lower()
    if name != "rnn":
        return name
    # As the calls of torch's modules: a layer's mode decides.
    mode = module.mode if isinstance(module, nn.RNNBase) else module.nonlinearity
    return f"rnn_{str(mode).removeprefix('RNN_').lower()}"


def _frozen(module: nn.Module, plain: type[nn.Module], dtype: torch.dtype) -> _Frozen:
    cell = _ops.CELLS[_cell_name(module, plain)]
    is_bounded = cell.name != "rnn_relu" and not getattr(module, "proj_size", 0)
    if dtype == torch.int8 and not is_bounded:
        dtype = torch.bfloat16
    return _FROZEN[plain](module, cell, dtype)


def freeze(model: Model, dtype: torch.dtype = torch.float32, *, inplace: bool = False) -> Model:
    """Packs the weights of a model's recurrent layers and cells once, for inference on a CPU.

    Every nn.LSTM, nn.GRU, nn.RNN, their cells and the fused modules become frozen modules, which
    are called alike: with lengths, packed input, states and batch_first. They have no parameters
    and no gradient. state_dict() still has the weights under their names, in float32; with
    bfloat16 and int8 as these types have rounded them. load_state_dict() packs a plain model's.

    With int8 each row of weight_ih and weight_hh has a scale. Inputs are quantised by token, to 8
    bits where the CPU has AVX512-VNNI and to 15 elsewhere; states to 15 bits by row.
    torch.ao.quantization.quantize_dynamic quantises both to 8 bits.
    Projected LSTMs and plain RNNs with relu, whose states have no bound, get bfloat16 weights.

    Args:
        model: any module, also one that is itself a recurrent layer. Recurrent parameters must be
            float32, on the CPU.
        dtype: of the packed weights: torch.float32, torch.bfloat16 or torch.int8 (torch.qint8 means
            the same). Inputs and results stay float32, bfloat16 or float16.
        inplace: whether to change the model itself, not a copy.

    Returns:
        The model with frozen modules; the frozen module, if the model is a recurrent layer itself.

    Raises:
        TypeError: model is no module.
        ValueError: an unknown dtype.
        RuntimeError: a recurrent module's parameters are not float32 on the CPU.

    Warns:
        UserWarning: lists the recurrent modules left alone: subclasses, which may compute
            differently, and modules with zoneout or layer norm.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: Expected model to be a module, got {type(model).__name__}")
    if dtype == torch.qint8:
        dtype = torch.int8
    if dtype not in _DTYPES:
        raise ValueError(f"freeze: dtype must be float32, bfloat16 or int8, got {dtype}")
    if not inplace:
        model = copy.deepcopy(model)
    left: list[str] = []
    made: dict[nn.Module, _Frozen] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            continue
        plain = _plain_class(module)
        options = _variant.changes(module, "zoneout", "layer_norm")
        if plain is None or options:
            reason = f": {options}" if options else ""
            left.append(f"{name or 'the model'} ({type(module).__name__}{reason})")
        else:
            made[module] = _frozen(module, plain, dtype)
    if left:
        warnings.warn(f"freeze left these as they are: {', '.join(left)}", stacklevel=2)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in made:
                parent._modules[name] = made[child]
    return cast(Model, made.get(model, model))

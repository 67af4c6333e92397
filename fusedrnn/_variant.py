"""Variants of a recurrence: recurrent dropout, zoneout, weight dropout, layer norm, resets.

A module holds its choice in attributes (`Option`). A call makes a `Call` of them, and from it a
`Variant` for each layer: the masks and tensors that an op takes.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fusedrnn._cells import Cell

T = TypeVar("T")
Zoneout = float | tuple[float, float]
Optional = Tensor | None

LAYER_NORM_EPS = 1e-5
_TORCHS = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)


def random_mask(shape: Sequence[int], p: float, device: torch.device) -> Tensor:
    """Booleans, each True with probability p, from torch's generator of the device."""
    from fusedrnn import _ops  # which imports this module

    return _ops.random_mask(shape, p, device)


@dataclass(frozen=True)
class Variant:
    """One layer's variant, as its op takes it. tokens: [T, B], or [N] if packed.

    Attributes:
        reset_mask: [*tokens] bool: the state before this step is discarded.
        reset_to_initial: a reset restores the layer's initial state, and zero otherwise.
        hidden_mask: [D, B, P] of the input's type, scaled: a factor for h in weight_hh h.
        candidate_mask: [D, *tokens, H] bool: False zeroes the candidate.
        candidate_scale: a factor for the candidates that are left.
        zoneout_h_mask: [D, *tokens, P] bool: True keeps h from before the step.
        zoneout_c_mask: [D, *tokens, H] bool: True keeps c.
        zoneout_h: without a mask, the weight of h from before the step; 0 for none.
        zoneout_c: the same for c.
        norms: for each direction norm_ih [G*H] and norm_hh [G*H], then norm_c [H] and norm_c_bias
            [H] for a cell with a cell state; empty without layer norm.
        return_cells: whether the cell states of all steps are wanted.
    """

    reset_mask: Optional = None
    reset_to_initial: bool = False
    hidden_mask: Optional = None
    candidate_mask: Optional = None
    candidate_scale: float = 1.0
    zoneout_h_mask: Optional = None
    zoneout_c_mask: Optional = None
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    norms: Sequence[Tensor] = ()
    return_cells: bool = False

    def tensors(self) -> list[Optional]:
        """All tensors, for `with_tensors`."""
        return [
            self.reset_mask,
            self.hidden_mask,
            self.candidate_mask,
            self.zoneout_h_mask,
            self.zoneout_c_mask,
            *self.norms,
        ]

    def with_tensors(self, tensors: Sequence[Optional]) -> Variant:
        """The same with other tensors, in the order of `tensors`."""
        reset, hidden, candidate, of_h, of_c, *norms = tensors
        return replace(
            self,
            reset_mask=reset,
            hidden_mask=hidden,
            candidate_mask=candidate,
            zoneout_h_mask=of_h,
            zoneout_c_mask=of_c,
            norms=[norm for norm in norms if norm is not None],
        )


class Options(NamedTuple):
    """A module's choice: see FusedLSTM's arguments."""

    recurrent_dropout: float = 0.0
    recurrent_dropout_mode: str = "sequence"
    zoneout: Zoneout = 0.0
    weight_dropout: float = 0.0
    layer_norm: bool = False
    save_memory: bool = False

    def non_default(self) -> dict[str, Any]:
        """The options that differ from their defaults, by name."""
        return {
            name: value
            for (name, value), default in zip(self._asdict().items(), NEUTRAL, strict=True)
            if not _is(value, default)
        }


NEUTRAL = Options()


def _is(value: object, default: object) -> bool:
    """Whether a value is the default. No bool is a number here, as for nn.LSTM's dropout."""
    kinds = (float, int) if isinstance(default, float) else (type(default),)
    return type(value) in kinds and value == default


def _is_own(module: object) -> bool:
    """Whether the options' names are ours: a subclass that fuse() extended may use them itself."""
    plain = getattr(type(module), "_unfused_class", None)
    return plain is None or plain in _TORCHS


class Option(Generic[T]):
    """An attribute with a variant's option. It may change at any time, as nn.LSTM's dropout.

    An assignment updates the module's `_fused_options`, the only attribute that a call reads: None
    as long as all options have their defaults.
    """

    def __init__(self, default: T) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, owner: type | None = None) -> T:
        values = {} if module is None else module.__dict__
        if self.name in values:
            found: T = values[self.name]
            return found
        # nn.Module.__getattr__ then finds a submodule, parameter or buffer of this name.
        tables = [values.get(table, ()) for table in ("_modules", "_parameters", "_buffers")]
        if any(self.name in table for table in tables) or not _is_own(module):
            raise AttributeError(self.name)
        return self.default

    def __set__(self, module: Any, value: T) -> None:
        module.__dict__[self.name] = value
        self._note(module)

    def __delete__(self, module: Any) -> None:
        if self.name not in module.__dict__:
            raise AttributeError(self.name)
        del module.__dict__[self.name]
        self._note(module)

    def _note(self, module: Any) -> None:
        if _is_own(module):
            values = module.__dict__
            known = [n for n in Options._fields if n in values and hasattr(type(module), n)]
            options = Options(**{n: values[n] for n in known})
            values["_fused_options"] = options if options.non_default() else None


def options_of(module: nn.Module) -> Options:
    """A module's options; the defaults for one without."""
    return getattr(module, "_fused_options", None) or NEUTRAL


def changes(module: nn.Module, *names: str) -> str:
    """A module's options of these names that change its results, as text; empty if none does."""
    changed = options_of(module).non_default()
    found = [n for n in names if n in changed and changed[n] not in (0, (0, 0))]
    return ", ".join(f"{name}={changed[name]}" for name in found)


def forget(module: nn.Module) -> None:
    """Removes the options' attributes, before a module becomes torch's own."""
    if _is_own(module):
        for name in (*Options._fields, "_fused_options"):
            module.__dict__.pop(name, None)


# Checks.


def _kind(cell: Cell) -> str:
    return cell.name.partition("_")[0].upper()


def _check_probability(name: str, value: object, meaning: str) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 <= float(value) <= 1:
        raise ValueError(
            f"{name} should be a number in range [0, 1] representing the probability of {meaning}"
        )
    return float(value)


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")


def _check_choice(name: str, value: object, first: str, second: str) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} should be of type str, got: {type(value).__name__}")
    if value not in (first, second):
        raise ValueError(f"Unknown {name} '{value}'. Select from '{first}' or '{second}'.")


def checked(cell: Cell, options: Options) -> Options:
    """The options with floats for all numbers, and zoneout as a pair (h, c).

    Raises:
        ValueError: a probability is none, or the cell has no such variant.
        TypeError: a wrong type.
    """
    zoneout: Any = options.zoneout
    if isinstance(zoneout, (tuple, list)):
        if not cell.has_cell_state:
            raise ValueError(
                f"zoneout should be one number for a {_kind(cell)}, which has no cell state, got a "
                f"{type(zoneout).__name__}"
            )
        if len(zoneout) != 2:
            raise ValueError(f"zoneout should be a number or a pair (h, c), got {len(zoneout)}")
    else:
        zoneout = (zoneout, zoneout if cell.has_cell_state else 0.0)
    dropout = _check_probability(
        "recurrent_dropout", options.recurrent_dropout, "an element being zeroed"
    )
    _check_choice("recurrent_dropout_mode", options.recurrent_dropout_mode, "sequence", "candidate")
    if options.recurrent_dropout_mode == "candidate" and not cell.has_candidate:
        raise ValueError(
            "recurrent_dropout_mode 'candidate' is only supported for LSTM and GRU: a plain RNN "
            "has no candidate"
        )
    of_h, of_c = (
        _check_probability("zoneout", p, "a unit keeping its value of the step before")
        for p in zoneout
    )
    weight_dropout = _check_probability(
        "weight_dropout", options.weight_dropout, "a weight being zeroed"
    )
    _check_flag("layer_norm", options.layer_norm)
    _check_flag("save_memory", options.save_memory)
    return options._replace(
        recurrent_dropout=dropout, zoneout=(of_h, of_c), weight_dropout=weight_dropout
    )


def check_reset_mask(mask: Tensor, expected: Sequence[int], input: Tensor) -> None:
    """Raises if a reset mask has not these sizes, is not boolean, or is on another device."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"Expected reset_mask to be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"reset_mask should be a tensor of type torch.bool, got: {mask.dtype}")
    if mask.shape != tuple(expected):
        raise RuntimeError(f"Expected reset_mask size {tuple(expected)}, got {list(mask.shape)}")
    if mask.device != input.device:
        raise RuntimeError(
            "Input and reset_mask tensors are not at the same device, found input tensor at "
            f"{input.device} and reset_mask tensor at {mask.device}"
        )


# Parameters of the layer norms.


def norm_names(cell: Cell, ends: Sequence[str]) -> list[str]:
    """The names of the layer norms' parameters. ends: of a layer's and direction's names."""
    names = ["norm_ih", "norm_hh"] + (["norm_c", "norm_c_bias"] if cell.has_cell_state else [])
    return [name + end for end in ends for name in names]


def layer_ends(num_layers: int, bidirectional: bool) -> list[str]:
    """The ends of parameters' names, by layer and direction."""
    directions = ("", "_reverse") if bidirectional else ("",)
    return [f"_l{i}{d}" for i in range(num_layers) for d in directions]


def set_up(
    module: nn.Module, cell: Cell, options: Options, ends: Sequence[str], device: Any, dtype: Any
) -> None:
    """A constructor's part: checks and sets the options, registers the layer norms' parameters."""
    found = checked(cell, options)
    if not isinstance(options.zoneout, (tuple, list)):
        found = found._replace(zoneout=float(options.zoneout))
    for name, value in found.non_default().items():
        setattr(module, name, value)
    if options.layer_norm:
        units: int = module.hidden_size  # type: ignore[assignment]
        for name in norm_names(cell, ends):
            size = units if name.startswith("norm_c") else cell.gates * units
            norm = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
            module.register_parameter(name, norm)
        reset_norms(module)


def own_norms(module: nn.Module) -> list[str]:
    """The names of a module's parameters that belong to layer norms."""
    if not _is_own(module):
        return []
    starts = ("norm_ih", "norm_hh", "norm_c")
    ends = ("", *layer_ends(getattr(module, "num_layers", 0), True))
    known = {s + bias + end for s in starts for bias in ("", "_bias") for end in ends}
    return [name for name in module._parameters if name in known]


def reset_norms(module: nn.Module) -> None:
    """Makes each layer norm the identity but for its normalisation."""
    for name in own_norms(module):
        norm = module._parameters[name]
        if norm is not None:
            nn.init.zeros_(norm) if name.startswith("norm_c_bias") else nn.init.ones_(norm)


def norms_of(module: nn.Module, cell: Cell, ends: Sequence[str]) -> list[Tensor]:
    """The current parameters of a module's layer norms.

    Raises:
        RuntimeError: there are none.
    """
    names = norm_names(cell, ends)
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise RuntimeError(
            f"layer_norm=True needs the parameters {', '.join(missing)}: construct the module with "
            "layer_norm=True"
        )
    return [getattr(module, name) for name in names]


# A call.


@dataclass(frozen=True)
class Call:
    """The variant of one call of all layers: probabilities that apply now, and tensors.

    Attributes:
        hidden_dropout: of h, one mask for the sequence.
        candidate_dropout: of the candidate.
        zoneout: of h and c.
        training: whether zoneout draws; else it takes the expectation.
        weight_dropout: of weight_hh.
        norms: of all layers, each direction's as in Variant.
        reset_mask: as in Variant.
        reset_to_initial: as in Variant.
        return_cells: whether the last layer's cell states are wanted.
        save_memory: whether the backward pass runs the forward pass again.
    """

    hidden_dropout: float = 0.0
    candidate_dropout: float = 0.0
    zoneout: tuple[float, float] = (0.0, 0.0)
    training: bool = False
    weight_dropout: float = 0.0
    norms: Sequence[Tensor] = ()
    reset_mask: Optional = None
    reset_to_initial: bool = False
    return_cells: bool = False
    save_memory: bool = False

    def draw(
        self,
        cell: Cell,
        index: int,
        num_layers: int,
        input: Tensor,
        states: Sequence[Optional],
        weights: Sequence[Tensor],
        bidirectional: bool,
        batch_sizes: Optional,
    ) -> tuple[Sequence[Tensor], Variant | None]:
        """A layer's weights and variant; None for the plain layer.

        Draws, in this order and only with a probability above 0: weight dropout, forward then
        reverse; the masks of recurrent dropout; of zoneout for h; of zoneout for c.
        """
        directions = 2 if bidirectional else 1
        per = len(weights) // directions
        device, tokens = input.device, input.shape[:-1]
        units, out = weights[1].size(0) // cell.gates, weights[1].size(1)
        if self.weight_dropout > 0:
            weights = list(weights)
            for i in range(1, len(weights), per):
                kept = random_mask(weights[i].shape, 1 - self.weight_dropout, device)
                weights[i] = weights[i] * kept * _scale(self.weight_dropout)
        hidden, candidate = None, None
        if self.hidden_dropout > 0:
            shape = (directions, _rows(input, states, batch_sizes), out)
            kept = random_mask(shape, 1 - self.hidden_dropout, device)
            hidden = kept.to(input.dtype) * _scale(self.hidden_dropout)
        if self.candidate_dropout > 0:
            shape = (directions, *tokens, units)
            candidate = random_mask(shape, 1 - self.candidate_dropout, device)
        masks = [
            random_mask((directions, *tokens, width), p, device)
            if self.training and p > 0
            else None
            for p, width in zip(self.zoneout, (out, units), strict=True)
        ]
        count = len(self.norms) // num_layers
        variant = Variant(
            reset_mask=self.reset_mask,
            reset_to_initial=self.reset_to_initial,
            hidden_mask=hidden,
            candidate_mask=candidate,
            candidate_scale=_scale(self.candidate_dropout),
            zoneout_h_mask=masks[0],
            zoneout_c_mask=masks[1],
            zoneout_h=0.0 if self.training else self.zoneout[0],
            zoneout_c=0.0 if self.training else self.zoneout[1],
            norms=self.norms[index * count : (index + 1) * count],
            return_cells=self.return_cells and index == num_layers - 1,
        )
        is_plain = (
            all(t is None for t in variant.tensors())
            and not variant.zoneout_h
            and not variant.zoneout_c
            and not variant.return_cells
        )
        return weights, None if is_plain else variant


def _scale(p: float) -> float:
    """The factor of the elements that dropout leaves; nothing is left with p of 1."""
    return 1 / (1 - p) if p < 1 else 0.0


def _rows(input: Tensor, states: Sequence[Optional], batch_sizes: Optional) -> int:
    if batch_sizes is None:
        return input.size(1)
    given = [s.size(1) for s in states if s is not None]
    return given[0] if given else int(batch_sizes[0])


def call_of(
    cell: Cell,
    options: Options,
    training: bool,
    norms: Sequence[Tensor] = (),
    reset_mask: Optional = None,
    reset_to: str = "zero",
    return_cell_states: bool = False,
) -> Call | None:
    """The variant of a call; None for a plain one.

    Raises:
        ValueError, TypeError: see `checked`; an unknown reset_to, or a wrong type.
    """
    _check_choice("reset_to", reset_to, "zero", "initial")
    _check_flag("return_cell_states", return_cell_states)
    if reset_mask is None and not return_cell_states and not options.non_default():
        return None
    options = checked(cell, options)
    dropout = options.recurrent_dropout if training else 0.0
    is_candidate = options.recurrent_dropout_mode == "candidate"
    return Call(
        hidden_dropout=0.0 if is_candidate else dropout,
        candidate_dropout=dropout if is_candidate else 0.0,
        zoneout=options.zoneout,  # type: ignore[arg-type]
        training=training,
        weight_dropout=options.weight_dropout if training else 0.0,
        norms=norms,
        reset_mask=reset_mask,
        reset_to_initial=reset_to == "initial",
        return_cells=return_cell_states,
        save_memory=options.save_memory,
    )

"""The table of cells for the tests: every cell in both torch and fusedrnn.

Tests take their cases from this table and never compare a cell's name. A new row of CELLS then
runs in every test, and a cell without a row is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedrnn
from fusedrnn import functional

Make = Callable[..., nn.Module]  # takes a module's constructor arguments


@dataclass(frozen=True)
class Cell:
    """A cell: torch's layer and single step, and ours.

    Attributes:
        name: the op's, torch.ops.fusedrnn.<name>, with "_backward" for its gradient.
        mode: the layer's, as in nn.RNNBase.
        plain: torch's layer.
        fused: our layer.
        plain_cell: torch's module for a single step.
        fused_cell: our module for a single step.
        gates: a weight's rows, in units of hidden_size.
        saved: values per step and unit, saved by the forward op for the backward pass.
        states: "h", and "c" if there is a cell state.
        projects: whether the layer takes proj_size.
        has_dead_units: whether units may stop having gradients, so small models do not train.
        options: for all four constructors, where cells share a class.
    """

    name: str
    mode: str
    plain: type[nn.RNNBase]
    fused: type[nn.RNNBase]
    plain_cell: type[nn.RNNCellBase]
    fused_cell: type[nn.RNNCellBase]
    gates: int
    saved: int
    states: tuple[str, ...] = ("h",)
    projects: bool = False
    has_dead_units: bool = False
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name

    @property
    def layer(self) -> Pair:
        return Pair(self, self.plain, self.fused)

    @property
    def step(self) -> Pair:
        return Pair(self, self.plain_cell, self.fused_cell)

    @property
    def function(self) -> Callable[..., Any]:
        return functools.partial(getattr(functional, self.plain.__name__.lower()), **self.options)

    def forward_op(self, ops: Any = torch.ops.fusedrnn) -> Any:
        return getattr(ops, self.name)

    def backward_op(self, ops: Any = torch.ops.fusedrnn) -> Any:
        return getattr(ops, f"{self.name}_backward")

    def weight_shapes(
        self, input_size: int, hidden_size: int, *, bias: bool = True, proj_size: int = 0
    ) -> list[tuple[int, ...]]:
        """One direction's shapes, in the ops' argument order."""
        rows = self.gates * hidden_size
        shapes: list[tuple[int, ...]] = [(rows, input_size), (rows, proj_size or hidden_size)]
        shapes += [(rows,), (rows,)] if bias else []
        return [*shapes, (proj_size, hidden_size)] if proj_size else shapes

    def state_widths(self, hidden_size: int, proj_size: int = 0) -> list[int]:
        """Each state's last dimension."""
        return [proj_size or hidden_size, hidden_size][: len(self.states)]

    def to_hx(self, states: Sequence[Tensor]) -> Any:
        """A module's `hx`, from as many of these states as the cell has."""
        used = tuple(states[: len(self.states)])
        return used if len(self.states) > 1 else used[0]

    def from_hx(self, hx: Any) -> tuple[Tensor, ...]:
        """The states in a module's `hx`, passed or returned."""
        return tuple(hx) if len(self.states) > 1 else (hx,)


@dataclass(frozen=True)
class Pair:
    """Torch's layer or single step for a cell, and ours."""

    cell: Cell
    plain: type[nn.Module]
    fused: type[nn.Module]

    def __str__(self) -> str:
        return "-".join([self.plain.__name__, *map(str, self.cell.options.values())])

    @property
    def is_layer(self) -> bool:
        return issubclass(self.plain, nn.RNNBase)

    def make_plain(self, *args: Any, **keywords: Any) -> nn.Module:
        return self._make(self.plain, args, keywords)

    def make_fused(self, *args: Any, **keywords: Any) -> nn.Module:
        return self._make(self.fused, args, keywords)

    @property
    def makers(self) -> tuple[Make, Make]:
        """Torch's, ours."""
        return self.make_plain, self.make_fused

    def _make(self, kind: type[nn.Module], args: Sequence[Any], keywords: Any) -> nn.Module:
        if self.is_layer and len(args) > 3:  # nn.RNN's fourth argument is its option
            return kind(*args[:3], *self.cell.options.values(), *args[3:], **keywords)
        return kind(*args, **{**self.cell.options, **keywords})

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is one of the two, and made with the cell's options."""
        return isinstance(module, (self.plain, self.fused)) and all(
            getattr(module, name) == value for name, value in self.cell.options.items()
        )


CELLS = (
    Cell(
        name="lstm",
        mode="LSTM",
        plain=nn.LSTM,
        fused=fusedrnn.FusedLSTM,
        plain_cell=nn.LSTMCell,
        fused_cell=fusedrnn.FusedLSTMCell,
        gates=4,
        saved=5,
        states=("h", "c"),
        projects=True,
    ),
    Cell(
        name="gru",
        mode="GRU",
        plain=nn.GRU,
        fused=fusedrnn.FusedGRU,
        plain_cell=nn.GRUCell,
        fused_cell=fusedrnn.FusedGRUCell,
        gates=3,
        saved=5,
    ),
    Cell(
        name="rnn_tanh",
        mode="RNN_TANH",
        plain=nn.RNN,
        fused=fusedrnn.FusedRNN,
        plain_cell=nn.RNNCell,
        fused_cell=fusedrnn.FusedRNNCell,
        gates=1,
        saved=1,
        options={"nonlinearity": "tanh"},
    ),
    Cell(
        name="rnn_relu",
        mode="RNN_RELU",
        plain=nn.RNN,
        fused=fusedrnn.FusedRNN,
        plain_cell=nn.RNNCell,
        fused_cell=fusedrnn.FusedRNNCell,
        gates=1,
        saved=1,
        has_dead_units=True,
        options={"nonlinearity": "relu"},
    ),
)
# Ops for cells without a torch module: they have their own tests.
NOT_IN_TORCH: tuple[str, ...] = ()

LAYERS = [cell.layer for cell in CELLS]
STEPS = [cell.step for cell in CELLS]
MODULES = [*LAYERS, *STEPS]

EACH_CELL = pytest.mark.parametrize("cell", CELLS, ids=str)
EACH_LAYER = pytest.mark.parametrize("pair", LAYERS, ids=str)
EACH_STEP = pytest.mark.parametrize("pair", STEPS, ids=str)
EACH_MODULE = pytest.mark.parametrize("pair", MODULES, ids=str)


def cell_named(name: str) -> Cell:
    """The row with an op's name.

    Raises:
        LookupError: there is none.
    """
    for cell in CELLS:
        if cell.name == name:
            return cell
    raise LookupError(f"no cell {name!r} in the tests' table: {', '.join(map(str, CELLS))}")


def pair_of(module: nn.Module) -> Pair:
    """The row with a module, torch's or ours.

    Raises:
        LookupError: there is none.
    """
    for pair in MODULES:
        if pair.matches(module):
            return pair
    raise LookupError(f"no cell of the tests' table is {module}")

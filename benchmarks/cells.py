"""The recurrent cells under measurement: one row each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

import fusedrnn


@dataclasses.dataclass(frozen=True)
class Cell:
    """A recurrent cell.

    Attributes:
        name: a case names the layer by it, and the single-step module by it with "Cell" appended.
        gates: blocks of H rows in a weight.
        states: names of the states, in nn's order.
        onnx_gates: nn's index of each gate, in the ONNX operator's order.
        onnx_attributes: further attributes of the ONNX operator, by the number of directions.
        torch_name: nn's layer; `name` if empty. The ONNX operator has the same name.
        options: keyword arguments that every module of this cell needs.
    """

    name: str
    gates: int
    states: tuple[str, ...]
    onnx_gates: tuple[int, ...]
    onnx_attributes: Callable[[int], Mapping[str, Any]] = lambda directions: {}
    torch_name: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "torch_name", self.torch_name or self.name)

    def torch(self, *sizes: int, step: bool = False, **options: Any) -> nn.Module:
        """Builds nn's layer, or its single-step module."""
        return self._build(nn, f"{self.torch_name}{'Cell' * step}", sizes, options)

    def fused(self, *sizes: int, step: bool = False, **options: Any) -> nn.Module:
        """Builds our layer, or our single-step module."""
        return self._build(fusedrnn, f"Fused{self.torch_name}{'Cell' * step}", sizes, options)

    def _build(self, library: Any, name: str, sizes: Any, options: dict[str, Any]) -> nn.Module:
        module: nn.Module = getattr(library, name)(*sizes, **self.options, **options)
        return module


CELLS = {
    cell.name: cell
    for cell in (
        # nn orders the gates i f g o, ONNX i o f c.
        Cell("LSTM", 4, ("h", "c"), (0, 3, 1, 2)),
        # nn orders the gates r z n, ONNX z r h.
        Cell("GRU", 3, ("h",), (1, 0, 2), lambda directions: {"linear_before_reset": 1}),
        Cell("RNN", 1, ("h",), (0,)),  # with tanh, the default of both
    )
}
# The layer and the single-step module of each cell, by a case's name for them.
LAYERS = tuple(CELLS)
STEPS = tuple(f"{name}Cell" for name in CELLS)
# Our modules for all cells.
FUSED = tuple(
    getattr(fusedrnn, f"Fused{cell.torch_name}{suffix}")
    for cell in CELLS.values()
    for suffix in ("", "Cell")
)


def cell_of(name: str) -> Cell:
    """The row of a layer or of a single-step module.

    Raises:
        ValueError: no row has this name.
    """
    if name not in LAYERS + STEPS:
        raise ValueError(f"no cell {name!r}; there are {', '.join(LAYERS + STEPS)}")
    return CELLS[name.removesuffix("Cell")]

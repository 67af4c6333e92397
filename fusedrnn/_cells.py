"""The library's cells, a row each: constants from csrc/cells.h, and a step in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

States = tuple[Tensor, ...]
# (weight_ih x + bias_ih [B, G*H], states, weight_hh, bias_hh, weight_hr) -> next states. Variants
# give `at`, a Places, as well.
Step = Callable[..., States]


def _unchanged(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Places:
    """The places in a step where a variant acts (fusedrnn/_variant.py). By default none does.

    Attributes:
        hidden: gives weight_hh h + bias_hh, from h, weight_hh and bias_hh.
        candidate: takes the candidate, the tanh of a gate, and gives its value.
        cell: takes the new cell state for the output's tanh.
    """

    hidden: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear
    candidate: Callable[[Tensor], Tensor] = _unchanged
    cell: Callable[[Tensor], Tensor] = _unchanged


_PLAIN = Places()


@dataclass(frozen=True)
class Cell:
    """A cell: its ops are fusedrnn::<name> and fusedrnn::<name>_backward."""

    name: str
    step: Step
    gates: int  # G
    has_cell_state: bool  # c beside h
    has_projection: bool  # whether its layers may have a weight_hr
    has_candidate: bool = False  # whether a step passes a candidate to Places
    # Under autocast on the CPU torch's modules cast to the autocast type or keep the input's type.
    layer_casts_on_cpu: bool = False
    cell_casts_on_cpu: bool = False
    saved: int = 0  # values a unit that the forward op saves
    index: int = -1  # in csrc/cells.h

    @property
    def states(self) -> int:
        """How many states it has: h, or h and c."""
        return 2 if self.has_cell_state else 1

    @property
    def weights(self) -> tuple[int, ...]:
        """A direction's possible numbers of weights: without and with biases, projected."""
        return (2, 3, 4, 5) if self.has_projection else (2, 4)


def lstm_step(
    x: Tensor,
    states: States,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    at: Places = _PLAIN,
) -> States:
    """One step of an LSTM, equations as in torch.nn.LSTM."""
    h, c = states
    i, f, g, o = (x + at.hidden(h, weight_hh, bias_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * at.candidate(g.tanh())
    h = o.sigmoid() * at.cell(c).tanh()
    return h if weight_hr is None else F.linear(h, weight_hr), c


def gru_step(
    x: Tensor,
    states: States,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    _: Tensor | None,
    at: Places = _PLAIN,
) -> States:
    """One step of a GRU, equations as in torch.nn.GRU."""
    (h,) = states
    x_r, x_z, x_n = x.chunk(3, -1)
    h_r, h_z, h_n = at.hidden(h, weight_hh, bias_hh).chunk(3, -1)
    z = (x_z + h_z).sigmoid()
    n = at.candidate((x_n + (x_r + h_r).sigmoid() * h_n).tanh())
    return ((1 - z) * n + z * h,)


def _rnn_step(nonlinearity: Callable[[Tensor], Tensor]) -> Step:
    def step(
        x: Tensor,
        states: States,
        weight_hh: Tensor,
        bias_hh: Tensor | None,
        _: Tensor | None,
        at: Places = _PLAIN,
    ) -> States:
        """One step of a plain RNN, equations as in torch.nn.RNN."""
        (h,) = states
        return (nonlinearity(x + at.hidden(h, weight_hh, bias_hh)),)

    return step


# A cell's Python side, by name.
_ROWS: dict[str, dict[str, Any]] = {
    "lstm": {"step": lstm_step, "has_candidate": True, "layer_casts_on_cpu": True},
    "gru": {"step": gru_step, "has_candidate": True},
    "rnn_tanh": {
        "step": _rnn_step(torch.tanh),
        "layer_casts_on_cpu": True,
        "cell_casts_on_cpu": True,
    },
    "rnn_relu": {
        "step": _rnn_step(torch.relu),
        "layer_casts_on_cpu": True,
        "cell_casts_on_cpu": True,
    },
}


def cells(constants: list[Mapping[str, Any]]) -> dict[str, Cell]:
    """The compiled cells by name. constants: from fusedrnn._C.cells()."""
    return {row["name"]: Cell(**row, **_ROWS[row["name"]]) for row in constants}

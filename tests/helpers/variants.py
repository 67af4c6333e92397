"""The variants' oracle: row by row and step by step in float64, from the papers' formulas.

It shares no code with fusedrnn but `random_mask`, which it calls in the documented order.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fusedrnn._variant import random_mask
from helpers.cells import CELLS, Cell

LAYOUTS = ("padded", "batch first", "packed", "unsorted", "lengths", "unbatched")
I = 3


@dataclass(frozen=True)
class Case:
    """A module, its options and a call. `options`: the constructor's."""

    cell: Cell
    options: dict[str, Any] = field(default_factory=dict)
    layout: str = "padded"
    hidden_size: int = 4
    num_layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    proj_size: int = 0
    dropout: float = 0.0
    dtype: torch.dtype = torch.float64
    with_hx: bool = True
    training: bool = True
    reset: float = 0.0  # the probability of a reset; 0 for no mask
    reset_to: str = "zero"
    cells: bool = False
    lengths: tuple[int, ...] = (4, 4, 4)
    seed: int = 0

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def make(self) -> nn.Module:
        settings: dict[str, Any] = {"proj_size": self.proj_size} if self.proj_size else {}
        torch.manual_seed(self.seed)
        module = self.cell.layer.make_fused(
            I,
            self.hidden_size,
            self.num_layers,
            bias=self.bias,
            batch_first=self.layout == "batch first",
            dropout=self.dropout if self.num_layers > 1 else 0.0,
            bidirectional=self.bidirectional,
            dtype=self.dtype,
            **settings,
            **self.options,
        )
        with torch.no_grad():
            for name, p in module.named_parameters():
                if name.startswith("norm"):  # away from one and zero
                    p.add_(0.5 * torch.randn(p.shape, dtype=torch.float64).to(p.dtype))
        return module.train(self.training)


FEATURES: dict[str, dict[str, Any]] = {
    "recurrent dropout": {"options": {"recurrent_dropout": 0.4}},
    "candidate dropout": {
        "options": {"recurrent_dropout": 0.4, "recurrent_dropout_mode": "candidate"}
    },
    "zoneout": {"options": {"zoneout": 0.3}},
    "weight dropout": {"options": {"weight_dropout": 0.4}},
    "layer norm": {"options": {"layer_norm": True}},
    "reset to zero": {"reset": 0.4},
    "reset to initial": {"reset": 0.4, "reset_to": "initial"},
    "cell states": {"cells": True},
}


def has(cell: Cell, feature: str) -> bool:
    """Whether a cell has a feature: plain RNNs have no candidate, and only an LSTM has c."""
    if feature == "candidate dropout":
        return cell.gates > 1
    return feature != "cell states" or "c" in cell.states


FEATURES_OF_CELLS = [
    (cell, feature) for cell, feature in itertools.product(CELLS, FEATURES) if has(cell, feature)
]


def random_case(seed: int) -> Case:
    """A composition of anything."""
    draw = random.Random(seed)

    def maybe(p: float = 0.5) -> bool:
        return draw.random() < p

    cell = draw.choice(CELLS)
    has_c = "c" in cell.states
    options: dict[str, Any] = {}
    if maybe():
        options["recurrent_dropout"] = draw.choice((0.1, 0.5, 1.0) if maybe(0.2) else (0.2, 0.5))
        if has(cell, "candidate dropout") and maybe():
            options["recurrent_dropout_mode"] = "candidate"
    if maybe():
        options["zoneout"] = draw.choice((0.3, 1.0) if maybe(0.1) else (0.2, 0.4))
        if has_c and maybe():
            options["zoneout"] = draw.choice(((0.3, 0.0), (0.0, 0.4), (0.1, 0.5)))
    if maybe(0.4):
        options["weight_dropout"] = draw.choice((0.2, 0.5))
    if maybe():
        options["layer_norm"] = True
    if maybe(0.2):
        options["save_memory"] = True
    layout = draw.choice(LAYOUTS)
    steps, rows = draw.randint(1, 5), 1 if layout == "unbatched" else draw.randint(1, 3)
    lengths = [steps] * rows
    if layout in ("packed", "unsorted", "lengths"):
        lengths = [draw.randint(0 if layout == "lengths" else 1, steps) for _ in range(rows)]
        if layout == "packed":
            lengths.sort(reverse=True)
    half = draw.choice((torch.bfloat16, torch.float16))
    # The norm of weight_hh h does not depend on an h of one value, but by rounding.
    proj_size = 3 if "layer_norm" in options else 1
    return Case(
        cell=cell,
        options=options,
        layout=layout,
        # A norm of few values has too small a variance now and then.
        hidden_size=draw.randint(7, 9) if "layer_norm" in options else draw.randint(2, 5),
        num_layers=draw.choice((1, 1, 2, 3)),
        bidirectional=maybe(),
        bias=maybe(0.8),
        proj_size=proj_size if cell.projects and maybe(0.3) else 0,
        dropout=0.3 if maybe(0.3) else 0.0,
        dtype=draw.choice((torch.float64,) * 4 + (torch.float32,) * 2 + (half,)),
        with_hx=maybe(0.7),
        training=maybe(0.7),
        reset=0.3 if maybe(0.6) else 0.0,
        reset_to=draw.choice(("zero", "initial")),
        cells=has_c and maybe(),
        lengths=tuple(lengths),
        seed=seed,
    )


# A call of ours.


@dataclass
class Arguments:
    """A call's tensors, dense: [T, B, ...] in the caller's order of rows."""

    x: Tensor
    states: list[Tensor]
    reset: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Arguments:
        return Arguments(function(self.x), [function(s) for s in self.states], self.reset)


def arguments(case: Case) -> Arguments:
    torch.manual_seed(case.seed + 1)
    steps, rows = max([*case.lengths, 1]), len(case.lengths)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(case.dtype).requires_grad_()

    x = new(steps, rows, I)
    states = [
        new(case.num_layers * case.directions, rows, width)
        for width in case.cell.state_widths(case.hidden_size, case.proj_size)
    ]
    reset = torch.rand(steps, rows) < case.reset if case.reset else None
    return Arguments(x, states if case.with_hx else [], reset)


def call(case: Case, module: nn.Module, given: Arguments) -> tuple[list[Tensor], Any]:
    """Our results as the oracle gives them, and the result itself."""
    x, reset = given.x, given.reset
    hx = case.cell.to_hx(given.states) if given.states else None
    settings: dict[str, Any] = {"return_cell_states": True} if case.cells else {}
    unsqueezed = [s[:, 0] for s in given.states]
    of_input: Any = x
    of_reset: Any = reset
    if case.layout == "batch first":
        of_input, of_reset = x.transpose(0, 1), None if reset is None else reset.t()
    elif case.layout == "unbatched":
        of_input, of_reset = x[:, 0], None if reset is None else reset[:, 0]
        hx = case.cell.to_hx(unsqueezed) if unsqueezed else None
    elif case.layout in ("packed", "unsorted"):
        of_input = packed(case, x)
        of_reset = None if reset is None else packed(case, reset.unsqueeze(-1))
        if of_reset is not None:
            of_reset = of_reset._replace(data=of_reset.data.squeeze(-1))
    elif case.layout == "lengths":
        settings["lengths"] = list(case.lengths)
    if reset is not None:
        settings |= {"reset_mask": of_reset, "reset_to": case.reset_to}
    torch.manual_seed(case.seed + 2)
    result = module(of_input, hx, **settings)
    output, final, *cells = result
    tokens = [dense(case, t) for t in (output, *cells)]
    finals = list(case.cell.from_hx(final))
    if case.layout == "unbatched":
        finals = [s.unsqueeze(1) for s in finals]
    return [tokens[0], *finals, *tokens[1:]], result


def packed(case: Case, x: Tensor) -> PackedSequence:
    lengths = torch.tensor(case.lengths)
    return pack_padded_sequence(x, lengths, enforce_sorted=case.layout == "packed")


def dense(case: Case, y: Any) -> Tensor:
    if isinstance(y, PackedSequence):
        return pad_packed_sequence(y)[0]
    if case.layout == "batch first":
        return y.transpose(0, 1)
    return y.unsqueeze(1) if case.layout == "unbatched" else y


# The oracle.


def sigmoid(v: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-v))


def normalised(v: Tensor) -> Tensor:
    mean = v.sum() / v.numel()
    variance = ((v - mean) ** 2).sum() / v.numel()
    return (v - mean) / torch.sqrt(variance + 1e-5)


def lstm(a: Tensor, u: Tensor, h: Tensor, c: Tensor, g_factor: Any, norm: Any) -> Any:
    i, f, g, o = (a + u).reshape(4, -1)
    c = sigmoid(f) * c + sigmoid(i) * (torch.tanh(g) * g_factor)
    return sigmoid(o) * torch.tanh(norm(c)), c


def gru(a: Tensor, u: Tensor, h: Tensor, c: Any, n_factor: Any, norm: Any) -> Any:
    (a_r, a_z, a_n), (u_r, u_z, u_n) = a.reshape(3, -1), u.reshape(3, -1)
    r, z = sigmoid(a_r + u_r), sigmoid(a_z + u_z)
    n = torch.tanh(a_n + r * u_n) * n_factor
    return (1 - z) * n + z * h, c


def rnn_tanh(a: Tensor, u: Tensor, h: Tensor, c: Any, factor: Any, norm: Any) -> Any:
    return torch.tanh(a + u), c


def rnn_relu(a: Tensor, u: Tensor, h: Tensor, c: Any, factor: Any, norm: Any) -> Any:
    return (a + u).clamp(min=0), c


FORMULAS = {"lstm": lstm, "gru": gru, "rnn_tanh": rnn_tanh, "rnn_relu": rnn_relu}


@dataclass
class Masks:
    """One layer's draws, in the documented order. None where nothing is drawn."""

    weights: list[Tensor] | None
    hidden: Tensor | None
    candidate: Tensor | None
    zoneout: list[Tensor | None]


def masks_of(case: Case, tokens: Sequence[int], shape_of_weight: Sequence[int]) -> Masks:
    options, cpu = case.options, torch.device("cpu")
    H, D, P = case.hidden_size, case.directions, case.proj_size or case.hidden_size
    if not case.training:
        return Masks(None, None, None, [None, None])
    weights = None
    if p := options.get("weight_dropout", 0.0):
        scale = 1 / (1 - p) if p < 1 else 0
        shape = tuple(shape_of_weight)
        weights = [random_mask(shape, 1 - p, cpu).double() * scale for _ in range(D)]
    hidden, candidate = None, None
    if p := options.get("recurrent_dropout", 0.0):
        scale = 1 / (1 - p) if p < 1 else 0
        if options.get("recurrent_dropout_mode") == "candidate":
            candidate = random_mask((D, *tokens, H), 1 - p, cpu).double() * scale
        else:
            kept = random_mask((D, len(case.lengths), P), 1 - p, cpu)
            hidden = (kept.to(case.dtype) * scale).double()
    zoneout = [
        random_mask((D, *tokens, width), p, cpu) if p else None
        for p, width in zip(zoneout_of(case), (P, H), strict=True)
    ]
    return Masks(weights, hidden, candidate, zoneout)


def zoneout_of(case: Case) -> tuple[float, float]:
    p = case.options.get("zoneout", 0.0)
    return p if isinstance(p, tuple) else (p, p if "c" in case.cell.states else 0.0)


def oracle(case: Case, weights: dict[str, Tensor], given: Arguments) -> list[Tensor]:
    """Output [T, B, D*P], final states [L*D, B, ...] and, if wanted, cells [T, B, D*H]."""
    steps, rows, _ = given.x.shape
    D, H = case.directions, case.hidden_size
    P = case.proj_size or H
    is_packed = case.layout in ("packed", "unsorted")
    order = list(range(rows))
    if case.layout == "unsorted":
        order = packed(case, given.x).sorted_indices.tolist()
    active = [[b for b in order if t < case.lengths[b]] for t in range(steps)]
    tokens = [sum(map(len, active))] if is_packed else [steps, rows]

    def place(t: int, b: int) -> tuple[int, ...]:
        """A token's index in a mask."""
        return (sum(map(len, active[:t])) + active[t].index(b),) if is_packed else (t, b)

    zero = given.x.new_zeros(())
    layer_input = given.x
    finals: list[list[list[Tensor]]] = [[], []]
    torch.manual_seed(case.seed + 2)
    for layer in range(case.num_layers):
        if layer and case.dropout and case.training:
            noise = F.dropout(torch.ones((*tokens, D * P), dtype=case.dtype), case.dropout)
            layer_input = layer_input * torch.stack(
                [
                    torch.stack(
                        [
                            noise[place(t, b)].double()
                            if t < case.lengths[b]
                            else torch.zeros(D * P, dtype=torch.float64)
                            for b in range(rows)
                        ]
                    )
                    for t in range(steps)
                ]
            )
        masks = masks_of(case, tokens, weights[f"weight_hh_l{layer}"].shape)
        outputs = [[[zero.expand(P)] * D for _ in range(rows)] for _ in range(steps)]
        cells = [[[zero.expand(H)] * D for _ in range(rows)] for _ in range(steps)]
        for d in range(D):
            end = f"_l{layer}" + ("_reverse" if d else "")
            own = {n.removesuffix(end): w for n, w in weights.items() if n.endswith(end)}
            if masks.weights is not None:
                own["weight_hh"] = own["weight_hh"] * masks.weights[d]
            of_direction: list[list[Tensor]] = [[], []]
            for b in range(rows):
                initial = [zero.expand(P), zero.expand(H)]
                for i, s in enumerate(given.states):
                    initial[i] = s[layer * D + d, b]
                h, c = initial
                times = range(case.lengths[b])
                for t in reversed(times) if d else times:
                    if given.reset is not None and given.reset[t, b]:
                        is_initial = case.reset_to == "initial"
                        h, c = initial if is_initial else (zero.expand(P), zero.expand(H))
                    factor = 1.0 if masks.hidden is None else masks.hidden[d, order.index(b)]
                    new = one_step(
                        case,
                        own,
                        layer_input[t, b],
                        (h, c),
                        h * factor,
                        1.0 if masks.candidate is None else masks.candidate[(d, *place(t, b))],
                    )
                    after = []
                    for p, mask, old, value in zip(
                        zoneout_of(case), masks.zoneout, (h, c), new, strict=True
                    ):
                        if mask is not None:
                            keep = mask[(d, *place(t, b))].double()
                        else:
                            keep = torch.tensor(0.0 if case.training else p, dtype=torch.float64)
                        after.append(keep * old + (1 - keep) * value)
                    h, c = after
                    outputs[t][b][d], cells[t][b][d] = h, c
                of_direction[0].append(h)
                of_direction[1].append(c)
            finals[0].append(of_direction[0])
            finals[1].append(of_direction[1])
        layer_input, of_cells = (
            torch.stack([torch.stack([torch.cat(row) for row in step]) for step in of_steps])
            for of_steps in (outputs, cells)
        )
    states = [torch.stack([torch.stack(rows) for rows in s]) for s in finals]
    results = [layer_input, *states[: len(case.cell.states)]]
    return [*results, of_cells] if case.cells else results


def one_step(
    case: Case,
    own: dict[str, Tensor],
    x: Tensor,
    states: tuple[Tensor, Tensor],
    operand: Tensor,
    candidate_factor: Any,
) -> tuple[Tensor, Tensor]:
    a, u = own["weight_ih"] @ x, own["weight_hh"] @ operand
    has_norm = case.options.get("layer_norm", False)
    if has_norm:
        a, u = normalised(a) * own["norm_ih"], normalised(u) * own["norm_hh"]
    if case.bias:
        a, u = a + own["bias_ih"], u + own["bias_hh"]

    def norm(c: Tensor) -> Tensor:
        return normalised(c) * own["norm_c"] + own["norm_c_bias"] if has_norm else c

    h, c = FORMULAS[case.cell.name](a, u, *states, candidate_factor, norm)
    return (own["weight_hr"] @ h if case.proj_size else h), c

"""The variants' ops against the reference in float64, and direct calls of them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.cells import CELLS
from torch import Tensor

from fusedrnn import _ops, _reference
from fusedrnn._variant import Variant

EVERYTHING = ("reset", "hidden", "candidate", "zoneout h", "zoneout c", "norms")


@dataclass
class Problem:
    """One layer's call. `fields`: of Variant."""

    cell: Any
    input: Tensor
    states: list[Tensor | None]
    weights: list[Tensor]
    bidirectional: bool
    batch_sizes: Tensor | None
    lengths: Tensor | None
    fields: dict[str, Any]

    @property
    def leaves(self) -> list[Tensor]:
        states = [s for s in self.states if s is not None]
        return [self.input, *states, *self.weights, *self.fields["norms"]]

    def run(self, layer: Any) -> list[Tensor]:
        """Output, final states and cell states."""
        output, final, cells = layer(
            self.cell,
            self.input,
            self.states,
            self.weights,
            self.bidirectional,
            self.batch_sizes,
            self.lengths,
            Variant(**self.fields),
        )
        return [output, *final, *([] if cells is None else [cells])]

    def arguments(self, save: bool) -> list[Any]:
        """The op's."""
        of_variant = [self.fields.get(name) for name in _ops._VARIANT_FIELDS]
        return [
            self.input,
            *self.states,
            self.weights,
            self.bidirectional,
            self.batch_sizes,
            self.lengths,
            *of_variant,
            save,
        ]


def problem(seed: int, dtype: torch.dtype = torch.float64, on: tuple[str, ...] = ()) -> Problem:
    """A random problem; `on` names the features that it has, or by default any."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (scale * values).to(dtype).requires_grad_()

    def mask(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < 0.4

    def has(feature: str) -> bool:
        return feature in on if on else draw.random() < 0.5

    cell = _ops.CELLS[draw.choice(list(_ops.CELLS))]
    steps, rows, inputs = draw.randint(1, 9), draw.randint(1, 7), draw.randint(1, 6)
    # Less and more than a vector, and more than a panel.
    units = draw.choice((7, 8, 16, 21, 40, 70))
    directions = draw.choice((1, 2))
    projected = cell.has_projection and draw.random() < 0.3
    out, gates = (draw.randint(3, 6) if projected else units), cell.gates * units
    has_bias = draw.random() < 0.7
    weights = []
    for _ in range(directions):
        weights += [normal(gates, inputs, scale=0.5), normal(gates, out, scale=0.5)]
        weights += [normal(gates, scale=0.3), normal(gates, scale=0.3)] if has_bias else []
        weights += [normal(out, units, scale=0.5)] if projected else []
    layout = draw.choice(("padded", "padded", "packed", "lengths"))
    x, tokens = normal(steps, rows, inputs), (steps, rows)
    batch_sizes = lengths = None
    if layout == "packed":
        of_rows = sorted((draw.randint(1, steps) for _ in range(rows)), reverse=True)
        of_rows[0] = steps
        batch_sizes = torch.tensor([sum(n > t for n in of_rows) for t in range(steps)])
        x = torch.cat([x[t, :n] for t, n in enumerate(batch_sizes)]).detach().requires_grad_()
        tokens = (x.size(0),)
    if layout == "lengths":
        lengths = torch.tensor([draw.randint(0, steps) for _ in range(rows)])
    states = [normal(directions, rows, out), normal(directions, rows, units)][: cell.states]
    given = draw.random() < 0.6
    norms = []
    for _ in range(directions if has("norms") else 0):
        norms += [normal(gates), normal(gates)]
        norms += [normal(units), normal(units)] if cell.has_cell_state else []
    c, draws = cell.has_cell_state, draw.random() < 0.5
    fields = {
        "reset_mask": mask(*tokens) if has("reset") else None,
        "reset_to_initial": draw.random() < 0.5,
        "hidden_mask": mask(directions, rows, out).to(dtype) * 1.7 if has("hidden") else None,
        "candidate_mask": None,
        "candidate_scale": 1.6,
        "zoneout_h_mask": None,
        "zoneout_c_mask": None,
        "zoneout_h": 0.0,
        "zoneout_c": 0.0,
        "norms": norms,
        "return_cells": c,
    }
    if has("candidate") and cell.has_candidate:
        fields["candidate_mask"] = mask(directions, *tokens, units)
    for name, width, is_there in (("h", out, True), ("c", units, c)):
        if has(f"zoneout {name}") and is_there:
            if draws:
                fields[f"zoneout_{name}_mask"] = mask(directions, *tokens, width)
            else:
                fields[f"zoneout_{name}"] = 0.3
    return Problem(
        cell,
        x,
        list(states) if given else [None] * cell.states,
        weights,
        directions == 2,
        batch_sizes,
        lengths,
        fields,
    )


def gradients(p: Problem, results: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in results]
    return list(
        torch.autograd.grad(results, p.leaves, gradients, allow_unused=True, materialize_grads=True)
    )


@pytest.mark.parametrize("first", range(0, 500, 50))
def test_compositions(first: int) -> None:
    """Values and all gradients are the reference's; inference gives the bits of training."""
    for seed in range(first, first + 50):
        p = problem(seed)
        ours, theirs = p.run(_ops.variant_layer), p.run(_reference.layer)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        for a, b in zip(gradients(p, ours, seed), gradients(p, theirs, seed), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        with torch.no_grad():
            again = p.run(_ops.variant_layer)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types(dtype: torch.dtype) -> None:
    """As the reference in the same type: float32 inside."""
    eps = torch.finfo(dtype).eps
    for seed in range(40):
        p = problem(seed, dtype, ("reset", "hidden", "candidate", "zoneout h", "zoneout c"))
        ours, theirs = p.run(_ops.variant_layer), p.run(_reference.layer)
        assert [y.dtype for y in ours] == [dtype] * len(ours)
        pairs = [*zip(ours, theirs, strict=True)]
        pairs += zip(gradients(p, ours, seed), gradients(p, theirs, seed), strict=True)
        for a, b in pairs:
            size = max(1.0, b.abs().max().item() if b.numel() else 0)
            torch.testing.assert_close(a, b, rtol=0, atol=50 * eps * size)


def test_same_bits_for_any_threads() -> None:
    """Large enough that threads share a layer: its units, its rows, a norm's rows."""
    threads = torch.get_num_threads()
    for rows, norms in ((1, False), (40, False), (40, True)):
        torch.manual_seed(0)
        units, gates = 128, 512
        weights = [torch.randn(gates, units) / 12, torch.randn(gates, units) / 12]
        norm = [torch.rand(gates), torch.rand(gates), torch.rand(units), torch.rand(units)]
        for t in (*weights, *norm):
            t.requires_grad_()
        variant = Variant(
            reset_mask=torch.rand(30, rows) < 0.1,
            zoneout_h_mask=torch.rand(1, 30, rows, units) < 0.2,
            zoneout_c=0.1,
            norms=norm if norms else [],
            return_cells=True,
        )
        x = torch.randn(30, rows, units, requires_grad=True)
        found = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                lstm = _ops.CELLS["lstm"]
                y, final, cells = _ops.variant_layer(
                    lstm, x, [None, None], weights, False, None, None, variant
                )
                assert cells is not None
                loss = y.square().sum() + cells.sum()
                found.append([y, *final, cells, *torch.autograd.grad(loss, [x, *weights])])
        finally:
            torch.set_num_threads(threads)
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# Direct calls.


def op_of(p: Problem, end: str = "") -> Any:
    return getattr(torch.ops.fusedrnn, f"{p.cell.name}_variant{end}").default


def a_problem(cell: str, on: tuple[str, ...]) -> Problem:
    return next(
        p
        for p in (problem(seed, on=on) for seed in range(1000))
        if p.cell.name == cell and p.states[0] is not None and p.batch_sizes is None
    )


@pytest.mark.parametrize("on", [("reset", "zoneout h"), EVERYTHING], ids=len)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_opcheck(cell: Any, on: tuple[str, ...]) -> None:
    p = a_problem(str(cell), on)
    torch.library.opcheck(op_of(p), p.arguments(True))
    with torch.no_grad():
        *results, saved = op_of(p)(*p.arguments(True))
        torch.library.opcheck(op_of(p), p.arguments(False))
    n = 1 + p.cell.states
    wanted = [True] * len(p.leaves)
    of_cells = results[-1] if p.cell.has_cell_state else None
    arguments = [*results[:n], *p.arguments(True)[:-1], of_cells, saved, wanted]
    detached = torch.utils._pytree.tree_map(
        lambda t: t.detach() if isinstance(t, Tensor) else t, arguments
    )
    torch.library.opcheck(op_of(p, "_backward"), detached)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "reset_mask's type": ({"reset_mask": torch.float32}, "reset_mask must have type Bool"),
    "reset_mask's size": ({"reset_mask": None}, "Expected reset_mask size"),
    "hidden_mask's type": ({"hidden_mask": torch.float32}, "but hidden_mask has type Float"),
    "hidden_mask's size": ({"hidden_mask": None}, "Expected hidden_mask size"),
    "candidate_mask's size": ({"candidate_mask": None}, "Expected candidate_mask size"),
    "zoneout_h_mask's size": ({"zoneout_h_mask": None}, "Expected zoneout_h_mask size"),
    "zoneout_c_mask's size": ({"zoneout_c_mask": None}, "Expected zoneout_c_mask size"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_masks(case: str) -> None:
    (changes, message), p = BAD[case], a_problem("lstm", EVERYTHING)
    for name, dtype in changes.items():
        mask = p.fields[name]
        if mask is None:  # zoneout by its expectation
            width = p.weights[1].size(1 if name == "zoneout_h_mask" else 0) // (
                1 if name == "zoneout_h_mask" else 4
            )
            mask = torch.ones(1 + p.bidirectional, *p.input.shape[:2], width, dtype=torch.bool)
        p.fields[name] = mask[..., :-1] if dtype is None else mask.to(dtype)
    with pytest.raises(RuntimeError, match=message):
        op_of(p)(*p.arguments(False))


def test_bad_numbers_and_norms() -> None:
    p = a_problem("lstm", ("norms",))
    for changes, message in (
        ({"zoneout_h": 1.5}, "must be from 0 to 1, got 1.5"),
        ({"zoneout_c": float("nan")}, "must be from 0 to 1, got nan"),
        ({"norms": p.fields["norms"][:-1]}, "Expected [48] norms, got [37]"),
        ({"norms": [n[:-1] for n in p.fields["norms"]]}, "Expected norm_ih size"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op_of(p)(*Problem(**{**vars(p), "fields": {**p.fields, **changes}}).arguments(False))
    rnn = a_problem("rnn_tanh", ("reset",))
    rnn.fields["candidate_mask"] = torch.ones(1, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="the cell has no candidate"):
        op_of(rnn)(*rnn.arguments(False))
    rnn.fields |= {"candidate_mask": None, "zoneout_c": 0.5}
    with pytest.raises(RuntimeError, match="the cell has no cell state"):
        op_of(rnn)(*rnn.arguments(False))


# Random masks.


def test_words_of_a_mask() -> None:
    """Philox's published words for counter 0 and key 0, by bisection of the threshold."""
    seed = torch.zeros((), dtype=torch.int64)

    def word(place: int) -> int:
        low, high = 0, 2**32
        while high - low > 1:
            middle = (low + high) // 2
            is_below = torch.ops.fusedrnn._random_mask(seed, [256], middle / 2**32)[place]
            low, high = (low, middle) if is_below else (middle, high)
        return low

    found = [word(64 * w) for w in range(4)]
    assert found == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_a_masks_values_depend_on_their_places_alone() -> None:
    seed = torch.tensor(2**62 + 12345)
    mask = torch.ops.fusedrnn._random_mask
    long = mask(seed, [1 << 20], 0.3)
    assert abs(long.double().mean().item() - 0.3) < 0.002
    for count in (0, 1, 255, 256, 257, 5000):
        assert torch.equal(mask(seed, [count], 0.3), long[:count])
    assert torch.equal(mask(seed, [4, 1 << 18], 0.3).flatten(), long)
    assert not torch.equal(mask(seed + 1, [5000], 0.3), long[:5000])
    # A larger probability only adds values.
    assert (mask(seed, [5000], 0.4) | ~long[:5000]).all()
    # Neighbours, and places a block apart, are independent.
    for distance in (1, 64, 256):
        both = (long[:-distance] & long[distance:]).double().mean().item()
        assert abs(both - 0.09) < 0.002
    with pytest.raises(RuntimeError, match="p must be from 0 to 1"):
        mask(seed, [4], 1.5)
    with pytest.raises(RuntimeError, match="seed must be one int64"):
        mask(torch.zeros(2, dtype=torch.int64), [4], 0.5)

"""`python -m benchmarks variants`: the cost of each variant of a layer.

Three candidates take turns: our layer with the variant, our plain layer, and the loop over steps
that people write for it today. The loop calls torch.lstm_cell or torch.gru_cell where the variant
acts between steps alone. Otherwise it multiplies the whole input first, and its steps are torch's
elementwise ops. For save_memory the third is torch.nn's layer under torch.utils.checkpoint. All are
float32. Saved bytes are those that the backward pass of one layer keeps, with the layer's input and
without parameters. A peak is that of a training call of several layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import machine, report
from benchmarks.cases import Case
from benchmarks.measure import MODES, in_turn, peak_memory, ratio_of_medians, spread

RESULTS = report.RESULTS / "variants.json"
CASES = (
    Case("B64 T100 H256", B=64, T=100, H=256),
    Case("B1 T100 H256", T=100, H=256),
    Case("GRU B32 T50 H128", "GRU", B=32, T=50, H=128),
)
EPISODE = 10  # steps between resets, on average
COMPARED = 20  # steps: later ones amplify rounding, most with layer norm
LAYERS = 4  # of the peak: the backward pass recomputes one layer at a time


@dataclasses.dataclass(frozen=True)
class Feature:
    """A variant: a layer's options, or keywords of its call.

    Attributes:
        name: in the tables.
        options: of the constructor.
        resets: whether the call has a reset_mask.
        cells: whether the call returns the cell states; the cell needs one.
        modes: where the variant does anything.
        is_random: whether results depend on masks, so that they can't be compared.
    """

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    resets: bool = False
    cells: bool = False
    modes: tuple[str, ...] = MODES
    is_random: bool = False

    def supports(self, case: Case, mode: str) -> bool:
        return mode in self.modes and (not self.cells or len(case.recurrence.states) > 1)


_DROPOUT = {"recurrent_dropout": 0.25}
_NORM = {"layer_norm": True}
FEATURES = (
    Feature("resets", resets=True),
    Feature("sequence dropout", _DROPOUT, modes=("training",), is_random=True),
    Feature(
        "candidate dropout",
        {**_DROPOUT, "recurrent_dropout_mode": "candidate"},
        modes=("training",),
        is_random=True,
    ),
    Feature("zoneout", {"zoneout": 0.1}, is_random=True),
    Feature("weight drop", {"weight_dropout": 0.5}, modes=("training",), is_random=True),
    Feature("layer norm", _NORM),
    Feature("cell states", cells=True),
    Feature("save_memory", {"save_memory": True}, modes=("training",)),
    Feature(
        "all but save_memory",
        {**_DROPOUT, **_NORM, "zoneout": 0.1, "weight_dropout": 0.5},
        resets=True,
        is_random=True,
    ),
)


class Loop(nn.Module):
    """A layer with a variant as a loop over its steps in torch, with another module's parameters.

    Args:
        layer: an LSTM or GRU of one layer and direction with the variant's parameters.
        feature: the variant.
    """

    def __init__(self, layer: nn.RNNBase, feature: Feature) -> None:
        super().__init__()
        self.layer, self.feature = layer, feature
        get = feature.options.get
        self.dropout, self.weight_dropout = get("recurrent_dropout", 0), get("weight_dropout", 0)
        self.drops_candidate = get("recurrent_dropout_mode") == "candidate"
        self.zoneout, self.layer_norm = get("zoneout", 0), get("layer_norm", False)

    def forward(self, x: Tensor, reset_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Output [T, B, H] and, for an LSTM, the cell states."""
        parameters: list[Tensor] = list(self.layer.parameters())
        w_ih, w_hh, b_ih, b_hh, *norms = parameters
        lstm = self.layer.mode == "LSTM"
        masks_h = bool(self.dropout and self.training and not self.drops_candidate)
        h = c = x.new_zeros(x.size(1), w_hh.size(1))
        locked = F.dropout(torch.ones_like(h), self.dropout) if masks_h else None
        w_hh = F.dropout(w_hh, self.weight_dropout, self.training)
        # torch.gru_cell would interpolate with the masked h.
        by_cell = not (self.layer_norm or self.drops_candidate or (masks_h and not lstm))
        steps = x if by_cell else self._input(x, w_ih, b_ih, norms)
        keep = [None] * x.size(0) if reset_mask is None else (~reset_mask)[..., None].to(x).unbind()
        outputs, cells = [], []
        for step, kept in zip(steps.unbind(), keep, strict=True):
            if kept is not None:
                h, c = h * kept, (c * kept if lstm else c)
            operand = h if locked is None else h * locked
            new_h, new_c = h, c
            if by_cell and lstm:
                new_h, new_c = torch.lstm_cell(step, (operand, c), w_ih, w_hh, b_ih, b_hh)
            elif by_cell:
                new_h = torch.gru_cell(step, operand, w_ih, w_hh, b_ih, b_hh)
            elif lstm:
                new_h, new_c = self._lstm(step + self._hidden(operand, w_hh, b_hh, norms), c, norms)
            else:
                new_h = self._gru(step, self._hidden(operand, w_hh, b_hh, norms), h)
            h, c = self._zoned(h, new_h), (self._zoned(c, new_c) if lstm else c)
            outputs.append(h)
            cells.append(c)
        return torch.stack(outputs), (torch.stack(cells) if lstm and self.feature.cells else None)

    def _input(self, x: Tensor, weight: Tensor, bias: Tensor, norms: Sequence[Tensor]) -> Tensor:
        if not self.layer_norm:
            return F.linear(x, weight, bias)
        return F.layer_norm(F.linear(x, weight), bias.shape, norms[0], bias)

    def _hidden(self, h: Tensor, weight: Tensor, bias: Tensor, norms: Sequence[Tensor]) -> Tensor:
        if not self.layer_norm:
            return F.linear(h, weight, bias)
        return F.layer_norm(F.linear(h, weight), bias.shape, norms[1], bias)

    def _candidate(self, value: Tensor) -> Tensor:
        return F.dropout(value, self.dropout, self.training) if self.drops_candidate else value

    def _lstm(self, gates: Tensor, c: Tensor, norms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * self._candidate(g.tanh())
        read = F.layer_norm(c, c.shape[-1:], norms[2], norms[3]) if self.layer_norm else c
        return o.sigmoid() * read.tanh(), c

    def _gru(self, step: Tensor, hidden: Tensor, h: Tensor) -> Tensor:
        (xr, xz, xn), (hr, hz, hn) = step.chunk(3, -1), hidden.chunk(3, -1)
        n = self._candidate((xn + (xr + hr).sigmoid() * hn).tanh())
        return n + (xz + hz).sigmoid() * (h - n)

    def _zoned(self, old: Tensor, new: Tensor) -> Tensor:
        if not self.zoneout:
            return new
        if self.training:
            return torch.where(torch.rand_like(new) < self.zoneout, old, new)
        return torch.lerp(new, old, self.zoneout)


class Checkpointed(nn.Module):
    """nn's layer, whose backward pass runs the forward pass again."""

    def __init__(self, layer: nn.RNNBase, case: Case) -> None:
        super().__init__()
        self.layer = case.recurrence.torch(case.I, case.H)
        self.layer.load_state_dict(layer.state_dict())

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """The output, and no cell states."""
        return checkpoint(self.layer, x, use_reentrant=False)[0], None


def made(case: Case, options: Mapping[str, Any]) -> Any:
    """Our layer for a case; every call gives the same weights."""
    torch.manual_seed(0)
    return case.recurrence.fused(case.I, case.H, **options)


def inputs(case: Case, feature: Feature) -> tuple[Tensor, dict[str, Tensor]]:
    """The input [T, B, I] and the masks of the call."""
    torch.manual_seed(1)
    x = torch.randn(case.T, case.B, case.I)
    return x, {"reset_mask": torch.rand(case.T, case.B) < 1 / EPISODE} if feature.resets else {}


def calls(case: Case, feature: Feature, mode: str) -> dict[str, Callable[[], Any]]:
    """The timed calls by name; each gives the output and, where the feature has them, the cells.

    Raises:
        AssertionError: the loop has other results than our layer.
    """
    x, masks = inputs(case, feature)
    ours, plain = made(case, feature.options), made(case, {})
    loop: nn.Module = Loop(ours, feature)
    if feature.options.get("save_memory"):
        loop = Checkpointed(ours, case)
    keywords: dict[str, Any] = {**masks, **({"return_cell_states": True} if feature.cells else {})}
    forwards = {
        "variant": (ours, lambda: ours(x, **keywords)[:: 2 if feature.cells else 1]),
        "plain": (plain, lambda: plain(x)),
        "loop": (loop, lambda: loop(x, **masks)),
    }
    found = {
        name: _with_mode(module.train(mode == "training"), forward, mode)
        for name, (module, forward) in forwards.items()
    }
    if not feature.is_random or mode == "inference":
        ours_found, loops = found["variant"](), found["loop"]()
        for index in (0, 1) if feature.cells else (0,):
            ours_first, loops_first = ours_found[index][:COMPARED], loops[index][:COMPARED]
        torch.testing.assert_close(ours_first, loops_first, rtol=1e-3, atol=1e-4)
    return found


def _with_mode(module: nn.Module, forward: Callable[[], Any], mode: str) -> Callable[[], Any]:
    def inference() -> Any:
        with torch.no_grad():
            return forward()

    def training() -> Any:
        module.zero_grad()
        result = forward()
        result[0].sum().backward()
        return result

    return inference if mode == "inference" else training


def measure(case: Case, feature: Feature, mode: str, seconds: float) -> dict[str, Any]:
    """A row: milliseconds of each, our cost over plain, and the loop's time over ours."""
    times = in_turn(calls(case, feature, mode), seconds)
    return {
        "name": case.name,
        "variant": feature.name,
        "mode": mode,
        "ms": {name: statistics.median(values) for name, values in times.items()},
        "spread": {name: spread(values) for name, values in times.items()},
        "over_plain": ratio_of_medians(times["variant"], times["plain"]),
        "loop_over": ratio_of_medians(times["loop"], times["variant"]),
    }


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that a layer's training call keeps for its backward pass, but for parameters.

    The input counts as kept. torch.utils.checkpoint holds it where no hook sees it.
    """
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = module(x)
    del result  # after the count: storages of freed tensors would share addresses
    return sum(kept.values())


def memory(case: Case) -> dict[str, Any]:
    """A row: bytes of the plain layer and with save_memory, saved and at the peak."""
    x, _ = inputs(case, FEATURES[0])
    row: dict[str, Any] = {"name": case.name, "saved": [], "peak": []}
    for options in ({}, {"save_memory": True}):
        row["saved"].append(saved_bytes(made(case, options), x))
        layers = made(case, {**options, "num_layers": LAYERS})
        training = _with_mode(layers, functools.partial(layers, x), "training")
        row["peak"].append(peak_memory(training))
    return row


def live_memory(case: Case) -> dict[str, Any]:
    """`memory` in a process whose C library returns freed memory at once.

    Otherwise the peak has what the library keeps for later, about as much as save_memory saves.
    """
    code = (
        "import json, sys; from benchmarks import variants; from benchmarks.cases import Case; "
        "print(json.dumps(variants.memory(Case(**json.loads(sys.argv[1])))))"
    )
    thresholds = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(dataclasses.asdict(case))],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **thresholds},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def table(run: dict[str, Any]) -> str:
    """The times, and the bytes."""
    head = ["case", "variant", "mode", "time", "over plain", "loop", "loop over ours"]
    body = [
        [
            row["name"],
            row["variant"],
            row["mode"],
            report.milliseconds(row["ms"]["variant"]),
            _ratio(row, "over_plain", "variant", "plain"),
            report.milliseconds(row["ms"]["loop"]),
            _ratio(row, "loop_over", "loop", "variant"),
        ]
        for row in run["rows"]
    ]
    lines = [report.caption(run["header"]), "", *report.markdown(head, body, text_columns=3)]
    head = [
        "case",
        "saved, KiB",
        "with save_memory",
        f"peak of {LAYERS} layers, KiB",
        "with save_memory",
    ]
    body = [
        [row["name"], *("" if n is None else f"{n / 1024:.0f}" for n in row["saved"] + row["peak"])]
        for row in run["memory"]
    ]
    return "\n".join([*lines, "", *report.markdown(head, body, text_columns=1)])


def _ratio(row: dict[str, Any], key: str, *candidates: str) -> str:
    """A ratio of two candidates; it is noisy if one of them is."""
    noise = max(row["spread"][name] for name in candidates)
    return report.ratio_text({**row[key], "spread": noise})


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, stores and reports; gives the exit status."""
    parser = report.parser("variants", __doc__)
    parser.add_argument("variants", nargs="*", metavar="variant", help="parts of variants' names")
    parser.add_argument("--seconds", type=float, default=2.0, help="for a row (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a JSON file (%(default)s)")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="report a stored run instead of measuring"
    )
    args: argparse.Namespace = parser.parse_args(argv)
    if args.report:
        print(table(json.loads(args.report.read_text())))
        return 0
    chosen = [f for f in FEATURES if not args.variants or any(v in f.name for v in args.variants)]
    if not chosen:
        parser.error(f"no such variant; there are {', '.join(f.name for f in FEATURES)}")
    run: dict[str, Any] = {"header": machine.header("cpu", []), "rows": []}
    for case in CASES:
        for feature in chosen:
            for mode in MODES:
                if feature.supports(case, mode):
                    row = measure(case, feature, mode, args.seconds)
                    run["rows"].append(row)
                    print(
                        f"{row['name']:18}{row['variant']:20}{mode:10}"
                        f"{row['ms']['variant']:10.3f} ms{row['over_plain']['ratio']:7.2f} of plain"
                        f"{row['loop_over']['ratio']:8.2f} times as fast as the loop",
                        flush=True,
                    )
    run["memory"] = [live_memory(case) for case in CASES]
    report.store(args.output, run)
    print(table(run))
    return 0

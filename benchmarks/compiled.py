"""`python -m benchmarks compiled`: whole networks, eager and under torch.compile.

Each network runs with torch.nn's recurrent layers, with fused layers, and without recurrent layers.
The last variant isolates torch.compile's effect on the rest. The fused network compiles with
fullgraph=True. torch.compile breaks the graph at nn.LSTM and leaves it out.
"""

from __future__ import annotations

import statistics
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine, report
from benchmarks.cells import cell_of
from benchmarks.measure import MODES, in_turn, ratio_of_medians, spread

RESULTS = report.RESULTS / "compiled.json"


class Network(nn.Module):
    """Embedding, recurrent layers, two linear layers: maps words [T, B] to scores [T, B, 20]."""

    def __init__(self, layers: Callable[..., nn.Module], size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, size.input_size)
        self.layers = layers(
            size.input_size,
            size.hidden_size,
            size.num_layers,
            bidirectional=size.bidirectional,
        )
        width = size.hidden_size * (2 if size.bidirectional else 1)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 20))

    def forward(self, words: Tensor) -> Tensor:
        """Log probabilities."""
        y, _ = self.layers(self.embedding(words))
        return self.head(y).log_softmax(-1)  # type: ignore[no-any-return]


class RepeatFeatures(nn.Module):
    """Replaces recurrent layers: repeats the features up to the output's width."""

    def __init__(self, input_size: int, hidden_size: int, _: int, bidirectional: bool) -> None:
        super().__init__()
        self.width = hidden_size * (2 if bidirectional else 1)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """The output, and no state."""
        return x.repeat(1, 1, -(-self.width // x.size(-1)))[..., : self.width], None


@dataclass(frozen=True)
class Size:
    """A network's size and its batch."""

    name: str
    batch: int
    steps: int
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    cell: str = "LSTM"


SIZES = (
    Size("one step, H64", 1, 1, 64, 64),
    Size("B1 T20 H64", 1, 20, 64, 64),
    Size("B1 T100 H256", 1, 100, 256, 256),
    Size("B8 T50 H128", 8, 50, 128, 128),
    Size("GRU B8 T50 H128", 8, 50, 128, 128, cell="GRU"),
    Size("tagger", 32, 50, 100, 200, 2, True),
)


def calls(size: Size, mode: str) -> dict[str, Callable[[], Any]]:
    """The timed calls, by name. Eager and compiled, torch and fused give the same scores."""
    words = torch.randint(1000, (size.steps, size.batch))
    found: dict[str, Callable[[], Any]] = {}
    expected: Tensor | None = None
    torch._dynamo.reset()
    cell = cell_of(size.cell)
    variants: dict[str, Callable[..., nn.Module]] = {
        "torch": cell.torch,
        "fused": cell.fused,
        "rest": RepeatFeatures,
    }
    for variant, layers in variants.items():
        torch.manual_seed(0)
        network = Network(layers, size).train(mode == "training")
        # torch.compile caches by code object. With a shared one, the second network's calls would
        # first evaluate the first network's guards.
        code = Network.forward.__code__.replace(co_name=f"forward_{variant}")
        network.forward = types.MethodType(  # type: ignore[method-assign]
            types.FunctionType(code, Network.forward.__globals__), network
        )
        compiled = torch.compile(network, fullgraph=variant != "torch")
        for how, model in (("eager", network), ("compiled", compiled)):

            def inference(model: Any = model) -> Tensor:
                with torch.no_grad():
                    return model(words)  # type: ignore[no-any-return]

            def training(model: Any = model, network: nn.Module = network) -> Tensor:
                for p in network.parameters():
                    p.grad = None
                scores: Tensor = model(words)
                scores.square().mean().backward()  # type: ignore[no-untyped-call]
                return scores

            call = inference if mode == "inference" else training
            scores = call()
            if expected is None or variant == "rest":
                expected = scores
            torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
            found[f"{variant} {how}"] = call
    return found


def table(run: dict[str, Any]) -> str:
    """Times of each network and mode, eager and compiled."""
    head = ["network", "mode", "torch", "compiled", "fused", "compiled"]
    head += ["the rest alone", "compiled", "torch over fused, compiled"]
    rows = [
        [
            row["name"],
            row["mode"],
            *(report.milliseconds(ms) for ms in row["ms"].values()),
            report.ratio_text(row),
        ]
        for row in run["rows"]
    ]
    return "\n".join(
        [report.caption(run["header"]), "", *report.markdown(head, rows, text_columns=2)]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, stores and reports; gives the exit status."""
    parser = report.parser("compiled", __doc__)
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="time for a network and mode (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="a JSON file")
    args = parser.parse_args(argv)
    rows = []
    for size in SIZES:
        for mode in MODES:
            times = in_turn(calls(size, mode), args.seconds)

            row = {
                "name": size.name,
                "mode": mode,
                "ms": {k: statistics.median(v) for k, v in times.items()},
                "spread": max(spread(times[k]) for k in ("torch compiled", "fused compiled")),
                **ratio_of_medians(times["torch compiled"], times["fused compiled"]),
            }
            rows.append(row)
            print(row, flush=True)
    run = {"header": machine.header("cpu", []), "rows": rows}
    report.store(args.output, run)
    return 0

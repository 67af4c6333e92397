"""`python -m benchmarks [case ...]`: times of fusedrnn and torch, in turn, in one process.

Each candidate is called for 20 ms before it is timed, so that no other's threads are still
spinning; the medians of several rounds are compared. Writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn import _ops

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration; sizes as in nn.LSTM."""

    name: str
    B: int
    T: int
    I: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    cell: str = "LSTM"
    dtype: str = "float32"
    layout: str = "padded"
    proj_size: int = 0


CASES = [
    Case("tiny", 1, 5, 6, 6),
    Case("step H64", 1, 1, 64, 64),
    Case("step H256 x2", 1, 1, 256, 256, layers=2),
    Case("B1 T100 H256", 1, 100, 256, 256),
    Case("B1 T50 H1024", 1, 50, 1024, 1024),
    Case("B8 T50 H128", 8, 50, 128, 128),
    Case("tagger", 32, 50, 100, 200, layers=2, bidirectional=True),
    Case("tagger packed", 32, 50, 100, 200, layers=2, bidirectional=True, layout="packed"),
    Case("B64 T100 H256", 64, 100, 256, 256),
    Case("B64 T100 H256 packed", 64, 100, 256, 256, layout="packed"),
    Case("B32 T50 H128 float64", 32, 50, 128, 128, dtype="float64"),
    Case("B64 T100 H256 bfloat16", 64, 100, 256, 256, dtype="bfloat16"),
    Case("B4 T160 H256 proj", 4, 160, 256, 256, proj_size=128),
    Case("GRU tiny", 1, 5, 6, 6, cell="GRU"),
    Case("GRU B1 T100 H256", 1, 100, 256, 256, cell="GRU"),
    Case("GRU B8 T50 H128", 8, 50, 128, 128, cell="GRU"),
    Case("GRU B64 T100 H256", 64, 100, 256, 256, cell="GRU"),
]


def calls(case: Case, training: bool) -> dict[str, Callable[[], object]]:
    """The candidates of a case, with the same weights and input."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    sizes = {"num_layers": case.layers, "bidirectional": case.bidirectional, "dtype": dtype}
    if case.proj_size:
        sizes["proj_size"] = case.proj_size
    theirs = getattr(nn, case.cell)(case.I, case.H, **sizes)
    ours = getattr(fusedrnn, f"Fused{case.cell}")(case.I, case.H, **sizes)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(case.T, case.B, case.I, dtype=dtype)
    if case.layout == "packed":
        lengths = torch.linspace(max(1, case.T // 10), case.T, case.B).long().flip(0)
        x = pack_padded_sequence(x, lengths)

    def inference(module: nn.Module) -> object:
        with torch.no_grad():
            return module(x)

    def train(module: nn.Module) -> object:
        module.zero_grad()
        y = module(x)[0]
        (y.data if case.layout == "packed" else y).sum().backward()
        return y

    run = train if training else inference
    return {"fusedrnn": lambda: run(ours), "torch": lambda: run(theirs)}


def measure(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds a call, one figure a round for each candidate."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            end = time.perf_counter() + 0.02
            count = 0
            while time.perf_counter() < end or count == 0:
                call()
                count += 1
            samples = []
            for _ in range(max(3, min(200, count))):
                start = time.perf_counter()
                call()
                samples.append(1e3 * (time.perf_counter() - start))
            times[name].append(statistics.median(samples))
    return times


def main() -> None:
    """Measures the cases that are asked for and prints a line for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="case", help="names or parts of names")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mode", choices=("inference", "training"))
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    parser.add_argument("--readme", type=Path, help="a page whose table to write anew")
    args = parser.parse_args()
    chosen = [c for c in CASES if not args.cases or any(part in c.name for part in args.cases)]
    if not chosen:
        parser.error(f"no case matches; there are: {', '.join(c.name for c in CASES)}")
    rows = []
    print(f"{'case':26}{'mode':12}{'fusedrnn ms':>12}{'torch ms':>12}{'ratio':>8}")
    for case in chosen:
        for mode in ("inference", "training"):
            if args.mode not in (None, mode):
                continue
            times = measure(calls(case, mode == "training"), args.rounds)
            ours, theirs = (statistics.median(times[k]) for k in ("fusedrnn", "torch"))
            ratio = theirs / ours
            print(f"{case.name:26}{mode:12}{ours:12.4f}{theirs:12.4f}{ratio:8.2f}", flush=True)
            rows.append(
                {
                    **dataclasses.asdict(case),
                    "mode": mode,
                    "peer": "torch",
                    "ours_ms": ours,
                    "peer_ms": theirs,
                    "ratio": ratio,
                }
            )
    if args.readme:
        write_table(args.readme, rows)
    if args.output:
        header = {
            "machine": platform.machine(),
            "processor": _processor(),
            "isa": _ops.cpu_isa(),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "fusedrnn": fusedrnn.__version__,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")


def write_table(page: Path, rows: list[dict[str, Any]]) -> None:
    """Puts the rows between the page's table markers: a line for each case, both modes in it."""
    by_case: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_case.setdefault(row["name"], {})[row["mode"]] = row
    lines = [
        "| case | inference: fusedrnn | torch | ratio | training: fusedrnn | torch | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, modes in by_case.items():
        cells = []
        for mode in ("inference", "training"):
            row = modes.get(mode)
            cells += (
                [f"{row['ours_ms']:.3g}", f"{row['peer_ms']:.3g}", f"**{row['ratio']:.2f}**"]
                if row
                else ["", "", ""]
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = page.read_text()
    before, rest = text.split("<!-- table -->\n", 1)
    _, after = rest.split("<!-- /table -->", 1)
    table = "\n".join(lines)
    page.write_text(f"{before}<!-- table -->\n{table}\n<!-- /table -->{after}")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()

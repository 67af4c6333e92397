"""`python -m benchmarks training`: trains the tagger example with nn's layers and with ours.

Each way runs examples/train_tagger.py with other flags. A training step is forward, backward and
the optimizer's step on a batch; both models take turns. The device's results store the rows under
"training". Arguments after `--` go to the example:
`python -m benchmarks training -- --cell gru --hidden 256`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, report
from benchmarks.baselines import CuDnn

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_tagger.py"
WAYS: dict[str, list[str]] = {
    "as it is": [],
    "lengths": ["--lengths"],
    "autocast": ["--amp"],
    "torch.compile, lengths": ["--compile", "--lengths"],
}


def measure(way: str, device: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Runs the example; gives its results.

    Raises:
        SystemExit: the example failed, after printing its errors.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(EXAMPLE), *WAYS[way], "--device", device]
        command += ["--output", folder, *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.returncode)
        found = json.loads((Path(folder) / "metrics.json").read_text())
    last = {name: side["epochs"][-1] for name, side in found["sides"].items()}
    return {
        "way": way,
        "tokens_per_second": found["tokens_per_second"],
        "train_loss": {name: row["train_loss"] for name, row in last.items()},
        "dev_accuracy": {name: row["dev_accuracy"] for name, row in last.items()},
        "largest_loss_difference": found["largest_loss_difference"],
    }


def table(found: dict[str, Any]) -> str:
    """A line for each way: tokens per second with both layers, ratios, losses, accuracies."""
    rows = found["rows"]
    theirs, ours = rows[0]["train_loss"]
    head = f"| examples/train_tagger.py {found['arguments']}".rstrip()
    lines = [
        f"{head} | {theirs}, training tokens/s | {ours} | ratio | inference | loss | accuracy |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        speeds, inference = row["tokens_per_second"]["train"], row["tokens_per_second"]["eval"]
        losses, accuracies = (row[key] for key in ("train_loss", "dev_accuracy"))
        lines.append(
            f"| {row['way']} | {speeds[theirs]:,.0f} | {speeds[ours]:,.0f} "
            f"| {speeds['ratio']:.2f} | {inference['ratio']:.2f} "
            f"| {losses[theirs]:.4f} / {losses[ours]:.4f} "
            f"| {accuracies[theirs]:.2%} / {accuracies[ours]:.2%} |"
        )
    return "\n".join([report.caption(found["header"]), "", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, stores and reports; gives the exit status."""
    parser = report.parser("training", __doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--way", choices=WAYS, action="append", help="default: all")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DEVICE.json")
    parser.add_argument("arguments", nargs="*", help="arguments for the example")
    args = parser.parse_args(argv)
    if args.device == "cuda" and (missing := CuDnn().available()):
        print(missing)
        return 1
    header = machine.header(args.device, [CuDnn()] if args.device == "cuda" else [])
    output = args.output or report.results_of(header["device"])
    rows: list[dict[str, Any]] = []
    found = {"header": header, "arguments": " ".join(args.arguments), "rows": rows}
    for way in args.way or WAYS:
        rows.append(measure(way, args.device, args.arguments))
        report.store(output, {"training": found})
        ratios = {kind: row["ratio"] for kind, row in rows[-1]["tokens_per_second"].items()}
        print(f"{way}: {', '.join(f'{kind} {ratio:.2f}' for kind, ratio in ratios.items())}")
    print(table(found))
    return 0

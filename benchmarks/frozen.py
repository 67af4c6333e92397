"""`python -m benchmarks frozen`: freeze() in its types beside other runtimes, in time and error.

The baselines are torch, ONNX Runtime with float32 and with its DynamicQuantizeLSTM, and
torch.ao.quantization.quantize_dynamic. An error is the mean difference from nn's output over the
output's mean size. With --tagger, the accuracy of a checkpoint of examples/train_tagger.py too.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import json
import statistics
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fusedrnn
from benchmarks import machine, report
from benchmarks.baselines import (
    Candidate,
    Frozen,
    Fused,
    OnnxRuntime,
    QuantizedOnnxRuntime,
    QuantizedTorch,
    Torch,
    values,
)
from benchmarks.cases import Case, pick
from benchmarks.measure import calmest, in_turn, spread

RESULTS = report.RESULTS / "frozen.json"
CASES = (
    "tiny",
    "step H64",
    "step H256 x2",
    "LSTMCell B1 H64",
    "LSTMCell B1 H256",
    "LSTMCell B32 H256",
    "GRU step H64",
    "GRUCell B1 H256",
    "GRUCell B32 H256",
    "B1 T100 H256",
    "B1 T100 H512",
    "B1 T50 H1024",
    "GRU B1 T50 H1024",
    "B4 T50 H256",
    "B8 T50 H128",
    "tagger",
    "B64 T100 H256",
)
DTYPES = (torch.float32, torch.bfloat16, torch.int8)


def candidates() -> list[Candidate]:
    """Ours, and the baselines that this machine can run; says why others are missing."""
    found: list[Candidate] = [Fused(), *map(Frozen, DTYPES)]
    for baseline in (Torch(), OnnxRuntime(), QuantizedTorch(), QuantizedOnnxRuntime()):
        missing = baseline.available()
        if missing:
            print(f"without {baseline.name}: {missing}", file=sys.stderr)
        else:
            found.append(baseline)
    return found


def measure(case: Case, chosen: Sequence[Candidate], seconds: float) -> list[dict[str, Any]]:
    """A row for each candidate that supports the case."""
    calls = {c.name: c.prepare(case, "inference") for c in chosen if c.supports(case, "inference")}
    expected = values(Torch().prepare(case, "inference")())
    errors = {
        name: ((values(call()) - expected).abs().mean() / expected.abs().mean()).item()
        for name, call in calls.items()
    }
    times = in_turn(calls, seconds)
    return [
        {
            "name": case.name,
            "candidate": name,
            "ms": statistics.median(times[name]),
            "spread": spread(times[name]),
            "error": errors[name],
        }
        for name in calls
    ]


def tagger_rows(checkpoint: Path) -> list[dict[str, Any]]:
    """The accuracy of the example's tagger on its development part, frozen and quantised."""
    folder = Path(__file__).parents[1] / "examples"
    sys.path.append(str(folder))
    parts = ("batches", "data", "model", "workers")
    batches, data, model, workers = (importlib.import_module(f"tagger.{name}") for name in parts)
    dev = data.load_data().dev
    alone = workers.Workers(0, 1, torch.device("cpu"))
    plain, _ = model.load_tagger(checkpoint, fused=False)
    models: dict[str, nn.Module] = {"torch": plain}
    for dtype in DTYPES:
        name = Frozen(dtype).name
        models[name] = fusedrnn.freeze(plain, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        quantize: Any = importlib.import_module("torch.ao.quantization").quantize_dynamic
        models["torch int8"] = quantize(copy.deepcopy(plain), {nn.LSTM}, torch.qint8)
    right = dict.fromkeys(models, 0)
    same = dict.fromkeys(models, 0)
    total = 0
    with torch.no_grad():
        for part in batches.chunks(dev, 64):
            words, lengths, labels, *_ = batches.make_batch(part, alone)
            real = labels != data.NO_LABEL
            found = {name: m(words, lengths).argmax(-1) for name, m in models.items()}
            total += int(real.sum())
            for name, label in found.items():
                right[name] += int((label == labels)[real].sum())
                same[name] += int((label == found["torch"])[real].sum())
    return [
        {"candidate": name, "accuracy": right[name] / total, "same": same[name] / total}
        for name in models
    ]


def table(run: dict[str, Any]) -> str:
    """Times of ours, their ratio over the baselines, and errors."""
    names = [n for n in report.TITLES if any(row["candidate"] == n for row in run["rows"])]
    found = {(row["name"], row["candidate"]): row for row in run["rows"]}
    cases = list(dict.fromkeys(row["name"] for row in run["rows"]))

    def cell(case: str, name: str, key: str) -> str:
        row = found.get((case, name))
        if row is None:
            return ""
        if key == "error":
            return f"{row['error']:.1e}"
        return "~" * report.is_noisy(row) + report.milliseconds(row["ms"])

    titles = [report.TITLES[name] for name in names]
    text = [report.caption(run["header"]), ""]
    body = [[case, *(cell(case, name, "ms") for name in names)] for case in cases]
    text += report.markdown(["case", *titles], body, text_columns=1)
    lossy = [name for name in names if any(s in name for s in ("int8", "bfloat16"))]
    body = [[case, *(cell(case, name, "error") for name in lossy)] for case in cases]
    text += ["", "Mean error over the output's mean size:", ""]
    text += report.markdown(["case", *(report.TITLES[n] for n in lossy)], body, text_columns=1)
    if run.get("tagger"):
        body = [
            [report.TITLES[row["candidate"]], f"{row['accuracy']:.2%}", f"{row['same']:.2%}"]
            for row in run["tagger"]
        ]
        text += ["", "The tagger of `make demo`, on its development part:", ""]
        text += report.markdown(["weights", "accuracy", "labels as torch's"], body, text_columns=1)
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, stores and reports; gives the exit status."""
    parser = report.parser("frozen", __doc__)
    parser.add_argument("cases", nargs="*", metavar="case", help="names or parts of names")
    parser.add_argument("--seconds", type=float, default=3.0, help="for a case (%(default)s)")
    parser.add_argument("--tagger", type=Path, help="a checkpoint of examples/train_tagger.py")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a JSON file (%(default)s)")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="report a stored run instead of measuring"
    )
    args: argparse.Namespace = parser.parse_args(argv)
    if args.report:
        run = json.loads(args.report.read_text())
    else:
        chosen = candidates()
        run = {"header": machine.header("cpu", chosen[1:]), "rows": []}
        for case in pick(args.cases or CASES):
            rows = calmest(functools.partial(measure, case, chosen, args.seconds))
            run["rows"] += rows
            for row in rows:
                print(
                    f"{row['name']:20}{row['candidate']:18}{1e3 * row['ms']:10.1f} us"
                    f"{row['spread']:8.1%}{row['error']:10.1e}",
                    flush=True,
                )
        if args.tagger:
            run["tagger"] = tagger_rows(args.tagger)
        report.store(args.output, run)
    print(table(run))
    return 0

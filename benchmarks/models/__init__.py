"""`python -m benchmarks models [name ...]`: fuses models and trainers from other packages.

These packages do not know fusedrnn. Each model's job runs twice from the same seed: with torch.nn's
layers, and after `fuse(model)` at the place where a user would call it. Code that tests isinstance
with nn.LSTM gets `fuse(model, subclass=True)`. The results are weights, forecasts, attributions or
text. They must agree to rounding, or the exit status is 1. Then both jobs are timed in turn.

Beside each difference stands the effect of rounding alone: torch's own result after its recurrent
weights moved by their last bit. `make models` installs the packages, the extra `models`. The run
skips models with missing packages.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine, report
from benchmarks.models import (
    arabic_diacritizer,
    classifier,
    deepecho,
    flair,
    forecasting,
    opennmt,
    pypots,
    reinforcement,
    resemblyzer,
    speechbrain,
    stanza,
    torch_geometric,
)
from benchmarks.models.compare import measure
from benchmarks.models.job import Model
from benchmarks.models.tables import layers, table

RESULTS = report.RESULTS / "models.json"
# In the order of the tables; each file lists its own.
MODELS: tuple[Model, ...] = (
    *resemblyzer.MODELS,
    *arabic_diacritizer.MODELS,
    *forecasting.MODELS,
    *reinforcement.MODELS,
    *flair.MODELS,
    *stanza.MODELS,
    *opennmt.MODELS,
    *speechbrain.MODELS,
    *torch_geometric.MODELS,
    *pypots.MODELS,
    *deepecho.MODELS,
    *classifier.MODELS,
)


def pick(parts: Sequence[str]) -> list[Model]:
    """The models with these names, or with names that contain these parts; all by default.

    Raises:
        ValueError: no name contains a part.
    """
    names = {model.name.lower(): model.name for model in MODELS}
    chosen: set[str] = set()
    for part in (part.lower() for part in parts):
        found = {part} & names.keys() or {name for name in names if part in name}
        if not found:
            raise ValueError(f"no model matches {part!r}; there are: {', '.join(names.values())}")
        chosen |= found
    return [model for model in MODELS if not parts or model.name.lower() in chosen]


def main(argv: Sequence[str] | None = None) -> int:
    """Compares, stores and reports; gives the exit status."""
    parser = report.parser("models", __doc__)
    parser.add_argument("models", nargs="*", metavar="name", help="names or parts of names")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for a model (%(default)s)")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args(argv)
    try:
        chosen = pick(args.models)
    except ValueError as error:
        parser.error(str(error))
    header = machine.header("cpu", [])
    rows = []
    for model in chosen:
        missing = model.missing()
        if missing:
            print(f"without {model.name}: {missing}", file=sys.stderr)
            continue
        row = measure(model, args.seconds)
        rows.append(row)
        print(
            f"{row['name']:21}{row['mode']:10}{layers(row):24.24}{row['calls']:6} calls, "
            f"differs by {row['difference']:.1e} (rounding {row['rounding']:.1e}), "
            f"{row['plain_ms']:.1f} / {row['fused_ms']:.1f} ms = {row['ratio']:.2f}",
            flush=True,
        )
    output = args.output or (None if args.models else RESULTS)
    if output and rows:
        run = {"header": header, "rows": rows}
        report.store(output, run)
        print(table(run))
    wrong = [row for row in rows if not row["ok"]]
    for row in wrong:
        print(
            f"{row['name']} is wrong: differs by {row['difference']:.1e}, more than "
            f"{row['tolerance']:g}, or by {row['repeated']:.1e} from itself, or "
            f"{row['calls']} calls are not those of the layers swapped",
            file=sys.stderr,
        )
    return 1 if wrong else 0

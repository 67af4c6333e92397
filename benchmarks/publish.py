"""`python -m benchmarks publish`: writes the published figures from the stored runs.

README.md and the pages in docs/ have tables and single figures between markers:

    <!-- grid -->            <!-- n: cpu inference over torch -->2.6×<!-- /n -->
    | ...
    <!-- /grid -->

A table has a name in `TABLES`. A figure is the geometric mean over a run's cases, or one case's
ratio: `<!-- n: cpu training over torch in tagger lengths -->`. With `at least` at its end it is the
lowest ratio. `cpu machine` is the run's machine.
No line may begin with a figure: Markdown would take the line for HTML. The charts are drawn again
where their figures have changed. With --check nothing is written, and the exit status tells
whether all is as stored.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import charts, compiled, frozen, latency, report, training, variants
from benchmarks.models import tables

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/performance.md")
FRONT_CHART = ROOT / "docs" / "images" / "speed.png"

# README's rows, by case.
FRONT = {
    "tagger lengths": "BiLSTM tagger, 32 rows of different lengths, hidden size 200",
    "B64 T100 H256": "LSTM, 64 rows, 100 steps, hidden size 256",
    "GRU B64 T100 H256": "GRU, 64 rows, 100 steps, hidden size 256",
    "B1 T100 H256": "LSTM, one row, 100 steps, hidden size 256",
    "step H64": "LSTM, one step of one row, hidden size 64",
}
# README's chart.
FRONT_CASES = (
    "tiny",
    "step H64",
    "LSTMCell B1 H256",
    "B1 T100 H256",
    "B4 T50 H256",
    "autoencoder B4 T1000 H32",
    "tagger",
    "tagger lengths",
    "time series B32 T100 I1 H64",
    "classifier B64 T28 I28 H128",
    "B64 T100 H256",
    "GRU B64 T100 H256",
)


@functools.cache
def stored(name: str) -> dict[str, Any]:
    """A run in benchmarks/results/, by its file's name."""
    run: dict[str, Any] = json.loads((report.RESULTS / f"{name}.json").read_text())
    return run


def gpus() -> Iterator[str]:
    """The names of the runs over the grid on GPUs."""
    for path in sorted(report.RESULTS.glob("nvidia_*.json")):
        if "rows" in (run := stored(path.stem)) and run["header"]["device"] != "cpu":
            yield path.stem


def ratios(name: str, baseline: str, mode: str) -> dict[str, report.Row]:
    """A run's rows over a baseline, by case.

    Raises:
        ValueError: there are none.
    """
    rows = stored(name)["rows"]
    found = {r["name"]: r for r in rows if (r["baseline"], r["mode"]) == (baseline, mode)}
    if not found:
        raise ValueError(f"{name} has no {mode} over {baseline}")
    return found


def front() -> str:
    """README's table: some cases on the CPU, and the geometric mean over all."""
    modes = {mode: ratios("cpu", "torch", mode) for mode in ("inference", "training")}
    body = [
        [title, *(f"{rows[case]['ratio']:.1f}×" for rows in modes.values())]
        for case, title in FRONT.items()
    ]
    means = [f"**{report.mean(list(rows.values())):.1f}×**" for rows in modes.values()]
    body.append([f"geometric mean of {len(modes['inference'])} cases", *means])
    return "\n".join(report.markdown(["CPU, over torch.nn", *modes], body, text_columns=1))


def front_run() -> dict[str, Any]:
    """The run on the CPU, of the chart's cases and the baselines that run nearly all cases."""
    run = stored("cpu")
    rows = [
        row
        for row in run["rows"]
        if row["name"] in FRONT_CASES and row["baseline"] not in report.OF_FEW_CASES
    ]
    return {**run, "rows": rows}


def gpu_grids() -> str:
    """The grid of each GPU."""
    parts = [report.table(stored(name)) for name in gpus()]
    parts += [training.table(stored(n)["training"]) for n in gpus() if "training" in stored(n)]
    return "\n\n".join(parts)


TABLES: dict[str, Callable[[], str]] = {
    "front": front,
    "grid": lambda: report.table(stored("cpu")),
    "instruction sets": lambda: report.side_by_side(
        {"AVX-512": stored("cpu"), "AVX2": stored("cpu_avx2")}
    ),
    "latency": lambda: latency.table(stored("latency")),
    "frozen": lambda: frozen.table(stored("frozen")),
    "variants": lambda: variants.table(stored("variants")),
    "compiled": lambda: compiled.table(stored("compiled")),
    "models": lambda: tables.table(stored("models")),
    "gpu": gpu_grids,
}

_FIGURE = re.compile(
    r"(\w+) (inference|training) over (\w+)(?: by (\w+))?(?: in (.+?))?(?P<least> at least)?"
)
_TABLE_PART = re.compile(r"<!-- ([a-z][a-z ]*) -->\n(.*?)<!-- /\1 -->", re.S)
_FIGURE_PART = re.compile(r"<!-- n: (.+?) -->(.*?)<!-- /n -->")
_AT_LINE_START = re.compile(r"^<!-- n: ", re.M)


def machine_of(run: dict[str, Any]) -> str:
    """The machine of a run on a CPU, in words."""
    header = run["header"]
    vectors = {"avx2": "AVX2", "avx512": "AVX-512", "avx512bf16": "AVX-512 and bfloat16"}
    isa = vectors.get(header["isa"], header["isa"])
    return f"{header['processor']} with {isa}, {header['threads']} threads"


def figure(name: str) -> str:
    """A figure by its name in a page.

    Raises:
        ValueError: no run has it.
    """
    if machine := re.fullmatch(r"(\w+) machine", name):
        return machine_of(stored(machine[1]))
    found = _FIGURE.fullmatch(name)
    if not found:
        raise ValueError(f"{name!r} is no figure")
    run, mode, baseline, clock, case = found.groups()[:5]
    rows = ratios(run, baseline, mode)
    if case:
        if case not in rows:
            raise ValueError(f"{run} has no case {case!r}")
        rows = {case: rows[case]}
    values = list(rows.values())
    if clock:
        values = [row[clock] for row in values if row[clock]["ratio"] is not None]
    summary = min(row["ratio"] for row in values) if found["least"] else report.mean(values)
    return f"{summary:.1f}×"


def published(text: str) -> str:
    """A page's text with the tables and figures of the stored runs.

    Raises:
        ValueError: the page has a figure that no run has, one at the start of a line, or none.
    """
    if _AT_LINE_START.search(text):
        raise ValueError("a line begins with a figure")

    def table(part: re.Match[str]) -> str:
        name = part[1]
        if name not in TABLES:
            raise ValueError(f"{name!r} is no table")
        return f"<!-- {name} -->\n{TABLES[name]()}\n<!-- /{name} -->"

    text, tables = _TABLE_PART.subn(table, text)
    text, figures = _FIGURE_PART.subn(
        lambda part: f"<!-- n: {part[1]} -->{figure(part[1])}<!-- /n -->", text
    )
    if not tables + figures:
        raise ValueError("a page without a marker")
    return text


def all_charts() -> list[charts.Chart]:
    """README's chart, and those beside the runs."""
    names = ("cpu", "cpu_avx2", *gpus())
    beside = (charts.of_run(stored(name), report.RESULTS / f"{name}.json") for name in names)
    front_chart = charts.ratios(front_run(), FRONT_CHART)
    return [front_chart, *(chart for found in beside for chart in found)]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or checks the pages and charts; gives the exit status."""
    parser = report.parser("publish", __doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a page differs"
    )
    args = parser.parse_args(argv)
    stale = []
    for name in PAGES:
        page = ROOT / name
        before = page.read_text(encoding="utf-8")
        after = published(before)
        if after != before:
            stale.append(name)
            if not args.check:
                page.write_text(after, encoding="utf-8")
    old = [chart for chart in all_charts() if not chart.is_current()]
    stale += [str(chart.path.relative_to(ROOT)) for chart in old]
    if not args.check:
        charts.draw(old)
    for name in stale:
        print(f"{name} {'differs from the stored runs' if args.check else 'is written'}")
    return 1 if args.check and stale else 0

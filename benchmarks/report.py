"""Reports a run: printed lines, Markdown tables, pictures, and a comparison with an older run."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

TITLES = {
    "fusedrnn": "fusedrnn",
    "torch": "torch",
    "torch.compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "cudnn": "cuDNN",
    "packing": "packing by hand",
    "frozen float32": "frozen",
    "frozen bfloat16": "frozen, bfloat16",
    "frozen int8": "frozen, int8",
    "torch int8": "torch, int8",
    "onnxruntime int8": "ONNX Runtime, int8",
}
# nn's own implementation on either device: ratios over it are compared, and its roofline is drawn.
REFERENCES = ("torch", "cudnn")
# A GPU's clocks besides the call with the wait for its end: keys of a row, columns of a table.
CLOCKS = {"back_to_back": "back to back", "graph": "by graph"}
RESULTS = Path(__file__).parent / "results"


def parser(name: str, text: str | None) -> argparse.ArgumentParser:
    """The parser for `python -m benchmarks NAME`, described by the module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}".strip(),
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def results_of(device: str) -> Path:
    """The file for runs on a device; the device is torch's name for it, or "cpu"."""
    return RESULTS / f"{slug(device)}.json"


def slug(name: str) -> str:
    """Turns a device's name into a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def store(output: Path, found: dict[str, Any]) -> None:
    """Updates a stored run; other keys in the file stay."""
    output.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(output.read_text()) if output.exists() else {}
    output.write_text(json.dumps({**old, **found}, indent=1) + "\n")


def heading(on_gpu: bool = False) -> None:
    clocks = f"{'back to back':>14}{'graph':>8}" if on_gpu else ""
    print(
        f"{'case':30}{'mode':11}{'baseline':14}{'fusedrnn ms':>12}{'base ms':>10}{'ratio':>8}"
        f"{clocks}{'spread':>8}{'roofline':>9}"
    )


def _has_clocks(row: Row) -> bool:
    """Whether a row has the ratios by a GPU's further clocks."""
    return "graph" in row


def _ratio(row: Row, clock: str) -> str:
    """The ratio by a clock; "-" without one, as where a graph can't be captured."""
    ratio = row.get(clock, {}).get("ratio")
    return "-" if ratio is None else f"{ratio:.2f}"


def lines(rows: Sequence[Row]) -> None:
    """Prints a line for each row. The last column is the roofline's share of our time.

    On a GPU: the ratios by all three clocks, and the reason where there is no graph.
    """
    for row in rows:
        bound = row["roofline_ms"]
        share = f"{bound / row['ours_ms']:9.0%}" if bound else ""
        clocks = ""
        if _has_clocks(row):
            clocks = f"{_ratio(row, 'back_to_back'):>14}{_ratio(row, 'graph'):>8}"
        print(
            f"{row['name']:30}{row['mode']:11}{row['baseline']:14}{row['ours_ms']:12.4f}"
            f"{row['baseline_ms']:10.4f}{row['ratio']:8.2f}{clocks}{row['ours_spread']:8.1%}"
            f"{share}",
            flush=True,
        )
        for name, reason in row.get("graph", {}).get("missing", {}).items():
            print(f"  {TITLES[name]}: {reason}", flush=True)


def show(rows: Sequence[Row]) -> None:
    heading(on_gpu=any(_has_clocks(row) for row in rows))
    lines(rows)


def summary(rows: Sequence[Row]) -> None:
    """Prints the geometric mean and the lowest ratio over each baseline."""
    for (baseline, mode), found in _groups(rows).items():
        lowest = min(found, key=lambda row: float(row["ratio"]))
        print(
            f"{mode} over {baseline}: {_mean(found):.2f} in the geometric mean over "
            f"{len(found)} cases, at least {lowest['ratio']:.2f} ({lowest['name']})"
        )
        for clock, title in CLOCKS.items():
            ratios = _ratios(found, clock)
            if ratios:
                mean, count = statistics.geometric_mean(ratios), len(ratios)
                print(f"  {title}: {mean:.2f} over {count} cases, at least {min(ratios):.2f}")
    noisy = [r for r in rows if max(r["ours_spread"], r["baseline_spread"]) > 0.2]
    print(f"{len(noisy)} of {len(rows)} rows vary by over 20 % between rounds")


def _groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["baseline"], row["mode"]), []).append(row)
    return groups


def _ratios(rows: Sequence[Row], clock: str) -> list[float]:
    """The ratios by a clock, of the rows that have one."""
    found = (row.get(clock, {}).get("ratio") for row in rows)
    return [ratio for ratio in found if ratio is not None]


def _mean(rows: Sequence[Row]) -> float:
    return statistics.geometric_mean([row["ratio"] for row in rows])


def compare(old: Sequence[Row], new: Sequence[Row], tolerance: float) -> list[str]:
    """Lists regressions: cases whose ratio over nn dropped by more than the tolerance.

    Ratios, unlike times, can be compared across machines.
    """
    before = {(r["name"], r["mode"]): r["ratio"] for r in old if r["baseline"] in REFERENCES}
    worse = []
    for row in new:
        ratio = before.get((row["name"], row["mode"]))
        if row["baseline"] not in REFERENCES or ratio is None:
            continue
        if row["ratio"] < ratio * (1 - tolerance):
            worse.append(f"{row['name']} {row['mode']}: {ratio:.2f} before, {row['ratio']:.2f} now")
    return worse


def write_between(page: Path, marker: str, text: str) -> None:
    """Replaces the text between a page's lines `<!-- marker -->` and `<!-- /marker -->`."""
    begin, end = f"<!-- {marker} -->\n", f"<!-- /{marker} -->"
    before, found, rest = page.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"{page} lacks the lines {begin.strip()} and {end}")
    page.write_text(f"{before}{begin}{text}\n{end}{after}")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int) -> list[str]:
    """The lines of a Markdown table: the first columns hold text, the others align right."""
    align = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return [f"| {' | '.join(cells)} |" for cells in (head, align, *rows)]


def caption(header: dict[str, Any]) -> str:
    """A run's machine and versions, in one line."""
    where = header["device"]
    if where == "cpu":
        where = f"{header['processor']} ({header['isa']}), {header['threads']} threads"
    versions = {"torch": header["torch"], **header["baselines"]}
    found = [f"{TITLES[name]} {versions[name]}" for name in TITLES if name in versions]
    return f"{where}; {', '.join(found)}; {header['date'][:10]}."


def marker(name: str, run: dict[str, Any]) -> str:
    """The marker for a part of a page; a GPU's parts have their own."""
    return name if run["header"]["device"] == "cpu" else f"{name} cuda"


def table(run: dict[str, Any]) -> str:
    """A line for each case: our milliseconds and the ratios over the baselines, in both modes.

    A GPU's table adds the ratios by the other clocks, the roofline's share, the regime, and both
    peak memories in MiB.
    """
    rows: list[Row] = run["rows"]
    groups = _groups(rows)
    by_mode: dict[str, list[str]] = {}
    for name, mode in sorted(groups, key=lambda group: (group[1], list(TITLES).index(group[0]))):
        if name not in ("torch.compile", "packing"):  # these run a few cases only
            by_mode.setdefault(mode, []).append(name)
    head, means = ["case"], ["geometric mean"]
    on_gpu = run["header"]["device"] != "cpu"
    more = [*CLOCKS.values(), "of roofline", "regime", "MiB"] if on_gpu else []
    for mode, found in by_mode.items():
        head += [f"{mode}, ms", *(f"over {TITLES[name]}" for name in found), *more]
        means += ["", *(f"**{_mean(groups[name, mode]):.2f}**" for name in found)]
        if on_gpu:
            first = groups[found[0], mode]
            ratios = [_ratios(first, clock) for clock in CLOCKS]
            means += [f"**{statistics.geometric_mean(r):.2f}**" if r else "" for r in ratios]
            means += [""] * (len(more) - len(CLOCKS))
    body = []
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = [name]
        for mode, found in by_mode.items():
            over = {r["baseline"]: r for r in rows if (r["name"], r["mode"]) == (name, mode)}
            cells.append(digits(next(iter(over.values()))["ours_ms"]) if over else "")
            cells += [f"{over[b]['ratio']:.2f}" if b in over else "" for b in found]
            if on_gpu:
                cells += _gpu_cells(next(iter(over.values()))) if over else [""] * len(more)
        body.append(cells)
    lines = markdown(head, [*body, means], text_columns=1)
    by_hand = [
        f"{row['name']} {row['ratio']:.2f} ({row['mode']})"
        for row in rows
        if row["baseline"] == "packing"
    ]
    if by_hand:
        lines += ["", "Fused layers that are packed and unpacked by hand, over `lengths=`: "]
        lines[-1] += f"{', '.join(by_hand)}."
    return "\n".join([caption(run["header"]), "", *lines])


def _gpu_cells(row: Row) -> list[str]:
    ours, theirs = row["ours_bytes"], row["baseline_bytes"]
    memory = "" if ours is None or theirs is None else f"{ours / 2**20:.1f} / {theirs / 2**20:.1f}"
    share = f"{row['roofline_ms'] / row['ours_ms']:.0%}" if row["roofline_ms"] else ""
    clocks = [_ratio(row, clock) if _has_clocks(row) else "" for clock in CLOCKS]
    return [*clocks, share, row.get("regime", ""), memory]


def digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


_COLORS = {"fusedrnn": "#0072b2", "torch": "#d55e00", "cudnn": "#d55e00"}
_COLORS |= {"onnxruntime": "#009e73", "openvino": "#cc79a7", "torch.compile": "#e69f00"}
_COLORS |= {"packing": "#999999"}


def picture(output: Path, kind: str) -> Path:
    """The path of a stored run's picture; `kind` is "ratio" or "roofline"."""
    return output.with_name(f"{output.stem}_{kind}.png")


def pictures(run: dict[str, Any], output: Path) -> None:
    """Draws OUTPUT_ratio.png and, if the rooflines are known, OUTPUT_roofline.png."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        print(f"no pictures: {error}", file=sys.stderr)
        return
    rows, where = run["rows"], caption(run["header"])
    ratios: dict[str, dict[str, dict[str, float]]] = {}
    shares: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        name, mode, baseline, bound = (row[k] for k in ("name", "mode", "baseline", "roofline_ms"))
        ratios.setdefault(mode, {}).setdefault(baseline, {})[name] = row["ratio"]
        if bound and baseline in REFERENCES:
            share = shares.setdefault(mode, {})
            share.setdefault("fusedrnn", {})[name] = 100 * bound / row["ours_ms"]
            share.setdefault(baseline, {})[name] = 100 * bound / row["baseline_ms"]
    _bars(
        ratios,
        f"A baseline's time over fusedrnn's: right of 1, fusedrnn is faster\n{where}",
        picture(output, "ratio"),
        is_ratio=True,
    )
    if shares:
        _bars(
            shares,
            f"Roofline from the machine's measured peaks, in % of the measured time\n{where}",
            picture(output, "roofline"),
            is_ratio=False,
        )


def _bars(
    values: dict[str, dict[str, dict[str, float]]], title: str, path: Path, is_ratio: bool
) -> None:
    """Draws horizontal bars: a panel for each mode, a color for each series, a group for a case."""
    figure_module: Any = importlib.import_module("matplotlib.figure")
    patches_module: Any = importlib.import_module("matplotlib.patches")
    names = list(dict.fromkeys(n for m in values.values() for s in m.values() for n in s))
    figure = figure_module.Figure(figsize=(9, 1.5 + 0.32 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
    for panel, (mode, series) in zip(panels, values.items(), strict=True):
        for at, name in enumerate(names):
            found = [s for s in series if name in series[s]]
            height = min(0.3, 0.8 / max(1, len(found)))
            for i, s in enumerate(found):
                value = series[s][name]
                panel.barh(
                    at + (i + 0.5 - len(found) / 2) * height,
                    value - 1 if is_ratio else value,
                    left=1 if is_ratio else 0,
                    height=height,
                    color=_COLORS[s],
                )
        panel.set_title(mode, fontsize=11)
        panel.set_yticks(range(len(names)), names, fontsize=9)
        panel.set_ylim(len(names) - 0.4, -0.6)
        panel.grid(axis="x", which="both", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        if is_ratio:
            _ratio_axis(panel, [v for s in series.values() for v in s.values()])
        else:
            panel.set_xlim(0, max(100, *(v for s in series.values() for v in s.values())))
    shown = [s for s in _COLORS if any(s in series for series in values.values())]
    patches = [patches_module.Patch(color=_COLORS[s], label=TITLES[s]) for s in shown]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(shown), fontsize=10)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=100)


def _ratio_axis(panel: Any, ratios: Sequence[float]) -> None:
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]
    low = max((t for t in ticks if t < min(ratios)), default=ticks[0])
    high = min((t for t in ticks if t > max(ratios)), default=ticks[-1])
    low, high = min(low, 0.5), max(high, 2)
    panel.set_xscale("log")
    panel.set_xlim(low, high)
    shown = [tick for tick in ticks if low <= tick <= high]
    panel.set_xticks(shown, [f"{tick:g}" for tick in shown], fontsize=9)
    panel.set_xticks([], minor=True)
    panel.axvline(1, color="black", linewidth=1)

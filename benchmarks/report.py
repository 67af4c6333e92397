"""Reports a run: printed lines, Markdown tables, and a comparison with an older run."""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
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
OF_FEW_CASES = ("torch.compile", "packing")
# A GPU's clocks besides the call with the wait for its end: keys of a row, columns of a table.
CLOCKS = {"back_to_back": "back to back", "graph": "by graph"}
# A row is noisy if the middle half of a candidate's rounds varies by more than this share, or if
# its ratio's interval is as wide.
NOISY_SPREAD = 0.2
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
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


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


def _ratio(row: Row, clock: str, unit: str = "") -> str:
    """The ratio by a clock; "-" without one, as where a graph can't be captured."""
    ratio = row.get(clock, {}).get("ratio")
    return "-" if ratio is None else f"{ratio:.2f}{unit}"


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
            f"{mode} over {baseline}: {mean(found):.2f} in the geometric mean over "
            f"{len(found)} cases, at least {lowest['ratio']:.2f} ({lowest['name']})"
        )
        for clock, title in CLOCKS.items():
            ratios = _ratios(found, clock)
            if ratios:
                middle, count = statistics.geometric_mean(ratios), len(ratios)
                print(f"  {title}: {middle:.2f} over {count} cases, at least {min(ratios):.2f}")
    noisy = sum(map(is_noisy, rows))
    print(f"{noisy} of {len(rows)} rows vary by over {NOISY_SPREAD:.0%} between rounds")


def _groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["baseline"], row["mode"]), []).append(row)
    return groups


def _ratios(rows: Sequence[Row], clock: str) -> list[float]:
    """The ratios by a clock, of the rows that have one."""
    found = (row.get(clock, {}).get("ratio") for row in rows)
    return [ratio for ratio in found if ratio is not None]


def mean(rows: Sequence[Row]) -> float:
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
    if cudnn := versions.get("cudnn"):  # 91900 is 9.19.0
        versions["cudnn"] = ".".join(
            str(int(part)) for part in (cudnn[:-4], cudnn[-4:-2], cudnn[-2:])
        )
    found = [f"{TITLES[name]} {versions[name]}" for name in TITLES if name in versions]
    return f"{where}; {', '.join(found)}; {header['date'][:10]}."


def table(run: dict[str, Any]) -> str:
    """A line for each case: our time, the ratios over the baselines, the share of the roofline.

    A GPU's table adds the ratios by the other clocks, the regime and both peak memories in MiB.
    """
    rows: list[Row] = run["rows"]
    groups = _groups(rows)
    by_mode: dict[str, list[str]] = {}
    for name, mode in sorted(groups, key=lambda group: (group[1], list(TITLES).index(group[0]))):
        if name not in OF_FEW_CASES:
            by_mode.setdefault(mode, []).append(name)
    head, means = ["case"], ["geometric mean"]
    on_gpu = run["header"]["device"] != "cpu"
    more = [*CLOCKS.values(), "regime", "MiB"] if on_gpu else []
    for mode, found in by_mode.items():
        head += [mode, *(f"over {TITLES[name]}" for name in found), *more, "of the limit"]
        means += ["", *(f"**{mean(groups[name, mode]):.2f}×**" for name in found)]
        if on_gpu:
            first = groups[found[0], mode]
            ratios = [_ratios(first, clock) for clock in CLOCKS]
            means += [f"**{statistics.geometric_mean(r):.2f}×**" if r else "" for r in ratios]
            means += [""] * (len(more) - len(CLOCKS))
        means.append("")
    body = []
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = [name]
        for mode, found in by_mode.items():
            over = {r["baseline"]: r for r in rows if (r["name"], r["mode"]) == (name, mode)}
            if not over:
                cells += [""] * (2 + len(found) + len(more))
                continue
            first_row = next(iter(over.values()))
            cells.append(milliseconds(first_row["ours_ms"]))
            cells += [ratio_text(over[b]) if b in over else "" for b in found]
            if on_gpu:
                cells += _gpu_cells(first_row)
            cells.append(share_text(first_row))
        body.append(cells)
    lines = markdown(head, [*body, means], text_columns=1)
    by_hand = [
        f"{row['name']} {ratio_text(row)} ({row['mode']})"
        for row in rows
        if row["baseline"] == "packing"
    ]
    if by_hand:
        lines += ["", "Fused layers that are packed and unpacked by hand, over `lengths=`: "]
        lines[-1] += f"{', '.join(by_hand)}."
    return "\n".join([caption(run["header"]), "", *lines])


def side_by_side(runs: dict[str, dict[str, Any]]) -> str:
    """A line for each case: times and ratios over torch of several runs, by their titles."""
    over = [
        {(r["name"], r["mode"]): r for r in run["rows"] if r["baseline"] in REFERENCES}
        for run in runs.values()
    ]
    modes = list(dict.fromkeys(mode for _, mode in over[0]))
    columns = [(mode, index) for mode in modes for index in range(len(runs))]
    titles = list(runs)
    head = ["case", *(f"{mode}, {titles[index]}" for mode, index in columns)]
    head += [f"over torch, {mode}, {titles[index]}" for mode, index in columns]
    body = []
    for name in dict.fromkeys(name for name, _ in over[0]):
        found = [over[index].get((name, mode)) for mode, index in columns]
        times = [milliseconds(row["ours_ms"]) if row else "" for row in found]
        body.append([name, *times, *(ratio_text(row) if row else "" for row in found)])
    means = [
        mean([row for (_, of), row in over[index].items() if of == mode]) for mode, index in columns
    ]
    last = ["geometric mean", *[""] * len(columns), *(f"**{value:.2f}×**" for value in means)]
    captions = [f"{title}: {caption(run['header'])}" for title, run in runs.items()]
    return "\n".join([*"\n\n".join(captions).splitlines(), "", *markdown(head, [*body, last], 1)])


def is_noisy(row: Row) -> bool:
    """Whether a row's times or its ratio vary so much between rounds that they mean little."""
    noise = [value for key, value in row.items() if key.endswith("spread")]
    if "ratio_low" in row:
        noise.append((row["ratio_high"] - row["ratio_low"]) / row["ratio"])
    return max(noise, default=0.0) > NOISY_SPREAD


def ratio_text(row: Row) -> str:
    """A ratio with half of its interval, if that means anything; "~" marks a noisy row."""
    ratio = row["ratio"]
    places = 1 if ratio >= 10 else 2
    mark = "~" if is_noisy(row) else ""
    half = ""
    if "ratio_low" in row:  # older runs have no interval
        width = max(row["ratio_high"] - ratio, ratio - row["ratio_low"], 10**-places)
        half = f" ±{width:.{places}f}" if width < ratio / 2 else ""
    return f"{mark}{ratio:.{places}f}×{half}"


def milliseconds(ms: float) -> str:
    """A time with its unit: microseconds below 1 ms."""
    return f"{digits(1e3 * ms)} µs" if ms < 1 else f"{digits(ms)} ms"


def share_text(row: Row) -> str:
    """The roofline's share of our time."""
    return f"{row['roofline_ms'] / row['ours_ms']:.0%}" if row["roofline_ms"] else ""


def _gpu_cells(row: Row) -> list[str]:
    ours, theirs = row["ours_bytes"], row["baseline_bytes"]
    memory = "" if ours is None or theirs is None else f"{ours / 2**20:.1f} / {theirs / 2**20:.1f}"
    clocks = [_ratio(row, clock, "×") if _has_clocks(row) else "" for clock in CLOCKS]
    return [*clocks, row.get("regime", ""), memory]


def digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"

"""Bar charts of a run, as PNG files that name the figures they were drawn from."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import REFERENCES, TITLES, caption

# Bars by mode, series and case.
Values = dict[str, dict[str, dict[str, float]]]

# The field of a PNG file that has the digest of the chart's figures.
_FIELD = "Description"
_COLORS = {"fusedrnn": "#0072b2", "torch": "#d55e00", "cudnn": "#d55e00"}
_COLORS |= {"onnxruntime": "#009e73", "openvino": "#cc79a7", "torch.compile": "#e69f00"}
_COLORS |= {"packing": "#999999"}


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart: a panel for each mode, a color for each series, a group of bars for each case.

    Attributes:
        is_ratio: the axis is logarithmic and the bars begin at 1.
    """

    path: Path
    title: str
    values: Values
    is_ratio: bool

    def digest(self) -> str:
        """Tells whether two charts show the same."""
        shown = json.dumps([self.title, self.values], sort_keys=True)
        return hashlib.sha256(shown.encode()).hexdigest()

    def is_current(self) -> bool:
        """Whether the file was drawn from these figures."""
        return self.path.exists() and text_of(self.path).get(_FIELD) == self.digest()

    def draw(self) -> None:
        """Writes the file.

        Raises:
            ImportError: matplotlib is missing.
        """
        figure_module: Any = importlib.import_module("matplotlib.figure")
        patches_module: Any = importlib.import_module("matplotlib.patches")
        names = list(dict.fromkeys(n for m in self.values.values() for s in m.values() for n in s))
        figure = figure_module.Figure(figsize=(9, 1.5 + 0.32 * len(names)), layout="constrained")
        panels = figure.subplots(1, len(self.values), sharey=True, squeeze=False)[0]
        for panel, (mode, series) in zip(panels, self.values.items(), strict=True):
            for at, name in enumerate(names):
                found = [s for s in series if name in series[s]]
                height = min(0.3, 0.8 / max(1, len(found)))
                for i, s in enumerate(found):
                    panel.barh(
                        at + (i + 0.5 - len(found) / 2) * height,
                        series[s][name] - (1 if self.is_ratio else 0),
                        left=1 if self.is_ratio else 0,
                        height=height,
                        color=_COLORS[s],
                    )
            panel.set_title(mode, fontsize=11)
            panel.set_yticks(range(len(names)), names, fontsize=9)
            panel.set_ylim(len(names) - 0.4, -0.6)
            panel.grid(axis="x", which="both", color="#dddddd", linewidth=0.6)
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
            if self.is_ratio:
                _ratio_axis(panel, [v for s in series.values() for v in s.values()])
            else:
                panel.set_xlim(0, 100)
        shown = [s for s in _COLORS if any(s in series for series in self.values.values())]
        patches = [patches_module.Patch(color=_COLORS[s], label=TITLES[s]) for s in shown]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(shown), fontsize=10)
        figure.suptitle(self.title, fontsize=11)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.path, dpi=120, metadata={_FIELD: self.digest()})


def _ratio_axis(panel: Any, ratios: Sequence[float]) -> None:
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]
    low = max((t for t in ticks if t < min(ratios)), default=ticks[0])
    high = min((t for t in ticks if t > max(ratios)), default=ticks[-1])
    low, high = min(low, 0.5), max(high, 2)
    panel.set_xscale("log")
    panel.set_xlim(low, high)
    shown = [tick for tick in ticks if low <= tick <= high]
    panel.set_xticks(shown, [f"{tick:g}×" for tick in shown], fontsize=9)
    panel.set_xticks([], minor=True)
    panel.axvline(1, color="black", linewidth=1)


def text_of(png: Path) -> dict[str, str]:
    """The text fields of a PNG file (its tEXt chunks)."""
    data, at = png.read_bytes(), 8
    found = {}
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"tEXt":
            key, _, text = data[at + 8 : at + 8 + size].partition(b"\0")
            found[key.decode("latin-1")] = text.decode("latin-1")
        at += 12 + size  # the size, the kind and the checksum have four bytes each
    return found


def ratios(run: dict[str, Any], path: Path) -> Chart:
    """Each baseline's time over fusedrnn's."""
    values: Values = {}
    for row in run["rows"]:
        mode = values.setdefault(row["mode"], {})
        mode.setdefault(row["baseline"], {})[row["name"]] = row["ratio"]
    title = "A baseline's time over fusedrnn's: right of 1, fusedrnn is faster"
    title += f" (B rows, T steps, H the hidden size)\n{_where(run)}"
    return Chart(path, title, values, is_ratio=True)


def rooflines(run: dict[str, Any], path: Path) -> Chart | None:
    """The roofline's share of the time taken, ours and nn's; None if no roofline is known."""
    values: Values = {}
    for row in run["rows"]:
        bound = row["roofline_ms"]
        if bound and row["baseline"] in REFERENCES:
            share = values.setdefault(row["mode"], {})
            ours, theirs = row["ours_ms"], row["baseline_ms"]
            share.setdefault("fusedrnn", {})[row["name"]] = 100 * bound / ours
            share.setdefault(row["baseline"], {})[row["name"]] = 100 * bound / theirs
    title = f"The least time by the machine's peaks, in % of the time taken\n{_where(run)}"
    return Chart(path, title, values, is_ratio=False) if values else None


def _where(run: dict[str, Any]) -> str:
    return caption(run["header"])


def of_run(run: dict[str, Any], output: Path) -> list[Chart]:
    """The charts beside a stored run: OUTPUT_ratio.png, and OUTPUT_roofline.png if known."""
    found = [ratios(run, output.with_name(f"{output.stem}_ratio.png"))]
    bounds = rooflines(run, output.with_name(f"{output.stem}_roofline.png"))
    return [*found, bounds] if bounds else found


def draw(charts: Sequence[Chart]) -> None:
    """Draws the charts that are not current; says if matplotlib is missing."""
    try:
        for chart in charts:
            if not chart.is_current():
                chart.draw()
    except ImportError as error:
        print(f"no charts: {error}", file=sys.stderr)

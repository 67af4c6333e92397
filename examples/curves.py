"""Draws the curves of the examples beside this file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw(path: Path, curves: Mapping[str, Sequence[float]], every: int = 1, **axes: Any) -> None:
    """Writes a PNG with a line for each curve.

    Args:
        path: the file, whose folder is made.
        curves: the values, by the name in the legend.
        every: what a value stands for on the horizontal axis: epochs, steps.
        axes: for matplotlib's Axes.set: xlabel, ylabel.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    for name, values in curves.items():
        panel.plot([every * (i + 1) for i in range(len(values))], values, label=name)
    panel.set(**axes)
    panel.grid(color="#dddddd")
    panel.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    print(path)

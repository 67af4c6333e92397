"""The table of a run over models."""

from __future__ import annotations

from typing import Any

from benchmarks import report


def layers(row: dict[str, Any]) -> str:
    """The count of swapped layers by class, and the layers left as they are."""
    names = list(row["swapped"].values())
    counts = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)) or "none"
    how = " by `fuse(model, subclass=True)`" if row["subclass"] else ""
    return "; left: ".join([counts + how, *row["left"]])


def table(run: dict[str, Any]) -> str:
    """A line for each model with swapped layers: its difference, and its speed-up."""
    head = ["package", "what", "swapped", "difference", "of rounding alone", "forward's share"]
    rows = [
        [
            row["package"].split(",")[0],
            f"{row['mode']}: {row['what']}",
            layers(row),
            f"{row['difference']:.0e}" + ("" if row["ok"] else " **wrong**"),
            f"{row['rounding']:.0e}",
            f"{row['share']:.0%}",
            report.ratio_text(row),
        ]
        for row in run["rows"]
        if row["swapped"]
    ]
    lines = report.markdown([*head, "speed-up"], rows, text_columns=3)
    return "\n".join([report.caption(run["header"]), "", *lines])

"""The tables for a run over models."""

from __future__ import annotations

from typing import Any

from benchmarks import report
from benchmarks.models.compare import TOLERANCE


def layers(row: dict[str, Any]) -> str:
    """The count of swapped layers by class, and the layers left as they are."""
    names = list(row["swapped"].values())
    counts = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)) or "none"
    how = " by `fuse(model, subclass=True)`" if row["subclass"] else ""
    return "; left: ".join([counts + how, *row["left"]])


def page(run: dict[str, Any]) -> str:
    """The run as a page."""
    head = ["model", "package", "what", "swapped", "calls", "difference", "of rounding alone"]
    head += ["forward's share", "torch, ms", "fused, ms", "ratio"]
    rows = [
        [
            row["name"],
            row["package"],
            f"{row['mode']}: {row['what']}",
            layers(row),
            str(row["calls"]),
            f"{row['difference']:.1e}" + ("" if row["ok"] else " **wrong**"),
            f"{row['rounding']:.1e}",
            f"{row['share']:.0%}",
            report.digits(row["plain_ms"]),
            report.digits(row["fused_ms"]),
            f"{row['ratio']:.2f}" if row["swapped"] else "",
        ]
        for row in run["rows"]
    ]
    return "\n".join(
        [
            "# Models and trainers from other packages",
            "",
            "Each model runs with torch.nn's layers, then after `fuse(model)` or the call that the",
            "table names. Written by `make models`.",
            "",
            report.caption(run["header"]),
            "",
            *report.markdown(head, rows, text_columns=4),
            "",
            "- Calls: calls to fused layers in a run.",
            "- Difference: the largest in any result, relative to the result's largest value. For",
            "  learnt weights: the norm of the difference relative to the norm. At most",
            f"  {TOLERANCE['inference']:g} in inference and {TOLERANCE['training']:g} in training.",
            "- Of rounding alone: the same figure for torch against torch, after its recurrent",
            "  weights moved by their last bit.",
            "- Forward's share: the recurrent layers' forward calls as a share of torch's time.",
            "  Training adds their backward.",
            "- Times cover the whole job, so the ratio stays near 1 where recurrent layers are a",
            "  small part. The ratio is empty if no layer was swapped.",
            "",
        ]
    )


def short_table(run: dict[str, Any]) -> str:
    """The swapped models' differences and speed-ups, for README."""
    lines = ["| package | what | swapped | difference | of rounding alone | times as fast |"]
    lines.append("|---|---|---|---:|---:|---:|")
    for row in run["rows"]:
        if row["swapped"]:
            cells = [
                row["package"].split(",")[0],
                f"{row['mode']}: {row['what']}",
                layers(row),
                f"{row['difference']:.0e}",
                f"{row['rounding']:.0e}",
                f"{row['ratio']:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([report.caption(run["header"]), "", *lines])

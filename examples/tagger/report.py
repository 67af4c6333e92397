"""The report on a run: lines on the terminal, and the measurements."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import fusedrnn
from tagger.data import Data
from tagger.side import Side
from tagger.workers import Workers


def describe(args: argparse.Namespace, data: Data, workers: Workers) -> str:
    """One line on the task, the model and where it runs."""
    where = str(workers.device)
    if workers.device.type == "cpu":
        threads = torch.get_num_threads()
        where += f", {threads} thread{'s' * (threads > 1)}"
    if workers.count > 1:
        where = f"{workers.count} processes on {where} each"
    where += ", FSDP" if workers.fsdp else ""
    where += ", autocast" if args.amp else ""
    where += ", torch.compile" if args.compile else ""
    task = {"upos": "UPOS of words", "stress": "Stress of phonemes"}[data.task]
    return (
        f"{task}: {args.layers}-layer bidirectional {args.cell.upper()}, hidden {args.hidden}, "
        f"batches of {args.batch_size}, {where}"
    )


def progress(sides: tuple[Side, Side]) -> str:
    """Losses and ratio of the speeds for the progress bar."""
    losses = ", ".join(f"{side.name} {side.epoch_losses[-1]:.4f}" for side in sides)
    theirs, ours = (side.turns["train"][-1][1] for side in sides)
    return f"loss of {losses}; {theirs / ours:.2f}x"


def header(sides: tuple[Side, Side]) -> str:
    """Two lines that epoch_line continues."""
    titles = ("train loss", "dev accuracy", "training tokens/s")
    names = "".join(f"{side.name:>10}" for side in sides)
    return f"{'':5}{''.join(f'{t:>20}' for t in titles)}\nepoch{names * 3}   ratio"


def epoch_line(sides: tuple[Side, Side], epoch: int) -> str:
    """Loss, accuracy and speed of both in an epoch, side by side."""
    rows = [side.history[epoch] for side in sides]
    cells = [f"{row['train_loss']:10.4f}" for row in rows]
    cells += [f"{row['dev_accuracy']:10.2%}" for row in rows]
    theirs, ours = (row["train_tokens_per_second"] for row in rows)
    return f"{epoch + 1:5}{''.join(cells)}{theirs:10,.0f}{ours:10,.0f}{ours / theirs:7.2f}x"


def table(sides: tuple[Side, Side]) -> str:
    """Final results: a column for each tagger and one for the ratio of speeds."""
    lines = [f"{'':24}{sides[0].name:>12}{sides[1].name:>12}{'ratio':>9}"]
    rows = [side.history[-1] for side in sides]
    for key, style in (("train_loss", ".4f"), ("dev_loss", ".4f"), ("dev_accuracy", ".2%")):
        cells = "".join(f"{row[key]:12{style}}" for row in rows)
        lines.append(f"{key.replace('_', ' '):24}{cells}")
    for kind, title in (("train", "training tokens/s"), ("eval", "inference tokens/s")):
        theirs, ours = (side.speed(kind) for side in sides)
        lines.append(f"{title:24}{theirs:12,.0f}{ours:12,.0f}{ours / theirs:8.2f}x")
    return "\n".join(lines)


def loss_differences(sides: tuple[Side, Side]) -> list[float]:
    """The difference of the two losses at each step."""
    return [abs(a - b) for a, b in zip(sides[0].losses, sides[1].losses, strict=True)]


def metrics(args: argparse.Namespace, data: Data, sides: tuple[Side, Side]) -> dict[str, Any]:
    """All measurements, for metrics.json."""
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    return {
        "arguments": arguments,
        "task": data.task,
        "torch": str(torch.__version__),
        "fusedrnn": fusedrnn.__version__,
        "processes": sides[0].workers.count,
        "threads": torch.get_num_threads(),
        "sides": {s.name: {"epochs": s.history, "step_losses": s.losses} for s in sides},
        "tokens_per_second": {
            k: {s.name: s.speed(k) for s in sides}
            | {"ratio": sides[1].speed(k) / sides[0].speed(k)}
            for k in ("train", "eval")
        },
        "largest_loss_difference": max(loss_differences(sides)),
    }

"""The files that a run leaves: picture, measurements, checkpoint."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tagger.batches import chunks, make_batch
from tagger.data import Data
from tagger.errors import UserError
from tagger.model import load_tagger, save_tagger
from tagger.plots import draw
from tagger.report import describe, loss_differences, metrics, table
from tagger.side import Side
from tagger.training import model_sizes, steps_per_epoch
from tagger.workers import Workers


def prepare_output(output: Path) -> None:
    """Makes the folder at the start, so that a failure does not lose a run."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't write to {output}: {error.strerror}") from error
    if not os.access(output, os.W_OK):
        raise UserError(f"can't write to {output}: Permission denied")


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file beside `path`, then renames it: the old file stays until then."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def same_predictions(path: Path, data: Data, args: argparse.Namespace) -> tuple[int, int]:
    """Loads a checkpoint with both layers and compares: equal labels, and all, of the dev part."""
    alone = Workers(0, 1, torch.device("cpu"))
    taggers = [load_tagger(path, fused=fused)[0] for fused in (False, True)]
    same = total = 0
    with torch.no_grad():
        for part in chunks(data.dev, args.batch_size):
            words, lengths, *_ = make_batch(part, alone)
            theirs, ours = (tagger(words, lengths).argmax(-1) for tagger in taggers)
            real = torch.arange(words.size(1)) < lengths[:, None]
            same += int((theirs == ours)[real].sum())
            total += int(real.sum())
    return same, total


def write_results(
    args: argparse.Namespace, data: Data, sides: tuple[Side, Side], weights: dict[str, Tensor]
) -> None:
    """Writes the three files, the checkpoint last, and prints the report."""
    title = describe(args, data, sides[0].workers)
    files = [args.output / name for name in ("curves.png", "metrics.json", "model.pt")]
    text = json.dumps(metrics(args, data, sides), indent=1) + "\n"
    try:
        write_whole(files[0], lambda path: draw(path, sides, title))
        write_whole(files[1], lambda path: path.write_text(text, encoding="utf-8"))
        write_whole(files[2], lambda path: save_tagger(path, weights, data, model_sizes(args)))
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError for a full disk
        raise UserError(f"can't write to {args.output}: {str(error).splitlines()[0]}") from error
    same, total = same_predictions(files[2], data, args)
    differences = loss_differences(sides)
    first = steps_per_epoch(data, args.batch_size)
    print(f"\n{table(sides)}\n")
    print(
        f"largest difference of the two losses at a step: {max(differences[:first]):.1e} in the "
        f"first epoch, {max(differences):.1e} in all (training amplifies rounding)"
    )
    names = " and ".join(side.name for side in sides)
    print(f"{files[2].name} loaded into {names}: same label for {same:,} of {total:,} dev words")
    print(f"wrote {', '.join(map(str, files))}")

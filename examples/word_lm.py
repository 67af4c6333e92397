"""Trains a word language model twice: plain, and with dropout in its recurrence.

The second model has weight_dropout (DropConnect on weight_hh: Merity et al. 2018) and
recurrent_dropout (one mask on h for a whole call: Gal and Ghahramani 2016). Both start from the
same weights and read the same batches. The text is the language reference that Python's help()
prints: 90,000 words and signs in the standard library. Every tenth paragraph is for validation.

    pip install matplotlib
    python examples/word_lm.py
    python examples/word_lm.py --text book.txt

Writes perplexities.png to --output.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curves import draw
from fusedrnn import FusedLSTM


class LanguageModel(nn.Module):
    """Embedding, LSTM, and a linear layer that shares the embedding's weight."""

    def __init__(self, words: int, size: int, **options: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, size)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.rnn = FusedLSTM(size, size, **options)
        self.head = nn.Linear(size, words)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor, state: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Scores [T, B, words] of the words that follow words [T, B], and the last state."""
        y, (h, c) = self.rnn(self.embedding(words), state)
        return self.head(y), (h.detach(), c.detach())


def read(text: Path | None) -> tuple[list[str], list[str]]:
    """Words and signs for training and for validation."""
    if text:
        whole = text.read_text()
    else:
        from pydoc_data.topics import topics

        whole = "\n\n".join(topics.values())
    paragraphs = (" ".join(p.split()).lower() for p in re.split(r"\n\s*\n", whole))
    unique = list(dict.fromkeys(paragraphs))  # pages repeat each other's paragraphs
    train = (p for i, p in enumerate(unique) if i % 10)
    return tuple(re.findall(r"\w+|[^\w\s]", " ".join(part)) for part in (train, unique[::10]))


def encode(words: Sequence[str], vocabulary: Sequence[str], rows: int) -> Tensor:
    """Ids [T, rows]: each row reads its own part of the text."""
    ids = {word: i for i, word in enumerate(vocabulary)}
    found = torch.tensor([ids.get(word, 0) for word in words])
    return found[: len(found) // rows * rows].view(rows, -1).t().contiguous()


def run(model: LanguageModel, ids: Tensor, steps: int, optimizer: torch.optim.Adam | None) -> float:
    """The perplexity of one pass; a step of the optimizer every `steps` words."""
    model.train(optimizer is not None)
    state, total = None, 0.0
    with torch.set_grad_enabled(optimizer is not None):
        for start in range(0, len(ids) - 1, steps):
            words = ids[start : start + steps + 1]
            scores, state = model(words[:-1], state)
            loss = F.cross_entropy(scores.flatten(0, 1), words[1:].flatten())
            if optimizer:
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            total += loss.item() * (len(words) - 1)
    return math.exp(total / (len(ids) - 1))


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Trains both and draws their validation perplexities, which it returns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a text file; paragraphs end at blank lines")
    for name, default in (("size", 200), ("epochs", 12), ("rows", 20), ("steps", 35), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("weight-dropout", 0.5), ("recurrent-dropout", 0.3)):
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--output", type=Path, default=Path("runs/word_lm"))
    args = parser.parse_args(argv)
    train, dev = read(args.text)
    vocabulary = ["<unk>", *sorted(w for w, n in Counter(train).items() if n > 2)]
    parts = [encode(words, vocabulary, args.rows) for words in (train, dev)]
    print(f"{len(train):,} words to train on, {len(dev):,} to test on, {len(vocabulary):,} ids")
    dropout = {"weight_dropout": args.weight_dropout, "recurrent_dropout": args.recurrent_dropout}
    curves = {}
    for name, options in (("plain", {}), ("with dropout", dropout)):
        torch.manual_seed(args.seed)
        model, curves[name] = LanguageModel(len(vocabulary), args.size, **options), []
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for epoch in range(args.epochs):
            seen = run(model, parts[0], args.steps, optimizer)
            curves[name].append(run(model, parts[1], args.steps, None))
            print(f"{name}, epoch {epoch + 1}: perplexity {seen:.2f}, dev {curves[name][-1]:.2f}")
    labels = {"xlabel": "epoch", "ylabel": "validation perplexity", "yscale": "log"}
    draw(args.output / "perplexities.png", curves, **labels)
    return curves


if __name__ == "__main__":
    main()

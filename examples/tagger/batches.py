"""Padded batches, cut from a list of examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tagger.data import NO_LABEL, Example
from tagger.workers import Workers


class Batch(NamedTuple):
    """A process's part of a batch of B sequences; the two counts are of the whole batch."""

    words: Tensor  # [B, T]
    lengths: Tensor  # [B], on the CPU
    labels: Tensor  # [B, T]
    tokens: int
    labelled: int


def make_batch(examples: Sequence[Example], workers: Workers) -> Batch:
    """Pads every count-th sequence, from the process's rank on.

    A process without rows gets a row without labels: each process has to make the step.
    """
    mine = examples[workers.rank :: workers.count]
    if not mine:
        words, labels = examples[0]
        mine = [(words, torch.full_like(labels, NO_LABEL))]
    return Batch(
        pad_sequence([words for words, _ in mine], batch_first=True).to(workers.device),
        torch.tensor([len(words) for words, _ in mine]),
        pad_sequence([labels for _, labels in mine], batch_first=True, padding_value=NO_LABEL).to(
            workers.device
        ),
        sum(len(words) for words, _ in examples),
        sum(int((labels != NO_LABEL).sum()) for _, labels in examples),
    )


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Cuts a sequence into parts of `size`; the last may be shorter."""
    return (items[i : i + size] for i in range(0, len(items), size))

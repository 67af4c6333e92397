"""The model, its loss, and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn
from tagger.data import NO_LABEL, UNKNOWN_LABEL, Data

LAYERS = {"lstm": (nn.LSTM, fusedrnn.FusedLSTM), "gru": (nn.GRU, fusedrnn.FusedGRU)}


class Tagger(nn.Module):
    """Embedding, bidirectional LSTM or GRU, linear.

    Args:
        cell: "lstm" or "gru".
        words: size of the vocabulary.
        labels: number of labels, L.
        embedding: size of an embedding.
        hidden: size of the hidden state of each direction.
        layers: number of layers.
        fused: whether the layers are fusedrnn's; parameters and their names are the same.
        packs: whether batches are packed; fusedrnn's layers can take lengths instead.
    """

    def __init__(
        self,
        cell: str,
        words: int,
        labels: int,
        embedding: int,
        hidden: int,
        layers: int,
        *,
        fused: bool,
        packs: bool = True,
    ) -> None:
        super().__init__()
        self.packs = packs
        self.embedding = nn.Embedding(words, embedding)
        self.rnn = LAYERS[cell][fused](
            embedding, hidden, layers, batch_first=True, bidirectional=True
        )
        self.linear = nn.Linear(2 * hidden, labels)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Scores [B, T, L] of words [B, T], with the length of each row [B] on the CPU."""
        embedded = self.embedding(words)
        if not self.packs:
            return self.linear(self.rnn(embedded, lengths=lengths)[0])
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        output, _ = self.rnn(packed)
        padded, _ = pad_packed_sequence(output, batch_first=True, total_length=words.size(1))
        return self.linear(padded)


def loss_sum(scores: Tensor, labels: Tensor) -> Tensor:
    """The sum of the cross-entropies of scores [B, T, L] at the labels [B, T] that count."""
    known = labels.masked_fill(labels == UNKNOWN_LABEL, NO_LABEL)
    return F.cross_entropy(
        scores.flatten(0, 1), known.flatten(), ignore_index=NO_LABEL, reduction="sum"
    )


def save_tagger(path: Path, weights: dict[str, Tensor], data: Data, sizes: dict[str, Any]) -> None:
    """Writes a checkpoint of plain tensors, numbers and strings."""
    checkpoint = {
        "config": sizes,
        "task": data.task,
        "words": data.words,
        "labels": data.labels,
        "state_dict": weights,
    }
    torch.save(checkpoint, path)


def load_tagger(
    path: str | Path, *, fused: bool, device: str | torch.device = "cpu"
) -> tuple[Tagger, dict[str, Any]]:
    """The tagger of a checkpoint, with either layer, and the checkpoint itself.

    `checkpoint["words"]` and `checkpoint["labels"]` list words and labels by id; word 0 is the
    unknown word.
    """
    checkpoint = torch.load(path, map_location=device, weights_only=True)
    words, labels = len(checkpoint["words"]), len(checkpoint["labels"])
    tagger = Tagger(words=words, labels=labels, **checkpoint["config"], fused=fused)
    tagger.load_state_dict(checkpoint["state_dict"])
    return tagger.to(device).eval(), checkpoint

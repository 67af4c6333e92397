"""Language identification by Stanza."""

from __future__ import annotations

import torch

from benchmarks.models.job import Job, Learnt, Model, Results, Swap, load, seed


def _stanza(swap: Swap) -> Job:
    rng = seed()
    # A language is a Markov chain over characters.
    odds = [rng.dirichlet([0.1] * 40, 40) for _ in range(8)]
    lines = [[int(rng.integers(40))] for _ in range(64)]
    for i, line in enumerate(lines):
        while len(line) < 40:
            line.append(int(rng.choice(40, p=odds[i % 8][line[-1]])))
    texts, languages = torch.tensor(lines) + 1, torch.arange(64) % 8
    config = {
        "model_path": None,
        "char_to_idx": {"<PAD>": 0} | {chr(97 + i): 1 + i for i in range(40)},
        "tag_to_idx": {f"language {i}": i for i in range(8)},
        "lang_weights": torch.ones(8),
    }

    def train() -> Results:
        seed()
        trainer = load("stanza.models.langid.trainer").Trainer(config, device="cpu")
        swap(trainer.model)
        learnt = Learnt(trainer.model)
        for _ in range(4):
            trainer.update((texts, languages))
        found = trainer.predict((texts, languages))
        return {"learnt": learnt(), "languages": found}

    return train


MODELS = (
    Model(
        "stanza langid",
        {"stanza": "stanza"},
        "language of a text, 4 updates by its Trainer",
        "training",
        _stanza,
    ),
)

"""Speech synthesis by SpeechBrain."""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks.models.job import Job, Learnt, Model, Results, Swap, load, seed


def _tacotron(swap: Swap) -> Job:
    core, tacotron = load("speechbrain.core"), load("speechbrain.lobes.models.Tacotron2")
    objective = tacotron.Loss(guided_attention_sigma=0.2)

    class Synthesis(core.Brain):  # type: ignore[name-defined,misc]
        """The class that a SpeechBrain recipe defines."""

        def compute_forward(self, batch: Any, stage: Any) -> Any:
            text, lengths, mel, _, mel_lengths, *_ = batch
            return self.modules.model((text, lengths, mel, lengths.max(), mel_lengths))

        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            _, lengths, mel, gate, mel_lengths, *_ = batch
            return objective(predictions, (mel, gate), lengths, mel_lengths, 1).loss

    seed()
    # Random data: 8 texts with 20 to 27 symbols, two frames for each symbol.
    pairs = [(torch.randint(1, 40, (n,)), torch.randn(80, 2 * n), n) for n in range(20, 28)]
    data = [{"mel_text_pair": pair, "label": "", "wav": ""} for pair in pairs]

    def fit() -> Results:
        seed()
        model = tacotron.Tacotron2(
            n_symbols=40, symbols_embedding_dim=128, encoder_embedding_dim=128, attention_dim=64,
            attention_rnn_dim=256, decoder_rnn_dim=256, prenet_dim=128, postnet_embedding_dim=128,
        )  # fmt: skip
        swap(model)
        learnt = Learnt(model)
        # Biases before a batch norm have gradients of pure rounding, far below this eps.
        adam = functools.partial(torch.optim.Adam, lr=1e-3, eps=1e-6)
        brain = Synthesis({"model": model}, adam, run_opts={"device": "cpu"})
        loader = {"batch_size": 4, "collate_fn": tacotron.TextMelCollate()}
        brain.fit(range(1), data, progressbar=False, train_loader_kwargs=loader)
        return {"learnt": learnt(), "loss": brain.avg_train_loss}

    return fit


MODELS = (
    Model(
        "Tacotron2",
        {"speechbrain": "speechbrain"},
        "speech from text, 2 batches by SpeechBrain's Brain",
        "training",
        _tacotron,
    ),
)

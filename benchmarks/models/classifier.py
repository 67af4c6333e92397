"""A user's classifier, trained by skorch and explained by Captum."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.models.job import Job, Learnt, Model, Results, Swap, load, seed


class Classifier(nn.Module):
    """Classifies a sequence of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(500, 64)
        self.lstm = nn.LSTM(64, 128, num_layers=2, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(256, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        output, _ = self.lstm(self.embedding(tokens))
        found: Tensor = self.linear(output.mean(1))
        return found


def _skorch(swap: Swap) -> Job:
    rng = seed()
    x = rng.integers(0, 500, (256, 40))
    y = x.sum(1) % 4

    def fit() -> Results:
        seed()
        net = load("skorch").NeuralNetClassifier(
            Classifier,
            criterion=nn.CrossEntropyLoss,
            optimizer=torch.optim.Adam,
            batch_size=32,
            max_epochs=1,
            train_split=None,
            verbose=0,
        )
        net.initialize()
        swap(net.module_)
        learnt = Learnt(net.module_)
        net.partial_fit(x, y)
        return {"learnt": learnt(), "probabilities": net.predict_proba(x)}

    return fit


def _captum(swap: Swap) -> Job:
    seed()
    model = Classifier().eval()
    swap(model)
    tokens = torch.randint(500, (4, 40))
    attribution = load("captum.attr").LayerIntegratedGradients(model, model.embedding)

    def attribute() -> Results:
        found, delta = attribution.attribute(
            tokens, torch.zeros_like(tokens), target=1, n_steps=20, return_convergence_delta=True
        )
        # delta subtracts nearly equal sums; the scores give it their scale.
        return {"attributions": found, "delta": torch.stack([delta, model(tokens)[:, 1]])}

    return attribute


MODELS = (
    Model(
        "skorch",
        {"skorch": "skorch"},
        "a user's classifier, an epoch by partial_fit, and predict_proba",
        "training",
        _skorch,
    ),
    Model(
        "captum",
        {"captum": "captum"},
        "the same classifier in eval mode, layer integrated gradients of its embedding",
        "inference",
        _captum,
    ),
)

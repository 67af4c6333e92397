"""Tells from a docstring which package it is from: a text classifier that takes `lengths=`.

The text is real: the docstrings of seven packages of Python's standard library, up to 60 words of
each, which docstrings.py reads. A fifth of them, at random, is for testing.

    python examples/text_classifier.py

Prints the accuracy after each epoch, beside the share of the largest package.
"""

import torch
from torch import Tensor, nn

import docstrings
from fusedrnn import FusedLSTM

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest")


class Classifier(nn.Module):
    """Embedding, bidirectional LSTM, and a linear layer over its last states."""

    def __init__(self, words: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Sequential(nn.Embedding(words, size), nn.Dropout(0.5))
        self.rnn = FusedLSTM(size, size, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(2 * size, len(PACKAGES)))

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Scores [B, packages] of ids [B, T]."""
        _, (h_n, _) = self.rnn(self.embedding(ids), lengths=lengths)  # padding is never read
        return self.head(torch.cat([*h_n], 1))


def main(epochs: int = 12, size: int = 64) -> tuple[float, float]:
    """Trains a classifier; returns its accuracy and the share of the largest package."""
    torch.manual_seed(0)
    ids, lengths, labels = docstrings.read(PACKAGES, steps=60)
    dev, train = torch.randperm(len(ids)).tensor_split([len(ids) // 5])
    largest = labels[dev].bincount().max().item() / len(dev)
    print(f"{len(train)} docstrings to train on, {len(dev)} to test on; largest: {largest:.1%}")
    model = Classifier(int(ids.max()) + 1, size)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(epochs):
        for part in train[torch.randperm(len(train))].split(32):
            scores = model.train()(ids[part], lengths[part])
            optimizer.zero_grad()
            nn.functional.cross_entropy(scores, labels[part]).backward()
            optimizer.step()
        with torch.no_grad():
            predicted = model.eval()(ids[dev], lengths[dev]).argmax(1)
        accuracy = (predicted == labels[dev]).float().mean().item()
        print(f"epoch {epoch + 1:2}: accuracy {accuracy:.1%}")
    return accuracy, largest


if __name__ == "__main__":
    main()

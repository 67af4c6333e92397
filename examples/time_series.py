"""Forecasts the sunspots of the next year, beside naive forecasts.

The series is real: yearly means from 1700 to 2008, in sunspots.csv (National Geophysical Data
Center of the USA, public domain). A GRU learns those before 1920; the others are for testing.

    python examples/time_series.py

Prints the mean absolute error in the test years: the GRU's, and those of three other forecasts.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from fusedrnn import FusedGRU

TRAIN = 1920 - 1700  # years


class Forecaster(nn.Module):
    """A GRU, and a linear layer for the change to the next value."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.rnn = FusedGRU(1, size)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(size, 1))

    def forward(self, values: Tensor) -> Tensor:
        """Forecasts [T]: each of the value after one of values [T]."""
        return values + 50 * self.head(self.rnn(values[:, None] / 50)[0])[:, 0]


def main(updates: int = 300, size: int = 32) -> dict[str, float]:
    """Trains a forecaster; returns the errors by the name of the forecast."""
    torch.manual_seed(0)
    lines = Path(__file__).with_name("sunspots.csv").read_text().split()[1:]
    values = torch.tensor([float(line.split(",")[1]) for line in lines])
    model, train = Forecaster(size), values[:TRAIN]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(updates):
        optimizer.zero_grad()
        (model(train[:-1]) - train[1:]).abs().mean().div(50).backward()
        optimizer.step()

    forecasts = {"FusedGRU": model.eval()(values)[TRAIN - 1 : -1].detach()}
    two = torch.stack([values[1:-1], values[:-2], torch.ones(len(values) - 2)], 1)
    fit = torch.linalg.lstsq(two[: TRAIN - 2], train[2:, None]).solution
    forecasts["linear regression on two years"] = (two @ fit)[TRAIN - 2 :, 0]
    forecasts["the year before"] = values[TRAIN - 1 : -1]
    forecasts["eleven years before"] = values[TRAIN - 11 : -11]
    errors = {k: (v - values[TRAIN:]).abs().mean().item() for k, v in forecasts.items()}
    for name, error in errors.items():
        print(f"{name:32}{error:6.1f}")
    return errors


if __name__ == "__main__":
    main()

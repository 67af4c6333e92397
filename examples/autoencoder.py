"""Finds anomalies by the error of a sequence autoencoder that is trained on normal series alone.

The series are made here: noisy pulses, each row at its own rate. In odd rows one comes early.

    python examples/autoencoder.py

Prints the mean squared errors of normal rows, which fall, and of odd rows. A row is found if its
error is larger than those of 99 % of the normal rows.
"""

import torch
from torch import Tensor, nn

from fusedrnn import FusedLSTM


def pulses(rows: int, odd: bool = False) -> Tensor:
    """Series [T, rows, 1]."""
    period = torch.empty(rows, 1).uniform_(14, 20)
    starts = 4 + 4 * torch.rand(rows, 1) + period * torch.arange(5)
    starts[:, 2] -= 0.4 * period[:, 0] * odd
    after = torch.arange(64)[:, None, None] - starts  # [T, rows, pulses]
    return (torch.exp(-(after**2) / 6).sum(-1) + 0.1 * torch.randn(64, rows))[..., None]


class Autoencoder(nn.Module):
    """The decoder gets one state of the encoder, at every step."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.encoder, self.decoder = FusedLSTM(1, size), FusedLSTM(size, size)
        self.head = nn.Linear(size, 1)

    def errors(self, x: Tensor) -> Tensor:
        """Mean squared errors [B] of series [T, B, 1]."""
        _, (code, _) = self.encoder(x.flip(0))
        output, _ = self.decoder(code.expand(len(x), -1, -1))
        return (self.head(output) - x).square().mean((0, 2))


def main(updates: int = 800, size: int = 64) -> tuple[list[float], float]:
    """Trains; returns the errors of normal rows, and the share of odd rows that is found."""
    torch.manual_seed(0)
    model, normal, odd = Autoencoder(size), pulses(200), pulses(200, odd=True)
    optimizer, history = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for update in range(updates + 1):
        if update % (updates // 4) == 0:
            e, e_odd = model.errors(normal).detach(), model.errors(odd).detach()
            found = (e_odd > e.quantile(0.99)).float().mean().item()
            history.append(e.mean().item())
            print(f"{update:4} updates: {e.mean():.3f}, odd {e_odd.mean():.3f}, {found:.0%} found")
        optimizer.zero_grad()
        model.errors(pulses(32)).mean().backward()
        optimizer.step()
    return history, found


if __name__ == "__main__":
    main()

"""Runs a batch of different lengths by `lengths=`, in the place of packing and unpacking.

    python examples/lengths.py

Prints the time of a training step in three ways, and the largest difference of their outputs and
states from the first way: nn.LSTM packed, FusedLSTM packed, FusedLSTM with lengths.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.benchmark import Timer

from fusedrnn import FusedLSTM


def packed(layer: nn.Module, x: Tensor, lengths: Tensor) -> Any:
    """Output and states, by the lines that nn.LSTM needs."""
    rows = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    output, states = layer(rows)
    output, _ = pad_packed_sequence(output, batch_first=True, total_length=x.size(1))
    return output, states


def main(hidden: int = 128, steps: int = 60, seconds: float = 1.0) -> float:
    """Compares the ways; returns the largest difference."""
    torch.manual_seed(0)
    lstm = nn.LSTM(64, hidden, batch_first=True, bidirectional=True)
    fused = FusedLSTM(64, hidden, batch_first=True, bidirectional=True)
    fused.load_state_dict(lstm.state_dict())
    x = torch.randn(32, steps, 64)
    lengths = torch.randint(1, steps + 1, (32,))  # in any order; zeros are allowed too
    print(f"32 rows of 1 to {steps} steps, {lengths.sum() / (32 * steps):.0%} of the batch")

    ways = {
        "nn.LSTM, packed": lambda: packed(lstm, x, lengths),
        "FusedLSTM, packed": lambda: packed(fused, x, lengths),
        "FusedLSTM, lengths": lambda: fused(x, lengths=lengths),
    }
    expected, states = packed(lstm, x, lengths)
    largest = 0.0
    for name, call in ways.items():
        output, found = call()
        pairs = zip((output, *found), (expected, *states), strict=True)
        largest = max(largest, *((a - b).abs().max().item() for a, b in pairs))
        step = "call()[0].square().sum().backward()"
        timer = Timer(step, globals={"call": call}, num_threads=torch.get_num_threads())
        milliseconds = 1e3 * timer.blocked_autorange(min_run_time=seconds).median
        print(f"{name:19}{milliseconds:7.2f} ms a training step, differs by {largest:.0e}")
    return largest


if __name__ == "__main__":
    main()

"""Puts FusedLSTM in the place of nn.LSTM: the same weights, the same results, in less time.

    python examples/quick_start.py

Prints the largest differences of the outputs and of the weights' gradients, then the times of a
call and of a training step with both layers.
"""

import statistics

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from fusedrnn import FusedLSTM


def compare(what: str, statement: str, layers: list[nn.Module], x: Tensor, seconds: float) -> None:
    """Prints the median time of a statement with either layer."""
    threads = torch.get_num_threads()
    timers = [Timer(statement, globals={"layer": m, "x": x}, num_threads=threads) for m in layers]
    turn = seconds / 5  # both take turns, because a machine's speed changes
    found = [[t.blocked_autorange(min_run_time=turn).median for t in timers] for _ in range(5)]
    theirs, ours = (1e3 * statistics.median(times) for times in zip(*found, strict=True))
    print(f"{what:14} nn.LSTM {theirs:6.2f} ms, FusedLSTM {ours:6.2f} ms: {theirs / ours:.2f}x")


def main(hidden: int = 128, steps: int = 50, seconds: float = 0.5) -> tuple[float, float]:
    """Compares both layers; returns the two differences."""
    torch.manual_seed(0)
    lstm = nn.LSTM(64, hidden, num_layers=2, bidirectional=True)
    fused = FusedLSTM(64, hidden, num_layers=2, bidirectional=True)  # the same arguments
    fused.load_state_dict(lstm.state_dict())  # the same weights

    x = torch.randn(steps, 8, 64)
    expected, output = lstm(x)[0], fused(x)[0]
    expected.square().sum().backward()
    output.square().sum().backward()
    outputs = (output - expected).abs().max().item()
    pairs = zip(fused.parameters(), lstm.parameters(), strict=True)
    gradients = max(((a.grad - b.grad).norm() / b.grad.norm()).item() for a, b in pairs)
    print(f"outputs differ by {outputs:.0e} at most, gradients by {gradients:.0e} of their norm")

    with torch.no_grad():
        compare("inference", "layer(x)", [lstm, fused], x, seconds)
    compare("training step", "layer(x)[0].square().sum().backward()", [lstm, fused], x, seconds)
    return outputs, gradients


if __name__ == "__main__":
    main()

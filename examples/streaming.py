"""Carries the state from step to step, as a service does that gets one token at a time.

    python examples/streaming.py

Prints the microseconds of a step, at the 50th and the 99th percentile: nn.LSTM, FusedLSTM, and
frozen layers, whose weights are packed once (`freeze`), in float32 and in int8. The last column is
the largest difference from the output of nn.LSTM in one call for all steps.
"""

import time

import torch
from torch import Tensor, nn

from fusedrnn import FusedLSTM, freeze


def stream(layer: nn.Module, tokens: Tensor) -> tuple[Tensor, list[float]]:
    """Outputs [T, 1, H] of tokens [T, 1, I], and the microseconds of the steps, sorted."""
    outputs, times, state = [], [], None
    for token in tokens:
        start = time.perf_counter()
        output, state = layer(token[None], state)
        times.append(1e6 * (time.perf_counter() - start))
        outputs.append(output)
    return torch.cat(outputs), sorted(times)


@torch.inference_mode()
def main(hidden: int = 256, steps: int = 2000) -> dict[str, float]:
    """Streams through each layer; returns the differences."""
    torch.manual_seed(0)
    lstm = nn.LSTM(64, hidden, num_layers=2).eval()
    fused = FusedLSTM(64, hidden, num_layers=2).eval()
    fused.load_state_dict(lstm.state_dict())
    layers = {"nn.LSTM": lstm, "FusedLSTM": fused}
    layers |= {"frozen": freeze(fused), "frozen, int8": freeze(fused, torch.int8)}

    tokens, differences = torch.randn(steps, 1, 64), {}
    expected, _ = lstm(tokens)
    print(f"{'':14}{'p50, us':>9}{'p99, us':>9}{'differs by':>12}")
    for name, layer in layers.items():
        stream(layer, tokens[:100])  # to warm up
        output, times = stream(layer, tokens)
        p50, p99 = (times[int(share * steps)] for share in (0.5, 0.99))
        differences[name] = (output - expected).abs().max().item()
        print(f"{name:14}{p50:9.1f}{p99:9.1f}{differences[name]:12.0e}")
    return differences


if __name__ == "__main__":
    main()

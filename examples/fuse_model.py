"""Fuses a model whose code stays as it is: checks it, times it, and puts torch's layers back.

    python examples/fuse_model.py

Prints the recurrent layers of the model and the time of a call, before and after `fuse`, then the
largest difference of the outputs.
"""

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from fusedrnn import fuse, unfuse


class Speech(nn.Module):
    """Stands for somebody else's model: nothing in it knows fusedrnn."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.encoder = nn.GRU(40, size, num_layers=2, batch_first=True, bidirectional=True)
        self.decoder = nn.LSTMCell(2 * size, size)
        self.head = nn.Linear(size, 30)

    def forward(self, frames: Tensor) -> Tensor:
        """Scores [B, T, 30] of frames [B, T, 40]."""
        state, scores = None, []
        for token in self.encoder(frames)[0].unbind(1):
            state = self.decoder(token, state)
            scores.append(self.head(state[0]))
        return torch.stack(scores, 1)


def milliseconds(model: nn.Module, frames: Tensor, seconds: float) -> float:
    """The median time of a call, printed beside the classes of the layers."""
    names = {"model": model, "frames": frames}
    timer = Timer("model(frames)", globals=names, num_threads=torch.get_num_threads())
    found = 1e3 * timer.blocked_autorange(min_run_time=seconds).median
    layers = " and ".join(type(layer).__name__ for layer in (model.encoder, model.decoder))
    print(f"{layers:26}{found:7.2f} ms a call")
    return found


@torch.no_grad()
def main(size: int = 128, steps: int = 100, seconds: float = 1.0) -> float:
    """Compares the model before and after; returns the largest difference of the outputs."""
    torch.manual_seed(0)
    model, frames = Speech(size).eval(), torch.randn(4, steps, 40)
    expected, before = model(frames), milliseconds(model, frames, seconds)
    fuse(model)  # in place: the same modules, with the same Parameters
    difference = (model(frames) - expected).abs().max().item()
    ratio = before / milliseconds(model, frames, seconds)
    print(f"{ratio:.2f} times as fast; outputs differ by {difference:.0e} at most")
    assert type(unfuse(model).encoder) is nn.GRU  # the way back, for example for ONNX
    return difference


if __name__ == "__main__":
    main()

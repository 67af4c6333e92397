"""Fused layers that take the place of torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN and their cells."""

from importlib import metadata as _metadata

try:
    import torch as _torch  # noqa: F401
except ImportError as _error:
    raise ImportError(
        "fusedrnn needs torch: pip install torch, then install fusedrnn again"
    ) from _error

from fusedrnn import functional
from fusedrnn.frozen import (
    FrozenGRU,
    FrozenGRUCell,
    FrozenLSTM,
    FrozenLSTMCell,
    FrozenRNN,
    FrozenRNNCell,
    freeze,
)
from fusedrnn.modules import (
    FusedGRU,
    FusedGRUCell,
    FusedLSTM,
    FusedLSTMCell,
    FusedRNN,
    FusedRNNCell,
)
from fusedrnn.swap import fuse, unfuse

try:
    __version__ = _metadata.version("fusedrnn")
except _metadata.PackageNotFoundError:  # run from a checkout that was built in place
    __version__ = "0+unknown"

__all__ = [
    "FrozenGRU",
    "FrozenGRUCell",
    "FrozenLSTM",
    "FrozenLSTMCell",
    "FrozenRNN",
    "FrozenRNNCell",
    "FusedGRU",
    "FusedGRUCell",
    "FusedLSTM",
    "FusedLSTMCell",
    "FusedRNN",
    "FusedRNNCell",
    "__version__",
    "freeze",
    "functional",
    "fuse",
    "unfuse",
]

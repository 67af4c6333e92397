"""The grid: every measured configuration, as data."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from benchmarks.cells import Cell, cell_of


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration; sizes as in nn.LSTM.

    A case with T = 1 receives its states, as in streaming; other cases start at zeros.

    Attributes:
        name: selects the case on the command line.
        cell: a layer or single-step module in benchmarks/cells.py.
        B: batch size.
        T: steps; the longest row's if lengths differ.
        H: hidden_size.
        I: input_size; H if 0.
        layers: num_layers.
        layout: padded: every row has T steps. packed: a PackedSequence, built beforehand. lengths:
            a padded input with lengths in any order; nn.LSTM packs and unpacks it in the call.
        batch_first: whether input and output are [B, T, ...].
        proj_size: as in nn.LSTM.
        compiled: whether torch.compile is a baseline; compiling takes long, so only a few cases.

    Raises:
        ValueError: benchmarks/cells.py has no such cell.
    """

    name: str
    cell: str = "LSTM"
    B: int = 1
    T: int = 1
    H: int = 64
    I: int = 0
    layers: int = 1
    bidirectional: bool = False
    dtype: str = "float32"
    layout: str = "padded"
    batch_first: bool = False
    proj_size: int = 0
    compiled: bool = False

    def __post_init__(self) -> None:
        cell_of(self.cell)
        object.__setattr__(self, "I", self.I or self.H)

    @property
    def recurrence(self) -> Cell:
        return cell_of(self.cell)

    @property
    def is_cell(self) -> bool:
        """Whether the module computes a single step, as nn.LSTMCell does."""
        return self.cell.endswith("Cell")

    @property
    def gates(self) -> int:
        return self.recurrence.gates

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def lengths(self) -> list[int]:
        """Steps of each row: T if padded, else evenly from T / 10 to T; longest first if packed."""
        if self.layout == "padded":
            return [self.T] * self.B
        low = max(1, self.T // 10)
        steps = [low + (self.T - low) * b // max(1, self.B - 1) for b in reversed(range(self.B))]
        if self.layout == "lengths":
            random.Random(0).shuffle(steps)
        return steps


_TAGGER = Case("tagger", B=32, T=50, I=100, H=200, layers=2, bidirectional=True)

CASES: tuple[Case, ...] = (
    # Call overhead, and single steps.
    Case("tiny", T=5, H=6, compiled=True),
    Case("step H64", H=64, compiled=True),
    Case("step H256 x2", H=256, layers=2),
    Case("LSTMCell B1 H64", "LSTMCell", H=64),
    Case("LSTMCell B1 H256", "LSTMCell", H=256, compiled=True),
    Case("LSTMCell B32 H256", "LSTMCell", B=32, H=256),
    # One row: every step reads all weights.
    Case("B1 T100 H128 bidirectional", T=100, H=128, bidirectional=True),
    Case("B1 T100 H256", T=100, H=256),
    Case("B1 T100 H512", T=100, H=512),
    Case("B1 T50 H1024", T=50, H=1024),
    # A few rows.
    Case("B2 T50 H256", B=2, T=50, H=256),
    Case("B4 T50 H256", B=4, T=50, H=256),
    Case("B4 T160 H256 x3", B=4, T=160, H=256, layers=3),
    Case("B4 T160 H256 proj", B=4, T=160, H=256, proj_size=128),
    Case("autoencoder B4 T1000 H32", B=4, T=1000, H=32),
    Case("B8 T50 H128", B=8, T=50, H=128),
    Case("B16 T100 H128 bidirectional", B=16, T=100, H=128, bidirectional=True),
    # Batches.
    _TAGGER,
    dataclasses.replace(_TAGGER, name="tagger packed", layout="packed"),
    dataclasses.replace(_TAGGER, name="tagger lengths", layout="lengths"),
    Case("time series B32 T100 I1 H64", B=32, T=100, I=1, H=64),
    Case("classifier B64 T28 I28 H128", B=64, T=28, I=28, H=128, batch_first=True),
    Case("B32 T50 H512", B=32, T=50, H=512),
    Case("B64 T100 H256", B=64, T=100, H=256),
    Case("B64 T100 H256 packed", B=64, T=100, H=256, layout="packed"),
    Case("B64 T100 H256 lengths", B=64, T=100, H=256, layout="lengths"),
    Case("B128 T50 H128", B=128, T=50, H=128),
    Case("B256 T20 H64", B=256, T=20, H=64),
    # GRU.
    Case("GRU tiny", "GRU", T=5, H=6, compiled=True),
    Case("GRU step H64", "GRU", H=64),
    Case("GRU step H256 x2", "GRU", H=256, layers=2),
    Case("GRUCell B1 H64", "GRUCell", H=64),
    Case("GRUCell B1 H256", "GRUCell", H=256, compiled=True),
    Case("GRUCell B32 H256", "GRUCell", B=32, H=256),
    Case("GRU B1 T100 H256", "GRU", T=100, H=256),
    Case("GRU B1 T50 H1024", "GRU", T=50, H=1024),
    Case("GRU B8 T50 H128", "GRU", B=8, T=50, H=128),
    dataclasses.replace(_TAGGER, name="GRU tagger", cell="GRU"),
    Case("GRU B64 T100 H256", "GRU", B=64, T=100, H=256),
    Case("GRU B64 T100 H256 packed", "GRU", B=64, T=100, H=256, layout="packed"),
    # Plain RNN.
    Case("RNN tiny", "RNN", T=5, H=6),
    Case("RNN step H64", "RNN", H=64),
    Case("RNNCell B1 H64", "RNNCell", H=64),
    Case("RNN B1 T100 H256", "RNN", T=100, H=256),
    Case("RNN B64 T100 H256", "RNN", B=64, T=100, H=256),
    # Other types.
    Case("B1 T50 H1024 bfloat16", T=50, H=1024, dtype="bfloat16"),
    Case("B8 T50 H256 bfloat16", B=8, T=50, H=256, dtype="bfloat16"),
    Case("B64 T100 H256 bfloat16", B=64, T=100, H=256, dtype="bfloat16"),
    Case("GRU B64 T100 H256 bfloat16", "GRU", B=64, T=100, H=256, dtype="bfloat16"),
    Case("B1 T50 H128 float64", T=50, H=128, dtype="float64"),
    Case("B32 T50 H128 float64", B=32, T=50, H=128, dtype="float64"),
    Case("GRU B32 T50 H128 float64", "GRU", B=32, T=50, H=128, dtype="float64"),
)

# Further cases for a GPU: half types, and layers too large for a CPU.
CUDA_CASES: tuple[Case, ...] = (
    Case("B1 T1000 H512 float16", T=1000, H=512, dtype="float16"),
    Case("B16 T200 H128 bidirectional float16", B=16, T=200, H=128, bidirectional=True,
         dtype="float16"),
    dataclasses.replace(_TAGGER, name="tagger float16", dtype="float16"),
    dataclasses.replace(_TAGGER, name="tagger lengths float16", layout="lengths", dtype="float16"),
    Case("B64 T100 H128 float16", B=64, T=100, H=128, dtype="float16"),
    Case("B64 T100 H512", B=64, T=100, H=512),
    Case("B64 T100 H512 float16", B=64, T=100, H=512, dtype="float16"),
    Case("GRU B64 T100 H512 float16", "GRU", B=64, T=100, H=512, dtype="float16"),
    Case("B128 T100 H1024 bfloat16", B=128, T=100, H=1024, dtype="bfloat16"),
    Case("B512 T100 H256 float16", B=512, T=100, H=256, dtype="float16"),
)  # fmt: skip


def pick(parts: Sequence[str], device: str = "cpu") -> list[Case]:
    """The cases with these names, or with names that contain these parts; all by default.

    Raises:
        ValueError: no name contains a part.
    """
    cases = CASES + (CUDA_CASES if device == "cuda" else ())
    names = {case.name for case in cases}
    chosen: set[str] = set()
    for part in parts:
        found = {part} & names or {name for name in names if part in name}
        if not found:
            raise ValueError(f"no case matches {part!r}; there are: {', '.join(sorted(names))}")
        chosen |= found
    return [case for case in cases if not parts or case.name in chosen]

"""A user's code, for `make lint`: mypy must know each call's return type."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from typing_extensions import assert_type

from fusedrnn import FusedGRU, FusedGRUCell, FusedLSTM, FusedLSTMCell, functional, fuse, unfuse

x = torch.randn(5, 2, 3)
packed = pack_sequence([x[0]])
lstm = FusedLSTM(3, 4, num_layers=2, dropout=0.1, proj_size=2, device="cpu", dtype=torch.float32)
gru = FusedGRU(3, 4, bidirectional=True, device=torch.device("cpu"))
lstm_cell, gru_cell = FusedLSTMCell(3, 4), FusedGRUCell(3, 4, bias=False)

assert_type(lstm(x), tuple[Tensor, tuple[Tensor, Tensor]])
assert_type(lstm(x, (x, x), lengths=[5, 3]), tuple[Tensor, tuple[Tensor, Tensor]])
assert_type(lstm(packed), tuple[PackedSequence, tuple[Tensor, Tensor]])
assert_type(gru(x, lengths=torch.tensor([5, 3])), tuple[Tensor, Tensor])
assert_type(gru(packed, hx=x), tuple[PackedSequence, Tensor])
assert_type(lstm_cell(x[0]), tuple[Tensor, Tensor])
assert_type(lstm_cell(x[0], (x[0], x[0])), tuple[Tensor, Tensor])
assert_type(gru_cell(x[0], x[0]), Tensor)
mask = x[..., 0] > 0
varied = FusedLSTM(3, 4, recurrent_dropout=0.1, zoneout=(0.1, 0.2), layer_norm=True)
varied.zoneout = 0.5
varied.recurrent_dropout_mode = "candidate"
assert_type(varied.weight_dropout, float)
assert_type(varied.layer_norm, bool)
assert_type(varied(x, reset_mask=mask), tuple[Tensor, tuple[Tensor, Tensor]])
assert_type(varied(x, return_cell_states=True), tuple[Tensor, tuple[Tensor, Tensor], Tensor])
assert_type(
    varied(packed, reset_mask=packed, reset_to="initial", return_cell_states=True),
    tuple[PackedSequence, tuple[Tensor, Tensor], PackedSequence],
)
assert_type(gru(x, reset_mask=mask, reset_to="zero"), tuple[Tensor, Tensor])
assert_type(functional.lstm(x, None, []), tuple[Tensor, Tensor, Tensor])
assert_type(
    functional.lstm(x, None, [], zoneout=0.1, return_cell_states=True),
    tuple[Tensor, Tensor, Tensor, Tensor],
)
assert_type(functional.gru(x, None, []), tuple[Tensor, Tensor])
assert_type(fuse(nn.LSTM(3, 4)), nn.LSTM)
assert_type(unfuse(lstm), FusedLSTM)

lstm(x, x)  # type: ignore[call-overload]  # a tensor for a pair
lstm(packed, lengths=[5])  # type: ignore[call-overload]
FusedGRU(3, 4, proj_size=2)  # type: ignore[arg-type]
FusedGRU(3, 4, zoneout=(0.1, 0.2))  # type: ignore[arg-type]
lstm(packed, reset_mask=mask)  # type: ignore[call-overload]
gru(x, return_cell_states=True)  # type: ignore[call-overload]

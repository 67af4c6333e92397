"""Variants of the cells as other implementations define them: oracles in plain torch.

Each function follows one source's formulas, gate order and mask convention, in new code. Masks are
arguments. Shapes: T steps, B batch rows, I input_size, H hidden_size. Gate orders of the weights:

    torch, fusedrnn, TorchRL, AWD-LSTM: LSTM i f g o, GRU r z n; a weight is [G*H, I]
    Haste: LSTM i g f o, GRU z r n; a kernel is the transpose, [I, G*H]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5  # nn.LayerNorm's default, and the constant in Haste's kernels
# Haste's gates, as indices into torch's.
HASTE_LSTM, HASTE_GRU = (0, 2, 1, 3), (1, 0, 2)


def reorder(rows: Tensor, order: Sequence[int]) -> Tensor:
    """The row blocks [G*H, ...] of torch's gates in another order."""
    gates = rows.chunk(len(order))
    return torch.cat([gates[i] for i in order])


@dataclass(frozen=True)
class Norms:
    """A layer's layer norm parameters in torch's gate order: gains, and the shift of c alone."""

    ih: Tensor  # [G*H]
    hh: Tensor  # [G*H]
    c: Tensor | None = None  # [H], LSTM
    c_bias: Tensor | None = None  # [H], LSTM


# --------------------------------------------------------------------------------------- Haste


def _haste_zoneout(
    new: Tensor, old: Tensor, rate: float, updated: Tensor | None, training: bool
) -> Tensor:
    """Haste's mask is 1 where a unit is updated, the opposite of a mask of kept units."""
    if not rate:
        return new
    if training:
        return (new - old) * updated + old
    return rate * old + (1 - rate) * new


def haste_lstm(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    *,
    norms: Norms | None = None,
    zoneout: float = 0.0,
    updated: Tensor | None = None,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """Haste's LSTM and LayerNormLSTM (the PyTorch fallbacks of its LSTM and LayerNormLSTM).

    One bias [4*H]: it takes the sum of torch's two. The layer norms of both products are over all
    4*H values and have gains alone. The cell state is normalised where h reads it and is carried
    as it was. Zoneout is on h alone.

    Args:
        x: [T, B, I].
        h: [B, H].
        c: [B, H].
        weights: weight_ih, weight_hh, bias_ih, bias_hh in torch's gate order.
        norms: of LayerNormLSTM.
        zoneout: the probability for h.
        updated: [T, B, H], 1 where h is updated; read in training.
        training: whether zoneout takes the mask or the expectation.

    Returns:
        h and c after each step, [T, B, H] each.
    """
    W, R, b_ih, b_hh = (reorder(w, HASTE_LSTM) for w in weights)
    hidden, bias = h.size(-1), b_ih + b_hh
    product = x @ W.t()
    if norms:
        product = F.layer_norm(product, (4 * hidden,), reorder(norms.ih, HASTE_LSTM), eps=EPS)
    outputs, cells = [], []
    for t in range(x.size(0)):
        recurrent = h @ R.t()
        if norms:
            gain = reorder(norms.hh, HASTE_LSTM)
            recurrent = F.layer_norm(recurrent, (4 * hidden,), gain, eps=EPS)
        i, g, f, o = (product[t] + recurrent + bias).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        read = F.layer_norm(c, (hidden,), norms.c, norms.c_bias, EPS) if norms else c
        new = torch.sigmoid(o) * torch.tanh(read)
        h = _haste_zoneout(new, h, zoneout, None if updated is None else updated[t], training)
        outputs.append(h)
        cells.append(c)
    return torch.stack(outputs), torch.stack(cells)


def haste_gru(
    x: Tensor,
    h: Tensor,
    weights: Sequence[Tensor],
    *,
    norms: Norms | None = None,
    zoneout: float = 0.0,
    updated: Tensor | None = None,
    training: bool = True,
) -> Tensor:
    """Haste's GRU and LayerNormGRU: reset gate after the product, both biases after the norms.

    Arguments: as haste_lstm. Gives h after each step, [T, B, H].
    """
    W, R, b_ih, b_hh = (reorder(w, HASTE_GRU) for w in weights)
    hidden = h.size(-1)

    def normalised(product: Tensor, gain: Tensor) -> Tensor:
        return F.layer_norm(product, (3 * hidden,), reorder(gain, HASTE_GRU), eps=EPS)

    product = x @ W.t()
    product = (normalised(product, norms.ih) if norms else product) + b_ih
    outputs = []
    for t in range(x.size(0)):
        recurrent = h @ R.t()
        recurrent = (normalised(recurrent, norms.hh) if norms else recurrent) + b_hh
        (xz, xr, xn), (hz, hr, hn) = product[t].chunk(3, -1), recurrent.chunk(3, -1)
        z = torch.sigmoid(xz + hz)
        n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
        new = z * h + (1 - z) * n
        h = _haste_zoneout(new, h, zoneout, None if updated is None else updated[t], training)
        outputs.append(h)
    return torch.stack(outputs)


# ------------------------------------------------------------------ PyTorch's fastrnns benchmark


def torchscript_layer_norm_lstm(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    norms: Norms,
    *,
    carries_normalised: bool = True,
) -> tuple[Tensor, Tensor]:
    """The loop over LayerNormLSTMCell in PyTorch's benchmarks/fastrnns/custom_lstms.py.

    It has no biases: the norms of the two products have shifts, which are torch's biases here.
    The carried cell state is the normalised one, LN(f c + i g). Haste's c stays as it was.

    Args:
        x: [T, B, I].
        h: [B, H].
        c: [B, H].
        weights: weight_ih, weight_hh, bias_ih, bias_hh.
        norms: of the layer.
        carries_normalised: whether the norm of c is in the recurrence, as there.

    Returns:
        h and the carried c after each step, [T, B, H] each.
    """
    w_ih, w_hh, b_ih, b_hh = weights
    hidden = h.size(-1)
    outputs, cells = [], []
    for step in x:
        from_input = F.layer_norm(step @ w_ih.t(), (4 * hidden,), norms.ih, b_ih, EPS)
        from_hidden = F.layer_norm(h @ w_hh.t(), (4 * hidden,), norms.hh, b_hh, EPS)
        i, f, g, o = (from_input + from_hidden).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        read = F.layer_norm(c, (hidden,), norms.c, norms.c_bias, EPS)
        c = read if carries_normalised else c
        h = torch.sigmoid(o) * torch.tanh(read)
        outputs.append(h)
        cells.append(c)
    return torch.stack(outputs), torch.stack(cells)


# ------------------------------------------------------------------------------------- TorchRL


def torchrl_recurrent_mode(
    layer: nn.RNNBase, x: Tensor, states: Sequence[Tensor], is_init: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """TorchRL's LSTMModule and GRUModule in recurrent mode, on nn.LSTM or nn.GRU.

    Each row is cut before the steps with is_init, and each piece runs alone. A piece starts from
    the state that the rollout stored for its first step. A Collector stores zeros there, since
    TorchRL zeroes the incoming state at is_init when it acts step by step.

    Args:
        layer: of one direction, not batch_first.
        x: [T, B, I].
        states: stored states, [T, L, B, H] each.
        is_init: [T, B] bool.

    Returns:
        output [T, B, H] and the states after the last step, [L, B, H] each.
    """
    steps, batch = is_init.shape
    outputs: list[Tensor] = []
    finals: list[tuple[Tensor, ...]] = []
    for row in range(batch):
        starts = [t for t in range(steps) if t == 0 or is_init[t, row]]
        pieces = []
        for start, end in zip(starts, [*starts[1:], steps], strict=True):
            first = tuple(state[start, :, row].contiguous() for state in states)
            y, last = layer(x[start:end, row], first if len(first) > 1 else first[0])
            pieces.append(y)
        outputs.append(torch.cat(pieces))
        finals.append(last if isinstance(last, tuple) else (last,))
    return torch.stack(outputs, 1), tuple(torch.stack(f, 1) for f in zip(*finals, strict=True))


def torchrl_step_mode(
    layer: nn.RNNBase, x: Tensor, states: Sequence[Tensor], is_init: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """TorchRL's LSTMModule and GRUModule when they act: a call a step, zeros in at is_init.

    Args:
        layer: of one direction, not batch_first.
        x: [T, B, I].
        states: the first step's, [L, B, H] each.
        is_init: [T, B] bool.

    Returns:
        As torchrl_recurrent_mode.
    """
    outputs = []
    for step, init in zip(x, is_init, strict=True):
        states = [state.masked_fill(init[:, None], 0) for state in states]
        y, last = layer(step[None], tuple(states) if len(states) > 1 else states[0])
        states = last if isinstance(last, tuple) else (last,)
        outputs.append(y)
    return torch.cat(outputs), tuple(states)


# ------------------------------------------------------------------------------------ AWD-LSTM


def dropped(values: Tensor, kept: Tensor, p: float) -> Tensor:
    """Inverted dropout by a mask of kept values, as F.dropout: what is kept grows by 1/(1-p)."""
    return values * kept / (1 - p)


def awd_weight_drop(weight_hh: Tensor, kept: Tensor, p: float) -> Tensor:
    """AWD-LSTM's WeightDrop (salesforce/awd-lstm-lm): dropout on weight_hh before the layer runs.

    One mask [G*H, H] serves all rows and steps of a call.
    """
    return dropped(weight_hh, kept, p)


def awd_locked_dropout(values: Tensor, kept: Tensor, p: float) -> Tensor:
    """AWD-LSTM's LockedDropout on values [T, B, H]: a mask [B, H] that all steps share."""
    return dropped(values, kept[None], p)


def locked_recurrence(
    layer: nn.RNNBase, x: Tensor, states: Sequence[Tensor], kept: Tensor, p: float
) -> Tensor:
    """A layer whose h passes through LockedDropout before each product with weight_hh.

    That is the variational dropout of Gal and Ghahramani (2016), equation 7. Gives h after each
    step, [T, B, H]. The GRU takes its old h without the mask where it interpolates.

    Args:
        layer: an nn.LSTM, nn.GRU or nn.RNN of one layer and direction.
        x: [T, B, I].
        states: [B, H] each.
        kept: [B, H], 1 where h is kept.
        p: the probability of a zero.
    """
    w_ih, w_hh, b_ih, b_hh = layer.parameters()
    h, *c = states
    outputs = []
    for step in x:
        from_input = step @ w_ih.t() + b_ih
        from_hidden = awd_locked_dropout(h[None], kept, p)[0] @ w_hh.t() + b_hh
        if isinstance(layer, nn.LSTM):
            i, f, g, o = (from_input + from_hidden).chunk(4, -1)
            c = [torch.sigmoid(f) * c[0] + torch.sigmoid(i) * torch.tanh(g)]
            h = torch.sigmoid(o) * torch.tanh(c[0])
        elif isinstance(layer, nn.GRU):
            (xr, xz, xn), (hr, hz, hn) = from_input.chunk(3, -1), from_hidden.chunk(3, -1)
            z = torch.sigmoid(xz + hz)
            h = (1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + z * h
        else:
            total = from_input + from_hidden
            h = total.relu() if layer.nonlinearity == "relu" else total.tanh()
        outputs.append(h)
    return torch.stack(outputs)

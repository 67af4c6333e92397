"""Variants of the layers against the formulas of Haste, TorchRL, AWD-LSTM and PyTorch's examples.

The oracles are in helpers/peer_variants.py and take masks. A layer draws its masks itself. A test
reads them from the results: a unit that zoneout kept has its old value to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import peer_variants as peer
from torch import Tensor, nn

from fusedrnn import FusedGRU, FusedLSTM, FusedRNN

T, B, I, H = 7, 5, 3, 6
LAYERS = [FusedLSTM, FusedGRU]
PLAIN = {FusedLSTM: nn.LSTM, FusedGRU: nn.GRU, FusedRNN: nn.RNN}
EACH_LAYER = pytest.mark.parametrize("kind", LAYERS)
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
P = 0.3  # of every dropout and zoneout


def made(kind: type[nn.RNNBase], *args: Any, **options: Any) -> nn.RNNBase:
    """A float64 layer from a seed, its layer norms away from one and zero."""
    torch.manual_seed(0)
    layer = kind(*(args or (I, H)), dtype=torch.float64, **options)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
    return layer


def inputs(layers: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, B, I], h and c [L, B, H], leaves that require grad."""
    torch.manual_seed(1)
    shapes = ((T, B, I), (layers, B, H), (layers, B, H))
    x, h, c = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    return x, h, c


def hx_of(layer: nn.RNNBase, h: Tensor, c: Tensor) -> Any:
    return (h, c) if isinstance(layer, (FusedLSTM, nn.LSTM)) else h


def weights_of(layer: nn.RNNBase) -> list[Tensor]:
    return [getattr(layer, f"{name}_l0") for name in WEIGHTS]


def norms_of(layer: nn.RNNBase) -> peer.Norms:
    names = ("norm_ih", "norm_hh", "norm_c", "norm_c_bias")
    return peer.Norms(*(getattr(layer, f"{n}_l0") for n in names if hasattr(layer, f"{n}_l0")))


def gradients(values: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a weighted sum of all values."""
    generator = torch.Generator().manual_seed(2)
    total = sum((v * torch.rand(v.shape, dtype=v.dtype, generator=generator)).sum() for v in values)
    return torch.autograd.grad(total, leaves, retain_graph=True, materialize_grads=True)


def assert_same(ours: Sequence[Tensor], theirs: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    torch.testing.assert_close(tuple(ours), tuple(theirs), rtol=1e-10, atol=1e-11)
    found, expected = gradients(ours, leaves), gradients(theirs, leaves)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def haste(layer: nn.RNNBase, x: Tensor, h: Tensor, c: Tensor, **options: Any) -> list[Tensor]:
    """Haste's output and last states, with the layer's parameters."""
    if isinstance(layer, (FusedLSTM, nn.LSTM)):
        output, cells = peer.haste_lstm(x, h[0], c[0], weights_of(layer), **options)
        return [output, output[-1:], cells[-1:]]
    output = peer.haste_gru(x, h[0], weights_of(layer), **options)
    return [output, output[-1:]]


def flat(result: Any) -> list[Tensor]:
    """Output and last states of a layer's result."""
    output, hx = result
    return [output, *(hx if isinstance(hx, tuple) else (hx,))]


def leaves_of(layer: nn.RNNBase, x: Tensor, h: Tensor, c: Tensor) -> list[Tensor]:
    return [x, *([h, c] if isinstance(layer, FusedLSTM) else [h]), *layer.parameters()]


# --------------------------------------------------------------------------------------- Haste


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_haste_without_options_is_torch(kind: type[nn.RNNBase]) -> None:
    """The oracle's gate orders are right."""
    layer, (x, h, c) = made(kind), inputs()
    torch.testing.assert_close(haste(layer, x, h, c), flat(layer(x, hx_of(layer, h, c))))


@EACH_LAYER
def test_layer_norm(kind: type[nn.RNNBase]) -> None:
    layer, (x, h, c) = made(kind, layer_norm=True), inputs()
    ours = flat(layer(x, hx_of(layer, h, c)))
    theirs = haste(layer, x, h, c, norms=norms_of(layer))
    assert_same(ours, theirs, leaves_of(layer, x, h, c))


def only_h(kind: type[nn.RNNBase]) -> Any:
    """The zoneout of Haste's LSTM and GRU, which both leave the cell state alone."""
    return (P, 0.0) if kind is FusedLSTM else P


@pytest.mark.parametrize("layer_norm", [False, True])
@EACH_LAYER
def test_zoneout(kind: type[nn.RNNBase], layer_norm: bool) -> None:
    layer, (x, h, c) = made(kind, layer_norm=layer_norm, zoneout=only_h(kind)), inputs()
    ours = flat(layer(x, hx_of(layer, h, c)))
    updated = (ours[0] != torch.cat([h, ours[0][:-1]])).double()
    assert 0.1 < 1 - updated.mean() < 0.5
    assert len(updated.flatten(0, 1).unique(dim=0)) > T  # a mask for each step and row
    norms = norms_of(layer) if layer_norm else None
    theirs = haste(layer, x, h, c, norms=norms, zoneout=P, updated=updated)
    assert_same(ours, theirs, leaves_of(layer, x, h, c))


@pytest.mark.parametrize("layer_norm", [False, True])
@EACH_LAYER
def test_zoneout_in_eval_mode(kind: type[nn.RNNBase], layer_norm: bool) -> None:
    layer, (x, h, c) = made(kind, layer_norm=layer_norm, zoneout=only_h(kind)), inputs()
    layer.eval()
    ours = flat(layer(x, hx_of(layer, h, c)))
    norms = norms_of(layer) if layer_norm else None
    theirs = haste(layer, x, h, c, norms=norms, zoneout=P, training=False)
    assert_same(ours, theirs, leaves_of(layer, x, h, c))


def test_zoneout_of_the_reverse_direction() -> None:
    layer, (x, h, c) = made(FusedLSTM, bidirectional=True, zoneout=(P, 0.0)), inputs(2)
    output, (h_n, c_n) = layer(x, (h, c))
    for direction, suffix in enumerate(("", "_reverse")):
        flip = (lambda v: v.flip(0)) if direction else (lambda v: v)
        mine = flip(output[..., direction * H : (direction + 1) * H])
        updated = (mine != torch.cat([h[direction, None], mine[:-1]])).double()
        weights = [getattr(layer, f"{name}_l0{suffix}") for name in WEIGHTS]
        found, cells = peer.haste_lstm(
            flip(x), h[direction], c[direction], weights, zoneout=P, updated=updated
        )
        ours, theirs = [mine, h_n[direction], c_n[direction]], [found, found[-1], cells[-1]]
        assert_same(ours, theirs, [x, h, c, *weights])


# ------------------------------------------------------------------ PyTorch's fastrnns benchmark


def test_layer_norm_as_torchscript_with_the_cell_state_as_it_was() -> None:
    """The norms of the products are those of the TorchScript loop; their shifts are the biases."""
    layer, (x, h, c) = made(FusedLSTM, layer_norm=True), inputs()
    output, cells = peer.torchscript_layer_norm_lstm(
        *(x, h[0], c[0], weights_of(layer), norms_of(layer)), carries_normalised=False
    )
    theirs = [output, output[-1:], cells[-1:]]
    assert_same(flat(layer(x, (h, c))), theirs, leaves_of(layer, x, h, c))


def test_layer_norm_as_torchscript_for_one_step() -> None:
    """h of one step agrees. The second step reads another c: normalised there, as it was here."""
    layer, (x, h, c) = made(FusedLSTM, layer_norm=True), inputs()
    theirs, _ = peer.torchscript_layer_norm_lstm(x, h[0], c[0], weights_of(layer), norms_of(layer))
    ours, _ = layer(x, (h, c))
    assert_same([ours[0]], [theirs[0]], leaves_of(layer, x, h, c))
    assert not torch.allclose(ours[1], theirs[1], rtol=1e-3)


def test_layer_norm_as_torchscript_with_closed_forget_gates() -> None:
    """With f = 0 no step reads the carried c, so h agrees at all steps."""
    layer, (x, h, c) = made(FusedLSTM, layer_norm=True), inputs()
    with torch.no_grad():
        layer.bias_ih_l0[H : 2 * H] = -1000
    theirs, _ = peer.torchscript_layer_norm_lstm(x, h[0], c[0], weights_of(layer), norms_of(layer))
    assert_same([layer(x, (h, c))[0]], [theirs], leaves_of(layer, x, h, c))


# ------------------------------------------------------------------------------------- TorchRL


def starts() -> Tensor:
    """is_init [T, B]: rows with no start, one, some, two in a row, and one at every step."""
    mask = torch.zeros(T, B, dtype=torch.bool)
    mask[3, 1] = mask[[0, 2, 5], 2] = mask[[3, 4, 6], 3] = True
    mask[:, 4] = True
    return mask


def stored(states: Sequence[Tensor], later: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """A rollout's states [T, L, B, H]: the first step's, and `later` of them at the others."""
    return [torch.stack([s, *(later(s) for _ in range(T - 1))]) for s in states]


@pytest.mark.parametrize("layers", [1, 2])
@EACH_LAYER
def test_resets_in_recurrent_mode(kind: type[nn.RNNBase], layers: int) -> None:
    """TorchRL starts a piece from the stored state: zeros there, or here the call's first.

    At the first step it takes the stored state also where is_init is set.
    """
    layer, (x, h, c) = made(kind, I, H, layers), inputs(layers)
    plain = PLAIN[kind](I, H, layers, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    states = [h, c] if kind is FusedLSTM else [h]
    mask = starts()
    later = mask.clone()
    later[0] = False
    for reset_to, state in (("zero", torch.zeros_like), ("initial", torch.clone)):
        ours = flat(layer(x, hx_of(layer, h, c), reset_mask=later, reset_to=reset_to))
        y, last = peer.torchrl_recurrent_mode(plain, x, stored(states, state), mask)
        torch.testing.assert_close(ours, [y, *last], rtol=1e-10, atol=1e-11)
        found = gradients(ours, [x, *states, *layer.parameters()])
        expected = gradients([y, *last], [x, *states, *plain.parameters()])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("layers", [1, 2])
@EACH_LAYER
def test_resets_in_step_mode(kind: type[nn.RNNBase], layers: int) -> None:
    """A call a step with zeros in at is_init, the first step's too."""
    layer, (x, h, c) = made(kind, I, H, layers), inputs(layers)
    plain = PLAIN[kind](I, H, layers, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    states = [h, c] if kind is FusedLSTM else [h]
    ours = flat(layer(x, hx_of(layer, h, c), reset_mask=starts()))
    y, last = peer.torchrl_step_mode(plain, x, states, starts())
    torch.testing.assert_close(ours, [y, *last], rtol=1e-10, atol=1e-11)
    found = gradients(ours, [x, *states, *layer.parameters()])
    expected = gradients([y, *last], [x, *states, *plain.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.long
@pytest.mark.parametrize("python_based", [False, True])
@EACH_LAYER
def test_torchrls_own_modules(kind: type[nn.RNNBase], python_based: bool) -> None:
    """torchrl's LSTMModule and GRUModule themselves; skipped without torchrl."""
    modules = pytest.importorskip("torchrl.modules")
    tensordict = pytest.importorskip("tensordict").TensorDict
    name = "LSTMModule" if kind is FusedLSTM else "GRUModule"
    recurrent = getattr(modules, name)(
        *(I, H), python_based=python_based, in_key="x", out_key="y"
    ).double()
    layer, (x, h, c) = made(kind), inputs()
    theirs = recurrent.lstm if kind is FusedLSTM else recurrent.gru
    layer.load_state_dict(theirs.state_dict())
    states = [h, c] if kind is FusedLSTM else [h]
    mask = starts()
    later = mask.clone()
    later[0] = False
    rollout = {
        "x": x.transpose(0, 1),
        "is_init": mask.t()[..., None],
        # [B, T, L, H] for each of the module's states
        **{
            key: state.permute(2, 0, 1, 3)
            for key, state in zip(
                recurrent.in_keys[1:-1], stored(states, torch.zeros_like), strict=True
            )
        },
    }
    with modules.set_recurrent_mode(True):
        found = recurrent(tensordict(rollout, [B, T]))
    y = found["y"].transpose(0, 1)
    ours, _ = layer(x, hx_of(layer, h, c), reset_mask=later)
    torch.testing.assert_close(ours, y, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(
        gradients([ours], [x, *states, *layer.parameters()]),
        gradients([y], [x, *states, *theirs.parameters()]),
        rtol=1e-9,
        atol=1e-10,
    )


# ------------------------------------------------------------------------------------ AWD-LSTM


@pytest.mark.parametrize("kind", [*LAYERS, FusedRNN])
def test_weight_dropout(kind: type[nn.RNNBase]) -> None:
    """One mask a call on weight_hh alone. Its zeros are where the weight has no gradient."""
    layer, (x, h, c) = made(kind, weight_dropout=P), inputs()
    ours = flat(layer(x, hx_of(layer, h, c)))
    (gradient,) = torch.autograd.grad(ours[0].sum(), layer.weight_hh_l0, retain_graph=True)
    kept = (gradient != 0).double()
    assert 0.1 < 1 - kept.mean() < 0.5
    plain = PLAIN[kind](I, H, dtype=torch.float64)
    names = {
        name: peer.awd_weight_drop(p, kept, P) if name.startswith("weight_hh") else p
        for name, p in layer.named_parameters()
    }
    theirs = flat(torch.func.functional_call(plain, names, (x, hx_of(layer, h, c))))
    assert_same(ours, theirs, leaves_of(layer, x, h, c))

    again = layer(x, hx_of(layer, h, c))[0]
    assert not torch.equal(again, ours[0])
    theirs = torch.func.functional_call(
        plain, dict(layer.named_parameters()), (x, hx_of(layer, h, c))
    )
    ours = layer.eval()(x, hx_of(layer, h, c))
    assert_same(flat(ours), flat(theirs), leaves_of(layer, x, h, c))


def kept_of(layer: nn.RNNBase, x: Tensor, seed: int) -> Tensor:
    """The mask [B, H] that a layer's recurrent dropout draws from a seed.

    A copy runs from the same seed, its weight_hh diagonal: the second step of a unit then depends
    on the mask of this unit alone, and all kept units agree.
    """
    probe = copy.deepcopy(layer)
    with torch.no_grad():
        for p in probe.parameters():
            p.zero_()
        probe.bias_ih_l0.fill_(1)
        gates = probe.weight_hh_l0.size(0) // H
        probe.weight_hh_l0.copy_(torch.eye(H, dtype=torch.float64).repeat(gates, 1))
        if isinstance(probe, FusedGRU):
            probe.bias_ih_l0[H : 2 * H] = -1  # so that h stays away from its limit
        torch.manual_seed(seed)
        second = probe(x)[0][1]
    assert len(second.unique()) == 2
    return (second != probe_without(probe, x)).double()


def probe_without(probe: nn.RNNBase, x: Tensor) -> Tensor:
    """A unit's second step when its h is dropped."""
    bare = copy.deepcopy(probe)
    with torch.no_grad():
        bare.weight_hh_l0.zero_()
        return bare(x)[0][1]


@pytest.mark.parametrize("kind", [*LAYERS, FusedRNN])
def test_sequence_dropout(kind: type[nn.RNNBase]) -> None:
    """LockedDropout on h before each product: one mask for all steps of a call."""
    layer, (x, h, c) = made(kind, recurrent_dropout=P), inputs()
    kept = kept_of(layer, x.detach(), seed=3)
    assert 0.05 < 1 - kept.mean() < 0.6
    torch.manual_seed(3)
    ours, _ = layer(x, hx_of(layer, h, c))
    plain = PLAIN[kind](I, H, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    states = [h[0], c[0]] if kind is FusedLSTM else [h[0]]
    theirs = peer.locked_recurrence(plain, x, states, kept, P)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
    found = gradients([ours], leaves_of(layer, x, h, c))
    leaves = [x, *([h, c] if kind is FusedLSTM else [h]), *plain.parameters()]
    torch.testing.assert_close(found, gradients([theirs], leaves), rtol=1e-9, atol=1e-10)

    assert not torch.equal(layer(x, hx_of(layer, h, c))[0], ours)
    everything = torch.ones_like(kept)
    theirs = peer.locked_recurrence(plain, x, states, everything, 0.0)
    torch.testing.assert_close(layer.eval()(x, hx_of(layer, h, c))[0], theirs)


def test_locked_recurrence_without_dropout_is_torch() -> None:
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        layer, (x, h, c) = made(kind), inputs()
        states = [h[0], c[0]] if kind is nn.LSTM else [h[0]]
        ones = torch.ones(B, H, dtype=torch.float64)
        found = peer.locked_recurrence(layer, x, states, ones, 0.0)
        torch.testing.assert_close(found, layer(x, hx_of(layer, h, c))[0])

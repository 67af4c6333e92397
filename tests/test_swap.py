"""fuse() and unfuse() swap layers; weights, hooks, optimizers and references stay."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cells import EACH_MODULE, Pair
from helpers.swapped import inputs, made, results, weight_name
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

from fusedrnn import FusedGRU, FusedGRUCell, FusedLSTM, FusedLSTMCell, fuse, unfuse

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


class Everything(nn.Module):
    """Every kind of layer; one has two names, and a cell is in a list unknown to torch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(5, 6, 2, bidirectional=True, dropout=0.3)
        self.blocks = nn.ModuleList([nn.GRU(12, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh())])
        self.cell = nn.LSTMCell(6, 6)
        self.gate = nn.GRUCell(6, 6)
        self.again = self.encoder
        self.hidden_from_torch = [self.cell]
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.again(x)
        x, h = self.blocks[0](x)
        c, _ = self.hidden_from_torch[0](self.blocks[1](x[-1]))
        return self.gate(c, h[0])


@EACH_MODULE
@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_alone(pair: Pair, device: str) -> None:
    module = made(pair.make_plain).to(device)
    expected = module(inputs(module).to(device))
    assert fuse(module) is module
    assert type(module) is pair.fused
    assert_close(module(inputs(module).to(device)), expected)
    assert unfuse(module) is module
    assert type(module) is pair.plain
    assert_close(module(inputs(module).to(device)), expected, rtol=0, atol=0)


def test_everything_inside() -> None:
    torch.manual_seed(0)
    model = Everything()
    plain = copy.deepcopy(model)
    names = [n for n, _ in model.named_modules(remove_duplicate=False)]
    parameters = dict(model.named_parameters())
    ids = {n: id(m) for n, m in model.named_modules()}
    fuse(model)
    swapped = [type(m) for m in (model.encoder, model.blocks[0], model.cell, model.gate)]
    assert swapped == [FusedLSTM, FusedGRU, FusedLSTMCell, FusedGRUCell]
    assert model.again is model.encoder
    assert model.hidden_from_torch[0] is model.cell
    assert [n for n, _ in model.named_modules(remove_duplicate=False)] == names
    assert {n: id(m) for n, m in model.named_modules()} == ids
    assert all(p is parameters[n] for n, p in model.named_parameters())
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    torch.manual_seed(1)
    found = model(x)
    torch.manual_seed(1)  # for dropout
    assert_close(found, plain(x))
    assert fuse(model) is model  # a second time does nothing
    assert type(model.encoder) is FusedLSTM
    unfuse(model)
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in plain.named_modules()
    }
    torch.manual_seed(1)
    again = model(x)
    torch.manual_seed(1)
    assert_close(again, plain(x), rtol=0, atol=0)


def test_an_optimizer_made_before_trains_it() -> None:
    def train(change: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = Everything()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        x = torch.randn(4, 3, 5, dtype=torch.float64)
        model.eval()
        for step in range(6):
            if step == 2:
                model = change(model)
            if step == 4:
                model = unfuse(model)
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        return model.state_dict()

    assert_close(train(fuse), train(lambda m: m), rtol=1e-9, atol=1e-12)


@EACH_MODULE
def test_attributes_hooks_and_weights_are_kept(pair: Pair) -> None:
    module = made(pair.make_plain).eval()
    module.register_buffer("note", torch.ones(2))
    module.own = "attribute"
    calls: list[str] = []
    module.register_forward_pre_hook(lambda *_: calls.append("before"))
    module.register_forward_hook(lambda *_: calls.append("after"))
    module.register_full_backward_hook(lambda *_: calls.append("backward"))
    next(module.parameters()).requires_grad_(False)
    state = copy.deepcopy(module.state_dict())
    fuse(module)
    assert not module.training
    assert module.own == "attribute"
    assert not next(module.parameters()).requires_grad
    assert_close(module.state_dict(), state)
    x = inputs(module).requires_grad_()
    torch.utils._pytree.tree_leaves(module(x))[0].sum().backward()
    assert calls == ["before", "after", "backward"]
    assert repr(module) == repr(unfuse(copy.deepcopy(module))).replace(
        pair.plain.__name__, pair.fused.__name__
    )


@EACH_MODULE
def test_copies_and_pickles(pair: Pair) -> None:
    module = fuse(made(pair.make_plain))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is pair.fused
        assert_close(results(other), results(module), rtol=0, atol=0)


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2

    def right_inverse(self, x: Tensor) -> Tensor:
        return x * 2


CHANGES: dict[str, Callable[[nn.Module, str], Any]] = {
    "parametrization": lambda m, n: parametrize.register_parametrization(m, n, Halved()),
    "weight_norm": lambda m, n: parametrizations.weight_norm(m, n),
    "spectral_norm": lambda m, n: parametrizations.spectral_norm(m, n),
    "orthogonal": lambda m, n: parametrizations.orthogonal(m, n),
    "weight_norm by hooks": weight_norm,
    "spectral_norm by hooks": spectral_norm,
    "pruning": lambda m, n: prune.l1_unstructured(m, n, amount=0.4),
}


@EACH_MODULE
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_changed_weights(change: str, when: str, pair: Pair) -> None:
    """Weights parametrized before or after the swap, and their gradients, are torch's."""
    plain = made(pair.make_plain).eval()  # in training, spectral_norm would iterate
    module = copy.deepcopy(plain)
    for m in (plain, module):
        if m is module and when == "after":
            fuse(m)
        torch.manual_seed(2)
        CHANGES[change](m, weight_name(m))
        if m is module and when == "before":
            fuse(m)
    assert isinstance(module, pair.fused)
    assert not isinstance(module, pair.plain)
    expected, found = results(plain), results(module)
    assert_close(found, expected)
    assert any(g is not None and g.any() for g in found[1].values())
    # Each call computes them again.
    with torch.no_grad():
        for p, q in zip(plain.parameters(), module.parameters(), strict=True):
            p.mul_(0.9)
            q.mul_(0.9)
    assert_close(results(module), results(plain))
    if parametrize.is_parametrized(module):
        assert parametrize.type_before_parametrizations(module) is pair.fused
        assert_close(results(copy.deepcopy(module)), results(module))
        assert parametrize.type_before_parametrizations(unfuse(module)) is pair.plain
        assert_close(results(module), results(plain), rtol=0, atol=0)
        fuse(module)
        parametrize.remove_parametrizations(module, weight_name(module))
        assert type(module) is pair.fused
        assert_close(module(inputs(module)), plain(inputs(plain)))
    assert type(unfuse(module)) is pair.plain
    assert_close(module(inputs(module)), plain(inputs(plain)), rtol=0, atol=0)


def test_unfuse_flattens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights moved to a GPU while fused are flattened for cuDNN."""
    module = fuse(nn.ModuleList([nn.LSTM(5, 6), nn.GRUCell(5, 6)]))
    calls: list[nn.Module] = []
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda m: calls.append(m))
    unfuse(module)
    assert calls == [module[0]]


def test_packed_and_hx_after_the_swap() -> None:
    plain = made(nn.LSTM, num_layers=2, bidirectional=True, proj_size=3)
    module = fuse(copy.deepcopy(plain))
    packed = pack_padded_sequence(inputs(plain), torch.tensor([2, 4, 1]), enforce_sorted=False)
    hx = torch.randn(4, 3, 3, dtype=torch.float64), torch.randn(4, 3, 6, dtype=torch.float64)
    assert_close(module(packed, hx), plain(packed, hx))


def test_unfuse_keeps_weights_assigned_while_fused() -> None:
    module = fuse(made(nn.LSTM))
    other = made(nn.LSTM)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    for name, p in other.named_parameters():
        setattr(module, name, nn.Parameter(p.detach().clone()))
    module = module.to(torch.float32).to(torch.float64)
    other = other.to(torch.float32).to(torch.float64)
    assert_close(results(unfuse(module)), results(other), rtol=0, atol=0)


@pytest.mark.parametrize("parametrized", [False, True])
def test_nothing_is_kept_alive(parametrized: bool) -> None:
    class Local(nn.LSTM):
        pass

    module = made(nn.LSTM if parametrized else Local)
    if parametrized:
        parametrizations.weight_norm(module, "weight_hh_l0")
    fuse(module)
    del Local
    gone = weakref.ref(module)
    cls = weakref.ref(type(module))
    del module
    gc.collect()
    assert gone() is None
    assert cls() is None


def test_functional_call_and_meta() -> None:
    module = fuse(made(nn.GRU))
    weights = {n: p * 0.5 for n, p in module.named_parameters()}
    found = torch.func.functional_call(module, weights, (inputs(module),))
    with torch.no_grad():
        for p in unfuse(module).parameters():
            p.mul_(0.5)
    assert_close(found, module(inputs(module)))
    with torch.device("meta"):
        shaped = fuse(nn.LSTM(5, 6))
    assert shaped(torch.empty(4, 3, 5, device="meta"))[0].shape == (4, 3, 6)


class Recogniser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.LSTM(5, 6, 2, bidirectional=True, batch_first=True)
        self.last = nn.GRU(12, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.layers(x)
        return self.head(self.last(y)[0]).log_softmax(-1)


def test_onnx_runtime_runs_what_was_fused(tmp_path: Any) -> None:
    """A model trained fused and exported after unfuse gives the same results for any sizes."""
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = fuse(Recogniser())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 7, 5)).square().mean().backward()
        optimizer.step()
    file = str(tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the exporter
        torch.onnx.export(
            unfuse(copy.deepcopy(model)).eval(),
            (torch.randn(3, 4, 5),),
            file,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": {0: "rows", 1: "steps"}},
            dynamo=False,
        )
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for rows, steps in ((1, 1), (3, 4), (5, 20)):
        x = torch.randn(rows, steps, 5)
        (y,) = session.run(None, {"x": x.numpy()})
        assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-4, atol=1e-5)

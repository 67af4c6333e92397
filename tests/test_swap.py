"""fuse() and unfuse(): what is swapped, what is kept, what is left."""

from __future__ import annotations

import abc
import copy
import functools
import gc
import logging
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing import assert_close

from fusedrnn import FusedGRU, FusedGRUCell, FusedLSTM, FusedLSTMCell, _ops, fuse, unfuse

PAIRS = {
    nn.LSTM: FusedLSTM,
    nn.GRU: FusedGRU,
    nn.LSTMCell: FusedLSTMCell,
    nn.GRUCell: FusedGRUCell,
}
EVERY = pytest.mark.parametrize(("theirs", "ours"), PAIRS.items(), ids=lambda c: c.__name__)
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """No warning but those that a test expects."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def made(kind: Callable[..., nn.Module], **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(5, 6, dtype=torch.float64, **settings)


def inputs(module: nn.Module) -> Tensor:
    shape = (3, 5) if isinstance(module, nn.RNNCellBase) else (4, 3, 5)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def results(module: nn.Module) -> tuple[Any, dict[str, Tensor | None]]:
    """Outputs, and the gradient of every parameter."""
    module.zero_grad()
    out = module(inputs(module))
    flat = torch.utils._pytree.tree_leaves(out)
    sum(t.square().sum() for t in flat).backward()
    return out, {n: None if p.grad is None else p.grad for n, p in module.named_parameters()}


class Everything(nn.Module):
    """Each kind of layer, one of them under two names and in a list that torch doesn't know."""

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


@EVERY
@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_alone(theirs: type, ours: type, device: str) -> None:
    module = made(theirs).to(device)
    expected = module(inputs(module).to(device))
    assert fuse(module) is module
    assert type(module) is ours
    assert_close(module(inputs(module).to(device)), expected)
    assert unfuse(module) is module
    assert type(module) is theirs
    assert_close(module(inputs(module).to(device)), expected, rtol=0, atol=0)


def test_everything_inside() -> None:
    torch.manual_seed(0)
    model = Everything()
    plain = copy.deepcopy(model)
    names = [n for n, _ in model.named_modules(remove_duplicate=False)]
    parameters = dict(model.named_parameters())
    ids = {n: id(m) for n, m in model.named_modules()}
    fuse(model)
    assert [type(m) for m in (model.encoder, model.blocks[0], model.cell, model.gate)] == list(
        PAIRS.values()
    )
    assert model.again is model.encoder
    assert model.hidden_from_torch[0] is model.cell
    assert [n for n, _ in model.named_modules(remove_duplicate=False)] == names
    assert {n: id(m) for n, m in model.named_modules()} == ids
    assert all(p is parameters[n] for n, p in model.named_parameters())
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    torch.manual_seed(1)
    found = model(x)
    torch.manual_seed(1)  # of the dropout
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


@EVERY
def test_what_is_kept(theirs: type, ours: type) -> None:
    module = made(theirs).eval()
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
        theirs.__name__, ours.__name__
    )


@EVERY
def test_copies_and_pickles(theirs: type, ours: type) -> None:
    module = fuse(made(theirs))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is ours
        assert_close(results(other), results(module), rtol=0, atol=0)


def weight_name(module: nn.Module) -> str:
    return "weight_hh" if isinstance(module, nn.RNNCellBase) else "weight_hh_l0"


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


@EVERY
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_changed_weights(change: str, when: str, theirs: type, ours: type) -> None:
    """Parametrized before or after the swap, the weights and their gradients are torch's."""
    plain = made(theirs).eval()  # spectral_norm goes on with its powers while training
    module = copy.deepcopy(plain)
    for m in (plain, module):
        if m is module and when == "after":
            fuse(m)
        torch.manual_seed(2)
        CHANGES[change](m, weight_name(m))
        if m is module and when == "before":
            fuse(m)
    assert isinstance(module, ours)
    assert not isinstance(module, theirs)
    expected, found = results(plain), results(module)
    assert_close(found, expected)
    assert any(g is not None and g.any() for g in found[1].values())
    # They are computed anew at each call, not kept.
    with torch.no_grad():
        for p, q in zip(plain.parameters(), module.parameters(), strict=True):
            p.mul_(0.9)
            q.mul_(0.9)
    assert_close(results(module), results(plain))
    if parametrize.is_parametrized(module):
        assert parametrize.type_before_parametrizations(module) is ours
        assert_close(results(copy.deepcopy(module)), results(module))
        assert parametrize.type_before_parametrizations(unfuse(module)) is theirs
        assert_close(results(module), results(plain), rtol=0, atol=0)
        fuse(module)
        parametrize.remove_parametrizations(module, weight_name(module))
        assert type(module) is ours
        assert_close(module(inputs(module)), plain(inputs(plain)))
    assert type(unfuse(module)) is theirs
    assert_close(module(inputs(module)), plain(inputs(plain)), rtol=0, atol=0)


class Initialised(nn.LSTM):
    """Overrides nothing that a call goes through."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.note = "kept"

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            self.bias_hh_l0[self.hidden_size : 2 * self.hidden_size] = 1

    def last(self, x: Tensor) -> Tensor:
        return self(x)[0][-1]


class InitialisedCell(nn.GRUCell):
    pass


class Masked(nn.LSTM):
    def forward(self, x: Tensor, hx: Any = None) -> Any:
        return nn.LSTM.forward(self, x * 2, hx)


class MaskedOnTop(Masked):
    """Its super().forward is no layer of torch's."""

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        return super().forward(x * 2, hx)


class MaskedElsewhere(nn.LSTM):
    """It asks super() for something else."""

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        assert super().extra_repr()
        return nn.LSTM.forward(self, x, hx)


class MaskedBefore(nn.LSTM):
    def __call__(self, *args: Any) -> Any:
        return super().__call__(*args)


class Flat(nn.LSTM):
    @property
    def _flat_weights(self) -> list[Tensor]:
        return [p * 2 for p in self.__dict__["_own"]]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Tensor]) -> None:
        self.__dict__["_own"] = value


class Strict(nn.LSTM):
    def __init_subclass__(cls, *, wanted: bool, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)


class Final(nn.LSTM):
    def __init_subclass__(cls) -> None:
        raise RuntimeError("Final can't be derived from")


class Closed(type):
    def __setattr__(cls, name: str, value: Any) -> None:
        raise AttributeError(name)


class ClosedLSTM(nn.LSTM, metaclass=Closed):
    pass


class Reduced(nn.LSTM):
    def __reduce__(self) -> Any:
        return Reduced, (5, 6)


def own_weights() -> nn.Module:
    module = nn.LSTM(5, 6)
    module._flat_weights = [w.detach() * 2 for w in module._flat_weights]
    return module


class Permuted(nn.GRU):
    def permute_hidden(self, hx: Tensor, permutation: Tensor | None) -> Tensor:
        return hx


def test_subclasses_without_a_forward() -> None:
    module = made(Initialised)
    expected = results(module)
    cell = made(InitialisedCell)
    of_cell = results(cell)
    fuse(nn.ModuleList([module, cell]))
    assert isinstance(module, FusedLSTM)
    assert isinstance(module, Initialised)
    assert isinstance(cell, FusedGRUCell)
    assert_close(results(module), expected)
    assert_close(results(cell), of_cell)
    assert_close(module.last(inputs(module)), expected[0][0][-1])
    assert module.note == "kept"
    output, _ = module(inputs(module), lengths=[4, 0, 2])  # a call of FusedLSTM's own
    assert not output[:, 1].any()
    module.reset_parameters()  # super() finds its way
    assert type(type(module)(5, 6, 2)) is type(module)
    assert type(type(cell)(5, 6)(torch.zeros(2, 5))) is Tensor
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        assert_close(results(other), results(module), rtol=0, atol=0)
    unfuse(module)
    unfuse(cell)
    assert type(module) is Initialised
    assert type(cell) is InitialisedCell


class Rows(abc.ABC, nn.RNNBase):
    """A forward of its own around torch's, as packages have it: by name, and not in every case."""

    @abc.abstractmethod
    def start(self) -> Any: ...

    def forward(self, x: Tensor, hx: Any = None, lengths: Tensor | None = None) -> Any:
        if lengths is None:
            return super().forward(x, hx=hx)
        if not lengths.any():
            return x.new_zeros(*x.shape[:2], self.hidden_size), self.start()
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, final = super().forward(packed, hx=hx)
        return nn.utils.rnn.pad_packed_sequence(y, total_length=x.size(0))[0], final


class RowsLSTM(Rows, nn.LSTM):
    def start(self) -> Any:
        return None


class RowsGRU(Rows, nn.GRU):
    def start(self) -> Any:
        return None


def doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(self: Any, x: Tensor, *args: Any) -> Any:
        return function(self, x * 2, *args)

    return wrapper


class Around(nn.LSTM):
    @doubled
    def forward(self, x: Tensor, hx: Any = None) -> Any:
        run = lambda: super(Around, self).forward(x + 1, hx)  # noqa: E731
        return run()


class AroundCell(nn.LSTMCell):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        h, c = super().forward(input, hx)
        return h.relu(), c


class Stateful(nn.LSTM):
    """With every name that the modules here might want for themselves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._states = None
        for name in ("_forward", "_layers", "_lengths", "_weight_names", "_weights", "_cell"):
            setattr(self, name, "mine")

    def _check_states(self) -> None:
        raise AssertionError

    def forward(self, x: Tensor | PackedSequence) -> Any:
        y, self._states = super().forward(x, self._states)
        return y, self._states


def test_names_of_a_subclass_are_its_own() -> None:
    """Whichever way a call takes."""
    plain = made(Stateful)
    fused = fuse(copy.deepcopy(plain))
    assert isinstance(fused, FusedLSTM)
    x = inputs(plain)
    packed = pack_padded_sequence(x, torch.tensor([4, 2, 1]))
    for given in (x, packed, x[:, 0]):
        plain._states = fused._states = None
        for _ in range(2):
            assert_close(fused(given), plain(given))
    mine = [name for name in vars(FusedLSTM) if name.startswith("_") and not name.startswith("__")]
    assert not mine


AROUND = [RowsLSTM, RowsGRU, Around, AroundCell]


@pytest.mark.parametrize("kind", AROUND)
def test_a_forward_around_torchs(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own forward goes on, and the kernels run under it."""
    module = made(kind)
    expected = results(module)
    calls: list[int] = []
    for name in ("fast_layers", "fast_cell"):
        function = getattr(_ops, name)
        monkeypatch.setattr(_ops, name, lambda *a, f=function: (calls.append(1), f(*a))[1])
    assert fuse(module) is module
    assert isinstance(module, kind)
    assert isinstance(module, (FusedLSTM, FusedGRU, FusedLSTMCell))
    assert_close(results(module), expected)
    assert len(calls) == 1
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        assert_close(results(other), expected)
    assert type(unfuse(module)) is kind
    assert_close(results(module), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [RowsLSTM, RowsGRU])
def test_arguments_of_a_forward_around_torchs(kind: type[nn.Module]) -> None:
    module = made(kind)
    fused = fuse(copy.deepcopy(module))
    x = inputs(module)
    h = torch.ones(1, 3, 6, dtype=torch.float64)
    hx = (h, h) if isinstance(module, nn.LSTM) else h
    for lengths in (None, torch.tensor([2, 4, 1]), torch.tensor([0, 0, 0])):
        assert_close(fused(x, hx=hx, lengths=lengths), module(x, hx=hx, lengths=lengths))


@EVERY
def test_layers_that_stay_instances_of_torchs(theirs: type, ours: type) -> None:
    module = made(theirs)
    expected = results(module)
    assert fuse(module, subclass=True) is module
    assert isinstance(module, theirs)
    assert isinstance(module, ours)
    assert_close(results(module), expected)
    assert repr(module).startswith(ours.__name__)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        type(module)(5, 6, dtype=torch.float64),
    ):
        assert type(other) is type(module)
        other.load_state_dict(module.state_dict())
        assert_close(results(other), expected)
    both = type(module)
    assert type(fuse(module, subclass=True)) is both
    assert type(fuse(module)) is both  # by whoever fuses the model that it is a part of
    assert type(unfuse(module)) is theirs
    assert_close(results(module), expected, rtol=0, atol=0)
    assert type(fuse(module)) is ours
    assert type(fuse(module, subclass=True)) is both


def test_a_class_derived_from_one_that_fuse_made() -> None:
    """Copies keep it, as they do any class."""
    module = fuse(made(nn.LSTM), subclass=True)
    module.__class__ = type("Loud", (type(module),), {"__module__": __name__, "loud": True})
    globals()["Loud"] = type(module)  # where pickle finds it
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        assert other.loud


@EVERY
def test_parametrized_layers_that_stay_instances_of_torchs(theirs: type, ours: type) -> None:
    module = made(theirs)
    parametrizations.weight_norm(module, weight_name(module))
    expected = results(module)
    for subclass in (False, True):
        fuse(module, subclass=subclass)
        assert isinstance(module, theirs) == subclass
        assert isinstance(module, ours)
        kind = type(module)
        assert type(fuse(module, subclass=subclass)) is kind
        assert_close(results(module), expected)
    assert parametrize.type_before_parametrizations(unfuse(module)) is theirs
    assert_close(results(module), expected, rtol=0, atol=0)


def test_what_is_an_instance_of_torchs_under_torch_compile() -> None:
    """dynamo asks isinstance too: it breaks the graph there, unless it is told not to."""
    module = nn.Sequential(nn.LSTM(5, 6))
    x = torch.randn(4, 3, 5)
    expected = module(x)
    fuse(module, subclass=True)
    torch._dynamo.reset()
    assert_close(torch.compile(module, backend="eager")(x), expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(module, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert_close(compiled(x), expected)
    torch._dynamo.reset()


def test_a_class_with_what_another_holds() -> None:
    """Packages copy attributes of one class to another, what fuse keeps there among them."""

    class First(nn.LSTM):
        pass

    fuse(made(First))

    class Second(nn.LSTM):
        pass

    for name in vars(First):
        if name not in vars(Second):
            setattr(Second, name, vars(First)[name])
    module = fuse(made(Second))
    assert isinstance(module, Second)
    assert type(unfuse(module)) is Second
    for plain in PAIRS:
        assert not any("fused" in name for name in vars(plain))


class OwnLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(5, 24)


class LSTMTagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(5, 6)


def test_what_only_looks_recurrent_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing by default; at INFO what is named as a recurrent layer and is none of torch's."""
    model = nn.ModuleDict({"own": OwnLSTM(), "tagger": LSTMTagger(), "head": nn.Linear(2, 2)})
    fuse(copy.deepcopy(model))
    assert not caplog.records
    with caplog.at_level(logging.INFO, "fusedrnn"):
        fuse(model)
    assert [record.getMessage() for record in caplog.records] == [
        "fuse: own (OwnLSTM) is named as a recurrent layer and has none of torch's inside: nothing "
        "to swap"
    ]


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.good = nn.GRU(2, 2)
        self.layer = layer


def own_forward() -> nn.Module:
    module = nn.LSTM(5, 6)
    module.forward = lambda *_: "mine"  # type: ignore[method-assign]
    return module


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.nn.quantized.dynamic.LSTM(5, 6)


def quantisable() -> nn.Module:
    import torch.ao.nn.quantizable

    return torch.ao.nn.quantizable.LSTM(5, 6)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.LSTM(5, 6))


LEFT = {
    "own forward": (lambda: Masked(5, 6), r"Masked: forward of its own"),
    "own forward below": (lambda: MaskedOnTop(5, 6), r"MaskedOnTop: forward of its own"),
    "own forward beside super": (
        lambda: MaskedElsewhere(5, 6),
        r"MaskedElsewhere: forward of its own",
    ),
    "own call": (lambda: MaskedBefore(5, 6), r"MaskedBefore: __call__ of its own"),
    "own part of it": (lambda: Permuted(5, 6), r"Permuted: permute_hidden of its own"),
    "forward of the object": (own_forward, r"LSTM: forward of its own"),
    "own weights": (lambda: Flat(5, 6), r"Flat: _flat_weights of its own"),
    "weights of the object": (own_weights, r"LSTM: _flat_weights of its own"),
    "a class that can't be extended": (
        lambda: Strict(5, 6),
        r"Strict: its class can't be extended",
    ),
    "a class that refuses to be": (lambda: Final(5, 6), r"Final: its class can't be extended"),
    "a class that keeps nothing": (
        lambda: ClosedLSTM(5, 6),
        r"ClosedLSTM: its class can't be extended",
    ),
    "own pickling": (lambda: Reduced(5, 6), r"Reduced: __reduce__ of its own"),
    "Elman": (lambda: nn.RNN(5, 6), r"RNN: no counterpart"),
    "Elman's cell": (lambda: nn.RNNCell(5, 6), r"RNNCell: no counterpart"),
    "quantised": (quantised, r"LSTM: scripted or quantised"),
    "quantisable": (quantisable, r"LSTM: scripted or quantised"),
    "scripted": (scripted, r"RecursiveScriptModule: scripted or quantised"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_is_listed(case: str) -> None:
    make, why = LEFT[case]
    model = Model(make())
    kind = type(model.layer)
    with pytest.warns(UserWarning, match=rf"^fuse left these as they are: layer \({why}\)$") as w:
        fuse(model)
    assert w[0].filename == __file__
    assert type(model.layer) is kind
    assert type(model.good) is FusedGRU
    with pytest.warns(UserWarning, match=rf"^fuse left these as they are: the model \({why}\)$"):
        assert fuse(model.layer) is model.layer
    unfuse(model)  # says nothing: there is nothing of ours in it
    assert type(model.good) is nn.GRU


def test_what_is_inside_of_what_is_left() -> None:
    """A layer of a subclass that can't be swapped is swapped, as it is where it is shared."""

    class Holder(nn.LSTM):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[0]

    model = Model(Holder(5, 6))
    model.layer.inner = model.shared = nn.GRU(5, 6)
    with pytest.warns(UserWarning, match="Holder: forward of its own"):
        fuse(model)
    assert type(model.shared) is FusedGRU
    unfuse(model)
    assert type(model.layer.inner) is nn.GRU


def test_unfuse_flattens(monkeypatch: pytest.MonkeyPatch) -> None:
    """What moved to a GPU while fused is as cuDNN wants it."""
    module = fuse(nn.ModuleList([nn.LSTM(5, 6), nn.GRUCell(5, 6)]))
    calls: list[nn.Module] = []
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda m: calls.append(m))
    unfuse(module)
    assert calls == [module[0]]


def test_unfuse_leaves_subclasses_of_ours() -> None:
    class Mine(FusedLSTM):
        pass

    model = nn.ModuleList([Mine(5, 6), FusedGRU(5, 6)])
    with pytest.warns(UserWarning, match=r"^unfuse left these as they are: 0 \(Mine: a subclass\)"):
        unfuse(model)
    assert type(model[0]) is Mine
    assert type(model[1]) is nn.GRU


@pytest.mark.parametrize("function", [fuse, unfuse])
@pytest.mark.parametrize("model", [None, nn.LSTM, {"lstm": nn.LSTM(2, 2)}, torch.zeros(2)])
def test_no_module(function: Callable[[Any], Any], model: Any) -> None:
    with pytest.raises(TypeError, match=f"^{function.__name__}: Expected model to be a module"):
        function(model)


def test_packed_and_hx_after_the_swap() -> None:
    plain = made(nn.LSTM, num_layers=2, bidirectional=True, proj_size=3)
    module = fuse(copy.deepcopy(plain))
    packed = pack_padded_sequence(inputs(plain), torch.tensor([2, 4, 1]), enforce_sorted=False)
    hx = torch.randn(4, 3, 3, dtype=torch.float64), torch.randn(4, 3, 6, dtype=torch.float64)
    assert_close(module(packed, hx), plain(packed, hx))


def test_weights_assigned_while_fused_are_those_of_the_way_back() -> None:
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
    """Trained fused, exported after unfuse, run elsewhere: the same results for any sizes."""
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
        warnings.simplefilter("ignore")  # the exporter's
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

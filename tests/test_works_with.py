"""Torch's features with its own layers and with fused layers: the table in docs/.

`python tests/test_works_with.py` writes the table. Each function tries the feature in its docstring
with a layer, and fails if the feature does not work.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cells import EACH_LAYER, Make, Pair, pair_of
from helpers.parity import autocast_result, has_bfloat16_lstm
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fusedrnn import FusedLSTM, fuse, unfuse

PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"
MARKS = ("<!-- works with -->\n", "<!-- /works with -->")
T, B, I, H = 5, 3, 4, 6


def data(*shape: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape or (T, B, I), generator=generator).to(device)


def made(make: Make, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return make(I, H, **settings)


def outcome(module: nn.Module, result: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The result, and the gradients of its square."""
    module.zero_grad()
    result.square().sum().backward()
    return result.detach(), {n: p.grad for n, p in module.named_parameters()}


def equal_alone(module: nn.Module, result: Tensor, x: Tensor | None = None) -> None:
    """Checks that the result and its gradients equal a plain call's."""
    found = outcome(module, result)
    expected = outcome(module, module(data() if x is None else x)[0])
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


# Compilers.


def compiles(make: Make, device: str) -> None:
    """`torch.compile(fullgraph=True)`, forward and backward"""
    module = made(make, num_layers=2).to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    equal_alone(module, compiled(data(device=device))[0], data(device=device))


def compiles_lengths(make: Make, device: str) -> None:
    """the same, rows of different lengths"""

    def model(x: Tensor, lengths: Tensor) -> Tensor:
        if is_fused:
            return module(x, lengths=lengths)[0]
        packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(module(packed)[0])[0]

    module = made(make).to(device)
    is_fused = type(module) is pair_of(module).fused
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    lengths = torch.tensor([2, 5, 3], device=device)
    x = data(device=device)
    found = outcome(module, compiled(x, lengths))
    assert_close(found, outcome(module, model(x, lengths)), rtol=1e-4, atol=1e-5)


def exports(make: Make, device: str) -> None:
    """`torch.export`, any number of steps and rows"""
    module = made(make).to(device).eval()
    shapes = ({0: Dim("steps"), 1: Dim("rows")},)
    program = torch.export.export(module, (data(device=device),), dynamic_shapes=shapes)
    for steps, rows in ((1, 1), (8, 2), (30, 5)):
        x = data(steps, rows, I, device=device)
        assert_close(program.module()(x), module(x))


def fx_traces(make: Make, device: str) -> None:
    """`torch.fx.symbolic_trace`"""
    model = nn.Sequential(made(make)).to(device)
    traced = torch.fx.symbolic_trace(model)
    assert_close(traced(data(device=device)), model(data(device=device)))


def traces(make: Make, device: str) -> None:
    """`torch.jit.trace`"""
    module = made(make).to(device).eval()
    traced = torch.jit.trace(module, (data(device=device),))
    assert_close(traced(data(device=device)), module(data(device=device)))


def scripts(make: Make, device: str) -> None:
    """`torch.jit.script`"""
    model = nn.Sequential(made(make)).to(device)
    assert_close(torch.jit.script(model)(data(device=device)), model(data(device=device)))


# torch.func.


def maps(make: Make, device: str) -> None:
    """`vmap` over inputs"""
    module = made(make).to(device).requires_grad_(False)
    x = data(4, T, B, I, device=device)
    assert_close(vmap(module)(x)[0], torch.stack([module(s)[0] for s in x]))


def per_sample(make: Make, device: str) -> None:
    """`vmap(grad)`: gradients of each sample"""
    module = made(make).to(device)
    x = data(4, T, 1, I, device=device)

    def loss(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(module, weights, (sample,))[0].square().sum()

    weights = {n: p.detach() for n, p in module.named_parameters()}
    found = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    for i, sample in enumerate(x):
        _, alone = outcome(module, module(sample)[0])
        assert_close({n: g[i] for n, g in found.items()}, alone, rtol=1e-4, atol=1e-5)


def batched_gradients(make: Make, device: str) -> None:
    """`autograd.functional.jacobian(vectorize=True)`, `is_grads_batched`"""
    module = made(make, batch_first=True).to(device).double().requires_grad_(False)
    x = data(2, 3, I, device=device).double().requires_grad_()

    def run(x: Tensor) -> Tensor:
        return module(x)[0]

    expected = torch.autograd.functional.jacobian(run, x)
    assert_close(torch.autograd.functional.jacobian(run, x, vectorize=True), expected)
    y = run(x)
    every = torch.eye(y.numel(), device=device).double().reshape(-1, *y.shape)
    (found,) = torch.autograd.grad(y, x, every, is_grads_batched=True)
    assert_close(found, expected.reshape(found.shape))


def batched_tangents(make: Make, device: str) -> None:
    """`jacobian(vectorize=True, strategy="forward-mode")`"""
    module = made(make, batch_first=True).to(device).double()
    x = data(2, 3, I, device=device).double()

    def run(x: Tensor) -> Tensor:
        return module(x)[0]

    found = torch.autograd.functional.jacobian(run, x, vectorize=True, strategy="forward-mode")
    assert_close(found, torch.autograd.functional.jacobian(run, x))


def forward_mode(make: Make, device: str) -> None:
    """`jvp`, `hessian`"""
    module = made(make).to(device).double().requires_grad_(False)
    x = data(2, 1, I, device=device).double()
    v = torch.ones_like(x)

    def loss(x: Tensor) -> Tensor:
        return module(x)[0].square().sum()

    assert_close(jvp(loss, (x,), (v,))[1], (grad(loss)(x) * v).sum())
    expected = torch.autograd.functional.hessian(loss, x)
    assert expected.any()
    assert_close(hessian(loss)(x), expected)


def second_derivatives(make: Make, device: str) -> None:
    """second derivatives (`create_graph=True`)"""
    module = made(make).to(device)
    module = module.double()
    x = data(3, 2, I, device=device).double().requires_grad_()
    weights = list(module.parameters())
    assert torch.autograd.gradgradcheck(lambda x, *_: module(x)[0], (x, *weights), fast_mode=True)


def eval_mode(make: Make, device: str) -> None:
    """gradients in eval mode"""
    module = made(make).to(device).eval()
    x = data(device=device)
    found = outcome(module, module(x)[0])
    assert_close(found, outcome(module.train(), module(x)[0]))
    assert all(g.any() for g in found[1].values())


# Training.


def amp(make: Make, device: str) -> None:
    """`torch.autocast` and `GradScaler`"""
    module = made(make).to(device)
    x = data(device=device)
    plain = made(pair_of(module).make_plain).to(device)
    plain.load_state_dict(module.state_dict())
    scaler = torch.amp.GradScaler(device)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = copy.deepcopy(module.state_dict())
    for dtype in (torch.bfloat16, torch.float16)[: 1 if device == "cpu" else 2]:
        with torch.autocast(device, dtype):
            output = module(x)[0]
            expected = plain(x)[0] if device != "cpu" else autocast_result(plain, x)[0]
        assert output.dtype == expected.dtype
        assert_close(output, expected, rtol=0.05, atol=0.02)
    scaler.scale(output.float().square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert any(not torch.equal(v, before[n]) for n, v in module.state_dict().items())


def checkpoints(make: Make, device: str) -> None:
    """`torch.utils.checkpoint`, both kinds, with dropout"""
    module = made(make, num_layers=2, dropout=0.5).to(device)
    for reentrant in (True, False):
        x = data(device=device).requires_grad_()
        torch.manual_seed(2)
        found = outcome(module, checkpoint(module, x, use_reentrant=reentrant)[0])
        torch.manual_seed(2)
        assert_close(found, outcome(module, module(x)[0]))


def parametrized(make: Make, device: str) -> None:
    """`parametrize`: `weight_norm`, `spectral_norm`, `orthogonal`; pruning"""
    for change in (
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        lambda m, n: prune.random_unstructured(m, n, amount=0.3),
    ):
        module = made(make).to(device).eval()
        change(module, "weight_hh_l0")
        plain = made(make).to(device)
        plain.load_state_dict({n: getattr(module, n).detach() for n in plain.state_dict()})
        x = data(device=device)
        found, gradients = outcome(module, module(x)[0])
        expected, of_plain = outcome(plain, plain(x)[0])
        assert_close(found, expected)
        assert any(n not in of_plain and g is not None and g.any() for n, g in gradients.items())
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight_hh_l0")
            assert_close(module(x)[0], expected)


def copies(make: Make, device: str) -> None:
    """`deepcopy`, `pickle`, `torch.save` and `torch.load(weights_only=True)`"""
    module = made(make, num_layers=2, bidirectional=True).to(device)
    x = data(device=device)
    expected = module(x)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = made(make, num_layers=2, bidirectional=True).to(device)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    whole = io.BytesIO()
    torch.save(module, whole)
    whole.seek(0)
    others = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(whole, weights_only=False),
        loaded,
    ]
    for other in others:
        assert_close(other(x), expected, rtol=0, atol=0)


def meta(make: Make, device: str) -> None:
    """meta device, `to_empty`, `load_state_dict(assign=True)`"""
    with torch.device("meta"):
        module = make(I, H)
        assert module(torch.empty(T, B, I))[0].shape == (T, B, H)
    reference = made(make).to(device)
    module = module.to_empty(device=device)
    module.load_state_dict(reference.state_dict())
    assert_close(module(data(device=device)), reference(data(device=device)))
    assigned = make(I, H, device="meta")
    assigned.load_state_dict(reference.state_dict(), assign=True)
    assert_close(assigned(data(device=device)), reference(data(device=device)))


def skips_init(make: Make, device: str) -> None:
    """`torch.nn.utils.skip_init`"""
    skipped = nn.utils.skip_init(make, I, H, device=device)
    skipped.reset_parameters()
    assert skipped(data(device=device))[0].isfinite().all()


def stateless(make: Make, device: str) -> None:
    """`torch.func.functional_call`"""
    module = made(make).to(device)
    other = {n: p.detach() * 0.5 for n, p in module.named_parameters()}
    found = functional_call(module, other, (data(device=device),))
    module.load_state_dict(other)
    assert_close(found, module(data(device=device)))


# Data and the way out.


def lengths_of_zero(make: Make, device: str) -> None:
    """rows of different lengths, also empty ones, their lengths on the device"""
    module = made(make, bidirectional=True).to(device)
    lengths = torch.tensor([2, 0, 5], device=device)
    x = data(device=device)
    if type(module) is pair_of(module).fused:
        output, _ = module(x, lengths=lengths)
    else:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        output, _ = nn.utils.rnn.pad_packed_sequence(module(packed)[0])
    assert not output[:, 1].any()
    assert_close(output[:2, 0], module(x[:2, :1])[0][:, 0])


def hidden_views(make: Make, device: str) -> None:
    """`hx` expanded from one row, the output changed in place"""
    module = made(make).to(device)
    h = data(1, 1, H, device=device).expand(1, B, H)
    output, _ = module(data(device=device), pair_of(module).cell.to_hx([h, h]))
    outcome(module, output.mul_(2))


def onnx(make: Make, device: str) -> None:
    """ONNX export"""
    pytest.importorskip("onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            made(make).eval(), (data(),), io.BytesIO(), dynamo=False, input_names=["x"]
        )


def quantises(make: Make, device: str) -> None:
    """`quantize_dynamic`"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(made(make))
        plain = pair_of(model[0]).plain
        if plain not in torch.ao.quantization.get_default_dynamic_quant_module_mappings():
            pytest.skip(f"torch quantises no {plain.__name__}")
        model = torch.ao.quantization.quantize_dynamic(model, {plain})
    assert "quantized" in type(model[0]).__module__


# Each feature in nn.LSTM and nn.GRU (on the CPU, and the exceptions on a GPU) and in fused layers.
YES, NO, UNFUSE = "yes", "no", "after `unfuse`"
NOT_LSTM, NOT_GRU = "`nn.LSTM`: no", "`nn.GRU`: no"
GROUPS: dict[str, dict[Callable[[Make, str], None], tuple[str, str]]] = {
    "compilers": {
        compiles: (NO, YES),
        compiles_lengths: (NO, YES),
        exports: (NO, YES),
        traces: (YES, YES),
        fx_traces: (YES, UNFUSE),
        scripts: (YES, UNFUSE),
    },
    "torch.func": {
        maps: (NO, YES),
        per_sample: (NOT_GRU, YES),
        forward_mode: (YES, YES),
        batched_gradients: (YES, YES),
        batched_tangents: (NO, YES),
        stateless: (YES, YES),
    },
    "training": {
        second_derivatives: ("not on a GPU", YES),
        eval_mode: ("not on a GPU", YES),
        amp: ("`nn.LSTM`: not on a CPU without AVX-512", YES),
        checkpoints: (YES, YES),
        parametrized: (YES, YES),
        copies: (YES, YES),
        meta: (YES, YES),
        skips_init: (NO, YES),
    },
    "data": {
        lengths_of_zero: (NO, YES),
        hidden_views: (NOT_LSTM, YES),
    },
    "the way out": {
        onnx: (YES, UNFUSE),
        quantises: (YES, UNFUSE),
    },
}
FEATURES = {f: claims for group in GROUPS.values() for f, claims in group.items()}
# Features with tests that start processes or compile C++.
ELSEWHERE = [
    ("AOTInductor package, any number of steps", NO, YES, "test_compile.py::test_aot_inductor"),
    ("two graphs for all sizes", NO, YES, "test_compile.py::test_two_graphs_for_all_sizes"),
    ("`torch.library.opcheck` of the ops", "-", YES, "test_compile.py"),
    ("DistributedDataParallel, 2 processes", YES, YES, "test_distributed.py"),
    ("FSDP2 (`fully_shard`), 2 processes", YES, YES, "test_distributed.py"),
    ("DataLoader workers, threads", YES, YES, "test_robustness.py"),
    ("`fuse`, `unfuse`: hooks, optimizers, shared modules", "-", YES, "test_swap.py"),
]


def table() -> str:
    """The table in Markdown."""
    lines = ["| feature | `nn.LSTM`, `nn.GRU` | fusedrnn | shown by |", "|---|---|---|---|"]
    for function, (theirs, ours) in FEATURES.items():
        lines.append(f"| {function.__doc__} | {theirs} | {ours} | `-k {function.__name__}` |")
    for what, theirs, ours, test in ELSEWHERE:
        lines.append(f"| {what} | {theirs} | {ours} | `{test.replace('::test_', ' -k ')}` |")
    return "\n".join(lines) + "\n"


def works(function: Callable[[Make, str], None], make: Make, device: str) -> bool:
    torch._dynamo.reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(make, device)
    except pytest.skip.Exception:
        raise
    except Exception:
        return False
    return True


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@EACH_LAYER
@pytest.mark.parametrize("function", FEATURES, ids=lambda f: f.__name__)
def test_works(function: Callable[[Make, str], None], pair: Pair, device: str) -> None:
    """Fused layers have each feature, some only after `unfuse`."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch._dynamo.reset()
    claim = FEATURES[function][1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if claim == YES:
            # skip_init needs a class.
            function(pair.fused if function is skips_init else pair.make_fused, device)
            if function is not skips_init:
                function(lambda *a, **k: fuse(pair.make_plain(*a, **k)), device)
        else:
            assert claim == UNFUSE
            function(lambda *a, **k: unfuse(pair.make_fused(*a, **k)), device)


@pytest.mark.skipif(
    not torch.__version__.startswith("2.13."), reason="the table is about torch 2.13"
)
@pytest.mark.parametrize("function", FEATURES, ids=lambda f: f.__name__)
def test_the_claims_about_torch(function: Callable[[Make, str], None]) -> None:
    """The table is right about nn.LSTM and nn.GRU on the CPU, and about `unfuse`."""
    theirs, ours = FEATURES[function]
    if function is amp and not has_bfloat16_lstm():
        pytest.skip("nn.LSTM has no bfloat16 on this CPU")
    assert works(function, nn.LSTM, "cpu") == (theirs not in (NO, NOT_LSTM))
    assert works(function, nn.GRU, "cpu") == (theirs not in (NO, NOT_GRU))
    if ours == UNFUSE:
        assert not works(function, FusedLSTM, "cpu")


def test_the_page_has_this_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.split(MARKS[0])[1].split(MARKS[1])[0] == table(), (
        f"run python {Path(__file__).name}"
    )
    for *_, test in ELSEWHERE:
        file, _, name = test.partition("::")
        source = (Path(__file__).parent / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"^def {name}\(", source, re.MULTILINE), test


if __name__ == "__main__":
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    PAGE.write_text(before + MARKS[0] + table() + MARKS[1] + rest.split(MARKS[1])[1])
    sys.exit()

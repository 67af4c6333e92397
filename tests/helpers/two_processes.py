"""Trains small models in several processes and measures their distance from one process.

    torchrun --standalone --nproc-per-node 2 tests/helpers/two_processes.py FOLDER

Writes FOLDER/<rank>.json with each case's measurements or error. A distance is the largest
difference over the largest value, for the worst tensor. Each process has every count-th batch row;
rows do not divide evenly. Runs on GPUs if there is one for each process, else on the CPU.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

sys.path.append(str(Path(__file__).parents[1]))

from helpers.cells import CELLS, Pair

T, B, I, H, STEPS = 5, 5, 4, 6, 3  # B is odd: one process has more rows than the other
Batch = tuple[Tensor, Tensor]  # x [T, B, I] and row lengths [B], on the CPU
Tensors = dict[str, Tensor]
Measured = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """A module, and how it gets rows of different lengths, if at all."""

    pair: Pair
    rows: str = "padded"  # "lengths" or "packed"
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def is_cell(self) -> bool:
        return not self.pair.is_layer


DEEP = {"num_layers": 2, "bidirectional": True}
FIRST = {**DEEP, "batch_first": True}
FORMS: dict[str, Form] = {}
for cell in CELLS:
    FORMS[f"{cell}"] = Form(cell.layer, settings=DEEP)
    FORMS[f"{cell} lengths"] = Form(cell.layer, "lengths", DEEP if cell.projects else FIRST)
    FORMS[f"{cell} packed"] = Form(cell.layer, "packed", DEEP)
    if cell.projects:
        FORMS[f"{cell} proj"] = Form(cell.layer, settings={**FIRST, "proj_size": 3})
    FORMS[f"{cell} cell"] = Form(cell.step)
DDP = {
    "plain": {},
    "static graph": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
    "accumulated": {},
}
FSDP = {
    "resharded": {"reshard_after_forward": True},
    "kept": {"reshard_after_forward": False},
    "accumulated": {"reshard_after_forward": True},
}
META = ("loaded", "reset")
DTENSORS = ("replicated weights", "sharded weights", "all", "input", "past FSDP's hooks")


class Model(nn.Module):
    """A recurrent layer, or a cell in a loop, and a linear head: x [T, B, I] -> scores [T, B, 2].

    Only the layer's output is read: its last states have no gradient.
    """

    def __init__(self, form: Form, fused: bool = True, in_place: bool = False) -> None:
        super().__init__()
        self.form = form
        self.in_place = in_place
        make = form.pair.make_fused if fused else form.pair.make_plain
        self.rnn = make(I, H, **form.settings, dtype=torch.float64)
        directions = 2 if form.settings.get("bidirectional") else 1
        width = directions * form.settings.get("proj_size", H)
        self.head = nn.Linear(width, 2, dtype=torch.float64)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Without lengths all rows have T steps in every form."""
        if self.form.is_cell:
            state: Any = None
            outputs = []
            for step in x:
                state = self.rnn(step, state)
                outputs.append(self.changed(state if isinstance(state, Tensor) else state[0]))
            return self.head(torch.stack(outputs))
        if self.form.rows == "packed" and lengths is not None:
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            output = self.rnn(packed)[0]
            self.changed(output.data)
            return self.head(pad_packed_sequence(output, total_length=len(x))[0])
        given = {} if self.form.rows == "padded" or lengths is None else {"lengths": lengths}
        if self.rnn.batch_first:
            output = self.changed(self.rnn(x.transpose(0, 1), **given)[0]).transpose(0, 1)
        else:
            output = self.changed(self.rnn(x, **given)[0])
        return self.head(output)

    def changed(self, output: Tensor) -> Tensor:
        """The caller owns an output and may write to it."""
        return output.add_(1) if self.in_place else output


def seeded(form: Form, seed: int = 0, **settings: bool) -> Model:
    torch.manual_seed(seed)
    return Model(form, **settings).to(DEVICE)


@functools.cache
def batch(form: Form, step: int) -> Batch:
    random = torch.Generator().manual_seed(step)
    x = torch.randn(T, B, I, generator=random, dtype=torch.float64).to(DEVICE)
    lengths = torch.randint(1, T + 1, (B,), generator=random)
    if form.rows == "lengths":  # a packed row can't be empty
        lengths[step] = 0
    return x, lengths


def backward(model: nn.Module, batch: Batch, rows: Tensor) -> None:
    """Adds the gradients of these rows' part of the loss, a mean over all rows."""
    x, lengths = batch
    loss = model(x[:, rows], lengths[rows]).square().sum() / B
    # DDP and FSDP divide gradients by the process count.
    (loss if len(rows) == B else loss * COUNT).backward()


def full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def gradients(model: nn.Module) -> Tensors:
    return {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def train(model: nn.Module, form: Form, backward: Callable[[Batch], None]) -> Tensors:
    """Makes STEPS steps; returns the first step's gradients."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(batch(form, step))
        found.append(gradients(model))
        optimizer.step()
    return found[0]


@functools.cache
def alone(form: Form, in_place: bool = False) -> tuple[Tensors, Model]:
    """One process with the whole batch: its first gradients and trained model."""
    model = seeded(form, in_place=in_place)
    return train(model, form, lambda batch: backward(model, batch, ALL)), model


def distance(found: Tensors, expected: Tensors) -> float:
    assert set(found) == set(expected), set(found) ^ set(expected)
    # A gradient may be zero everywhere: then so must the other be.
    tiny = torch.finfo(torch.float64).tiny
    of_each = [
        (found[n] - e).abs().max() / e.abs().max().clamp(min=tiny) for n, e in expected.items()
    ]
    return torch.stack(of_each).max().item()  # NaN if any value is NaN, or all are zero


def ddp(form: Form, mode: str) -> Measured:
    model = seeded(form, seed=RANK)  # DDP must broadcast the first process's weights
    if mode == "unused":
        model.spare = seeded(form)
    shared = DistributedDataParallel(model, **DDP[mode])

    def step(batch: Batch) -> None:
        if mode == "accumulated":
            with shared.no_sync():
                backward(shared, batch, MINE[:1])
            backward(shared, batch, MINE[1:])
        else:
            backward(shared, batch, MINE)

    found = train(model, form, step)
    weights = {n: full(p) for n, p in model.named_parameters() if not n.startswith("spare")}
    expected, trained = alone(form)
    return {
        "gradients": distance({n: g for n, g in found.items() if g.any()}, expected),
        "weights": distance(weights, trained.state_dict()),
    }


def sharded(model: Model, **settings: Any) -> Model:
    """Shards the layer as its own unit, so its weights are gathered and freed around calls."""
    for module in (model.rnn, model):
        fully_shard(module, mesh=MESH, **settings)
    return model


def gathered(model: nn.Module) -> Tensors:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def fsdp(form: Form, mode: str, in_place: bool = False) -> Measured:
    model = sharded(seeded(form, in_place=in_place), **FSDP[mode])

    def step(batch: Batch) -> None:
        if mode == "accumulated":
            model.set_requires_gradient_sync(False)
            backward(model, batch, MINE[:1])
            model.set_requires_gradient_sync(True)
            backward(model, batch, MINE[1:])
        else:
            backward(model, batch, MINE)

    found = train(model, form, step)
    expected, trained = alone(form, in_place)
    state = gathered(model)
    theirs = seeded(form, fused=False, in_place=in_place)
    theirs.load_state_dict(state)
    x, _ = batch(form, 0)
    with torch.no_grad():
        scores = {"": theirs(x)}, {"": trained(x)}
    return {
        "gradients": distance(found, expected),
        "weights": distance(state, trained.state_dict()),
        "scores": distance(*scores),
    }


def fsdp_bfloat16(form: Form) -> Measured:
    """float32 weights cast to bfloat16 in calls, and one process with bfloat16 weights.

    Distances are from float64, with all gradients as one vector.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(seeded(form).float(), mp_policy=policy)
    one = seeded(form).bfloat16()
    x, lengths = batch(form, 0)
    backward(model, (x, lengths), MINE)
    backward(one, (x.bfloat16(), lengths), ALL)
    exact, _ = alone(form)

    def vector(gradients: Tensors) -> Tensor:
        return torch.cat([gradients[n].double().flatten() for n in exact])

    def error_of(gradients: Tensors) -> float:
        return ((vector(gradients) - vector(exact)).norm() / vector(exact).norm()).item()

    found = gradients(model)
    return {
        "types": sorted({str(g.dtype) for g in found.values()}),
        "two": error_of(found),
        "one": error_of(gradients(one)),
    }


def fsdp_meta(form: Form, mode: str) -> Measured:
    """A model on meta, whose weights are allocated after sharding."""
    with torch.device("meta"):
        model = Model(form)
    sharded(model).to_empty(device=DEVICE)
    one = seeded(form)
    if mode == "loaded":
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, one.state_dict() if RANK == 0 else {}, options=options)
    else:
        torch.manual_seed(1)
        for module in (model.rnn, model.head):
            module.reset_parameters()
    weights = gathered(model)
    rnn = torch.cat([w.flatten() for name, w in weights.items() if name.startswith("rnn")])
    result = {"least": rnn.min().item(), "greatest": rnn.max().item()}
    if mode == "loaded":
        result["weights"] = distance(weights, one.state_dict())
    one.load_state_dict(weights)
    backward(model, batch(form, 0), MINE)
    backward(one, batch(form, 0), ALL)
    return result | {"gradients": distance(gradients(model), gradients(one))}


def attempt(case: Callable[..., Any], *args: Any) -> Any:
    """A case's measurements, or its error."""
    try:
        return case(*args)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def dtensors(form: Form, mode: str) -> Measured:
    """A layer called with DTensors, with and without gradients."""
    layer, one = seeded(form).rnn, seeded(form).rnn

    def shard(_: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(distribute_tensor(p.data, mesh, [Shard(0)])))

    if mode == "past FSDP's hooks":
        fully_shard(layer, mesh=MESH)
    elif mode != "input":
        distribute_module(layer, MESH, shard if mode == "sharded weights" else None)

    def call(layer: Callable[..., Any], distribute: bool) -> Tensor:
        x, lengths = batch(form, 0)
        given = {"lengths": lengths} if form.rows == "lengths" else {}
        input: Any = x[0] if form.is_cell else x
        if distribute:
            input = distribute_tensor(input, MESH, [Replicate()])
        if form.rows == "packed":
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            data = distribute_tensor(packed.data, MESH, [Replicate()]) if distribute else packed[0]
            input = packed._replace(data=data)
        found = layer(input, **given)
        while not isinstance(found, Tensor):  # in (output, (h_n, c_n)), (h, c), PackedSequence
            found = found[0]
        return found

    def compare(grad: bool) -> Measured:
        with torch.set_grad_enabled(grad):
            output = call(
                layer.forward if mode == "past FSDP's hooks" else layer, mode in ("all", "input")
            )
            expected = call(one, False)
        measured = {"output": distance({"": full(output)}, {"": expected.detach()})}
        if not grad:
            return measured
        output = output.full_tensor() if isinstance(output, DTensor) else output
        output.square().sum().backward()
        expected.square().sum().backward()
        return measured | {"gradients": distance(gradients(layer), gradients(one))}

    return {"grad": attempt(compare, True), "no grad": attempt(compare, False)}


def cases() -> Iterator[tuple[str, Any]]:
    """Each case's name and measurements."""
    for name, form in FORMS.items():
        for mode in DDP:
            yield f"ddp {mode}: {name}", attempt(ddp, form, mode)
        for mode in FSDP:
            yield f"fsdp {mode}: {name}", attempt(fsdp, form, mode)
        yield f"fsdp in place: {name}", attempt(fsdp, form, "resharded", True)
        yield f"fsdp bfloat16: {name}", attempt(fsdp_bfloat16, form)
        for mode in META:
            yield f"fsdp meta {mode}: {name}", attempt(fsdp_meta, form, mode)
        for mode in DTENSORS:
            yield f"dtensors {mode}: {name}", attempt(dtensors, form, mode)


if __name__ == "__main__":
    torch.set_num_threads(1)
    RANK, COUNT = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    ALL, MINE = torch.arange(B), torch.arange(RANK, B, COUNT)
    on_gpus = torch.cuda.device_count() >= COUNT
    DEVICE = torch.device("cuda", RANK) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(DEVICE)
    limit = datetime.timedelta(seconds=30)  # how long processes wait for one that ended early
    dist.init_process_group("nccl" if on_gpus else "gloo", timeout=limit)
    MESH = init_device_mesh(DEVICE.type, (COUNT,))
    results = dict(cases())
    (Path(sys.argv[1]) / f"{RANK}.json").write_text(json.dumps(results, indent=1))
    dist.destroy_process_group()
    # A gloo thread still holding a tensor at interpreter exit would abort the process.
    os._exit(0)

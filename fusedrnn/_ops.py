"""The only file that touches torch.ops: loading, fake kernels, second derivatives."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.compiler import is_dynamo_compiling
from torch.utils.checkpoint import checkpoint

from fusedrnn import _functorch, _reference
from fusedrnn._cells import Cell, States, cells
from fusedrnn._variant import Variant

_ISAS = ("baseline", "avx2", "avx512", "avx512vnni", "avx512bf16")
_POOLS = ("auto", "torch", "own")
REBUILD = "pip install --force-reinstall --no-deps --no-cache-dir ."


def cpu_isa() -> str:
    """The CPU kernels' instruction set: one of _ISAS."""
    return str(torch.ops.fusedrnn._cpu_isa())


def cpu_threads() -> int:
    """The most threads of a call on the CPU."""
    return int(torch.ops.fusedrnn._cpu_threads())


def _load() -> None:
    """Loads the binary, or raises an error with the reason and the command to fix it."""
    where = Path(__file__).parent
    binaries = [p for suffix in EXTENSION_SUFFIXES if (p := where / f"_C{suffix}").exists()]
    mend = f"run `{REBUILD}` in a checkout of fusedrnn"
    try:
        from fusedrnn import _build
    except ImportError:
        binaries = []
    if not binaries:
        if (
            where.parent / "setup.py"
        ).exists():  # the folder that Python was started in comes first
            mend += ", then start Python in another folder"
        raise ImportError(f"fusedrnn has no compiled kernels in {where}: {mend}")
    running = str(torch.__version__)
    built = _build.torch_version
    if built != running:
        raise ImportError(
            f"fusedrnn was built for torch {built} but torch {running} is running: {mend}"
        )
    try:
        importlib.import_module("fusedrnn._C")
    except ImportError as error:
        raise ImportError(f"fusedrnn's kernels could not be loaded ({error}): {mend}") from error
    isa = os.environ.get("FUSEDRNN_CPU_ISA", "")
    if isa not in ("", *_ISAS):
        warnings.warn(
            f"FUSEDRNN_CPU_ISA={isa} is none of {', '.join(_ISAS)}: using {cpu_isa()}",
            stacklevel=2,
        )
    pool = os.environ.get("FUSEDRNN_CPU_POOL", "")
    if pool not in ("", *_POOLS):
        warnings.warn(
            f"FUSEDRNN_CPU_POOL={pool} is none of {', '.join(_POOLS)}: using auto", stacklevel=2
        )


_load()

_C: Any = sys.modules["fusedrnn._C"]
# The fast paths of csrc/python.cpp; they return None for calls that need the slow path.
fast_layers = _C.layers
fast_cell = _C.cell
fast_frozen_layers = _C.frozen_layers
fast_frozen_cell = _C.frozen_cell

# By name; a cell's index is its place.
CELLS: dict[str, Cell] = cells(_C.cells())

# The devices with a kernel: a backend that was not compiled is absent from the dispatcher.
_DEVICES = frozenset(
    device
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if torch._C._dispatch_has_kernel_for_dispatch_key("fusedrnn::lstm", key)
)
_FORWARD = {name: getattr(torch.ops.fusedrnn, name).default for name in CELLS}
_FROZEN = {name: getattr(torch.ops.fusedrnn, f"{name}_frozen").default for name in CELLS}
_VARIANT = {name: getattr(torch.ops.fusedrnn, f"{name}_variant").default for name in CELLS}
_VARIANT_DEVICES = frozenset(
    device
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if torch._C._dispatch_has_kernel_for_dispatch_key("fusedrnn::lstm_variant", key)
)
_BACKWARD = {name: getattr(torch.ops.fusedrnn, f"{name}_backward").default for name in CELLS}


def devices() -> frozenset[str]:
    """The device types that have kernels in this build."""
    return _DEVICES


def _differentiable_gradients(
    layer: Callable[[list[Tensor]], Sequence[Tensor | None]],
    arguments: Sequence[Tensor],
    needed: Sequence[bool],
    gradients: Sequence[Tensor | None],
) -> list[Tensor]:
    """Differentiable gradients of a layer's results, for create_graph=True; empty if not needed.

    _functorch.py does the same by torch.func.vjp, which can't run inside the kernel for a Batched
    key.
    """
    # A separate tensor for each argument. A path between two arguments, as from a weight to an
    # earlier layer's state, is the engine's own and would be counted twice.
    with torch.enable_grad():
        tensors = [
            (t.view_as(t) if t.requires_grad else t.detach().requires_grad_()) if need else t
            for t, need in zip(arguments, needed, strict=True)
        ]
        results = layer(tensors)
    used = [
        (y, g) for y, g in zip(results, gradients, strict=True) if y is not None and g is not None
    ]
    found: list[Tensor] = [arguments[0].new_empty(0)] * len(tensors)
    wanted = [i for i, need in enumerate(needed) if need]
    if used and wanted:
        of_wanted = torch.autograd.grad(
            [y for y, _ in used],
            [tensors[i] for i in wanted],
            [g for _, g in used],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
            materialize_grads=True,
        )
        for i, g in zip(wanted, of_wanted, strict=True):
            found[i] = g
    return found


def _differentiable_backward(cell: Cell, *args: Any) -> tuple[Any, ...]:
    """A backward op in torch's own ops. Arguments and results: see the op in csrc/ops.cpp."""
    n = 1 + cell.states  # output and final states; input and states
    weights, (bidirectional, batch_sizes, lengths, _, _, needed) = args[2 * n], args[2 * n + 1 :]

    def layer(tensors: list[Tensor]) -> Sequence[Tensor]:
        output, final = _reference.layer(
            cell, tensors[0], tensors[1:n], tensors[n:], bidirectional, batch_sizes, lengths
        )
        return output, *final

    found = _differentiable_gradients(layer, (*args[n : 2 * n], *weights), needed, args[:n])
    return *found[:n], found[n:]


# A variant's fields in its op's order.
_VARIANT_FIELDS = (
    "reset_mask",
    "reset_to_initial",
    "hidden_mask",
    "candidate_mask",
    "candidate_scale",
    "zoneout_h_mask",
    "zoneout_c_mask",
    "zoneout_h",
    "zoneout_c",
    "norms",
)


def _differentiable_variant_backward(cell: Cell, *args: Any) -> tuple[Any, ...]:
    """The same for a variant's."""
    n, v = 1 + cell.states, len(_VARIANT_FIELDS)
    weights, (bidirectional, batch_sizes, lengths) = args[2 * n], args[2 * n + 1 : 2 * n + 4]
    given = dict(zip(_VARIANT_FIELDS, args[2 * n + 4 : 2 * n + 4 + v], strict=True))
    grad_cells, _, needed = args[2 * n + 4 + v :]
    end = n + len(weights)

    def layer(tensors: list[Tensor]) -> Sequence[Tensor | None]:
        variant = Variant(**{**given, "norms": tensors[end:]}, return_cells=grad_cells is not None)
        output, final, cells = _reference.layer(
            cell,
            tensors[0],
            tensors[1:n],
            tensors[n:end],
            bidirectional,
            batch_sizes,
            lengths,
            variant,
        )
        return output, *final, cells

    arguments = (*args[n : 2 * n], *weights, *given["norms"])
    found = _differentiable_gradients(layer, arguments, needed, (*args[:n], grad_cells))
    return *found[:n], found[n:]


_library = torch.library.Library("fusedrnn", "IMPL")  # type: ignore[no-untyped-call]
for _cell in CELLS.values():
    for _name, _function in (
        (_cell.name, _differentiable_backward),
        (f"{_cell.name}_variant", _differentiable_variant_backward),
    ):
        for _op, _key in (
            (f"_{_name}_backward_differentiable", "CompositeImplicitAutograd"),
            # Several gradients for one call: torch.autograd.grad's is_grads_batched, or vmap.
            (f"{_name}_backward", "Batched"),
            (f"{_name}_backward", "FuncTorchBatched"),
        ):
            _library.impl(_op, functools.partial(_function, _cell), _key)  # type: ignore[no-untyped-call]


def _transforms() -> set[TransformType] | None:
    """torch.func's active transforms; None if only the reference supports one of them."""
    if forward_ad._current_level >= 0:
        return None
    if not torch._C._are_functorch_transforms_active():
        return set()
    if is_dynamo_compiling():  # it can't inspect them
        return None
    found = {i.key() for i in retrieve_all_functorch_interpreters()}
    return found if found <= {TransformType.Grad, TransformType.Vmap} else None


def can_reshape_in_place() -> bool:
    """Whether results may be reshaped in place. FSDP's hooks survive that, but not a new view."""
    return (
        forward_ad._current_level < 0  # torch transposes tangents wrongly in place
        and not is_dynamo_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def autocast(
    cell: Cell,
    is_layer: bool,
    input: Tensor,
    states: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
) -> tuple[Tensor, Sequence[Tensor] | None, Sequence[Tensor]]:
    """Casts as torch's own module does under torch.autocast: a layer, or a single step's cell.

    On the CPU some cast to the autocast type and the others to the input's. On CUDA the cells cast
    to the autocast type, and the layers, as cuDNN's, to float16 whatever it is.
    """
    device = input.device.type
    if (
        not torch._C._is_any_autocast_enabled()
        or not _reference.has_autocast(device)
        or not torch.is_autocast_enabled(device)
        or torch.float64 in (input.dtype, weights[0].dtype)
    ):
        return input, states, weights
    if device == "cuda" and is_layer:
        dtype = torch.float16
    elif device == "cpu" and not (cell.layer_casts_on_cpu if is_layer else cell.cell_casts_on_cpu):
        dtype = input.dtype
    else:
        dtype = torch.get_autocast_dtype(device)
    return (
        input.to(dtype),
        None if states is None else [s.to(dtype) for s in states],
        [w.to(dtype) for w in weights],
    )


def check_lengths(lengths: Tensor, steps: int) -> None:
    """The kernels' check, for lengths on the host."""
    while torch._C._functorch.is_functorch_wrapped_tensor(lengths):
        lengths = torch._C._functorch.get_unwrapped(lengths)
    if lengths.device.type != "cpu":
        return
    for n in lengths.flatten().tolist():
        if not 0 <= n <= steps:
            raise RuntimeError(f"lengths must be from 0 to the sequence length {steps}, got {n}")


def layer(
    cell: Cell,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    bidirectional: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, States]:
    """One layer, all its directions: output and final states. Shapes as in csrc/ops.cpp."""
    transforms = _transforms() if input.device.type in _DEVICES else None
    if transforms is None:
        if lengths is not None and not is_dynamo_compiling():
            check_lengths(lengths, input.size(0))
        return _reference.layer(cell, input, states, weights, bidirectional, batch_sizes, lengths)
    if transforms:
        # Gradients that an outer transform wants are invisible here.
        save = TransformType.Grad in transforms or torch.is_grad_enabled()
        call = _functorch.Call(cell, _FORWARD[cell.name], _BACKWARD[cell.name], bidirectional, save)
        return _functorch.layer(call, input, states, weights, batch_sizes, lengths)
    result = _FORWARD[cell.name](
        input, *states, weights, bidirectional, batch_sizes, lengths, False
    )
    return result[0], result[1:-1]


_random_mask = torch.ops.fusedrnn._random_mask.default
_MASK_DEVICES = frozenset(
    device
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if torch._C._dispatch_has_kernel_for_dispatch_key("fusedrnn::_random_mask", key)
)


def random_mask(shape: Sequence[int], p: float, device: torch.device) -> Tensor:
    """Booleans, each True with probability p, from torch's generator of the device.

    The generator gives a seed, and a kernel the mask: torch's own random numbers take as long as
    the layer.
    """
    if device.type not in _MASK_DEVICES or torch._C._are_functorch_transforms_active():
        return torch.rand(tuple(shape), device=device) < p
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    mask: Tensor = _random_mask(seed, shape, p)
    return mask


def variant_layer(
    cell: Cell,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    bidirectional: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    variant: Variant,
) -> tuple[Tensor, States, Tensor | None]:
    """As `layer`, of a variant: also the cell states of all steps, if it wants them."""
    # Other transforms than none take the reference.
    if input.device.type not in _VARIANT_DEVICES or _transforms() != set():
        if lengths is not None and not is_dynamo_compiling():
            check_lengths(lengths, input.size(0))
        return _reference.layer(
            cell, input, states, weights, bidirectional, batch_sizes, lengths, variant
        )
    fields = [getattr(variant, name) for name in _VARIANT_FIELDS]
    output, *rest, cells, _ = _VARIANT[cell.name](
        input, *states, weights, bidirectional, batch_sizes, lengths, *fields, False
    )
    return output, tuple(rest), cells if cell.has_cell_state and variant.return_cells else None


def checkpointed_layer(
    cell: Cell,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    bidirectional: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    variant: Variant | None,
) -> tuple[Tensor, States, Tensor | None]:
    """As `layer` or `variant_layer`. Keeps its arguments alone, and runs again for the backward."""
    n = 1 + cell.states
    of_variant = [] if variant is None else variant.tensors()

    def run(*tensors: Any) -> tuple[Tensor, States, Tensor | None]:
        of_layer, rest = tensors[:n], tensors[n:]
        args = (
            cell,
            of_layer[0],
            of_layer[1:],
            rest[: len(weights)],
            bidirectional,
            batch_sizes,
            lengths,
        )
        if variant is None:
            return *layer(*args), None
        return variant_layer(*args, variant.with_tensors(rest[len(weights) :]))

    tensors = (input, *states, *weights, *of_variant)
    if (
        not torch.is_grad_enabled()
        or torch.compiler.is_exporting()  # a strict export fails at a checkpoint
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()  # they know no checkpoint
    ):
        return run(*tensors)
    found: tuple[Tensor, States, Tensor | None] = checkpoint(
        run, *tensors, use_reentrant=False, preserve_rng_state=False
    )
    return found


def freeze(
    cell: Cell, weights: Sequence[Tensor], bidirectional: bool, dtype: torch.dtype
) -> Tensor:
    """One layer's float32 weights, packed for this machine; see csrc/ops.cpp."""
    packed: Tensor = torch.ops.fusedrnn._freeze(cell.name, weights, bidirectional, dtype)
    return packed


def unfreeze(packed: Tensor) -> list[Tensor]:
    """The weights in a result of `freeze`, in float32."""
    weights: list[Tensor] = torch.ops.fusedrnn._unfreeze(packed)
    return weights


def cpu_panel_layout() -> str:
    """The layout of the CPU kernels' frozen weights: equal where they fit both machines."""
    return str(torch.ops.fusedrnn._cpu_panel_layout())


def frozen_layer(
    cell: Cell,
    input: Tensor,
    states: Sequence[Tensor | None],
    packed: Tensor,
    sizes: tuple[int, int],
    bidirectional: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, States]:
    """As `layer`, with a result of `freeze`. sizes: of h's units and of the output."""
    result = _FROZEN[cell.name](input, *states, packed, *sizes, bidirectional, batch_sizes, lengths)
    return result[0], result[1:]


def _check_devices(op: str, args: Sequence[Any]) -> None:
    """Raises if real tensors stand among meta or fake ones: the fake kernel gets them all."""
    tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,))]
    found = {t.device for t in tensors if isinstance(t, Tensor)}
    if len(found) > 1:
        names = " and ".join(sorted(map(str, found)))
        raise RuntimeError(f"fusedrnn::{op}: Expected all tensors on one device, found {names}")


def _fake_results(
    input: Tensor,
    states: Sequence[Tensor | None],
    sizes: tuple[int, int],
    bidirectional: bool,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, ...]:
    """Output and final states. sizes: of h's units and of the output."""
    directions, (hidden, out) = 2 if bidirectional else 1, sizes
    rows: Any = None
    if batch_sizes is None:
        rows = input.size(1)
    else:
        given = [s for s in states if s is not None]
        # batch_sizes holds the number of rows as data; hx, if given, has it as a size.
        rows = given[0].size(1) if given else torch.library.get_ctx().new_dynamic_size()
    shapes = [(directions, rows, out), (directions, rows, hidden)][: len(states)]
    return (
        input.new_empty((*input.shape[:-1], directions * out)),
        *(input.new_empty(shape) for shape in shapes),
    )


def _fake_forward(cell: Cell, *args: Any) -> tuple[Tensor, ...]:
    n = cell.states
    input, weights = args[0], args[1 + n]
    _check_devices(cell.name, args[: 2 + n])
    bidirectional, batch_sizes, _, save = args[2 + n :]
    hidden, out = weights[1].size(0) // cell.gates, weights[1].size(1)
    tokens = input.size(0) * (input.size(1) if batch_sizes is None else 1)
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    saved = (2 if bidirectional else 1, tokens, cell.saved, hidden) if save else (0,)
    return (
        *_fake_results(input, args[1 : 1 + n], (hidden, out), bidirectional, batch_sizes),
        input.new_empty(saved, dtype=compute),
    )


def _fake_variant(cell: Cell, *args: Any) -> tuple[Tensor, ...]:
    n = cell.states
    input, weights = args[0], args[1 + n]
    bidirectional, batch_sizes, _, *fields, save = args[2 + n :]
    norms = fields[-1]
    _check_devices(f"{cell.name}_variant", (*args[: 2 + n], *fields))
    directions = 2 if bidirectional else 1
    hidden, out = weights[1].size(0) // cell.gates, weights[1].size(1)
    tokens = input.size(0) * (input.size(1) if batch_sizes is None else 1)
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    c = cell.has_cell_state
    # As SavedVariant in csrc/sequence.h.
    given = dict(zip(_VARIANT_FIELDS, fields, strict=True))
    keeps = [
        input.device.type != "cpu" or given[f"{name}_mask"] is not None or given[name] != 0
        for name in ("zoneout_h", "zoneout_c")
    ]
    size = cell.saved * hidden
    if keeps[0] or len(weights) // directions % 2 == 1:
        size += out
    if c and (keeps[1] or norms):
        size += hidden
    if norms:
        size += (2 * cell.gates + c) * hidden + 2 + c
    return (
        *_fake_results(input, args[1 : 1 + n], (hidden, out), bidirectional, batch_sizes),
        input.new_empty((*input.shape[:-1], directions * hidden) if c else (0,)),
        input.new_empty((directions, tokens, size) if save else (0,), dtype=compute),
    )


def _fake_frozen(cell: Cell, *args: Any) -> tuple[Tensor, ...]:
    n = cell.states
    _check_devices(f"{cell.name}_frozen", args[: 2 + n])
    hidden, out, bidirectional, batch_sizes, _ = args[2 + n :]
    return _fake_results(args[0], args[1 : 1 + n], (hidden, out), bidirectional, batch_sizes)


def _fake_variant_backward(cell: Cell, *args: Any) -> tuple[Any, ...]:
    n = 1 + cell.states
    norms = args[2 * n + 3 + len(_VARIANT_FIELDS)]
    return _fake_backward(cell, *args[: 2 * n], [*args[2 * n], *norms], *args[2 * n + 1 :])


def _fake_backward(cell: Cell, *args: Any) -> tuple[Any, ...]:
    n = 1 + cell.states
    _check_devices(f"{cell.name}_backward", args[: 2 * n + 1])
    tensors, weights, mask = args[n : 2 * n], args[2 * n], args[-1]
    input, directions = tensors[0], 2 if args[2 * n + 1] else 1
    # A state's gradient is wanted only where there is a state.
    rows = next((s.size(1) for s in tensors[1:] if s is not None), 0)
    widths = (weights[1].size(1), weights[1].size(0) // cell.gates)
    shapes = [input.shape, *((directions, rows, w) for w in widths[: n - 1])]
    gradients = [
        input.new_empty(shape if wanted else (0,))
        for shape, wanted in zip(shapes, mask[:n], strict=True)
    ]
    weight_gradients = [
        w.new_empty(w.shape if wanted else (0,))
        for w, wanted in zip(weights, mask[n:], strict=True)
    ]
    return *gradients, weight_gradients


def _fake_random_mask(seed: Tensor, size: Sequence[int], p: float) -> Tensor:
    return seed.new_empty(size, dtype=torch.bool)


torch.library.register_fake("fusedrnn::_random_mask")(_fake_random_mask)

for _cell in CELLS.values():
    for _suffix, _fake in (
        ("", _fake_forward),
        ("_frozen", _fake_frozen),
        ("_backward", _fake_backward),
        ("_variant", _fake_variant),
        ("_variant_backward", _fake_variant_backward),
    ):
        torch.library.register_fake(f"fusedrnn::{_cell.name}{_suffix}")(
            functools.partial(_fake, _cell)
        )

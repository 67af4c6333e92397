"""fuse(model) and unfuse(model): the swap in a model that is there already.

A module is swapped by changing its class, as torch's own parametrizations do: it stays the same
object with the same Parameters, so that whatever holds on to either (optimizers, hooks, lists,
other modules) goes on to.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fusedrnn.modules import FusedGRU, FusedGRUCell, FusedLSTM, FusedLSTMCell

__all__ = ["fuse", "unfuse"]

Model = TypeVar("Model", bound=nn.Module)
Class = type[nn.Module]

_FUSED: dict[Class, Class] = {
    nn.LSTM: FusedLSTM,
    nn.GRU: FusedGRU,
    nn.LSTMCell: FusedLSTMCell,
    nn.GRUCell: FusedGRUCell,
}
_PLAIN = {fused: plain for plain, fused in _FUSED.items()}

# What a call of torch's modules goes through: who defines one of these may compute something else.
_CALLED = (
    "__call__",
    "__getattr__",
    "__getattribute__",
    "_call_impl",
    "_init_flat_weights",
    "_update_flat_weights",
    "_weights_have_changed",
    "_wrapped_call_impl",
    "check_forward_args",
    "check_hidden_size",
    "check_input",
    "forward",
    "get_expected_cell_size",
    "get_expected_hidden_size",
    "permute_hidden",
)


class _NoCounterpartError(Exception):
    """Why a module is left as it is."""


def _new(plain: Class) -> nn.Module:
    cls = _fused_subclass(plain)  # type: ignore[arg-type]  # mypy takes no class for hashable
    return cls.__new__(cls)


@functools.cache
def _fused_subclass(plain: Class) -> Class:
    """The counterpart of a subclass of torch's: its own methods, and a fused forward."""
    base = next(c for c in plain.__mro__ if c in _FUSED)
    # The order of resolution is that of `plain`, with our class before torch's.
    inner = type(_FUSED[base].__name__, (_FUSED[base], base), {})

    def reduce(module: nn.Module, _: Any) -> tuple[Any, ...]:
        """Pickles with the class that it was made of, for this one has no name to import."""
        return _new, (plain,), object.__reduce_ex__(module, 2)[2]

    space = {"__module__": plain.__module__, "__doc__": plain.__doc__, "__reduce_ex__": reduce}
    return type(f"Fused{plain.__name__}", (plain, inner), {**space, "_unfused_class": plain})


def _to_fused(cls: Class) -> Class:
    base = next((c for c in cls.__mro__ if c in _FUSED), None)
    if base is None:
        raise _NoCounterpartError("no counterpart")
    for c in cls.__mro__[: cls.__mro__.index(base)]:
        for name in _CALLED:
            if name in vars(c):
                raise _NoCounterpartError(f"{name} of its own")
    return _FUSED[base] if cls is base else _fused_subclass(cls)  # type: ignore[arg-type]


def _to_plain(cls: Class) -> Class:
    found: Class | None = _PLAIN.get(cls) or vars(cls).get("_unfused_class")
    if found is None:
        raise _NoCounterpartError("a subclass")
    return found


def _is_foreign(module: nn.Module) -> bool:
    """Whether it is a recurrent layer in the guise of torch's quantisation or scripting."""
    names = {c.__name__ for c in _FUSED}
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", None) in names
    return any(
        c.__name__ in names and c.__module__.startswith("torch.ao.") for c in type(module).__mro__
    )


def _swap(module: nn.Module, find: Callable[[Class], Class]) -> None:
    cls = type(module)
    for name in _CALLED:
        if name in vars(module):
            raise _NoCounterpartError(f"{name} of its own")
    if is_parametrized(module):
        # Such a module has a class of its own, with the weights as properties.
        base = find(cls.__bases__[0])
        space = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(f"Parametrized{base.__name__}", (base,), space)
    else:
        module.__class__ = find(cls)


def _swap_all(what: str, model: Model, swap: Callable[[nn.Module], None]) -> Model:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what}: Expected model to be a module, got {type(model).__name__}")
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{whole}." if whole else "") for whole in left):
            continue  # a part of what is listed
        try:
            swap(module)
        except _NoCounterpartError as reason:
            left[name] = f"{name or 'the model'} ({type(module).__name__}: {reason})"
    if left:
        warnings.warn(f"{what} left these as they are: {', '.join(left.values())}", stacklevel=3)
    return model


def _fuse_one(module: nn.Module) -> None:
    if _is_foreign(module):
        raise _NoCounterpartError("scripted or quantised")
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and not isinstance(module, tuple(_PLAIN)):
        _swap(module, _to_fused)


def _unfuse_one(module: nn.Module) -> None:
    if isinstance(module, tuple(_PLAIN)):
        _swap(module, _to_plain)


def fuse(model: Model) -> Model:
    """Swaps every nn.LSTM, nn.GRU, nn.LSTMCell and nn.GRUCell inside for its fused counterpart.

    In place: the modules change their class and stay the same objects, with the same Parameters,
    buffers, hooks, parametrizations, names and training flag. An optimizer made before still trains
    them. Subclasses that don't touch the computation keep their own methods.

    Args:
        model: any module, also one that is itself a recurrent layer.

    Returns:
        The model.

    Raises:
        TypeError: model is no module.

    Warns:
        UserWarning: lists what is left as it was: nn.RNN, subclasses with a forward of their own,
            quantised and scripted modules.
    """
    return _swap_all("fuse", model, _fuse_one)


def unfuse(model: Model) -> Model:
    """Swaps every fused module inside for torch's own, in place; undoes fuse().

    For what knows only torch's modules: ONNX, quantisation, TorchScript. Modules that were made as
    fused ones become torch's too.

    Args:
        model: any module, also one that is itself a recurrent layer.

    Returns:
        The model.

    Raises:
        TypeError: model is no module.

    Warns:
        UserWarning: lists what is left as it was: subclasses of fused modules.
    """
    return _swap_all("unfuse", model, _unfuse_one)

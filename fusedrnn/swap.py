"""fuse(model) and unfuse(model): the swap in a model that is there already.

A module is swapped by changing its class, as torch's own parametrizations do: it stays the same
object with the same Parameters, so that whatever holds on to either (optimizers, hooks, lists,
other modules) goes on to.
"""

from __future__ import annotations

import dis
import inspect
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fusedrnn.modules import FUSED

__all__ = ["fuse", "unfuse"]

Model = TypeVar("Model", bound=nn.Module)
Class = type[nn.Module]

_LOG = logging.getLogger("fusedrnn")
_RECURRENT_NAME = re.compile(r"LSTM|GRU|RNN")

_PLAIN = {fused: plain for plain, fused in FUSED.items()}

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
    cls = _fused_subclass(plain)
    return cls.__new__(cls)


def _made(name: str, bases: tuple[Class, ...], plain: Class, space: dict[str, Any]) -> Class:
    """A fused class that `plain` is a base of, and its counterpart."""

    def reduce(module: nn.Module, protocol: Any) -> str | tuple[Any, ...]:
        """Pickles with the class that it was made of, for this one has no name to import."""
        if vars(type(module)).get("_unfused_class") is not plain:  # a class derived from it
            return object.__reduce_ex__(module, protocol)
        return _new, (plain,), object.__reduce_ex__(module, 2)[2]

    return type(name, bases, {**space, "__reduce_ex__": reduce, "_unfused_class": plain})


# Classes that are torch's as well, for code that asks isinstance(module, nn.LSTM). The order of
# resolution is ours before torch's, but for the constructor.
_BOTH = {
    plain: _made(
        fused.__name__,
        (fused, plain),
        plain,
        {"__module__": fused.__module__, "__doc__": fused.__doc__, "__init__": plain.__init__},
    )
    for plain, fused in FUSED.items()
}


def _fused_subclass(plain: Class) -> Class:
    """The counterpart of a subclass of torch's, or of torch's class itself, that is one of it too.

    A subclass keeps its own methods, and its super().forward is fused. The class is kept as an
    attribute of `plain`, so that it lives as long.
    """
    if plain in _BOTH:
        return _BOTH[plain]
    found: Class | None = vars(plain).get("_fused_class")
    # Some copy what they find in one class to another.
    if found is not None and vars(found)["_unfused_class"] is plain:
        return found
    base = next(c for c in plain.__mro__ if c in FUSED)
    space = {"__module__": plain.__module__, "__doc__": plain.__doc__}
    try:
        found = _made(f"Fused{plain.__name__}", (plain, _BOTH[base]), plain, space)
        plain._fused_class = found  # type: ignore[attr-defined]
    except Exception as error:  # whatever its metaclass or __init_subclass__ raises
        raise _NoCounterpartError("its class can't be extended") from error
    return found


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function, and of those inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _calls_super(function: object) -> bool:
    """Whether a forward has a super().forward, and so leaves the computation to torch's."""
    code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
    if not isinstance(code, CodeType):
        return False
    for inner in _codes(code):
        is_super = False  # whether the next attribute is one of super()'s
        for instruction in dis.get_instructions(inner):
            if instruction.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER")):
                if is_super and instruction.argval == "forward":
                    return True
                is_super = False
            elif instruction.opname.startswith("LOAD_") and instruction.argval == "super":
                is_super = True
    return False


def _to_fused(cls: Class, subclass: bool) -> Class:
    base = next((c for c in cls.__mro__ if c in FUSED), None)
    if base is None:
        raise _NoCounterpartError("no counterpart")
    for c in cls.__mro__[: cls.__mro__.index(base)]:
        for name in (*_CALLED, "_flat_weights", "__reduce__", "__reduce_ex__"):
            if name in vars(c) and not (name == "forward" and _calls_super(vars(c)[name])):
                raise _NoCounterpartError(f"{name} of its own")
    return FUSED[base] if cls is base and not subclass else _fused_subclass(cls)


def _to_plain(cls: Class) -> Class:
    found: Class | None = _PLAIN.get(cls) or vars(cls).get("_unfused_class")
    if found is None:
        raise _NoCounterpartError("a subclass")
    return found


def _is_foreign(module: nn.Module) -> bool:
    """Whether it is a recurrent layer in the guise of torch's quantisation or scripting."""
    names = {c.__name__ for c in FUSED}
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", None) in names
    return any(
        c.__name__ in names and c.__module__.startswith("torch.ao.") for c in type(module).__mro__
    )


def _has_own_weights(module: nn.Module) -> bool:
    """Whether torch's forward would use others than the named ones, which somebody put there."""
    if not isinstance(module, nn.RNNBase) or is_parametrized(module):
        return False
    named = [getattr(module, name, None) for name in module._flat_weights_names]
    # It finds them changed by comparing with these, and then takes the named ones.
    noted = [None if ref is None else ref() for ref in module._flat_weight_refs]
    known = all(a is b for a, b in zip(named, noted, strict=True))
    return known and any(a is not b for a, b in zip(named, module._flat_weights, strict=True))


def _counterpart(module: nn.Module, find: Callable[[Class], Class]) -> Class:
    for name in _CALLED:
        if name in vars(module):
            raise _NoCounterpartError(f"{name} of its own")
    if _has_own_weights(module):
        raise _NoCounterpartError("_flat_weights of its own")
    cls = type(module)
    if not is_parametrized(module):
        return find(cls)
    # Parametrized modules have a class of their own, which has the weights as properties.
    base = find(cls.__bases__[0])
    if base is cls.__bases__[0]:
        return cls
    space = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{base.__name__}", (base,), space)


def _swap_all(what: str, model: Model, target: Callable[[nn.Module], Class | None]) -> Model:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what}: Expected model to be a module, got {type(model).__name__}")
    swaps: list[tuple[nn.Module, Class]] = []
    left: dict[str, str] = {}
    foreign: list[str] = []  # what begins so is a part of what is listed
    for name, module in model.named_modules():
        if name.startswith(tuple(foreign)):
            continue
        try:
            cls = target(module)
            if cls is not None:
                swaps.append((module, cls))
        except _NoCounterpartError as reason:
            left[name] = f"{name or 'the model'} ({type(module).__name__}: {reason})"
            if _is_foreign(module):
                foreign.append(f"{name}." if name else "")
    for module, cls in swaps:
        if cls is type(module):
            continue
        module.__class__ = cls
        if what == "unfuse" and isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # which cuDNN wants
    if left:
        warnings.warn(f"{what} left these as they are: {', '.join(left.values())}", stacklevel=3)
    return model


def _target_of_fuse(module: nn.Module, subclass: bool) -> Class | None:
    if _is_foreign(module):
        raise _NoCounterpartError("scripted or quantised")
    if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return None
    if not isinstance(module, tuple(_PLAIN)):
        return _counterpart(module, lambda cls: _to_fused(cls, subclass))
    if not subclass:
        return None
    try:
        return _counterpart(module, lambda cls: _to_fused(_to_plain(cls), subclass))
    except _NoCounterpartError:  # a subclass of ours
        return None


def _target_of_unfuse(module: nn.Module) -> Class | None:
    return _counterpart(module, _to_plain) if isinstance(module, tuple(_PLAIN)) else None


def _log_others(model: nn.Module) -> None:
    """Tells of modules that are named as recurrent ones and have no layer of torch's inside."""
    if not _LOG.isEnabledFor(logging.INFO):
        return
    for name, module in model.named_modules():
        kind = type(module).__name__
        if (
            _RECURRENT_NAME.search(kind)
            and not _is_foreign(module)
            and not any(isinstance(m, (nn.RNNBase, nn.RNNCellBase)) for m in module.modules())
        ):
            _LOG.info(
                "fuse: %s (%s) is named as a recurrent layer and has none of torch's inside: "
                "nothing to swap",
                name or "the model",
                kind,
            )


def fuse(model: Model, *, subclass: bool = False) -> Model:
    """Swaps every nn.LSTM, nn.GRU, nn.LSTMCell and nn.GRUCell inside for its fused counterpart.

    In place: the modules change their class and stay the same objects, with the same Parameters,
    buffers, hooks, parametrizations, names and training flag. An optimizer made before still trains
    them. Subclasses that don't touch the computation keep their own methods, also a forward of
    their own that calls super().forward.

    Args:
        model: any module, also one that is itself a recurrent layer.
        subclass: whether isinstance(module, nn.LSTM) stays true, for code that asks for it while it
            runs. torch.compile then breaks its graph at these layers, as at torch's own, unless
            torch._dynamo.config.allow_rnn is set. Subclasses of torch's layers are swapped so in
            any case. Layers that are fused already become so too; without it they stay as they are.

    Returns:
        The model.

    Raises:
        TypeError: model is no module.

    Warns:
        UserWarning: lists what is left as it was: nn.RNN, subclasses with a computation of their
            own, quantised and scripted modules. What only looks like a recurrent layer, by its
            class's name, is told to the logger "fusedrnn" at the level INFO.
    """
    _swap_all("fuse", model, lambda module: _target_of_fuse(module, subclass))
    _log_others(model)
    return model


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
    return _swap_all("unfuse", model, _target_of_unfuse)

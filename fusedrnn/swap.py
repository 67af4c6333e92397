"""fuse(model) and unfuse(model): swap the modules of an existing model.

A swap changes a module's class, as torch's own parametrizations do. It stays the same object with
the same Parameters, so optimizers, hooks, lists and other modules keep their references.
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

from fusedrnn import _variant
from fusedrnn.modules import FUSED

__all__ = ["fuse", "unfuse"]

Model = TypeVar("Model", bound=nn.Module)
Class = type[nn.Module]

_LOG = logging.getLogger("fusedrnn")
_RECURRENT_NAME = re.compile(r"LSTM|GRU|RNN")

_PLAIN = {fused: plain for plain, fused in FUSED.items()}

# The methods behind a call of torch's modules. A class with its own may compute differently.
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
    """Why a module stays as it is."""


class _VariantError(Exception):
    """The options of a module that torch's has not."""


def _new(plain: Class) -> nn.Module:
    cls = _fused_subclass(plain)
    return cls.__new__(cls)


def _made(name: str, bases: tuple[Class, ...], plain: Class, space: dict[str, Any]) -> Class:
    """A fused class derived from `plain`, its counterpart."""

    def reduce(module: nn.Module, protocol: Any) -> str | tuple[Any, ...]:
        """Pickles as `plain`, because this class has no importable name."""
        if vars(type(module)).get("_unfused_class") is not plain:  # a class derived from it
            return object.__reduce_ex__(module, protocol)
        return _new, (plain,), object.__reduce_ex__(module, 2)[2]

    return type(name, bases, {**space, "__reduce_ex__": reduce, "_unfused_class": plain})


# Fused classes derived from torch's too, for isinstance(module, nn.LSTM). Ours come before torch's
# in the method resolution order, but for the constructor.
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
    """The fused class derived from `plain`, one of torch's classes or a subclass.

    A subclass keeps its own methods, and its super().forward is fused. The fused class is an
    attribute of `plain`, and lives as long.
    """
    if plain in _BOTH:
        return _BOTH[plain]
    found: Class | None = vars(plain).get("_fused_class")
    # Some code copies a class's attributes to another class.
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
    """A function's code and its inner functions'."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _calls_super(function: object) -> bool:
    """Whether a forward calls super().forward, and so leaves the computation to torch's class."""
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
    """Whether it is a recurrent layer that torch has quantised or scripted."""
    names = {c.__name__ for c in FUSED}
    if isinstance(module, torch.jit.ScriptModule):
        # With a recurrent layer's weights: other classes are named RNN too.
        is_recurrent = hasattr(module, "weight_hh") or hasattr(module, "weight_hh_l0")
        return is_recurrent and getattr(module, "original_name", None) in names
    return any(
        c.__name__ in names and c.__module__.startswith("torch.ao.") for c in type(module).__mro__
    )


def _has_own_weights(module: nn.Module) -> bool:
    """Whether torch's forward would use other weights than the module's named ones."""
    if not isinstance(module, nn.RNNBase) or is_parametrized(module):
        return False
    named = [getattr(module, name, None) for name in module._flat_weights_names]
    # Where these differ from the named weights, torch's forward takes the named ones again.
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
    # A parametrized module has its own class, with its weights as properties.
    base = find(cls.__bases__[0])
    if base is cls.__bases__[0]:
        return cls
    space = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{base.__name__}", (base,), space)


def _swap_all(function: str, model: Model, target: Callable[[nn.Module], Class | None]) -> Model:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: Expected model to be a module, got {type(model).__name__}")
    swaps: list[tuple[nn.Module, Class]] = []
    left: dict[str, str] = {}
    foreign: list[str] = []  # prefixes: submodules belong to a listed module
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
        except _VariantError as options:
            raise RuntimeError(
                f"{function}: {name or 'the model'} ({type(module).__name__}) has {options}, which "
                "torch's modules have not. Without these options it can be swapped"
            ) from None
    for module, cls in swaps:
        if cls is type(module):
            continue
        if function == "unfuse":
            _variant.forget(module)
        module.__class__ = cls
        if function == "unfuse" and isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # cuDNN wants it
    if left:
        warnings.warn(
            f"{function} left these as they are: {', '.join(left.values())}", stacklevel=3
        )
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
    if not isinstance(module, tuple(_PLAIN)):
        return None
    found = _counterpart(module, _to_plain)
    names = ("recurrent_dropout", "zoneout", "weight_dropout", "layer_norm")
    if options := _variant.changes(module, *names):
        raise _VariantError(options)
    return found


def _log_others(model: nn.Module) -> None:
    """Logs modules with a recurrent layer's name and without any layer from torch."""
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
    """Swaps every recurrent layer and cell of torch.nn in a model for its fused counterpart.

    In place: the modules change their class and stay the same objects, with the same Parameters,
    buffers, hooks, parametrizations, names and training flag. An existing optimizer still trains
    them. Subclasses keep their own methods, if these leave the computation alone; a forward that
    calls super().forward is fine.

    Args:
        model: any module, also one that is itself a recurrent layer.
        subclass: whether isinstance(module, nn.LSTM) stays true, for code that checks it at run
            time. torch.compile then breaks its graph at these layers, as at torch's own, unless
            torch._dynamo.config.allow_rnn is set. Subclasses of torch's layers always stay
            instances. Fused layers in the model become instances too; without it they are left.

    Returns:
        The model.

    Raises:
        TypeError: model is no module.

    Warns:
        UserWarning: lists the recurrent modules left alone: classes without a counterpart,
            subclasses with their own computation, quantised and scripted modules. The logger
            "fusedrnn" lists, at the level INFO, modules that only have a recurrent layer's name.
    """
    _swap_all("fuse", model, lambda module: _target_of_fuse(module, subclass))
    _log_others(model)
    return model


def unfuse(model: Model) -> Model:
    """Swaps every fused module inside for torch's own, in place; undoes fuse().

    For code that knows only torch's modules: ONNX, quantisation, TorchScript. Modules constructed
    as fused ones become torch's too.

    Args:
        model: any module, also one that is itself a recurrent layer.

    Returns:
        The model.

    Raises:
        TypeError: model is no module.
        RuntimeError: a module has recurrent dropout, zoneout, weight dropout or layer norm. The
            model is then unchanged.

    Warns:
        UserWarning: lists the modules left alone: subclasses of fused modules.
    """
    return _swap_all("unfuse", model, _target_of_unfuse)

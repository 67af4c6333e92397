"""Calls whose errors are the same in torch's module and in ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from helpers.cells import Make, Pair, pair_of


def raised(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as e:
        return e
    return None


def assert_same_error(call: Callable[[Make], Any], pair: Pair) -> None:
    """Both calls raise the same type with the same message."""
    expected, got = (raised(lambda make=make: call(make)) for make in pair.makers)
    assert expected is not None, "torch accepts this"
    assert type(got) is type(expected), (got, expected)
    assert str(got) == str(expected)


def given(make: Make, x: Tensor | PackedSequence, *states: Tensor, **keywords: Any) -> Any:
    """A call with as many states as the cell has."""
    module = make(3, 4, **keywords)
    return module(x, pair_of(module).cell.to_hx(states))

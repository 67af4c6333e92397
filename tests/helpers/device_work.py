"""Counts what a call of the emulated CUDA ops would put into a GPU's stream."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch

# Operators of torch that launch nothing themselves: allocation, views, and operators that call
# others, which are counted instead.
WITHOUT_KERNEL = frozenset((
    "alias", "as_strided", "clone", "contiguous", "detach", "empty", "empty_like",
    "empty_strided", "expand", "item", "masked_fill", "narrow", "permute", "reshape",
    "resize_", "_reshape_alias", "select", "slice", "t", "to", "_to_copy", "transpose",
    "unsqueeze", "view", "zeros",
))  # fmt: skip


def device_work(call: Callable[[], Any]) -> dict[str, int]:
    """The numbers of kernels, GEMMs, memsets and torch's operators, by name; without zeros.

    torch runs an operator on a GPU as one kernel or copy at least.
    """
    launches = lambda: int(torch.ops.fusedrnn_emulated.counts()[0])  # noqa: E731
    before = launches()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    work: collections.Counter[str] = collections.Counter(kernel=launches() - before)
    for event in profile.events() or ():
        name = counted(event)
        if name and not any(counted(parent) for parent in parents(event)):
            work[name] += 1
    return {name: number for name, number in work.items() if number}


def parents(event: Any) -> list[Any]:
    found = []
    while (event := event.cpu_parent) is not None:
        found.append(event)
    return found


def counted(event: Any) -> str:
    """The name of the work that an event stands for, or an empty one."""
    library, _, name = event.name.partition("::")
    is_operator = library == "aten" and name not in WITHOUT_KERNEL
    return name if is_operator or library == "emulated" else ""

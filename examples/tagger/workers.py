"""The processes that share each batch: one, or torchrun's."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tagger.errors import UserError
from tagger.model import Tagger


@dataclass(frozen=True)
class Workers:
    """The processes that share each batch: one unless started by torchrun."""

    rank: int
    count: int
    device: torch.device
    fsdp: bool = False  # whether they share the weights too

    def reduce(self, values: Sequence[float], op: Any = dist.ReduceOp.SUM) -> list[float]:
        """The sums (or what `op` says) of each value over all processes."""
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op)
        return tensor.tolist()

    def share(self, tagger: Tagger) -> nn.Module:
        """Wraps the tagger, so that its gradients are means over all processes."""
        if self.fsdp:
            mesh = init_device_mesh(self.device.type, (self.count,))
            for module in (tagger.rnn, tagger):
                fully_shard(module, mesh=mesh)
            return tagger
        return DistributedDataParallel(tagger) if self.count > 1 else tagger

    def clock(self) -> float:
        """The time in seconds, after waiting for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def find_device(text: str) -> torch.device:
    """The device to train on; with torchrun on CUDA, one for each process of a machine.

    Raises:
        UserError: it isn't "cpu", "cuda" or "cuda:N", or torch doesn't have it.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise UserError(f"--device should be cpu, cuda or cuda:N, got '{text}'", 2)
    if text == "cpu":
        return torch.device(text)
    if not torch.cuda.is_available():
        raise UserError(f"--device {text}: torch finds no CUDA device here")
    index = int(text[5:] or os.environ.get("LOCAL_RANK", 0))
    if index >= torch.cuda.device_count():
        raise UserError(f"--device {text}: there are {torch.cuda.device_count()} CUDA devices")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def start_workers(device: torch.device, fsdp: bool) -> Workers:
    """Joins the other processes if torchrun started this one."""
    if "WORLD_SIZE" not in os.environ:
        return Workers(0, 1, device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Workers(dist.get_rank(), dist.get_world_size(), device, fsdp)

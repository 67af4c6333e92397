"""A model under test: the job its user would run, before and after `fuse`."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

import fusedrnn
from benchmarks.cells import FUSED

RECURRENT = (nn.RNNBase, nn.RNNCellBase)

Results = dict[str, Any]  # tensors, or values that convert: arrays, numbers, text
Job = Callable[[], Results]


class Swap:
    """Changes a model: `plain` not at all, `fused` by fuse(), `nudged` in the weights' last bit.

    Records the swapped recurrent layers, and the reasons for layers left as they are.
    """

    def __init__(self, kind: str, subclass: bool = False) -> None:
        self.kind = kind
        self.subclass = subclass
        self.swapped: dict[str, str] = {}
        self.left: list[str] = []

    def __call__(self, model: nn.Module) -> None:
        recurrent = {
            name: module for name, module in model.named_modules() if isinstance(module, RECURRENT)
        }
        if self.kind == "nudged":
            generator = torch.Generator().manual_seed(0)  # packages use the global one
            with torch.no_grad():
                for module in recurrent.values():
                    for weight in module.parameters():
                        sign = torch.randint(2, weight.shape, generator=generator) * 2 - 1
                        weight.mul_(1 + sign * torch.finfo(weight.dtype).eps)
        if self.kind == "fused":
            before = {name: type(module).__name__ for name, module in recurrent.items()}
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fusedrnn.fuse(model, subclass=self.subclass)
            self.swapped = {n: before[n] for n, m in recurrent.items() if isinstance(m, FUSED)}
            self.left = [str(w.message).partition("as they are: ")[2] for w in caught]


@dataclass(frozen=True)
class Model:
    """A package's model.

    Attributes:
        packages: the modules to import, each with its distribution.
        what: a description for the tables.
        prepare: gives the job, a typical use of the model. Every call starts from the same seed, so
            all calls give the same results.
        tolerance: largest difference; by `mode` if None.
        subclass: passed to `fuse`: for code that tests isinstance with nn.LSTM or nn.GRU.
    """

    name: str
    packages: dict[str, str]
    what: str
    mode: str
    prepare: Callable[[Swap], Job]
    tolerance: float | None = None
    subclass: bool = False

    def missing(self) -> str | None:
        for module in self.packages:
            try:
                with quiet():
                    importlib.import_module(module)
            except ImportError as error:
                return str(error)
        return None

    def versions(self) -> str:
        return ", ".join(f"{dist} {version(dist)}" for dist in self.packages.values())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the packages' progress bars, logs and warnings."""
    logging.disable(logging.WARNING)
    try:
        with (
            open(os.devnull, "w") as sink,  # a real file: packages read its encoding
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def load(name: str) -> Any:
    return importlib.import_module(name)


def seed(value: int = 0) -> Any:
    """Seeds the global generators in torch and numpy; gives a generator of its own."""
    np = load("numpy")
    np.random.seed(value)
    torch.manual_seed(value)
    return np.random.default_rng(value)


def weights(model: nn.Module) -> Tensor:
    """Copies all weights into one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Learnt:
    """The change in a model's weights from now on."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._start = weights(model)

    def __call__(self) -> Tensor:
        return weights(self._model) - self._start

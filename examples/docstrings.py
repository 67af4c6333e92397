"""Real text that is on every machine: the docstrings of Python's standard library."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def read(packages: Sequence[str], steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The docstrings of some packages, each text once.

    Args:
        packages: names of packages.
        steps: words of a docstring to keep, T.

    Returns:
        Ids of words [N, T], padded with zeros; lengths [N]; indices of the packages [N].
    """
    ids: dict[str, int] = {}
    found: dict[tuple[int, ...], int] = {}
    for label, package in enumerate(packages):
        folder = Path(sysconfig.get_path("stdlib"), package)
        for path in sorted(folder.rglob("*.py")):
            for text in re.findall('"""(.*?)"""', path.read_text("utf-8"), re.DOTALL):
                words = re.findall("[a-z]+", text.lower())[:steps]
                found[tuple(ids.setdefault(word, len(ids)) for word in words)] = label
    found.pop((), None)
    rows = pad_sequence([torch.tensor(row) for row in found], batch_first=True)
    return rows, torch.tensor([*map(len, found)]), torch.tensor([*found.values()])

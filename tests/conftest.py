"""Fixtures of several test files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

# These files compare results of different kernels. test_cuda.py sets the precision itself.
FLOAT32 = {"test_compile", "test_functorch", "test_swap", "test_works_with"}


@pytest.fixture(autouse=True)
def ieee(request: pytest.FixtureRequest) -> Iterator[None]:
    """Disables TF32 on a GPU: its rounding would hide every other difference."""
    if request.module.__name__ not in FLOAT32 or not torch.cuda.is_available():
        yield
        return
    rnn = torch.backends.cudnn.rnn
    before = rnn.fp32_precision
    rnn.fp32_precision = "ieee"
    yield
    rnn.fp32_precision = before

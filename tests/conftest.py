"""What several files of tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# For tools/. At the end: `make sanitize` imports the fusedrnn that PYTHONPATH names.
sys.path.append(str(Path(__file__).parents[1]))

# Compare what may run in different kernels; test_cuda.py sets the precision itself.
FLOAT32 = {
    "test_compile",
    "test_functorch",
    "test_swap",
    "test_swap_left",
    "test_swap_subclasses",
    "test_works_with",
}


@pytest.fixture(autouse=True)
def ieee(request: pytest.FixtureRequest) -> Iterator[None]:
    """float32 on a GPU without TF32, whose rounding would be the greatest difference."""
    if request.module.__name__ not in FLOAT32 or not torch.cuda.is_available():
        yield
        return
    rnn = torch.backends.cudnn.rnn
    before = rnn.fp32_precision
    rnn.fp32_precision = "ieee"
    yield
    rnn.fp32_precision = before

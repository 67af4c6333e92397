"""Fixtures for several test files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
# For tools/, and for the examples, which import each other as scripts do. Last on the path, because
# `make sanitize` tests the fusedrnn on PYTHONPATH.
sys.path += [str(ROOT), str(ROOT / "examples")]

# These files compare different kernels' results. test_cuda.py sets the precision itself.
FLOAT32 = {
    "test_compile",
    "test_functorch",
    "test_swap",
    "test_swap_skipped",
    "test_swap_subclasses",
    "test_works_with",
}


@pytest.fixture(autouse=True)
def ieee(request: pytest.FixtureRequest) -> Iterator[None]:
    """Disables TF32 on a GPU: its rounding would hide every other difference."""
    if request.module.__name__ not in FLOAT32 or not torch.cuda.is_available():
        yield
        return
    # By the older setting: where it differs from rnn.fp32_precision, torch.export fails.
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    cudnn.allow_tf32 = False
    yield
    cudnn.allow_tf32 = before

"""Fixtures for several test files."""

from __future__ import annotations

import os
import sys
import threading
import time
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


class Heartbeat:
    """Names a test that runs long, fixtures included: the mutation tests first compile for minutes.

    A line every EVERY seconds, on the stderr that pytest itself began with.
    """

    EVERY = 30.0

    def __init__(self) -> None:
        self._stderr = os.dup(2)
        self._running: tuple[str, float] | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        last = 0.0
        while True:
            time.sleep(1)
            running, now = self._running, time.monotonic()
            if running is not None and now - max(running[1], last) >= self.EVERY:
                last = now
                self.say(f"{running[0]} runs for {now - running[1]:.0f} s")

    def say(self, line: str) -> None:
        os.write(self._stderr, f"\n{line}\n".encode())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._running = (item.nodeid, time.monotonic())
        try:
            return (yield)
        finally:
            self._running = None


def pytest_configure(config: pytest.Config) -> None:
    """Nothing is captured yet. pytest-xdist's workers print nothing."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Heartbeat())

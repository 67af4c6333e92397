"""A pytest plugin for workers of pytest-xdist on a GPU.

A failed kernel ends the process's CUDA context, and all of its later tests would fail. So the
worker reports the test and exits; xdist starts another.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from typing import Any

import pytest
import torch


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, None]:
    outcome = yield
    if (
        call.when != "call"
        or not torch.cuda.is_initialized()
        or "PYTEST_XDIST_WORKER" not in os.environ
    ):
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        report = outcome.get_result()
        print(f"{item.nodeid}: {error}\n{report.longreprtext}", file=sys.__stderr__, flush=True)
        os._exit(3)

"""Two processes train as one: DistributedDataParallel, fully_shard, calls with DTensors.

helpers/two_processes.py computes everything in one run.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedrnn

if not torch.distributed.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)

from helpers.two_processes import DDP, DTENSORS, FORMS, FSDP, META, H

pytestmark = pytest.mark.long  # two processes

HERE = Path(__file__).parent
GRADIENT, TRAINED = 1e-12, 1e-10  # in float64; updates add to earlier rounding
Measured = list[dict[str, Any]]  # one a process


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    folder = tmp_path_factory.mktemp("distributed")
    paths = [str(Path(fusedrnn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(HERE / "helpers/two_processes.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    processes = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return {case: [found[case] for found in processes] for case in processes[0]}


def check(measured: Measured, *, trained: bool = True) -> None:
    """Each process has no error, and the gradients, weights and scores of one process."""
    for found in measured:
        assert "error" not in found, found["error"]
        assert found["gradients"] <= GRADIENT
        others = [found[name] for name in ("weights", "scores") if name in found]
        assert bool(others) == trained
        assert max(others, default=0) <= TRAINED


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", DDP)
def test_ddp(measured: dict[str, Measured], mode: str, form: str) -> None:
    check(measured[f"ddp {mode}: {form}"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", FSDP)
def test_fsdp(measured: dict[str, Measured], mode: str, form: str) -> None:
    """Gathered weights load into torch's module, with the same scores."""
    check(measured[f"fsdp {mode}: {form}"])


@pytest.mark.parametrize("form", FORMS)
def test_fsdp_with_outputs_written_to(measured: dict[str, Measured], form: str) -> None:
    check(measured[f"fsdp in place: {form}"])


@pytest.mark.parametrize("form", FORMS)
def test_fsdp_bfloat16(measured: dict[str, Measured], form: str) -> None:
    for found in measured[f"fsdp bfloat16: {form}"]:
        assert "error" not in found, found["error"]
        assert found["types"] == ["torch.float32"]
        # Rounding differs, because each process sums its own rows.
        assert found["two"] <= 2 * found["one"] + torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", META)
def test_fsdp_of_a_model_on_meta(measured: dict[str, Measured], mode: str, form: str) -> None:
    found = measured[f"fsdp meta {mode}: {form}"]
    check(found, trained=mode != "reset")
    bound = 1 / math.sqrt(H)
    for extremes in found:
        assert -bound <= extremes["least"] < -0.75 * bound
        assert 0.75 * bound < extremes["greatest"] <= bound


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", DTENSORS)
@pytest.mark.parametrize("grad", ["grad", "no grad"])
def test_dtensors(measured: dict[str, Measured], mode: str, form: str, grad: str) -> None:
    """Results are right, or torch raises an error naming DTensors."""
    for of_process in measured[f"dtensors {mode}: {form}"]:
        found = of_process[grad]
        if "error" in found:
            said = "mixed torch.Tensor and DTensor|sharding strategy|Cannot find device mesh"
            assert re.search(said, found["error"])
        else:
            assert all(far <= GRADIENT for far in found.values())

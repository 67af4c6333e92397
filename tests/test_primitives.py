"""Each function in launch.cuh and ptx.cuh, on the emulator and on a GPU: primitives.cu."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from helpers.emulated import COMPILER, EMULATOR, ENVIRONMENT, ROOT, kernel_flags

from tools import cuda_toolkit

SOURCE = Path(__file__).parent / "kernels" / "primitives.cu"
try:
    CUDA_HOME = cuda_toolkit.find_home()
except cuda_toolkit.MissingError:
    CUDA_HOME = None


def run(program: Path) -> None:
    result = subprocess.run([program], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("ok") >= 20


def test_on_the_emulator(tmp_path: Path) -> None:
    program = tmp_path / "primitives"
    flags = [*kernel_flags(), "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
    sources = ["-x", "c++", str(SOURCE), str(EMULATOR / "emulator.cpp")]
    subprocess.run([*COMPILER, *flags, *sources, "-o", str(program)], check=True)
    run(program)


@pytest.mark.skipif(CUDA_HOME is None, reason="needs nvcc")
def test_on_a_gpu(tmp_path: Path) -> None:
    """Without a GPU it compiles."""
    nvcc = f"{CUDA_HOME}/bin/nvcc"
    program = tmp_path / "primitives"
    arch = "native" if torch.cuda.is_available() else "sm_90"
    flags = ["-std=c++17", "--expt-relaxed-constexpr", f"-arch={arch}", "-Werror=all-warnings"]
    subprocess.run(
        [nvcc, *flags, f"-I{ROOT / 'csrc'}", str(SOURCE), "-o", str(program)],
        check=True,
        env=ENVIRONMENT,
    )
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    run(program)

"""The doctor, and what an import says when the binary does not fit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedrnn

PACKAGE = Path(fusedrnn.__file__).parent


def run(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=path,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )


def copy(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "fusedrnn", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "fusedrnn"


def last_line(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode != 0
    return process.stderr.strip().splitlines()[-1]


def test_doctor() -> None:
    report = subprocess.run(
        [sys.executable, "-m", "fusedrnn"], capture_output=True, text=True, check=False
    )
    assert report.returncode == 0, report.stdout + report.stderr
    assert re.search(rf"^torch +{re.escape(str(torch.__version__))}", report.stdout, re.M)
    assert re.search(r"^CPU ISA +(baseline|avx2|avx512|avx512bf16)$", report.stdout, re.M)
    lower = subprocess.run(
        [sys.executable, "-m", "fusedrnn"],
        env={**os.environ, "FUSEDRNN_CPU_ISA": "baseline"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.search(r"^CPU ISA +baseline$", lower.stdout, re.M)
    assert "self-check passed" in report.stdout


def test_built_for_another_torch(tmp_path: Path) -> None:
    build = copy(tmp_path) / "_build.py"
    build.write_text('torch_version = "1.0.0"\n')
    assert last_line(run("import fusedrnn", tmp_path)) == (
        f"ImportError: fusedrnn was built for torch 1.0.0 but torch {torch.__version__} is "
        "running: run `pip install --force-reinstall --no-deps --no-cache-dir .` in a checkout of "
        "fusedrnn"
    )


def test_not_built(tmp_path: Path) -> None:
    package = copy(tmp_path)
    for binary in package.glob("_C*"):
        binary.unlink()
    line = last_line(run("import fusedrnn", tmp_path))
    assert line.startswith("ImportError: fusedrnn has no compiled kernels in ")
    assert "pip install" in line


def test_a_broken_binary(tmp_path: Path) -> None:
    package = copy(tmp_path)
    for binary in package.glob("_C*"):
        binary.write_bytes(b"not a library")
    line = last_line(run("import fusedrnn", tmp_path))
    assert line.startswith("ImportError: fusedrnn's kernels could not be loaded (")
    assert "pip install" in line


def test_without_torch(tmp_path: Path) -> None:
    copy(tmp_path)
    code = "import sys; sys.modules['torch'] = None; import fusedrnn"
    assert "fusedrnn needs torch: pip install torch" in last_line(run(code, tmp_path))


def compiled(tmp_path: Path, compiler: str, *flags: str) -> Path:
    """A program of the kernels alone: that it compiles shows that they need no torch."""
    program = tmp_path / "kernels"
    source = Path(__file__).parent
    subprocess.run(
        [
            *(compiler, "-std=c++17", "-O1", "-DFUSEDRNN_TILE_ROWS=2", *flags, "-o", str(program)),
            str(source / "kernels_alone.cpp"),
            str(source.parent / "csrc/cpu/kernels_baseline.cpp"),
        ],
        check=True,
    )
    return program


def test_kernels_without_torch(tmp_path: Path) -> None:
    program = compiled(tmp_path, os.environ.get("CXX", "c++"))
    subprocess.run([program], check=True)


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64-static")),
    reason="needs a compiler for arm64 and an emulator: g++-aarch64-linux-gnu, qemu-user-static",
)
def test_kernels_on_arm64(tmp_path: Path) -> None:
    program = compiled(tmp_path, "aarch64-linux-gnu-g++", "-static")
    subprocess.run(["qemu-aarch64-static", program], check=True)

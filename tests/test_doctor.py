"""`python -m fusedrnn`: what the page says, and when the self-check fails."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from fusedrnn import __main__ as doctor
from fusedrnn import _build, _ops
from fusedrnn.modules import FUSED, FusedGRU

LAYERS = [plain.__name__ for plain in FUSED]


def page(**environment: str) -> str:
    """The page that another process prints."""
    report = subprocess.run(
        [sys.executable, "-m", "fusedrnn"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.returncode == 0, report.stdout + report.stderr
    assert "__main__.py" not in report.stderr  # no warning of the page's own code
    return report.stdout


def value(text: str, name: str) -> str:
    """The first value of that name."""
    return str(re.findall(rf"^  {name} +(\S.*)$", text, re.M)[0])


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A quick look of one call each, and no CUDA in torch."""
    monkeypatch.setattr(doctor, "LOOK_SECONDS", 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(_ops, "_DEVICES", frozenset(("cpu",)))
    return monkeypatch


def test_page() -> None:
    text = page(FUSEDRNN_CPU_POOL="torch", FUSEDRNN_CPU_ISA="")
    assert value(text, "torch") == str(torch.__version__)
    assert platform.python_version() in value(text, "Python")
    assert value(text, "kernels").startswith("cpu")
    assert value(text, "CPU ISA") in ("baseline", "avx2", "avx512", "avx512vnni", "avx512bf16")
    assert int(value(text, "cores").split(",")[0]) == os.cpu_count()
    assert re.search(r"^  FUSEDRNN_CPU_POOL=torch$", text, re.M)
    checked = re.findall(r"^  cpu +(\w+) +\d+e-\d+ +\d+e-\d+$", text, re.M)
    assert checked == LAYERS
    looks = re.findall(r"^  cpu +(\w+), LSTM .* +([\d.]+) +([\d.]+) +([\d.]+)x$", text, re.M)
    assert [name for name, *_ in looks] == ["inference", "training"]
    for _, plain, fused, ratio in looks:
        assert float(ratio) == pytest.approx(float(plain) / float(fused), abs=0.06, rel=0.01)
    assert text.endswith("\nself-check passed: values and gradients agree with torch.nn\n")
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 100


def test_page_with_fewer_instructions_and_cores() -> None:
    text = page(FUSEDRNN_CPU_ISA="baseline", FUSEDRNN_CPU_CORES="1")
    best = page(FUSEDRNN_CPU_ISA="")
    assert value(text, "CPU ISA") == f"baseline; this machine has {value(best, 'CPU ISA')}"
    if (os.cpu_count() or 1) > 1:
        assert value(text, "cores").endswith("1 by FUSEDRNN_CPU_CORES")
    assert value(text, "threads").endswith(", 1 of the kernels")


def test_instruction_set_of_a_process_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRNN_CPU_ISA", "baseline")
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert doctor.instruction_set() == f"{_ops.cpu_isa()}; this machine has unknown"


def test_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.delenv("FUSEDRNN_CPU_CORES", raising=False)
    for usable, expected in (
        (16, "64, 16 in the affinity mask"),
        (4, "64, 16 in the affinity mask, 4 by the CPU quota"),
    ):
        monkeypatch.setattr(doctor, "usable_cores", lambda count, usable=usable: usable)
        assert doctor.cores() == expected
    monkeypatch.setenv("FUSEDRNN_CPU_CORES", "4")
    assert doctor.cores() == "64, 16 in the affinity mask, 4 by FUSEDRNN_CPU_CORES"
    monkeypatch.delattr(os, "sched_getaffinity")
    assert doctor.cores() == "64, 4 by FUSEDRNN_CPU_CORES"


def test_usable_cores_leaves_torchs_threads() -> None:
    threads = torch.get_num_threads()
    assert 1 <= doctor.usable_cores(os.cpu_count() or 1) <= (os.cpu_count() or 1)
    assert torch.get_num_threads() == threads


def test_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: "flags\t: a\nmodel name\t: A 3000\n")
    assert doctor.processor() == "A 3000"
    monkeypatch.setattr(Path, "exists", lambda self: False)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(sys, "platform", "linux")
    assert doctor.processor() == platform.machine()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(doctor, "output", lambda *command: "Apple M3")
    assert doctor.processor() == "Apple M3"


def test_environment(brief: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in list(os.environ):
        if doctor.VARIABLES.match(name):
            brief.delenv(name)
    assert doctor.main() == 0
    assert "Environment\n  nothing set\n" in capsys.readouterr().out
    brief.setenv("OMP_NUM_THREADS", "3")
    brief.setenv("FUSEDRNN_CUDA_REGIME", "")
    brief.setenv("SECRET_CUDA_TOKEN", "x")
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    assert "Environment\n  FUSEDRNN_CUDA_REGIME=\n  OMP_NUM_THREADS=3\n\n" in printed


class Wrong(FusedGRU):
    """A GRU with one wrong value, or a wrong gradient."""

    error = 1e-3
    factor = 1.0

    def forward(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
        output, h_n = super().forward(*args, **kwargs)  # type: ignore[arg-type, call-overload]
        wrong = torch.zeros_like(output)
        wrong[-1, -1, -1] = self.error
        output = output + wrong
        return output.detach() + (output - output.detach()) * self.factor, h_n


class WrongGradient(Wrong):
    error, factor = 0.0, 1.01


class NotANumber(Wrong):
    error = float("nan")


class Refuses(FusedGRU):
    def forward(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
        raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        (Wrong, r"\d+e-0[1-4] +\d+e-\d+  FAILED over 1e-04"),
        (WrongGradient, r"\d+e-0[5-9] +[1-9]e-0[1-3]  FAILED over 1e-04"),
        (NotANumber, r"inf +\S+  FAILED over 1e-04"),
        (Refuses, r" FAILED RuntimeError: no kernel image"),
    ],
)
def test_self_check_fails(
    layer: type[nn.Module],
    line: str,
    brief: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    brief.setitem(FUSED, nn.GRU, layer)
    assert doctor.main() == 1
    printed = capsys.readouterr().out
    assert re.search(rf"^  cpu +GRU +{line}$", printed, re.M), printed
    assert re.findall(r"^self-check FAILED: (.*)$", printed, re.M) == ["GRU on cpu"]
    assert "self-check passed" not in printed
    assert "Quick look" not in printed  # of no use beside wrong results


@pytest.mark.parametrize(("load", "busy"), [(0.1, False), (64.5, True)])
def test_busy_machine(
    load: float, busy: bool, brief: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    brief.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    brief.setattr(os, "cpu_count", lambda: 2)
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    assert value(printed, "load") == f"{load}, the last minute's average"
    assert ("was busy in the last minute: these times may mean little" in printed) == busy


def test_unknown_load(brief: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    brief.delattr(os, "getloadavg")
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    assert value(printed, "load") == "unknown"
    assert "was busy in the last minute" not in printed


def test_relative_error() -> None:
    a = torch.tensor([4.0, -2.0])
    assert doctor.relative_error(a, a) == 0
    assert doctor.relative_error(a, a + 1) == 0.25
    assert doctor.relative_error(a, a * float("nan")) == float("inf")
    assert doctor.relative_error(a * 0, a * 0) == 0
    assert doctor.relative_error(a * 0, a) > 1


def test_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians of calls in turn, until the time is over."""
    monkeypatch.setattr(doctor, "LOOK_SECONDS", 10)
    clock = [0.0]
    called: list[nn.Module] = []
    seconds = iter([9, 9, 2, 1, 4, 1, 3, 1])  # the first of each is not counted
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: clock[0])

    def call(module: nn.Module) -> None:
        called.append(module)
        clock[0] += next(seconds)

    modules = (nn.Linear(1, 1), nn.Linear(1, 1))
    assert doctor.times(call, modules, "cpu") == [3000, 1000]
    assert called == [*modules] * 4


def gpu(name: str, major: int, minor: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(name=name, major=major, minor=minor, total_memory=80 * 2**30)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A build with CUDA kernels, without a GPU."""
    monkeypatch.setattr(_ops, "_DEVICES", frozenset(("cpu", "cuda")))
    monkeypatch.setattr(_build, "cuda", "13.0")
    monkeypatch.setattr(_build, "cuda_archs", ["sm_80", "sm_90a", "compute_90"])
    monkeypatch.setattr(torch.version, "cuda", "13.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def test_cuda_without_a_gpu(cuda: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The self-check leaves out a device that is not there."""
    cuda.setattr(doctor, "LOOK_SECONDS", 0)
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    assert (
        "CUDA\n"
        "  torch         built for CUDA 13.1\n"
        "  kernels       by nvcc 13.0 for sm_80 sm_90a compute_90\n"
        "  GPUs          torch finds none\n"
    ) in printed
    assert not re.search(r"^  cuda ", printed, re.M)
    cuda.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor.cuda_lines()[-1] == ("GPUs", "torch finds none, CUDA_VISIBLE_DEVICES is ''")


def test_cuda_in_a_cpu_build_of_torch(cuda: pytest.MonkeyPatch) -> None:
    cuda.setattr(torch.version, "cuda", None)
    assert doctor.cuda_lines() == [
        ("torch", "a CPU build"),
        ("to use a GPU", "install a CUDA build of torch, then in a checkout of fusedrnn run"),
        ("", _ops.REBUILD),
    ]


def test_cuda_without_kernels(cuda: pytest.MonkeyPatch) -> None:
    cuda.setattr(_ops, "_DEVICES", frozenset(("cpu",)))
    assert doctor.cuda_lines() == [
        ("torch", "built for CUDA 13.1"),
        ("kernels", "none in this build: on a GPU layers run on torch's ops, slowly"),
        ("to add them", "install CUDA 13.1's toolkit, then in a checkout of fusedrnn run"),
        ("", f"FUSEDRNN_CUDA=1 {_ops.REBUILD}"),
        ("GPUs", "torch finds none"),
    ]


def test_cuda_with_gpus(cuda: pytest.MonkeyPatch) -> None:
    gpus = [gpu("H100", 9, 0), gpu("B200", 10, 0), gpu("L40", 8, 9), gpu("T4", 7, 5)]
    cuda.setattr(_build, "cuda_archs", ["sm_80", "sm_90a"])
    cuda.setattr(torch.cuda, "is_available", lambda: True)
    cuda.setattr(torch.cuda, "device_count", lambda: len(gpus))
    cuda.setattr(torch.cuda, "get_device_properties", lambda i: gpus[i])
    cuda.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    cuda.setattr(doctor, "output", lambda *command: "580.65" if "nvidia-smi" in command else None)
    assert doctor.cuda_lines()[2:] == [
        ("driver", "580.65"),
        ("GPU 0", "H100, capability 9.0, 80 GiB"),
        ("GPU 1", "B200, capability 10.0, 80 GiB"),
        ("", "no kernels for it in this build: in a checkout of fusedrnn run"),
        ("", f"TORCH_CUDA_ARCH_LIST=10.0 {_ops.REBUILD}"),
        ("GPU 2", "L40, capability 8.9, 80 GiB"),
        ("GPU 3", "T4, capability 7.5, 80 GiB"),
        ("", "the kernels need capability 8.0: layers there run on torch's ops"),
    ]
    cuda.setattr(doctor, "output", lambda *command: None)  # nvidia-smi without a driver
    assert doctor.cuda_lines()[2][0] == "GPU 0"


@pytest.mark.parametrize(
    ("arch", "runs"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)]),
        ("sm_86", [(8, 6), (8, 9)]),
        ("sm_90", [(9, 0)]),
        ("sm_90a", [(9, 0)]),
        ("sm_100", [(10, 0), (10, 3)]),
        ("sm_100f", [(10, 0), (10, 3)]),
        ("compute_90", [(9, 0), (10, 0), (10, 3), (12, 0)]),
        ("compute_90a", [(9, 0)]),
    ],
)
def test_gpus_that_run_an_arch(arch: str, runs: list[tuple[int, int]]) -> None:
    capabilities = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
    found = [c for c in capabilities if doctor.runs_on([arch], c)]
    assert found == [c for c in capabilities if c in runs]
    assert not any(doctor.runs_on([], c) for c in capabilities)


def test_output() -> None:
    assert doctor.output(sys.executable, "-c", "print('a'); print('b')") == "a"
    assert doctor.output(sys.executable, "-c", "exit(1)") is None
    assert doctor.output("/nonexistent/program") is None

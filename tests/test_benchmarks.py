"""The benchmarks: the grid, rooflines, baselines and reports. No test asserts a time."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

pytest.importorskip("benchmarks")  # importable from the checkout's root only

from benchmarks import (
    baselines,
    cases,
    charts,
    gpu_roofline,
    latency,
    machine,
    measure,
    models,
    pass_cost,
    profile,
    report,
    roofline,
    step_cost,
    training,
    variants,
)
from benchmarks import peaks as peaks_command
from benchmarks.__main__ import main
from benchmarks.cases import Case
from benchmarks.cells import LAYERS, STEPS
from benchmarks.models.compare import difference
from benchmarks.models.job import Job, Model, Results, Swap, weights
from fusedrnn import _ops
from tools import gpu as gpu_stages

PEAKS = roofline.Peaks(
    flops={"float32": 1e9, "float64": 5e8, "bfloat16": 2e9, "float16": 1e9},
    bandwidth={1 << 10: 4e9, 1 << 12: 1e9},
)


class FixedPeaks:
    def measure(self) -> roofline.Peaks:
        return PEAKS


SIZES = {field.name for field in dataclasses.fields(Case)} - {"compiled"}


def has(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) for package in packages)


def row(
    name: str, ratio: float, mode: str = "inference", over: str = "torch", noisy: bool = False
) -> dict[str, Any]:
    return {
        "name": name,
        "mode": mode,
        "baseline": over,
        "ours_ms": 1.0,
        "baseline_ms": ratio,
        "roofline_ms": 0.5,
        "ratio": ratio,
        "ratio_low": 0.9 * ratio,
        "ratio_high": 1.05 * ratio,
        "ours_spread": 0.01,
        "baseline_spread": 0.3 if noisy else 0.1,
    }


def stored(path: Path, *rows: dict[str, Any]) -> Path:
    header = {"device": "cpu", "processor": "some", "isa": "avx2", "threads": 2, "torch": "2.13"}
    header |= {"baselines": {"onnx": "1", "openvino": "2026"}, "date": "2026-01-02T03:04:05+00:00"}
    path.write_text(json.dumps({"header": header, "rows": rows}))
    return path


def test_grid() -> None:
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names) >= 40
    assert {case.cell for case in cases.CASES} == {*LAYERS, *STEPS}
    assert {case.layout for case in cases.CASES} == {"padded", "packed", "lengths"}
    for case in cases.CASES:
        assert len(case.lengths) == case.B
        assert max(case.lengths) == case.T
        assert min(case.lengths) >= 1
        assert case.T == 1 or not case.is_cell
        if case.layout == "packed":
            assert case.lengths == sorted(case.lengths, reverse=True)


def test_unknown_cell() -> None:
    with pytest.raises(ValueError, match="no cell 'nothing'; there are LSTM, GRU, "):
        Case("a", "nothing")


def test_pick() -> None:
    assert [case.name for case in cases.pick(["tiny"])] == ["tiny"]  # not "GRU tiny"
    taggers = ["tagger", "tagger packed", "tagger lengths", "GRU tagger"]
    assert [case.name for case in cases.pick(["tagg"])] == taggers
    assert cases.pick([]) == list(cases.CASES)
    on_cuda = cases.pick([], "cuda")
    assert on_cuda == [*cases.CASES, *cases.CUDA_CASES]
    assert len({case.name for case in on_cuda}) == len(on_cuda)
    with pytest.raises(ValueError, match="no case matches 'nothing'"):
        cases.pick(["tiny", "nothing"])


@pytest.mark.parametrize(
    ("case", "inference", "training"),
    [
        # 2 * tokens * gates * H * (I + H); in training, no gradient for the input
        (Case("a", B=3, T=5, I=2, H=7), 2 * 15 * 28 * 9, 2 * 15 * 28 * (3 * 9 - 2)),
        (Case("b", "GRU", B=3, T=5, I=2, H=7), 2 * 15 * 21 * 9, 2 * 15 * 21 * (3 * 9 - 2)),
        (Case("c", "LSTMCell", B=3, H=7), 2 * 3 * 28 * 14, 2 * 3 * 28 * (3 * 14 - 7)),
        # lengths 10 and 1
        (Case("d", B=2, T=10, H=4, layout="packed"), 2 * 11 * 16 * 8, 2 * 11 * 16 * 20),
        # the second layer reads both directions' outputs, and its input needs a gradient
        (
            Case("e", T=6, I=3, H=4, layers=2, bidirectional=True),
            2 * 6 * 2 * 16 * (7 + 12),
            2 * 6 * 2 * 16 * (3 * 7 - 3 + 3 * 12),
        ),
        # 4 gates with 6 units from input and h (width 2), plus the projection
        (
            Case("f", T=5, I=3, H=6, proj_size=2),
            2 * 5 * (24 * 5 + 12),
            2 * 5 * (3 * (24 * 5 + 12) - 24 * 3),
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_flops(case: Case, inference: int, training: int) -> None:
    assert roofline.flops(case, "inference") == inference
    assert roofline.flops(case, "training") == training


def test_roofline() -> None:
    assert roofline.bound_ms(Case("a"), "inference", None) is None
    # Compute decides: 2 * 64 * 4 * 8 * 16 operations at the type's peak.
    wide = Case("b", B=64, H=8)
    assert roofline.bound_ms(wide, "inference", PEAKS) == pytest.approx(1e3 * 65536 / 1e9)
    half = dataclasses.replace(wide, dtype="bfloat16")
    assert roofline.bound_ms(half, "inference", PEAKS) == pytest.approx(1e3 * 65536 / 2e9)
    # Reads decide, with H = 16 and I = 48: 16 KiB of weights once, 4 KiB of W_hh 99 times more.
    fast = roofline.Peaks({"float32": 1e15}, PEAKS.bandwidth)
    narrow = Case("c", T=100, I=48, H=16)
    expected = 1e3 * (16384 + 99 * 4096) / 1e9
    assert roofline.bound_ms(narrow, "inference", fast) == pytest.approx(expected)
    assert roofline.bound_ms(narrow, "training", fast) == pytest.approx(2 * expected)
    # Interpolates between measured sizes on a log-log scale.
    assert fast.read_seconds(1000, 1 << 11) == pytest.approx(1000 / 2e9)
    assert fast.read_seconds(1000, 1 << 5) == pytest.approx(1000 / 4e9)


# 8 multiprocessors at 1 GHz, so a cycle is a nanosecond. A multiprocessor's operations in a cycle:
# 1000 by tensor cores, 500 in TF32, 112.5 by float32 multiply-adds. L2: 100 bytes for each.
GPU = gpu_roofline.GpuPeaks(
    flops={"float32": 4e12, "float64": 1e12, "bfloat16": 6e12, "float16": 8e12},
    bandwidth=5e11,
    multiprocessors=8,
    shared_bytes=200_000,
    kernels={
        "clock": {"ghz": 1.0},
        "tflops": {"bfloat16": 8.0, "float16": None, "tf32": 3.0, "ieee": 0.9},
        "l2": {"read_tb_per_s": 0.8},
        "latency_cycles": {"ffma": 5.0, "hmma_bfloat16": 30.0, "hmma_tf32": None},
        "exchange_ns": {
            "cta 1 512": 50.0,
            "st_async 2 64": 300.0,
            "st_async 4 64": 400.0,
            "st_async 4 2048": 390.0,
            "cluster 4 512": None,
            "grid 4 64": 1000.0,
            "grid_flags 4 64": 600.0,
        },
    },
)


def with_kernels(peaks: gpu_roofline.GpuPeaks, **sections: Any) -> gpu_roofline.GpuPeaks:
    return dataclasses.replace(peaks, kernels={**peaks.kernels, **sections})


def step_of(
    case: Case, peaks: gpu_roofline.GpuPeaks, is_backward: bool = False
) -> gpu_roofline.Step:
    step = gpu_roofline.step(case, peaks, is_backward)
    assert step
    return step


def test_exchange_by_the_number_of_ctas() -> None:
    seconds = {ctas: GPU.exchange_seconds(ctas) for ctas in (1, 2, 3, 4, 16, 17, 99)}
    expected = {1: 50, 2: 300, 3: 300, 4: 390, 16: 390, 17: 600, 99: 600}
    assert seconds == {ctas: pytest.approx(1e-9 * ns) for ctas, ns in expected.items()}
    # A noisy probe of more CTAs can't make a bound on fewer too high.
    noisy = with_kernels(GPU, exchange_ns={"grid 2 64": 500.0, "grid 4 64": 450.0})
    assert noisy.exchange_seconds(2) == noisy.exchange_seconds(4) == pytest.approx(450e-9)
    assert with_kernels(GPU, exchange_ns={}).exchange_seconds(2) == 0


@pytest.mark.parametrize(
    ("case", "changed", "ctas", "exchange", "gemm", "activations"),
    [
        # 64 * 256 weights by a tile of 8 rows: 2 * 16384 * 8 / 1000. Two CTAs would save 131 and
        # cost 250.
        (Case("a", H=64, dtype="bfloat16"), {}, 1, 50, 262.144, 60),
        # A row by float32 multiply-adds, 2 * 16384 / 112.5, not by a tile in TF32.
        (Case("b", H=64), {}, 1, 50, 2 * 16384 / 112.5, 130),
        # 9 rows on 8 multiprocessors: two each, for which a tile is faster.
        (Case("c", B=9, H=32), {}, 1, 50, 2 * 4096 * 8 / 500, 130),
        # A GRU has three quarters of the weights, a plain RNN a quarter and one nonlinearity.
        (Case("d", "GRU", H=64, dtype="bfloat16"), {}, 1, 50, 196.608, 60),
        (Case("e", "RNN", H=64, dtype="bfloat16"), {}, 1, 50, 65.536, 30),
        # With fast tensor cores the chain is longest: K = 128 in bfloat16 is 8 mma, whose sums are
        # added in 3 levels.
        (
            Case("f", H=128, dtype="bfloat16"),
            {"tflops": {"bfloat16": 8e3}},
            1,
            50,
            30 + 3 * 5,
            60,
        ),
        # 160 * 640 weights in bfloat16 are 51200 bytes over a CTA's 153600 bytes of registers. They
        # come from shared memory at 128 bytes a cycle; another CTA would cost 450 more.
        (
            Case("g", H=160, dtype="bfloat16"),
            {"tflops": {"bfloat16": 8e3}, "exchange_ns": {"cta 1 512": 50.0, "grid 2 64": 500.0}},
            1,
            50,
            400,
            60,
        ),
        # With a cheaper exchange the weights are in the registers of two: 30 + 5 * log2(10).
        (
            Case("h", H=160, dtype="bfloat16"),
            {"tflops": {"bfloat16": 8e3}, "exchange_ns": {"cta 1 512": 50.0, "grid 2 64": 300.0}},
            2,
            300,
            30 + 5 * np.log2(10),
            60,
        ),
        # 8 MiB on all 8 multiprocessors: 694976 bytes a CTA come through L2.
        (
            Case("i", H=1024, dtype="bfloat16"),
            {"tflops": {"bfloat16": 8e3}},
            8,
            390,
            (2**20 - 153_600 - 200_000) / 100,
            60,
        ),
        # Directions share the multiprocessors, so a direction has four at most.
        (
            Case("j", H=1024, dtype="bfloat16", bidirectional=True),
            {"tflops": {"bfloat16": 8e3}},
            4,
            390,
            (2**21 - 153_600 - 200_000) / 100,
            60,
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_step_of_a_gpu(
    case: Case,
    changed: dict[str, Any],
    ctas: int,
    exchange: float,
    gemm: float,
    activations: float,
) -> None:
    step = step_of(case, with_kernels(GPU, **changed))
    assert step.ctas == ctas
    found = [1e9 * seconds for seconds in (step.exchange, step.gemm, step.activations)]
    assert found == pytest.approx([exchange, gemm, activations])
    assert 1e9 * step.seconds == pytest.approx(exchange + gemm + activations)


def test_backward_step_of_a_gpu() -> None:
    """The same weights and exchange; three multiply-adds behind them, one of a plain RNN."""
    for cell, cycles in (("LSTM", 12), ("GRU", 12), ("RNN", 4)):
        case = Case("a", cell, H=64, dtype="bfloat16")
        forward, backward = (step_of(case, GPU, is_backward) for is_backward in (False, True))
        assert backward.gemm == forward.gemm
        assert 1e9 * backward.activations == pytest.approx(cycles)
    fast = with_kernels(GPU, tflops={"bfloat16": 8e3})
    step = step_of(Case("a", H=64, dtype="bfloat16"), fast, is_backward=True)
    assert 1e9 * step.gemm == pytest.approx(30 + 5 * 4)  # K = 256: 16 mma


def test_roofline_of_a_gpu() -> None:
    bound = gpu_roofline.bound_ms
    # Latency decides. 1001 steps in two layers; the first needs neither an exchange nor a product.
    deep = Case("a", T=1000, I=1, H=64, layers=2, dtype="bfloat16")
    forward = 1001 * 60 + 1000 * (50 + 262.144)
    assert bound(deep, "inference", GPU) == pytest.approx(1e-6 * forward)
    backward = 1001 * 12 + 1000 * (50 + 262.144)
    assert bound(deep, "training", GPU) == pytest.approx(1e-6 * (forward + backward))
    both = dataclasses.replace(deep, bidirectional=True)  # layers can't overlap
    forward = 2000 * 60 + 1999 * (50 + 262.144)
    assert bound(both, "inference", GPU) == pytest.approx(1e-6 * forward)
    # L2 decides: 32768 weights, 8 * 128 values; training reads both twice and writes gradients.
    few = Case("b", B=8, H=64, I=64, dtype="bfloat16")
    slow = with_kernels(GPU, l2={"read_tb_per_s": 1e-3})
    assert bound(few, "inference", slow) == pytest.approx(1e-6 * 2 * (32768 + 1024))
    assert bound(few, "training", slow) == pytest.approx(1e-6 * 2 * (3 * 32768 + 2 * 1024))
    # Memory decides, for what is over 30 MiB: 64 MiB of weights and 16 KiB of values.
    large = Case("c", H=2048, I=2048, dtype="bfloat16")
    slow = dataclasses.replace(GPU, bandwidth=1e9)
    over = 2 * (2 * 4 * 2048**2 + 4096) - (30 << 20)
    assert bound(large, "inference", slow) == pytest.approx(1e-6 * over)
    assert bound(few, "inference", slow) < 1e-2
    # Compute decides, by torch's rate. Without nvcc there are no latencies.
    unknown = dataclasses.replace(GPU, kernels={})
    assert gpu_roofline.step(deep, unknown) is None
    expected = 1e3 * roofline.flops(few, "inference") / 6e12
    assert bound(few, "inference", unknown) == pytest.approx(expected)


# An H100's rates as published, with latencies from the step-cost model: 1.755 GHz, 132
# multiprocessors, an exchange through L2 without a fence in 500 ns and more.
H100 = gpu_roofline.GpuPeaks(
    flops={"float32": 3.9e14, "float64": 5e13, "bfloat16": 7.5e14, "float16": 7.5e14},
    bandwidth=2.8e12,
    multiprocessors=132,
    shared_bytes=228 << 10,
    kernels={
        "clock": {"ghz": 1.755},
        "tflops": {"bfloat16": 620.0, "float16": 620.0, "tf32": 310.0, "ieee": 55.0},
        "l2": {"read_tb_per_s": 5.5},
        "exchange_ns": {
            "cta 1 512": 30.0,
            **{f"st_async {ctas} 64": 195.0 + 4 * ctas for ctas in (2, 4, 8, 16)},
            **{f"cluster {ctas} 512": 500.0 for ctas in (2, 4, 8, 16)},
            **{f"grid {ctas} 64": 1200.0 for ctas in (2, 4, 8, 16, 32, 64, 128, 132)},
            **{f"grid_flags {ctas} 64": 500.0 + ctas for ctas in (2, 4, 8, 16, 32, 64, 128, 132)},
        },
    },
)
# Modelled microseconds per step of the kernels today, forward and backward.
STEP_US = {
    ("bfloat16", 128): {1: (0.8, 1.3), 16: (1.9, 2.4), 64: (1.9, 2.4), 256: (1.9, 2.4)},
    ("bfloat16", 256): {1: (1.4, 1.3), 16: (1.4, 1.3), 64: (1.4, 1.3), 256: (2.0, 2.1)},
    ("bfloat16", 512): {1: (1.4, 1.3), 16: (1.4, 1.3), 64: (1.4, 2.1), 256: (3.4, 6.6)},
    ("bfloat16", 1024): {1: (1.6, 2.1), 16: (1.6, 2.1), 64: (2.3, 6.6), 256: (7.8, 25.0)},
    ("float32", 512): {64: (1.6, 3.6), 256: (4.2, 12.7)},
}


@pytest.mark.parametrize(("dtype", "hidden"), list(STEP_US))
def test_bound_is_below_the_kernels_of_today(dtype: str, hidden: int) -> None:
    for B, (forward_us, backward_us) in STEP_US[dtype, hidden].items():
        case = Case("a", B=B, T=1000, I=8, H=hidden, dtype=dtype)
        for is_backward, us in ((False, forward_us), (True, backward_us)):
            assert 0.05 * us < 1e6 * step_of(case, H100, is_backward).seconds < us
        assert gpu_roofline.bound_ms(case, "inference", H100) < forward_us
        assert gpu_roofline.bound_ms(case, "training", H100) < forward_us + backward_us


def test_weights_need_many_ctas() -> None:
    """The bound on a large layer does not take the exchange of two CTAs."""
    step = step_of(Case("a", H=1024, dtype="bfloat16"), H100)
    assert step.ctas > 16
    assert step.exchange >= 500e-9
    assert step_of(Case("a", H=128), H100).ctas > 1  # 256 KB: not in one CTA's registers


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("mode", measure.MODES)
def test_bound_is_monotone(dtype: str, mode: str) -> None:
    def bounds(cases: list[Case]) -> list[float]:
        return [gpu_roofline.bound_ms(case, mode, H100) for case in cases]

    many = range(1, 2000, 37)
    for found in (
        bounds([Case("a", B=4, T=50, H=H, dtype=dtype) for H in range(16, 2049, 48)]),
        bounds([Case("a", B=B, T=50, H=512, dtype=dtype) for B in range(1, 300, 7)]),
        bounds([Case("a", "GRU", B=B, T=9, H=96, bidirectional=True, dtype=dtype) for B in many]),
        bounds([Case("a", B=4, T=T, H=256, dtype=dtype) for T in range(1, 300, 9)]),
        bounds([Case("a", B=4, T=9, H=256, layers=n, dtype=dtype) for n in range(1, 9)]),
    ):
        assert found == sorted(found)
        assert 0 < found[0] < found[-1]


def test_peaks_of_kernels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without nvcc or a GPU, the reason is printed."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    assert gpu_roofline._kernel_peaks() == {}
    assert "has no bin/nvcc" in capsys.readouterr().err
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for program, found, said in (
        ("""echo '{"exchange_ns": {"cta": 40}}'""", {"exchange_ns": {"cta": 40}}, ""),
        ("echo no GPU >&2; exit 1", {}, "without the results of peaks.cu: no GPU"),
        ("""echo a: late >&2; echo '{"l2": {"a": null}}'""", {"l2": {"a": None}}, "a: late\n"),
        ("exit 3", {}, "peaks exited 3"),
    ):
        script = '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n'
        script += f"cat > $2 <<'END'\n#!/bin/sh\n{program}\nEND\nchmod +x $2\n"
        nvcc.write_text(script)
        nvcc.chmod(0o755)
        assert gpu_roofline._kernel_peaks() == found
        assert said in capsys.readouterr().err


def test_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charts, "draw", lambda found: None)
    old = stored(tmp_path / "old.json", row("a", 2.0), row("b", 2.0), row("gone", 9.0))
    new = stored(
        *(tmp_path / "new.json", row("a", 1.85), row("b", 1.7), row("b", 0.1, over="openvino")),
        *(row("new", 0.5), row("b", 1.0, "training")),
    )
    assert main(["--report", str(new), "--compare", str(old)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "b inference: 2.00 before, 1.70 now"
    assert main(["--report", str(new), "--compare", str(old), "--tolerance", "0.2"]) == 0


def test_table_of_a_cpu(tmp_path: Path) -> None:
    run = stored(
        *(tmp_path / "run.json", row("a", 2.0), row("a", 12.0, "training")),
        *(row("a", 3.0, over="openvino"), row("b", 4.5, noisy=True)),
    )
    assert report.table(json.loads(run.read_text())).splitlines() == [
        "some (avx2), 2 threads; torch 2.13, OpenVINO 2026; 2026-01-02.",
        "",
        "| case | inference | over torch | over OpenVINO | of the limit "
        "| training | over torch | of the limit |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| a | 1.00 ms | 2.00× ±0.20 | 3.00× ±0.30 | 50% | 1.00 ms | 12.0× ±1.2 | 50% |",
        "| b | 1.00 ms | ~4.50× ±0.45 |  | 50% |  |  |  |",
        "| geometric mean |  | **3.00×** | **3.00×** |  |  | **12.00×** |  |",
    ]
    assert main(["--report", str(run)]) == 0
    if has("matplotlib"):
        for chart in ("run_ratio.png", "run_roofline.png"):
            assert (tmp_path / chart).read_bytes().startswith(b"\x89PNG")


def test_tables_side_by_side(tmp_path: Path) -> None:
    runs = {
        title: json.loads(
            stored(tmp_path / "run.json", row("a", ratio), row("a", 3.0, "training")).read_text()
        )
        for title, ratio in (("new", 2.0), ("old", 1.0))
    }
    del runs["old"]["rows"][1]  # it measured no training
    runs["old"]["rows"].append(row("a", 9.0, over="openvino"))
    where = "some (avx2), 2 threads; torch 2.13, OpenVINO 2026; 2026-01-02."
    with pytest.raises(statistics.StatisticsError):
        report.side_by_side(runs)
    runs["old"]["rows"].append(row("a", 5.0, "training"))
    assert report.side_by_side(runs).splitlines() == [
        f"new: {where}",
        "",
        f"old: {where}",
        "",
        "| case | inference, new | inference, old | training, new | training, old "
        "| over torch, inference, new | over torch, inference, old "
        "| over torch, training, new | over torch, training, old |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| a | 1.00 ms | 1.00 ms | 1.00 ms | 1.00 ms "
        "| 2.00× ±0.20 | 1.00× ±0.10 | 3.00× ±0.30 | 5.00× ±0.50 |",
        "| geometric mean |  |  |  |  | **2.00×** | **1.00×** | **3.00×** | **5.00×** |",
    ]


def test_table_of_a_gpu(tmp_path: Path) -> None:
    """A GPU's table has regimes, rooflines and memory; the training example has a table too."""
    gpu = {"regime": "grid", "ours_bytes": 3 << 20, "baseline_bytes": 2**21}
    clocks = {"back_to_back": {"ratio": 2.5}, "graph": {"ratio": 3.0}}
    rows = [row("a", 2.0, over="cudnn") | gpu, row("a", 4.0, "training", "cudnn") | gpu]
    rows[1] |= {"roofline_ms": None, "ours_bytes": None}
    rows[0] |= clocks
    rows[1] |= {"back_to_back": {"ratio": 4.5}, "graph": {"ratio": None}}
    rows += [
        row("old", 2.0, over="cudnn") | {"ours_bytes": None, "baseline_bytes": None}
    ]  # from a run without these clocks and without intervals
    del rows[2]["ratio_low"], rows[2]["ratio_high"]
    run = json.loads(stored(tmp_path / "run.json", *rows).read_text())
    run["header"] |= {"device": "NVIDIA X", "baselines": {"cudnn": "91300"}}
    caption = "NVIDIA X; torch 2.13, cuDNN 9.13.0; 2026-01-02."
    columns = "over cuDNN | back to back | by graph | regime | MiB | of the limit |"
    assert report.table(run).splitlines() == [
        caption,
        "",
        f"| case | inference | {columns} training | {columns}",
        "| --- " + "| ---: " * 14 + "|",
        "| a | 1.00 ms | 2.00× ±0.20 | 2.50× | 3.00× | grid | 3.0 / 2.0 | 50% "
        "| 1.00 ms | 4.00× ±0.40 | 4.50× | - | grid |  |  |",
        "| old | 1.00 ms | 2.00× |  |  |  |  | 50% |" + "  |" * 7,
        "| geometric mean |  | **2.00×** | **2.50×** | **3.00×** |  |  |  "
        "|  | **4.00×** | **4.50×** |  |  |  |  |",
    ]
    speeds = {"nn.LSTM": 1000.0, "FusedLSTM": 2500.0, "ratio": 2.5}
    both = {"nn.LSTM": 0.25, "FusedLSTM": 0.25}
    way = {"way": "lengths", "tokens_per_second": {"train": speeds, "eval": speeds}}
    way |= {"train_loss": both, "dev_accuracy": both}
    found = {"header": run["header"], "arguments": "--hidden 9", "rows": [way]}
    assert training.table(found).splitlines() == [
        caption,
        "",
        "| examples/train_tagger.py --hidden 9 | nn.LSTM, training tokens/s | FusedLSTM | ratio "
        "| inference | loss | accuracy |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| lengths | 1,000 | 2,500 | 2.50 | 2.50 | 0.2500 / 0.2500 | 25.00% / 25.00% |",
    ]


@pytest.mark.skipif(not has("matplotlib", "tqdm"), reason="needs matplotlib and tqdm")
@pytest.mark.long
def test_training(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rest = "\t_" * 6
    treebank = "".join(f"{i}\tw{i % 3}\t_\tT{i % 3}{rest}\n" for i in range(1, 9))
    (tmp_path / "a.conllu").write_text(treebank)
    data = [arg for name in ("conllu", "dev") for arg in (f"--{name}", str(tmp_path / "a.conllu"))]
    output = tmp_path / "found.json"
    chosen = ["training", "--way", "lengths", "--output", str(output), "--", "--epochs", "2"]
    assert main([*chosen, *data, "--hidden", "8"]) == 0
    found = json.loads(output.read_text())["training"]
    (way,) = found["rows"]
    assert way["largest_loss_difference"] < 1e-4
    assert set(way["tokens_per_second"]["train"]) == {"nn.LSTM", "FusedLSTM", "ratio"}
    assert capfd.readouterr().out.endswith(training.table(found) + "\n")
    with pytest.raises(SystemExit, match=r"^1$"):
        main([*chosen, "--conllu", "none", "--dev", "none"])
    assert "none: No such file" in capfd.readouterr().err


NCU = """==PROF== Disconnected from process 99
  void fusedrnn::cuda::run<x::StepKernel<Lstm, (int)4>>(T1) (132, 1, 1)x(256, 1, 1), Context 1, \
Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    Memory Throughput                 %        29.69
    Duration                         us         5.47
    L1/TEX Cache Throughput           %        36.31
    OPT   This kernel's 3.2 theoretical warps are 5
    Section: Launch Statistics
    Registers Per Thread             register/thread             255
    Memory Throughput           Gbyte/s         1.2
    # of waves  1
  void fusedrnn::cuda::run<Other>(T1) (1, 1, 1)x(128, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Block Size                                                   1,024
"""


def test_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(name, ratio, over="cudnn") for name, ratio in (("a", 3.0), ("b", 1.0), ("c", 2.0))]
    rows += [row("b", 0.5, "training", "cudnn"), row("a", 0.1, over="torch.compile")]
    assert profile.pick(rows, 3) == [("b", "training"), ("b", "inference"), ("c", "inference")]
    assert profile.metrics_in(NCU) == [
        {
            "kernel": "void fusedrnn::cuda::run<x::StepKernel<Lstm, (int)4>>(T1)",
            "Memory Throughput": "29.69 %",
            "Duration": "5.47 us",
            "Registers Per Thread": "255 register/thread",
        },
        {"kernel": "void fusedrnn::cuda::run<Other>(T1)", "Block Size": "1,024"},
    ]
    if not torch.cuda.is_available():
        assert main(["profile", "--run", str(tmp_path / "none.json")]) == 1
        assert "finds no CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ratio", "low", "high", "spread", "text"),
    [
        (1.5, 1.46, 1.52, 0.0, "1.50× ±0.04"),
        (12.5, 12.0, 13.1, 0.0, "12.5× ±0.6"),
        (1.5, 1.5, 1.5, 0.0, "1.50× ±0.01"),
        (1.5, 1.3, 1.55, 0.3, "~1.50× ±0.20"),
        (1.5, 0.7, 1.55, 0.0, "~1.50×"),
    ],
)
def test_ratio_text(ratio: float, low: float, high: float, spread: float, text: str) -> None:
    found = {"ratio": ratio, "ratio_low": low, "ratio_high": high, "ours_spread": spread}
    assert report.ratio_text(found) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.01281, "0.0128"), (9.876, "9.88"), (1234.5, "1234")]
)
def test_digits(value: float, text: str) -> None:
    assert report.digits(value) == text


def test_peaks() -> None:
    probe = roofline.probe()
    if probe is None:
        pytest.skip("no C++ compiler")
    peaks = probe.measure(1e-4)
    assert set(peaks.flops) == {"float32", "float64", "bfloat16", "float16"}
    assert min(*peaks.flops.values(), *peaks.bandwidth.values()) > 0


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert roofline.probe() is None
    assert "no-such-compiler" in capsys.readouterr().err


def test_measured_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "probe", FixedPeaks)
    monkeypatch.setattr(charts, "draw", lambda found: None)
    monkeypatch.setattr(measure, "WARM_SECONDS", 0.002)
    wanted = ["torch"] + (["onnxruntime"] if has("onnx", "onnxruntime") else [])
    output = tmp_path / "run.json"
    chosen = ["tiny", "--seconds", "0.1", "--output", str(output)]
    assert main([*chosen, *(arg for name in wanted for arg in ("--baseline", name))]) == 0
    run = json.loads(output.read_text())
    assert {"isa", "threads", "torch", "fusedrnn", "commit", "date"} <= set(run["header"])
    found = [(r["name"], r["mode"], r["baseline"]) for r in run["rows"]]
    assert found == [
        *(("tiny", "inference", name) for name in wanted),
        ("tiny", "training", "torch"),
    ]
    for r in run["rows"]:
        assert set(r) >= SIZES
        assert r["rounds"] >= measure.ROUNDS
        assert min(r["ours_ms"], r["baseline_ms"], r["ratio"]) > 0
        assert r["ratio"] == r["baseline_ms"] / r["ours_ms"]
        assert r["ratio_low"] <= r["ratio"] <= r["ratio_high"]
        assert r["roofline_ms"] == roofline.bound_ms(cases.CASES[0], r["mode"], PEAKS)
        assert {"ours_spread", "baseline_spread", "ours_bytes", "baseline_bytes"} <= set(r)
    assert "inference over torch" in capsys.readouterr().out


@pytest.mark.parametrize("mode", measure.MODES)
@pytest.mark.parametrize(
    ("cell", "layout"),
    [
        *itertools.product(LAYERS, ("padded", "packed", "lengths")),
        *((cell, "padded") for cell in STEPS),
    ],
)
def test_ours_is_torchs(cell: str, layout: str, mode: str) -> None:
    case = Case("small", cell, B=3, H=4, T=1 if cell.endswith("Cell") else 7, layout=layout)
    ours, theirs = baselines.Fused().prepare(case, mode)(), baselines.Torch().prepare(case, mode)()
    assert isinstance(ours, PackedSequence) == (layout == "packed")
    baselines.check("fusedrnn", case, "cpu", ours, theirs)


def test_wrong_output_is_an_error() -> None:
    case = Case("small", B=2, T=3, H=4)
    output = baselines.Torch().prepare(case, "inference")()
    with pytest.raises(AssertionError, match="other is wrong in small"):
        baselines.check("other", case, "cpu", output.numpy() + 0.01, output)


ONNX_CASES = [
    *(Case("cell", cell, B=2, I=3, H=4) for cell in STEPS),
    *(
        Case("layers", cell, B=2, T=5, I=3, H=4, layers=2, bidirectional=True, batch_first=first)
        for cell in LAYERS
        for first in (False, True)
    ),
    *(Case("step", cell, I=3, H=4, layers=2) for cell in LAYERS),
]


RUNTIMES = [baselines.OnnxRuntime(), baselines.OpenVino()]


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: runtime.name)
def test_onnx_models(runtime: baselines.Candidate) -> None:
    if not has(*runtime.packages):
        pytest.skip(f"needs {' and '.join(runtime.packages)}")
    for case in ONNX_CASES:
        assert runtime.supports(case, "inference")
        output = runtime.prepare(case, "inference")()
        baselines.check(
            runtime.name, case, "cpu", output, baselines.Torch().prepare(case, "inference")()
        )


def test_in_turn_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "WARM_SECONDS", 0.0)
    order: list[str] = []
    times = measure.in_turn({"a": lambda: None, "b": lambda: None}, 0.0, order.append)
    assert order == ["a", "b"] * 5
    assert [len(found) for found in times.values()] == [5, 5]
    # The first two rounds are disturbed and repeated.
    monkeypatch.setattr(measure, "PATIENCE", 1e12)
    cores = iter([1.0, 1.0, *([0.0] * 5)])
    monkeypatch.setattr(measure.Others, "cores", lambda self: next(cores))
    order.clear()
    times = measure.in_turn({"a": lambda: None}, 1e-9, order.append)
    assert (len(order), len(times["a"])) == (7, 5)
    assert measure.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    cores = iter([0.0] * 9)
    times = measure.in_turn({"a": lambda: None}, 1e-9, least_rounds=9)
    assert len(times["a"]) == 9


def test_ratio_of_medians() -> None:
    """Its interval has the ratio, shrinks with the noise, and pairs the rounds."""
    found = measure.ratio_of_medians([2.0, 4.0, 6.0, 8.0, 2.0], [1.0, 2.0, 3.0, 4.0, 1.0])
    assert found == {"ratio": 2.0, "ratio_low": 2.0, "ratio_high": 2.0}
    noise = [1.0, 1.2, 0.9, 1.1, 1.0, 0.8, 1.3]
    found = measure.ratio_of_medians(noise, [0.5] * 7)
    assert found["ratio"] == 2.0
    assert 1.6 <= found["ratio_low"] < 2.0 < found["ratio_high"] <= 2.6


@pytest.mark.parametrize(
    ("spreads", "kept", "measured"),
    [([0.1, 0.0], 0.1, 1), ([0.5, 0.1, 0.0], 0.1, 2), ([0.5, 0.4, 0.3, 0.0], 0.5, 3)],
)
def test_noisy_cases_are_measured_again(spreads: list[float], kept: float, measured: int) -> None:
    left = list(spreads)

    (found,) = measure.calmest(lambda: [row("a", 2.0) | {"baseline_spread": left.pop(0)}])
    assert found["baseline_spread"] == kept
    assert len(spreads) - len(left) == measured


class FakeGpu:
    """Stands in for torch.cuda. A call takes its host's time or its GPU's, the longer; a replay
    its GPU's.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.stream = 0.0, "default"
        self.graph: Any = None  # under capture
        self.waits, self.calls = 0, 0
        for name in ("Event", "CUDAGraph", "Stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.Stream(self.stream))
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: self.enter(stream.name))
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)

    def enter(self, stream: str) -> None:
        self.stream = stream

    def wait(self) -> None:
        self.waits += 1

    def call(self, host_ms: float, gpu_ms: float, output: Any = None, refuses: str = "") -> Any:
        def run() -> Any:
            self.calls += 1
            if not self.graph:
                self.now += max(host_ms, gpu_ms)
            elif refuses:
                self.graph.is_valid = False
                raise RuntimeError(refuses)
            else:
                self.graph.ms += gpu_ms
            return output

        return run

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802
        assert enable_timing
        event = SimpleNamespace(at=None, is_complete=False)
        event.record = lambda: setattr(event, "at", self.now)
        event.synchronize = lambda: setattr(event, "is_complete", True)

        def elapsed_time(end: Any) -> float:
            assert end.is_complete
            assert end.at > event.at
            return float(end.at - event.at)

        event.elapsed_time = elapsed_time
        return event

    def CUDAGraph(self) -> Any:  # noqa: N802
        graph = SimpleNamespace(ms=0.0, is_valid=True)
        graph.replay = lambda: setattr(self, "now", self.now + graph.ms)
        return graph

    def Stream(self, name: str = "side") -> Any:  # noqa: N802
        return SimpleNamespace(name=name, wait_stream=lambda other: None)

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, stream.name
        yield
        self.stream = before

    @contextlib.contextmanager
    def capture(self, graph: Any) -> Iterator[None]:
        """As torch's: an invalid capture raises at its end and leaves its stream current."""
        before, self.stream, self.graph = self.stream, "capture", graph
        try:
            yield
        finally:
            self.graph = None
            if not graph.is_valid:
                raise RuntimeError("capture invalidated")
            self.stream = before


def test_clocks_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    calls = {
        "fusedrnn": gpu.call(0.5, 0.25, "ours"),
        "cudnn": gpu.call(0.5, 1.0, "theirs"),
        "packing": gpu.call(2.0, 0.5, refuses="can't copy\nmore"),
    }
    verified = []
    found = measure.gpu_clocks(calls, lambda name, output: verified.append((name, output)))
    assert verified == [("fusedrnn", "ours"), ("cudnn", "theirs")]
    assert gpu.stream == "default"
    assert list(found) == ["cudnn", "packing"]

    def times(result: dict[str, Any]) -> list[float | None]:
        return [result[key] for key in ("ours_ms", "baseline_ms", "ratio")]

    assert times(found["cudnn"]["back_to_back"]) == pytest.approx([0.5, 1.0, 2.0])
    assert times(found["cudnn"]["graph"]) == pytest.approx([0.25, 1.0, 4.0])
    assert found["cudnn"]["graph"]["ours_spread"] == pytest.approx(0, abs=1e-9)
    assert times(found["packing"]["back_to_back"]) == pytest.approx([0.5, 2.0, 4.0])
    assert times(found["packing"]["graph"]) == [pytest.approx(0.25), None, None]
    assert found["packing"]["graph"]["baseline_spread"] is None
    assert found["packing"]["graph"]["missing"] == {"packing": "no CUDA graph: can't copy"}
    # Where our own graph fails, the baseline's time stays.
    calls["fusedrnn"] = gpu.call(0.5, 0.25, refuses="waits")
    found = measure.gpu_clocks(calls, lambda name, output: None)
    assert times(found["cudnn"]["graph"]) == [None, pytest.approx(1.0), None]
    assert set(found["packing"]["graph"]["missing"]) == {"fusedrnn", "packing"}


def test_calls_back_to_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short calls are many between two events, long ones at least five; none waits."""
    gpu = FakeGpu(monkeypatch)
    for ms, count in ((0.001, 200), (0.5, 20), (100.0, 5)):
        gpu.calls = 0
        times = measure.back_to_back({"a": gpu.call(0.0, ms)})
        assert times == {"a": [pytest.approx(ms)] * measure.GPU_ROUNDS}
        assert gpu.calls == 4 + measure.GPU_ROUNDS * (1 + count)
    assert gpu.waits == 0


def test_a_wrong_replay_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)

    def verify(name: str, output: Any) -> None:
        raise AssertionError(f"{name} is wrong")

    with pytest.raises(AssertionError, match="fusedrnn is wrong"):
        measure.gpu_clocks({"fusedrnn": gpu.call(1.0, 1.0)}, verify)


def test_rows_of_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gpu = FakeGpu(monkeypatch)
    monkeypatch.setattr(measure, "WARM_SECONDS", 0.0)
    monkeypatch.setattr(measure, "peak_memory", lambda call, device: 7)
    monkeypatch.setattr(measure, "check", lambda *args: None)

    def candidate(name: str, *args: Any) -> Any:
        return SimpleNamespace(name=name, prepare=lambda case, mode: gpu.call(*args))

    monkeypatch.setattr(measure, "Fused", lambda device: candidate("fusedrnn", 0.5, 0.25))
    monkeypatch.setattr(measure, "Torch", lambda device: candidate("torch", 1.0, 1.0))
    theirs = [candidate("cudnn", 0.5, 1.0), candidate("packing", 0.5, 0.5, None, "copies")]
    rows = measure.measure(Case("a"), "inference", theirs, "cuda", 0.0)
    assert gpu.waits > 0
    assert [row["baseline"] for row in rows] == ["cudnn", "packing"]
    for found in rows:
        assert set(found) >= {"ours_ms", "ratio", "back_to_back", "graph", "baseline_bytes"}
    report.show(rows)
    report.summary(rows)
    printed = capsys.readouterr().out
    heads, cudnn, packing, reason = (line.split() for line in printed.splitlines()[:4])
    assert heads[5:9] == ["base", "ms", "ratio", "back"]
    assert cudnn[6:8] == ["2.00", "4.00"]
    assert packing[6:8] == ["1.00", "-"]
    assert " ".join(reason) == "packing by hand: no CUDA graph: copies"
    assert "  back to back: 2.00 over 1 cases, at least 2.00" in printed
    assert printed.count("  by graph: ") == 1
    assert "  by graph: 4.00 over 1 cases, at least 4.00" in printed


def test_peaks_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run.json"
    chosen = ["peaks", "--output", str(output)]
    header = json.loads(stored(tmp_path / "other.json").read_text())["header"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(chosen) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "header", lambda device, baselines: header)
    monkeypatch.setattr(gpu_roofline, "measure", lambda: dataclasses.replace(GPU, kernels={}))
    assert main(chosen) == 1
    assert not output.exists()
    monkeypatch.setattr(gpu_roofline, "measure", lambda: GPU)
    assert main(chosen) == 0
    found = json.loads(output.read_text())
    assert found["peaks"]["kernels"] == GPU.kernels
    assert found["peaks"]["multiprocessors"] == 8
    assert found["model"]["clock"]["ghz"] == {"assumed": 1.9, "measured": 1.0}
    assert found["model"]["latency_cycles"]["ffma"] == {"assumed": 4, "measured": 5.0}
    assert found["model"]["latency_cycles"]["hmma_tf32"]["measured"] is None
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["hmma_bfloat16", "33", "30", "cycles,", "latency"] in printed
    assert ["hmma_tf32", "6.5", "-", "cycles", "a", "scheduler,", "issue"] in printed
    assert set(found["model"]) == set(peaks_command.UNITS)
    # The stage of `make gpu` runs it, and each name is one that peaks.cu prints.
    (command,) = gpu_stages.STAGES["peaks"](output)
    assert [*command.args[-4:]] == ["benchmarks", *chosen]
    source = (Path(peaks_command.__file__).with_name("peaks.cu")).read_text()
    for section, names in gpu_roofline.ASSUMED.items():
        assert f'print("{section}"' in source
        for name in names:
            assert f'"{name.split()[0]}"' in source


def test_peak_memory() -> None:
    size = 64 << 20
    found = measure.peak_memory(lambda: np.ones(size, np.uint8))
    if found is None:
        pytest.skip("no VmHWM here")
    assert size * 0.9 < found < size * 1.5


def test_latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "WARM_SECONDS", 0.002)
    monkeypatch.setattr(latency, "STEPS", ("tiny",))
    monkeypatch.setattr(latency, "SHARED", ("LSTMCell B1 H64",))
    monkeypatch.setattr(latency, "LONG", Case("long", T=2))
    monkeypatch.setattr(latency, "SCALING", ("tiny",))
    monkeypatch.setattr(latency.OnnxRuntime, "packages", ("no_such_package",))
    output = tmp_path / "latency.json"
    chosen = ["--calls", "100", "--seconds", "0.02", "--output", str(output)]
    assert main(["latency", *chosen]) == 0
    run = json.loads(output.read_text())
    assert len({r["situation"] for r in run["rows"]}) == 7
    keys = ("p50_us", "p90_us", "p99_us", "max_us")
    assert all([r[k] for k in keys] == sorted(r[k] for k in keys) for r in run["rows"])
    assert [(r["mode"], r["candidate"]) for r in run["scaling"]] == [
        (mode, name) for mode in measure.MODES for name in ("fusedrnn", "torch")
    ]
    for case in ("tiny", "LSTMCell B1 H64", "long"):
        assert f"| {case} | busy neighbour process |" in latency.table(run)
    for row in run["rows"]:  # as stored by an older version
        del row["p90_us"]
    assert "| tiny | busy neighbour process |" in latency.table(run)


SMALL_VARIANTS = (Case("small", B=3, T=5, H=6), Case("GRU small", "GRU", B=2, T=4, I=3, H=5))


def test_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "WARM_SECONDS", 0.001)
    monkeypatch.setattr(measure, "PATIENCE", 1)
    monkeypatch.setattr(variants, "CASES", SMALL_VARIANTS)
    monkeypatch.setattr(variants, "FEATURES", variants.FEATURES[::2])
    output = tmp_path / "variants.json"
    assert main(["variants", "--seconds", "0.01", "--output", str(output)]) == 0
    run = json.loads(output.read_text())
    expected = {
        (case.name, feature.name, mode)
        for case in SMALL_VARIANTS
        for feature in variants.FEATURES
        for mode in measure.MODES
        if feature.supports(case, mode)
    }
    assert {(r["name"], r["variant"], r["mode"]) for r in run["rows"]} == expected
    assert ("small", "cell states", "inference") in expected
    assert not {
        ("GRU small", "cell states", "inference"),
        ("small", "weight drop", "inference"),
    } & (expected)
    for found in run["rows"]:
        assert set(found["ms"]) == set(found["spread"]) == {"variant", "plain", "loop"}
        for ratio in (found["over_plain"], found["loop_over"]):
            assert 0 < ratio["ratio_low"] <= ratio["ratio"] <= ratio["ratio_high"]
    for found in run["memory"]:
        plain, small = found["saved"]
        assert 0 < small < plain
    assert "| small | weight drop | training |" in variants.table(run)
    assert main(["variants", "--report", str(output)]) == 0


def test_variants_are_picked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["variants", "no such"])
    assert "no such variant; there are resets" in capsys.readouterr().err


@pytest.mark.parametrize("case", SMALL_VARIANTS, ids=lambda case: case.name)
@pytest.mark.parametrize("feature", variants.FEATURES, ids=lambda feature: feature.name)
def test_the_loop_of_a_variant(case: Case, feature: variants.Feature) -> None:
    """The loop gives our results and gradients, where no mask is drawn."""
    if not feature.supports(case, "training"):
        return
    layer = variants.made(case, feature.options).eval()
    x, masks = variants.inputs(case, feature)
    more = {"return_cell_states": True} if feature.cells else {}
    ours = layer(x, **masks, **more)
    theirs, cells = variants.Loop(layer, feature).eval()(x, **masks)
    torch.testing.assert_close(ours[0], theirs)
    if feature.cells:
        torch.testing.assert_close(ours[2], cells)
    weights = list(layer.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(ours[0].square().sum(), weights),
        torch.autograd.grad(theirs.square().sum(), weights),
        rtol=1e-4,
        atol=1e-5,
    )


def test_saved_bytes() -> None:
    """Parameters are not counted, and each storage once."""
    linear, x = torch.nn.Linear(4, 4), torch.randn(8, 4)
    assert variants.saved_bytes(linear, x) == x.nbytes
    assert variants.saved_bytes(torch.nn.Sequential(linear, torch.nn.Tanh()), x) == 2 * x.nbytes


def test_a_device_of_its_own(tmp_path: Path) -> None:
    assert report.slug("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"
    output = tmp_path / "new" / "run.json"
    report.store(output, {"rows": [1], "step_cost": 2})
    report.store(output, {"rows": [3]})
    assert json.loads(output.read_text()) == {"rows": [3], "step_cost": 2}
    if "cuda" not in _ops.devices():
        with pytest.raises(SystemExit, match="has no kernels for cuda"):
            main(["tiny", "--device", "cuda"])
        assert main(["step_cost", "--output", str(output)]) == 1


@pytest.mark.parametrize(
    ("name", "regime"),
    [
        ("run<(anonymous namespace)::ForwardStepKernel<scalar::Lstm, float, 4>>", "step"),
        ("run<(anonymous namespace)::FusedStepKernel<scalar::Lstm, BFloat16, 8>>", "step"),
        (
            "run<R<Lstm, cuda::CtaTraits<cuda::FragmentTraits<cuda::FragmentGemm<float, float, 4, "
            "64>, 4, 1, 8, 1, 8, true> > > >",
            "alone",
        ),
        ("run<R<Gru, GridTraits<FmaGemm<(int)1, (int)192>, (int)8, (int)16>>", "grid"),
        (
            "run<R<Gru, cuda::ClusterAllGatherTraits<a::TensorCoreGemm<float, 3, 64>, 4, 8> >",
            "cluster",
        ),
        (
            "run<R<Gru, cuda::ClusterReduceScatterTraits<a::TensorCoreGemm<float, 3, 64>, 8> >",
            "cluster",
        ),
        ("void cutlass::Kernel<GridTraits<int>>", None),
    ],
)
def test_regimes_by_kernels(name: str, regime: str | None) -> None:
    assert step_cost.regimes_in([name]) == ({regime} if regime else set())


def test_cudnn_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_cost, "kernels_of", lambda call: [call(), [("other", 3, 6.0)]][1])
    found = step_cost.cudnn_kernels(["ieee"], [4], [1], "cpu")
    assert tuple(row["cell"] for row in found) == LAYERS
    assert found[0]["training"] == ["3 x 2.0 us other"]


def test_pass_cost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the CPU, with a device that refuses an algorithm or fails otherwise."""
    monkeypatch.setattr(pass_cost, "steps_of", lambda algorithm, rows: (2, 30))
    refusal = "FUSEDRNN_CUDA_REGIME=grid: this device can't run a layer so"
    passes = pass_cost._passes

    def refused(*args: Any) -> dict[str, float]:
        if os.environ["FUSEDRNN_CUDA_REGIME"] == "grid":
            raise RuntimeError(refusal)
        return passes(*args)

    monkeypatch.setattr(pass_cost, "_passes", refused)
    rows = list(pass_cost.measured([("GRU", "tf32", 4, 2)], device="cpu"))
    assert [(row["algorithm"], row["starts_at_zero"]) for row in rows] == [
        ("cudnn", True),
        *((name, at_zero) for name in ("alone", "cluster", "step") for at_zero in (True, False)),
    ]
    assert all(len(row[of]) == 2 for row in rows for of in pass_cost.PASSES)
    refusal = "out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        list(pass_cost.measured([("LSTM", "bfloat16", 4, 2)], device="cpu"))


def test_pass_cost_beside_the_model() -> None:
    """The stored run; and a run in which another algorithm than the model's choice is faster."""
    stored = json.loads((report.RESULTS / "nvidia_h200_steps.json").read_text())["steps"]
    text = "\n".join(pass_cost.compared(stored))
    lost = re.search(r"takes ([\d.]+) % longer than the fastest algorithm", text)
    assert lost
    assert float(lost[1]) < 1
    layer = {"cell": "LSTM", "kind": "bfloat16", "H": 128, "B": 1, "starts_at_zero": True}
    slow = {"algorithm": "alone", **layer, "inference": [2.0, 1.0]}
    fast = {"algorithm": "grid", **layer, "inference": [1.0, 1.0]}
    text = "\n".join(pass_cost.compared([slow, fast]))
    assert "takes 100.0 % longer" in text
    assert "| LSTM bfloat16 H128 B1, inference | alone | 2.00 | grid | 1.00 |" in text


class Trainer:
    """Stands in for a package: trains its model for one step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.LSTM(3, 4))

    def fit(self) -> torch.Tensor:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.model(torch.ones(5, 2, 3))[0].sum().backward()
        optimizer.step()
        return weights(self.model)


def stand_in(prepare: Any = None, package: str = "torch") -> Model:
    def one(swap: Swap) -> Job:
        def fit() -> Results:
            trainer = Trainer()
            swap(trainer.model)
            return {"weights": trainer.fit()}

        return fit

    return Model("stand-in", {package: package}, "a trainer", "training", prepare or one)


def test_models_are_picked() -> None:
    assert models.pick([]) == list(models.MODELS)
    assert [model.name for model in models.pick(["PAR"])] == ["PAR"]  # not DeepAR
    assert len(models.pick(["deepar"])) == 3
    assert len({model.name for model in models.MODELS}) == len(models.MODELS)


def test_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["models", "nothing"])
    assert exit.value.code == 2
    assert "no model matches 'nothing'; there are: Resemblyzer, " in capsys.readouterr().err


def test_missing_package_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "models.json"
    monkeypatch.setattr(models, "MODELS", (stand_in(package="no_such_package"),))
    assert main(["models", "--output", str(output)]) == 0
    assert "without stand-in: No module named 'no_such_package'" in capsys.readouterr().err
    assert not output.exists()


def test_models_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "models.json"
    monkeypatch.setattr(models, "MODELS", (stand_in(),))
    assert main(["models", "--seconds", "0.1", "--output", str(output)]) == 0
    (found,) = json.loads(output.read_text())["rows"]
    assert found["swapped"] == {"0": "LSTM"}
    assert found["calls"] == 1
    assert found["difference"] < 1e-5
    assert 0 < found["rounding"] < 1e-5
    assert f"| torch {importlib.metadata.version('torch')} |" in capsys.readouterr().out

    def wrong(swap: Swap) -> Job:
        model = torch.nn.LSTM(3, 4)
        swap(model)
        return lambda: {"value": model(torch.ones(1, 3))[0].mean() + (swap.kind == "fused")}

    def not_called(swap: Swap) -> Job:
        swap(torch.nn.LSTM(3, 4))
        return lambda: {"value": 1.0}

    def asks(swap: Swap) -> Job:
        torch.manual_seed(0)
        model = torch.nn.LSTM(3, 4)
        swap(model)
        return lambda: {"value": model(torch.ones(1, 3))[0], "is": isinstance(model, torch.nn.LSTM)}

    asking = dataclasses.replace(stand_in(asks), subclass=True)
    monkeypatch.setattr(models, "MODELS", (asking,))
    assert main(["models", "--seconds", "0.1", "--output", str(output)]) == 0
    assert "1 LSTM by `fuse(model, subclass=True)`" in capsys.readouterr().out

    for prepare in (wrong, not_called, asks):
        monkeypatch.setattr(models, "MODELS", (stand_in(prepare),))
        assert main(["models", "stand-in", "--seconds", "0.1"]) == 1
        assert "stand-in is wrong: " in capsys.readouterr().err


def test_what_is_left_is_told() -> None:
    class Own(torch.nn.LSTM):
        def forward(self, *args: Any) -> Any:
            return torch.nn.LSTM.forward(self, *args)

    swap = Swap("fused")
    swap(torch.nn.ModuleDict({"a": torch.nn.GRU(2, 3), "b": Own(2, 3)}))
    assert swap.swapped == {"a": "GRU"}
    assert swap.left == ["b (Own: forward of its own)"]


@pytest.mark.parametrize(
    ("found", "expected", "gap"),
    [
        ({"a": torch.tensor([1.0, 2.5])}, {"a": torch.tensor([1.0, 2.0])}, 0.25),
        ({"learnt": torch.tensor([3.0, 0.0])}, {"learnt": torch.tensor([3.0, 4.0])}, 0.8),
        ({"a": "same", "b": 2}, {"a": "same", "b": 2}, 0.0),
        ({"a": "longer"}, {"a": "short"}, float("inf")),
        ({"a": float("nan")}, {"a": 1.0}, float("inf")),
        ({"a": 1.0}, {"a": float("nan")}, float("inf")),
        ({}, {"a": 1.0}, float("inf")),
    ],
)
def test_differences(found: Results, expected: Results, gap: float) -> None:
    assert difference(found, expected) == pytest.approx(gap)

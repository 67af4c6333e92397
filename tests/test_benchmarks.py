"""The benchmarks: the grid, rooflines, baselines and reports. No test asserts a time."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

pytest.importorskip("benchmarks")  # importable from the checkout's root only

from benchmarks import (
    baselines,
    cases,
    latency,
    measure,
    models,
    profile,
    report,
    roofline,
    step_cost,
    training,
)
from benchmarks.__main__ import main
from benchmarks.cases import Case
from benchmarks.cells import LAYERS, STEPS
from benchmarks.models.compare import difference
from benchmarks.models.job import Job, Model, Results, Swap, weights
from fusedrnn import _ops

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


def row(name: str, ratio: float, mode: str = "inference", over: str = "torch") -> dict[str, Any]:
    times = {"ours_ms": 1.0, "baseline_ms": ratio, "roofline_ms": 0.5}
    spreads = {"ours_spread": 0.01, "baseline_spread": 0.3}
    return {"name": name, "mode": mode, "baseline": over, "ratio": ratio, **times, **spreads}


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


def test_roofline_of_a_gpu() -> None:
    exchange = {"cta": 1e-7, "cluster 8": 6e-7, "grid 16": 5e-7}
    peaks = roofline.GpuPeaks({"float32": 1e13, "float16": 2e13}, 1e12, exchange, 1 << 18, {})
    # Latency decides: W_hh, 64 KiB, fits into a multiprocessor; with twice the width it does not.
    deep = Case("a", T=1000, I=1, H=64, layers=2, bidirectional=True)
    assert roofline.gpu_bound_ms(deep, "inference", peaks) == pytest.approx(0.2)
    assert roofline.gpu_bound_ms(deep, "training", peaks) == pytest.approx(0.4)
    wide = dataclasses.replace(deep, H=129)
    assert peaks.exchange_seconds(4 * 4 * 129**2) == 5e-7
    assert roofline.gpu_bound_ms(wide, "training", peaks) == pytest.approx(2.0)
    # Memory decides: 32 KiB weights, 2 KiB x, 2 KiB y; training doubles it and adds 32 KiB.
    one_way = dataclasses.replace(deep, bidirectional=False)
    assert roofline.gpu_bound_ms(one_way, "inference", peaks) == pytest.approx(0.1001)
    few = Case("b", B=8, H=64, I=64)
    unknown = dataclasses.replace(peaks, bandwidth=1e9, exchange={})
    moved = 4 * (2 * 4 * 64 * 64 + 8 * 128)
    assert roofline.gpu_bound_ms(few, "inference", unknown) == pytest.approx(1e-6 * moved)
    moved = 2 * moved + 4 * 2 * 4 * 64 * 64
    assert roofline.gpu_bound_ms(few, "training", unknown) == pytest.approx(1e-6 * moved)
    # Compute decides, at the type's rate.
    fast = dataclasses.replace(unknown, bandwidth=1e15)
    half = dataclasses.replace(few, dtype="float16")
    expected = 1e3 * roofline.flops(half, "inference") / 2e13
    assert roofline.gpu_bound_ms(half, "inference", fast) == pytest.approx(expected)


def test_peaks_of_kernels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without nvcc or a GPU, the reason is printed."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    assert roofline._kernel_peaks() == {}
    assert "has no bin/nvcc" in capsys.readouterr().err
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for program, found, said in (
        ("""echo '{"exchange_ns": {"cta": 40}}'""", {"exchange_ns": {"cta": 40}}, ""),
        ("echo no GPU >&2; exit 1", {}, "without exchange times: no GPU"),
        ("exit 3", {}, "peaks exited 3"),
    ):
        script = '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n'
        script += f"cat > $2 <<'END'\n#!/bin/sh\n{program}\nEND\nchmod +x $2\n"
        nvcc.write_text(script)
        nvcc.chmod(0o755)
        assert roofline._kernel_peaks() == found
        assert said in capsys.readouterr().err


def test_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "pictures", lambda run, output: None)
    old = stored(tmp_path / "old.json", row("a", 2.0), row("b", 2.0), row("gone", 9.0))
    new = stored(
        *(tmp_path / "new.json", row("a", 1.85), row("b", 1.7), row("b", 0.1, over="openvino")),
        *(row("new", 0.5), row("b", 1.0, "training")),
    )
    assert main(["--report", str(new), "--compare", str(old)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "b inference: 2.00 before, 1.70 now"
    assert main(["--report", str(new), "--compare", str(old), "--tolerance", "0.2"]) == 0


def test_table_between_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- table -->\nold\n<!-- /table -->\nbelow\n")
    run = stored(
        *(tmp_path / "run.json", row("a", 2.0), row("a", 8.0, "training")),
        *(row("a", 3.0, over="openvino"), row("b", 4.5)),
    )
    for _ in range(2):  # the second table replaces the first
        assert main(["--report", str(run), "--readme", str(page)]) == 0
        assert page.read_text().splitlines() == [
            "above",
            "<!-- table -->",
            "some (avx2), 2 threads; torch 2.13, OpenVINO 2026; 2026-01-02.",
            "",
            "| case | inference, ms | over torch | over OpenVINO | training, ms | over torch |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            "| a | 1.00 | 2.00 | 3.00 | 1.00 | 8.00 |",
            "| b | 1.00 | 4.50 |  |  |  |",
            "| geometric mean |  | **3.00** | **3.00** |  | **8.00** |",
            "<!-- /table -->",
            "below",
        ]
    page.write_text("no markers")
    with pytest.raises(ValueError, match="lacks the lines <!-- table --> and"):
        main(["--report", str(run), "--readme", str(page)])
    if has("matplotlib"):
        for picture in ("run_ratio.png", "run_roofline.png"):
            assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_table_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's table has regimes, rooflines and memory; the training example has a table too."""
    monkeypatch.setattr(report, "pictures", lambda run, output: None)
    page, gpu = (
        tmp_path / "page.md",
        {"regime": "grid", "ours_bytes": 3 << 20, "baseline_bytes": 2**21},
    )
    parts = ("table", "table cuda", "training cuda")
    page.write_text("".join(f"<!-- {part} -->\n<!-- /{part} -->\n" for part in parts))
    rows = [row("a", 2.0, over="cudnn") | gpu, row("a", 4.0, "training", "cudnn") | gpu]
    rows[1] |= {"roofline_ms": None, "ours_bytes": None}
    path = stored(tmp_path / "run.json", *rows)
    run = json.loads(path.read_text())
    run["header"] |= {"device": "NVIDIA X", "baselines": {"cudnn": "91300"}}
    speeds = {"nn.LSTM": 1000.0, "FusedLSTM": 2500.0, "ratio": 2.5}
    both = {"nn.LSTM": 0.25, "FusedLSTM": 0.25}
    way = {"way": "lengths", "tokens_per_second": {"train": speeds, "eval": speeds}}
    way |= {"train_loss": both, "dev_accuracy": both}
    run["training"] = {"header": run["header"], "arguments": "--hidden 9", "rows": [way]}
    path.write_text(json.dumps(run))
    assert main(["--report", str(path), "--readme", str(page)]) == 0
    caption = "NVIDIA X; torch 2.13, cuDNN 91300; 2026-01-02."
    columns = "over cuDNN | of roofline | regime | MiB |"
    assert page.read_text().splitlines() == [
        "<!-- table -->",
        "<!-- /table -->",
        "<!-- table cuda -->",
        caption,
        "",
        f"| case | inference, ms | {columns} training, ms | {columns}",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| a | 1.00 | 2.00 | 50% | grid | 3.0 / 2.0 | 1.00 | 4.00 |  | grid |  |",
        "| geometric mean |  | **2.00** |  |  |  |  | **4.00** |  |  |  |",
        "",
        "![Time of cuDNN over fusedrnn's, by case](run_ratio.png)",
        "<!-- /table cuda -->",
        "<!-- training cuda -->",
        caption,
        "",
        "| examples/train_tagger.py --hidden 9 | nn.LSTM, training tokens/s | FusedLSTM | ratio "
        "| inference | loss | accuracy |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| lengths | 1,000 | 2,500 | 2.50 | 2.50 | 0.2500 / 0.2500 | 25.00% / 25.00% |",
        "<!-- /training cuda -->",
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
    monkeypatch.setattr(report, "pictures", lambda run, output: None)
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
        assert r["rounds"] >= 3
        assert min(r["ours_ms"], r["baseline_ms"], r["ratio"]) > 0
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


def test_peak_memory() -> None:
    size = 64 << 20
    found = measure.peak_memory(lambda: np.ones(size, np.uint8))
    if found is None:
        pytest.skip("no VmHWM here")
    assert size * 0.9 < found < size * 1.5


def test_latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "WARM_SECONDS", 0.002)
    monkeypatch.setattr(latency, "STEPS", ("tiny",))
    monkeypatch.setattr(latency, "SCALING", ("tiny",))
    monkeypatch.setattr(latency.OnnxRuntime, "packages", ("no_such_package",))
    page, output = tmp_path / "page.md", tmp_path / "latency.json"
    page.write_text("<!-- latency -->\n<!-- /latency -->\n")
    chosen = ["--calls", "100", "--seconds", "0.02", "--output", str(output)]
    assert main(["latency", *chosen, "--readme", str(page)]) == 0
    run = json.loads(output.read_text())
    assert len({r["situation"] for r in run["rows"]}) == 6
    assert all(r["p50_us"] <= r["p99_us"] <= r["max_us"] for r in run["rows"])
    assert [(r["mode"], r["candidate"]) for r in run["scaling"]] == [
        (mode, name) for mode in measure.MODES for name in ("fusedrnn", "torch")
    ]
    assert "| tiny | busy neighbour process |" in page.read_text()


def test_a_device_of_its_own(tmp_path: Path) -> None:
    assert report.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
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
        ("run<R<Lstm, cuda::CtaTraits<cuda::TensorCoreGemm<float, 4, 64>, 4, 8> >", "alone"),
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


def test_step_times(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On the CPU, with a device that refuses a regime or fails otherwise."""
    monkeypatch.setattr(step_cost, "STEPS", (2, 30))
    refusal = "FUSEDRNN_CUDA_REGIME=grid: this device can't run a layer so"
    call_of = step_cost.call_of

    def refused(*args: Any) -> baselines.Call:
        if os.environ["FUSEDRNN_CUDA_REGIME"] == "grid":
            raise RuntimeError(refusal)
        return call_of(*args)

    monkeypatch.setattr(step_cost, "call_of", refused)
    (row,) = step_cost.step_times(["GRU"], ["bfloat16"], [4], [2], "cpu")
    assert list(row) == ["cell", "kind", "H", "B", "cudnn", "step", "alone"]
    assert set(row["alone"]) == {"inference_us", "training_us", "tflops"}
    (row,) = step_cost.step_times(["GRU"], ["tf32"], [4], [1], "cpu", step_cost.CLUSTERS)
    assert list(row) == ["cell", "kind", "H", "B", "cudnn", "cluster"]
    refusal = "out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        step_cost.step_times(["GRU"], ["bfloat16"], [4], [2], "cpu")
    monkeypatch.setattr(step_cost, "kernels_of", lambda call: [call(), [("other", 3, 6.0)]][1])
    found = step_cost.cudnn_kernels(["ieee"], [4], [1], "cpu")
    assert tuple(row["cell"] for row in found) == LAYERS
    assert found[0]["training"] == ["3 x 2.0 us other"]
    assert "us per step: cudnn" in capsys.readouterr().out


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
    page = output.with_suffix(".md").read_text()
    assert f"| stand-in | torch {importlib.metadata.version('torch')} |" in page

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
    assert "1 LSTM by `fuse(model, subclass=True)`" in output.with_suffix(".md").read_text()

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

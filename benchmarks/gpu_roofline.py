"""The roofline of a GPU: a lower bound on a case's time, from peaks that peaks.cu measures."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.roofline import BYTES, flops, layers_of
from tools import cuda_toolkit

_SOURCE = Path(__file__).with_name("peaks.cu")
# Seconds for nvcc, and for the program that it builds.
_LIMIT_SECONDS = 100

# At most so many bytes of a multiprocessor's 256 KB of registers hold weights. Accumulators,
# operands and addresses need the others.
_REGISTER_WEIGHTS = 150 << 10
# Bytes that a multiprocessor loads from its shared memory in a cycle.
_SHARED_BYTES_PER_CYCLE = 128
# A call repeats, so a working set up to this size may stay in the L2 cache (40 to 126 MB).
_L2_BYTES = 30 << 20
_MAX_CLUSTER = 16
# Batch rows of an mma, the fewest that a tensor core multiplies in one instruction.
_MMA_ROWS = 8
# K of an mma; a multiply-add has 1.
_MMA_K = {"bfloat16": 16, "float16": 16, "float32": 8, "float64": 1}
_HMMA = {"bfloat16": "hmma_bfloat16", "float16": "hmma_float16", "float32": "hmma_tf32"}
# Dependent cycles of a cell's activations: two levels of nonlinearities around the cell state. With
# tanh.approx 60; more exact types need ex2 and rcp a level.
_ACTIVATION_CYCLES = {"bfloat16": 60, "float16": 130, "float32": 130, "float64": 130}
# Backward, a gradient passes through three multiply-adds; all else needs saved values alone.
_BACKWARD_CYCLES = 12

# The figures that the issue model of the kernels assumes for sm_90a. `python -m benchmarks peaks`
# compares them with the measured ones of the same names.
ASSUMED: dict[str, dict[str, float]] = {
    "clock": {"ghz": 1.9},
    "latency_cycles": {
        "ffma": 4,
        "alu": 5,
        "mufu_ex2": 22,
        "mufu_tanh": 22,
        "hmma_bfloat16": 33,
        "hmma_float16": 33,
        "hmma_tf32": 33,
        "lds": 30,
        "shfl": 24,
        "bar_8_warps": 28,
        "l2_load": 280,
        "store_and_membar_gpu": 500,
        "dsmem_load": 230,
    },
    "issue_cycles": {
        "mufu_ex2": 8,
        "mufu_tanh": 8,
        "hmma_bfloat16": 6.5,
        "hmma_float16": 6.5,
        "hmma_tf32": 6.5,
    },
    # 1000 cycles of a fence, an arrival and a poll; 370 of st.async and its wait.
    "exchange_ns": {"grid 32 64": 526, "st_async 8 64": 195},
}


@dataclasses.dataclass(frozen=True)
class GpuPeaks:
    """Peak rates on a GPU.

    Attributes:
        flops: operations per second in torch's large GEMMs, by type; float32 is TF32.
        bandwidth: bytes per second in a large copy through memory, reads plus writes.
        multiprocessors: their number.
        shared_bytes: bytes of shared memory in a multiprocessor.
        kernels: results of peaks.cu by section; empty without nvcc. A probe that passed its
            deadline is None.
            `clock`: the multiprocessors' `ghz`.
            `tflops`: with the operands in registers; "8 warps": with one CTA of 8 warps and 4
            chains each on a multiprocessor.
            `l2`: `read_tb_per_s`, of the whole GPU.
            `latency_cycles`: of dependent instructions.
            `issue_cycles`: of a scheduler per instruction, with two warps of 4 chains each.
            `exchange_ns`: per step that only exchanges h, by "PROTOCOL CTAS BYTES". A CTA sends
            BYTES and gets those of all. "cta": between a CTA's threads. "cluster": by the cluster
            barrier. "st_async": by transaction barriers. "grid": through L2, by a counter.
            "grid_flags": through L2, where each word of the data is its own flag.
            `active_clusters`: by CTAs in a cluster, of CTAs that fill a multiprocessor.
    """

    flops: dict[str, float]
    bandwidth: float
    multiprocessors: int
    shared_bytes: int
    kernels: dict[str, dict[str, float | None]]

    def measured(self, section: str, name: str) -> float | None:
        """A result of peaks.cu; None if there is none."""
        return self.kernels.get(section, {}).get(name)

    def cycles(self, name: str) -> float:
        """A latency: measured, or the model's."""
        return self.measured("latency_cycles", name) or ASSUMED["latency_cycles"][name]

    def exchange_seconds(self, ctas: int) -> float:
        """The least measured seconds per step in which so many CTAs, or more, exchange h.

        Above 16 CTAs only the exchanges through L2 count. A number between two measured ones takes
        the lower. Messages of any size count, because a large one can travel while the GEMM runs.
        """
        found = []
        for name, ns in self.kernels.get("exchange_ns", {}).items():
            protocol, count, _ = name.split()
            if ns is not None and (ctas <= _MAX_CLUSTER or protocol.startswith("grid")):
                found.append((int(count), 1e-9 * ns))
        floor = max((count for count, _ in found if count <= ctas), default=0)
        return min((seconds for count, seconds in found if count >= floor), default=0.0)


@dataclasses.dataclass(frozen=True)
class Step:
    """The least seconds of a step, which pass one after another.

    Attributes:
        ctas: the number of CTAs that the weights of a direction are divided among.
        exchange: until each CTA has all of h, or of its gradient.
        gemm: the product with the recurrent weights.
        activations: from the sums to h, or to the gates' gradients.
    """

    ctas: int
    exchange: float
    gemm: float
    activations: float

    @property
    def seconds(self) -> float:
        return self.exchange + self.gemm + self.activations


def step(case: Case, peaks: GpuPeaks, is_backward: bool = False) -> Step | None:
    """The lower bound on a step, the least over numbers of CTAs; None if the clock is unknown.

    More CTAs take longer for the exchange, and each has less to multiply. The groups that fit the
    GPU divide the rows. A CTA's weights are in at most 150 KB of registers, then in shared memory,
    then in the L2 cache. Loads overlap the multiplication, so a GEMM takes the longest of four
    times: its longest chain, its multiply-adds, and the two loads.
    """
    ghz = peaks.measured("clock", "ghz")
    if not ghz:
        return None
    hz = 1e9 * ghz
    levels = 1 if case.gates > 1 else 0.5 if not is_backward else 1 / 3
    cycles = _BACKWARD_CYCLES if is_backward else _ACTIVATION_CYCLES[case.dtype]
    found = []
    for ctas in range(1, peaks.multiprocessors // case.directions + 1):
        gemm = _gemm_seconds(case, peaks, ctas, hz, is_backward)
        found.append(Step(ctas, peaks.exchange_seconds(ctas), gemm, levels * cycles / hz))
    return min(found, key=lambda step: step.seconds)


def _gemm_seconds(case: Case, peaks: GpuPeaks, ctas: int, hz: float, is_backward: bool) -> float:
    """The least seconds of a step's product, with the weights of a direction on so many CTAs."""
    P = case.proj_size or case.H
    groups = min(case.B, peaks.multiprocessors // (ctas * case.directions))
    rows = math.ceil(case.B / groups)
    weights = (P * case.gates * case.H + case.H * case.proj_size) / ctas
    others = max(0.0, BYTES[case.dtype] * weights - _REGISTER_WEIGHTS)
    shared = min(others, peaks.shared_bytes)
    # Sums of single mma, added in pairs.
    K = case.gates * case.H if is_backward else P
    chain = peaks.cycles("ffma") * math.log2(math.ceil(K / _MMA_K[case.dtype]))
    chain += peaks.cycles(_HMMA[case.dtype]) if case.dtype in _HMMA else 0
    l2 = peaks.measured("l2", "read_tb_per_s")
    return max(
        chain / hz,
        2 * weights * _seconds_per_flop(case.dtype, rows, peaks) * peaks.multiprocessors,
        shared / _SHARED_BYTES_PER_CYCLE / hz,
        (others - shared) * peaks.multiprocessors / (1e12 * l2) if l2 else 0.0,
    )


def _seconds_per_flop(dtype: str, rows: int, peaks: GpuPeaks) -> float:
    """Seconds of the whole GPU to multiply a weight by so many rows, per operation of one row.

    By tensor cores, in tiles of 8 rows, or by float32 multiply-adds: with one row and TF32 the
    latter are faster.
    """
    name = "tf32" if dtype == "float32" else dtype
    rate = max(peaks.flops[dtype], 1e12 * (peaks.measured("tflops", name) or 0))
    if dtype == "float64":
        return rows / rate
    plain = 1e12 * (peaks.measured("tflops", "ieee") or 0)
    tiled = math.ceil(rows / _MMA_ROWS) * _MMA_ROWS / rate
    return min(tiled, rows / plain) if plain else tiled


def bound_ms(case: Case, mode: str, peaks: GpuPeaks) -> float:
    """A lower bound on a GPU call's milliseconds: the largest of four times.

    Compute: `flops` at the rate of torch's GEMMs. L2: a pass reads weights and inputs and writes
    outputs once; training has two passes and writes the weight gradients. Memory: all but 30 MB of
    these weights, inputs, outputs and gradients, once. Latency: each pass is a chain of steps
    (`step`). Its first step needs neither an exchange nor, from a zero state, a product.
    Bidirectional layers run one after another; in one direction, each layer runs one step behind
    the layer below. Directions run concurrently. The model omits saved values and launches.
    """
    P = case.proj_size or case.H
    weights = sum(sum(sizes) for sizes in layers_of(case))
    values = sum(case.lengths) * (case.I + case.directions * P)
    gradients = weights if mode == "training" else 0
    passes = 2 if mode == "training" else 1
    width = BYTES[case.dtype]
    moved = width * ((weights + values) * passes + gradients)
    from_memory = max(0, width * (weights + values + gradients) - _L2_BYTES)
    l2 = peaks.measured("l2", "read_tb_per_s")
    times = [
        flops(case, mode) / peaks.flops[case.dtype],
        moved / (1e12 * l2) if l2 else 0.0,
        from_memory / peaks.bandwidth,
    ]
    steps = case.T * case.layers if case.bidirectional else case.T + case.layers - 1
    latency = 0.0
    for is_backward in (False, True)[:passes]:
        if least := step(case, peaks, is_backward):
            latency += steps * least.activations
            latency += (steps - 1) * (least.exchange + least.gemm)
    return 1e3 * max(*times, latency)


def compared(peaks: GpuPeaks) -> dict[str, dict[str, dict[str, float | None]]]:
    """The model's figures beside the measured ones, by section and name."""
    return {
        section: {
            name: {"assumed": value, "measured": peaks.measured(section, name)}
            for name, value in values.items()
        }
        for section, values in ASSUMED.items()
    }


# ---- measuring ----------------------------------------------------------------------------------


def measure() -> GpuPeaks:
    """Measures the current device, peaks.cu included, in about half a minute."""
    properties = torch.cuda.get_device_properties()
    return GpuPeaks(
        {name: _gemm_rate(getattr(torch, name), "cuda", 8192) for name in BYTES},
        _copy_rate("cuda", 1 << 30),
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor,
        _kernel_peaks(),
    )


def _kernel_peaks() -> dict[str, dict[str, float | None]]:
    """The results from peaks.cu; if it fails, prints the reason and gives none."""
    try:
        home = cuda_toolkit.find_home()
        if home is None:
            raise OSError("no nvcc found")
        with tempfile.TemporaryDirectory() as folder:
            program = f"{folder}/peaks"
            command = [f"{home}/bin/nvcc", "-O3", "-std=c++17", "--expt-relaxed-constexpr"]
            command += ["-arch=native", f"-I{_SOURCE.parents[1]}/csrc", "-o", program]
            for args in ([*command, str(_SOURCE)], [program]):
                done = subprocess.run(
                    args, capture_output=True, text=True, check=False, timeout=_LIMIT_SECONDS
                )
                if done.returncode:
                    raise OSError(done.stderr.strip() or f"{args[0]} exited {done.returncode}")
        found: dict[str, dict[str, float | None]] = json.loads(done.stdout)
    except (
        OSError,
        ValueError,
        cuda_toolkit.MissingError,
        subprocess.TimeoutExpired,
    ) as error:
        print(f"without the results of peaks.cu: {error}", file=sys.stderr)
        return {}
    if done.stderr:  # names probes that passed their deadline
        print(done.stderr.strip(), file=sys.stderr)
    return found


def _seconds(run: Any) -> float:
    """Seconds per call in a run of ten calls; the median over a few tries."""
    times: list[float] = []
    for _ in range(4):
        event: Any = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        begin.record()
        for _ in range(10):
            run()
        end.record()
        end.synchronize()
        times.append(1e-4 * begin.elapsed_time(end))
    return statistics.median(times[1:])


def _gemm_rate(dtype: torch.dtype, device: str, size: int) -> float:
    size = size // 4 if dtype == torch.float64 else size
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    c = torch.empty_like(a)
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        rate: float = 2 * size**3 / _seconds(lambda: torch.mm(a, b, out=c))
    finally:
        matmul.fp32_precision = before
    return rate


def _copy_rate(device: str, size: int) -> float:
    a = torch.ones(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * size / _seconds(lambda: b.copy_(a))

"""The roofline: a lower bound on a case's time, from measured peaks of the CPU or GPU."""

from __future__ import annotations

import bisect
import ctypes
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from tools import cuda_toolkit

_SOURCE = Path(__file__).with_name("peaks.cpp")
_GPU_SOURCE = Path(__file__).with_name("peaks.cu")
# Working sets in bytes, over all threads: from the L1 caches to memory.
_SETS = tuple(2**k for k in range(15, 28))
# Register bytes per multiprocessor, on every supported GPU.
_REGISTERS = 4 << 16
_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Peak rates with all of torch's threads.

    Attributes:
        flops: operations per second in independent multiply-adds, two each, by type.
        bandwidth: bytes read per second, by the working set's size in bytes. Each thread reads its
            own part repeatedly.
    """

    flops: dict[str, float]
    bandwidth: dict[int, float]

    def or_better(self, other: Peaks) -> Peaks:
        """The higher rate from two measurements, each by itself."""
        return Peaks(
            {key: max(rate, other.flops[key]) for key, rate in self.flops.items()},
            {size: max(rate, other.bandwidth[size]) for size, rate in self.bandwidth.items()},
        )

    def read_seconds(self, bytes: int, working_set: int) -> float:
        """Seconds to read bytes from a working set, interpolated between measured sizes."""
        sizes = sorted(self.bandwidth)
        at = bisect.bisect(sizes, working_set)
        if at in (0, len(sizes)):
            return bytes / self.bandwidth[sizes[min(at, len(sizes) - 1)]]
        low, high = sizes[at - 1], sizes[at]
        share = math.log(working_set / low) / math.log(high / low)
        rate: float = self.bandwidth[low] ** (1 - share) * self.bandwidth[high] ** share
        return bytes / rate


class Probe:
    """Measures the current peaks: a virtual machine's peaks vary with its host's load.

    Raises:
        OSError: no C++ compiler is found, or peaks.cpp does not compile.
    """

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "peaks.so"
            command = [os.environ.get("CXX", "c++"), "-O3", "-march=native", "-shared", "-fPIC"]
            try:
                subprocess.run([*command, "-o", path, _SOURCE], check=True, capture_output=True)
            except subprocess.CalledProcessError as error:
                raise OSError(error.stderr.decode(errors="replace")) from error
            self._library = ctypes.CDLL(str(path))
        self._memory = torch.ones(_SETS[-1], dtype=torch.uint8)
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads)

    def _rate(self, name: str, seconds: float, size: int | None = None) -> float:
        """The rate summed over concurrent threads; the better of two tries."""
        function = getattr(self._library, name)
        function.restype = ctypes.c_double
        part = (size or 0) // self._threads
        first = self._memory.data_ptr()

        def run(thread: int) -> float:
            # ctypes releases the GIL during the call, so the threads run concurrently.
            if size is None:
                return float(function(ctypes.c_double(seconds)))
            address = ctypes.c_void_p(first + thread * part)
            return float(function(ctypes.c_double(seconds), address, ctypes.c_size_t(part)))

        return max(sum(self._pool.map(run, range(self._threads))) for _ in range(2))

    def measure(self, seconds: float = 0.004) -> Peaks:
        """Measures the peaks; each try takes `seconds`."""
        types = ("float32", "float64", "bfloat16")
        flops = {name: self._rate(f"peak_{name}", seconds) for name in types}
        # Without an instruction for a half type, the kernels compute in float32.
        flops["bfloat16"] = flops["bfloat16"] or flops["float32"]
        flops["float16"] = flops["float32"]
        return Peaks(flops, {size: self._rate("peak_read", seconds, size) for size in _SETS})


def probe() -> Probe | None:
    """A probe; None without a C++ compiler."""
    try:
        return Probe()
    except OSError as error:
        print(f"without rooflines: {error}", file=sys.stderr)
        return None


@dataclasses.dataclass(frozen=True)
class GpuPeaks:
    """Peak rates on a GPU.

    Attributes:
        flops: operations per second in torch's large GEMMs, by type; float32 is TF32.
        bandwidth: bytes per second in a large copy, reads plus writes.
        exchange: seconds per step for the exchange of h alone. "cta": between a CTA's threads.
            "grid N": between N CTAs through L2. "cluster N": between N CTAs by the cluster barrier.
            "st_async N": between N CTAs by transaction barriers. Empty without nvcc.
        on_chip: bytes in a multiprocessor's registers and shared memory.
        kernels: further results from peaks.cu: `tflops` with the weights in registers, and
            `active_clusters` by size.
    """

    flops: dict[str, float]
    bandwidth: float
    exchange: dict[str, float]
    on_chip: int
    kernels: dict[str, dict[str, float]]

    def exchange_seconds(self, weights: int) -> float:
        """Seconds per step for recurrent weights in bytes: within a CTA if they fit on chip."""
        if weights <= self.on_chip:
            return self.exchange.get("cta", 0.0)
        return min((s for name, s in self.exchange.items() if name != "cta"), default=0.0)


def gpu_peaks() -> GpuPeaks:
    """Measures the current device, peaks.cu included, in about ten seconds."""
    properties = torch.cuda.get_device_properties()
    on_chip = properties.shared_memory_per_multiprocessor + _REGISTERS
    found = _kernel_peaks()
    exchange = {name: 1e-9 * ns for name, ns in found.pop("exchange_ns", {}).items()}
    return GpuPeaks(
        {name: _gemm_rate(getattr(torch, name), "cuda", 8192) for name in _BYTES},
        _copy_rate("cuda", 1 << 30),
        exchange,
        on_chip,
        found,
    )


def _kernel_peaks() -> dict[str, dict[str, float]]:
    """The results from peaks.cu; if it fails, prints the reason and gives none."""
    try:
        home = cuda_toolkit.find_home()
        if home is None:
            raise OSError("no nvcc found")
        with tempfile.TemporaryDirectory() as folder:
            program = f"{folder}/peaks"
            command = [f"{home}/bin/nvcc", "-O3", "-std=c++17", "--expt-relaxed-constexpr"]
            command += ["-arch=native", f"-I{_SOURCE.parents[1]}/csrc", "-o", program]
            for args in ([*command, str(_GPU_SOURCE)], [program]):
                done = subprocess.run(
                    args, capture_output=True, text=True, check=False, timeout=100
                )
                if done.returncode:
                    raise OSError(done.stderr.strip() or f"{args[0]} exited {done.returncode}")
        found: dict[str, dict[str, float]] = json.loads(done.stdout)
    except (
        OSError,
        ValueError,
        cuda_toolkit.MissingError,
        subprocess.TimeoutExpired,
    ) as error:
        print(f"without exchange times: {error}", file=sys.stderr)
        return {}
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


def _layers(case: Case) -> list[tuple[int, int, int]]:
    """Elements in each layer's W_ih, W_hh and projection, over all directions."""
    P = case.proj_size or case.H
    sizes = []
    for layer in range(case.layers):
        I = case.directions * P if layer else case.I
        projection = case.H * case.proj_size
        sizes.append((I * case.gates * case.H, P * case.gates * case.H, projection))
    return [(i * case.directions, h * case.directions, p * case.directions) for i, h, p in sizes]


def flops(case: Case, mode: str) -> int:
    """Operations in the GEMMs with the weights; a multiply-add counts as two.

    Inference: 2 * G * H * (I + P) + 2 * H * proj_size per layer, direction and valid token, with G
    gates and P the width of h. Training adds the same count for the weight gradients. Training
    adds it again for the gradients of h and the layer's input. The first layer's input needs none.
    """
    tokens = sum(case.lengths)
    total = 0
    for layer, (input, hidden, projection) in enumerate(_layers(case)):
        total += input + hidden + projection
        if mode == "training":
            total += 2 * (input + hidden + projection) - (0 if layer else input)
    return 2 * tokens * total


def gpu_bound_ms(case: Case, mode: str, peaks: GpuPeaks) -> float:
    """A lower bound on a GPU call's milliseconds: the largest of three times.

    Compute: `flops` at the rate of torch's GEMMs. Memory: a pass reads weights and inputs and
    writes outputs once; training has two passes and writes the weight gradients. Latency: each
    step waits for the exchange of h, in both passes. Bidirectional layers run one after another;
    in one direction, each layer runs one step behind the layer below. Directions run concurrently.
    The model omits saved values, the time of a step's GEMM, and launches.
    """
    width, passes = _BYTES[case.dtype], 2 if mode == "training" else 1
    P = case.proj_size or case.H
    weights = sum(sum(sizes) for sizes in _layers(case))
    values = sum(case.lengths) * (case.I + case.directions * P)
    moved = width * ((weights + values) * passes + (weights if mode == "training" else 0))
    recurrent = width * (P * case.gates * case.H + case.H * case.proj_size)
    steps = case.T * case.layers if case.bidirectional else case.T + case.layers - 1
    latency = steps * passes * peaks.exchange_seconds(recurrent)
    compute = flops(case, mode) / peaks.flops[case.dtype]
    return 1e3 * max(compute, moved / peaks.bandwidth, latency)


def bound_ms(case: Case, mode: str, peaks: Peaks | None) -> float | None:
    """A lower bound on a CPU call's milliseconds: the larger of two times; None without peaks.

    Compute: `flops` at the type's peak rate. Reads: all weights once, at the bandwidth for their
    size. Each later step reads W_hh and the projection again, at the bandwidth for a layer's W_hh.
    In training, both passes read. The model omits inputs, outputs, saved values, activations and
    the overhead of a call. So short calls stay far from the bound. With many rows, one read serves
    all rows, and compute decides.
    """
    if peaks is None:
        return None
    compute = flops(case, mode) / peaks.flops[case.dtype]
    width = _BYTES[case.dtype]
    layers = _layers(case)
    weights = width * sum(sum(sizes) for sizes in layers)
    reads = peaks.read_seconds(weights, weights)
    for _, hidden, projection in layers:
        recurrent = width * (hidden + projection)
        reads += peaks.read_seconds((case.T - 1) * recurrent, recurrent)
    return 1e3 * max(compute, reads * (2 if mode == "training" else 1))

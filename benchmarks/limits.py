"""The least time a case can take on this machine or its GPU, from their measured peaks."""

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
# Working sets of all threads together, in bytes: from the first-level caches to memory.
_SETS = tuple(2**k for k in range(15, 28))
# Bytes of a multiprocessor's registers, on all GPUs that the kernels are for.
_REGISTERS = 4 << 16
_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Peaks:
    """What all of torch's threads do together.

    Attributes:
        flops: operations a second of independent multiply-adds, two each, by type.
        bandwidth: bytes a second read, by the size in bytes of the set that is read repeatedly,
            each thread its own part.
    """

    flops: dict[str, float]
    bandwidth: dict[int, float]

    def or_better(self, other: Peaks) -> Peaks:
        """The higher of two measurements each."""
        return Peaks(
            {key: max(rate, other.flops[key]) for key, rate in self.flops.items()},
            {size: max(rate, other.bandwidth[size]) for size, rate in self.bandwidth.items()},
        )

    def read_seconds(self, bytes: int, working_set: int) -> float:
        """Seconds to read so many bytes of a working set, by the next sizes measured."""
        sizes = sorted(self.bandwidth)
        at = bisect.bisect(sizes, working_set)
        if at in (0, len(sizes)):
            return bytes / self.bandwidth[sizes[min(at, len(sizes) - 1)]]
        low, high = sizes[at - 1], sizes[at]
        share = math.log(working_set / low) / math.log(high / low)
        rate: float = self.bandwidth[low] ** (1 - share) * self.bandwidth[high] ** share
        return bytes / rate


class Probe:
    """Measures the peaks as they are at the moment: a virtual machine's change with its host's.

    Raises:
        OSError: there is no C++ compiler, or it does not compile peaks.cpp.
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
        """The sum of what the threads reach at once, the better of two tries."""
        function = getattr(self._library, name)
        function.restype = ctypes.c_double
        part = (size or 0) // self._threads
        first = self._memory.data_ptr()

        def run(thread: int) -> float:
            # ctypes lets go of the interpreter during the call, so the threads run at once.
            if size is None:
                return float(function(ctypes.c_double(seconds)))
            address = ctypes.c_void_p(first + thread * part)
            return float(function(ctypes.c_double(seconds), address, ctypes.c_size_t(part)))

        return max(sum(self._pool.map(run, range(self._threads))) for _ in range(2))

    def measure(self, seconds: float = 0.004) -> Peaks:
        """The peaks; each try of each figure takes so many seconds."""
        types = ("float32", "float64", "bfloat16")
        flops = {name: self._rate(f"peak_{name}", seconds) for name in types}
        # Half types without an instruction of their own are computed in float32.
        flops["bfloat16"] = flops["bfloat16"] or flops["float32"]
        flops["float16"] = flops["float32"]
        return Peaks(flops, {size: self._rate("peak_read", seconds, size) for size in _SETS})


def probe() -> Probe | None:
    """A probe; None without a C++ compiler."""
    try:
        return Probe()
    except OSError as error:
        print(f"without limits: {error}", file=sys.stderr)
        return None


@dataclasses.dataclass(frozen=True)
class GpuPeaks:
    """What a GPU does.

    Attributes:
        flops: operations a second of torch's products of large matrices, by type; float32 is TF32.
        bandwidth: bytes a second of a large copy, those read and those written.
        exchange: seconds of a step that only hands h on, "cta" to the threads of a CTA, "cluster N"
            and "grid N" to N CTAs, by a cluster's barrier and by L2, "mail N" as the kernels do it
            in a cluster; empty where there is no nvcc.
        on_chip: bytes of registers and shared memory of a multiprocessor.
        kernels: what peaks.cu tells besides: `tflops` of products whose weights stay in registers,
            `active_clusters` by their size.
    """

    flops: dict[str, float]
    bandwidth: float
    exchange: dict[str, float]
    on_chip: int
    kernels: dict[str, dict[str, float]]

    def exchange_seconds(self, weights: int) -> float:
        """Of a step whose recurrent weights have so many bytes: in one CTA where they fit."""
        if weights <= self.on_chip:
            return self.exchange.get("cta", 0.0)
        return min((s for name, s in self.exchange.items() if name != "cta"), default=0.0)


def gpu_peaks() -> GpuPeaks:
    """Measures those of the current device, in about ten seconds with those of peaks.cu."""
    properties = torch.cuda.get_device_properties()
    on_chip = properties.shared_memory_per_multiprocessor + _REGISTERS
    found = _kernel_peaks()
    exchange = {name: 1e-9 * ns for name, ns in found.pop("exchange_ns", {}).items()}
    return GpuPeaks(
        {name: _product_rate(getattr(torch, name), "cuda", 8192) for name in _BYTES},
        _copy_rate("cuda", 1 << 30),
        exchange,
        on_chip,
        found,
    )


def _kernel_peaks() -> dict[str, dict[str, float]]:
    """What peaks.cu prints; empty, and why is said, where it can't be compiled or run."""
    try:
        home = cuda_toolkit.find_home()
        if home is None:
            raise OSError("there is no nvcc")
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
        print(f"without the times of exchanges: {error}", file=sys.stderr)
        return {}
    return found


def _seconds(run: Any) -> float:
    """Of one of ten calls that follow each other, the median of a few tries."""
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


def _product_rate(dtype: torch.dtype, device: str, size: int) -> float:
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
    """Elements of W_ih, of W_hh and of the projection of each layer, all its directions."""
    P = case.proj_size or case.H
    sizes = []
    for layer in range(case.layers):
        I = case.directions * P if layer else case.I
        projection = case.H * case.proj_size
        sizes.append((I * case.gates * case.H, P * case.gates * case.H, projection))
    return [(i * case.directions, h * case.directions, p * case.directions) for i, h, p in sizes]


def flops(case: Case, mode: str) -> int:
    """Operations of the products with the weights, a multiply-add being two.

    Inference: 2 * G * H * (I + P) + 2 * H * proj_size for each layer, direction and position that
    is no padding; G gates, P the width of h. Training adds as much for the gradients of the
    weights, and for those of h and of each layer's input but the first, which needs none.
    """
    positions = sum(case.lengths)
    total = 0
    for layer, (input, hidden, projection) in enumerate(_layers(case)):
        total += input + hidden + projection
        if mode == "training":
            total += 2 * (input + hidden + projection) - (0 if layer else input)
    return 2 * positions * total


def gpu_limit_ms(case: Case, mode: str, peaks: GpuPeaks) -> float:
    """Milliseconds below which no call of a case can come on a GPU, by this model.

    The largest of three times. Operations: `flops` at the rate of torch's products. Memory: weights
    and inputs read and outputs written once, in training read again and the gradients written.
    Steps: each waits for the one before to hand its h on, in both passes. Layers follow each other
    in both directions, and a step behind each other in one; directions run beside each other. Not
    counted: what is saved for the backward pass, the products
    of a step, launches.
    """
    width, passes = _BYTES[case.dtype], 2 if mode == "training" else 1
    P = case.proj_size or case.H
    weights = sum(sum(sizes) for sizes in _layers(case))
    values = sum(case.lengths) * (case.I + case.directions * P)
    moved = width * ((weights + values) * passes + (weights if mode == "training" else 0))
    recurrent = width * (P * case.gates * case.H + case.H * case.proj_size)
    steps = case.T * case.layers if case.bidirectional else case.T + case.layers - 1
    waiting = steps * passes * peaks.exchange_seconds(recurrent)
    compute = flops(case, mode) / peaks.flops[case.dtype]
    return 1e3 * max(compute, moved / peaks.bandwidth, waiting)


def limit_ms(case: Case, mode: str, peaks: Peaks | None) -> float | None:
    """Milliseconds below which no call of a case can come by this model; None without peaks.

    The larger of two times. Operations: `flops` at the peak rate of the type. Reads: all weights
    once, from where a set of that size lies, and W_hh (with the projection) again at each of the
    T - 1 later steps, from where a layer's W_hh lies; in training by both passes. Not counted:
    inputs, outputs, what is saved for the backward pass, activations, the calls themselves. So
    short calls are far from it, and for many rows, where a step's weights serve them all, the
    operations decide.
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

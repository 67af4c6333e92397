"""The roofline: a lower bound on a case's time, from measured peaks of the CPU.

gpu_roofline.py has the GPU's.
"""

from __future__ import annotations

import bisect
import ctypes
import dataclasses
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.cases import Case

_SOURCE = Path(__file__).with_name("peaks.cpp")
# Working sets in bytes, over all threads: from the L1 caches to memory.
_SETS = tuple(2**k for k in range(15, 28))
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


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


def layers_of(case: Case) -> list[tuple[int, int, int]]:
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
    for layer, (input, hidden, projection) in enumerate(layers_of(case)):
        total += input + hidden + projection
        if mode == "training":
            total += 2 * (input + hidden + projection) - (0 if layer else input)
    return 2 * tokens * total


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
    width = BYTES[case.dtype]
    layers = layers_of(case)
    weights = width * sum(sum(sizes) for sizes in layers)
    reads = peaks.read_seconds(weights, weights)
    for _, hidden, projection in layers:
        recurrent = width * (hidden + projection)
        reads += peaks.read_seconds((case.T - 1) * recurrent, recurrent)
    return 1e3 * max(compute, reads * (2 if mode == "training" else 1))

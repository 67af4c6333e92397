"""`python -m fusedrnn`: the build, the machine, a self-check and a quick look at speed.

A page to paste into an issue. The exit status is 1 if the self-check fails.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusedrnn
from fusedrnn import _build, _ops
from fusedrnn.modules import FUSED

# Relative to a tensor's largest value. Rounding in float32 is 1e-6.
TOLERANCE = 1e-4
# Seconds for each line of the quick look.
LOOK_SECONDS = 0.25
# Share of the cores that others use on average, from which times mean little.
BUSY_LOAD = 0.3
VARIABLES = re.compile(
    r"(FUSEDRNN|OMP|MKL|KMP|GOMP|CUDA)_|ATEN_CPU_CAPABILITY$|TORCH_CUDA_ARCH_LIST$"
)
OLDEST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Check:
    """A layer's largest error on a device beside torch's, relative to a tensor's largest value.

    Attributes:
        failure: why the layer could not run; None if it ran.
    """

    device: str
    name: str
    values: float = float("nan")
    gradients: float = float("nan")
    failure: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the layer ran, with errors up to TOLERANCE."""
        return self.failure is None and max(self.values, self.gradients) <= TOLERANCE


def devices_here() -> list[str]:
    """The devices that have kernels in this build and are present."""
    return [d for d in sorted(_ops.devices()) if d != "cuda" or torch.cuda.is_available()]


@contextmanager
def ieee_precision() -> Iterator[None]:
    """Disables TF32, which would hide a bug."""
    rnn: Any = torch.backends.cudnn.rnn
    precision, rnn.fp32_precision = rnn.fp32_precision, "ieee"
    try:
        yield
    finally:
        rnn.fp32_precision = precision


def self_check() -> list[Check]:
    """Runs every layer and cell against torch's own on each device."""
    with ieee_precision():
        return [
            check(device, plain, fused)
            for device in devices_here()
            for plain, fused in FUSED.items()
        ]


def check(device: str, plain: type[nn.Module], fused: type[nn.Module]) -> Check:
    """Compares values and gradients of two layers with the same weights."""
    options = {"num_layers": 2, "bidirectional": True} if issubclass(plain, nn.RNNBase) else {}
    try:
        torch.manual_seed(0)
        theirs, ours = (cls(17, 33, **options).to(device) for cls in (plain, fused))
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(*((9,) if options else ()), 5, 17, device=device)
        expected, found = (values_and_gradients(module, x) for module in (theirs, ours))
        values, gradients = (
            max(relative_error(a, b) for a, b in zip(e, f, strict=True))
            for e, f in zip(expected, found, strict=True)
        )
        return Check(device, plain.__name__, values, gradients)
    except Exception as error:  # the rest of the page still helps
        return Check(device, plain.__name__, failure=f"{type(error).__name__}: {error}")


def values_and_gradients(module: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """A module's results, and the gradients of the input and the parameters."""
    leaf = x.clone().requires_grad_()
    results = flat(module(leaf))
    if isinstance(module, nn.RNNCellBase):  # a second step: in the first, h is zero
        states = tuple(results) if len(results) > 1 else results[0]
        results = flat(module(leaf, states))
    loss = torch.stack([y.square().sum() for y in results]).sum()
    return results, list(torch.autograd.grad(loss, (leaf, *module.parameters())))


def flat(results: Any) -> list[Tensor]:
    """The tensors in a module's results: an LSTM's states are a tuple of their own."""
    if isinstance(results, Tensor):
        return [results]
    return [tensor for result in results for tensor in flat(result)]


def relative_error(expected: Tensor, found: Tensor) -> float:
    """The largest difference over the largest value; NaN counts as infinite."""
    scale = expected.detach().abs().max().clamp_min(1e-30)  # both may be zero
    difference = (found - expected).detach().abs().max() / scale
    return float(difference.nan_to_num(float("inf")))


@dataclass(frozen=True)
class Look:
    """Median milliseconds of one call of torch's layer and of the fused one."""

    device: str
    call: str
    plain: float
    fused: float


def load_average() -> float | None:
    """The processes that ran or waited for a core in the last minute; None where unknown."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # not on Windows
        return None


def quick_look(device: str) -> list[Look]:
    """Times inference and training of one LSTM in turn, for LOOK_SECONDS each."""
    T, B, H = 50, 8, 128
    torch.manual_seed(0)
    plain, fused = (cls(H, H).to(device) for cls in (nn.LSTM, fusedrnn.FusedLSTM))
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(T, B, H, device=device)

    def infer(module: nn.Module) -> None:
        with torch.no_grad():
            module(x)

    def train(module: nn.Module) -> None:
        module(x)[0].sum().backward()

    sizes = f"LSTM of {H} units, {B} rows, {T} steps"
    return [
        Look(device, f"{name}, {sizes}", *times(call, (plain, fused), device))
        for name, call in (("inference", infer), ("training", train))
    ]


def times(
    call: Callable[[nn.Module], None], modules: Sequence[nn.Module], device: str
) -> list[float]:
    """Median milliseconds of a call of each module, measured in turn."""
    measured: list[list[float]] = [[] for _ in modules]
    for module in modules:  # the first call allocates
        call(module)
    end = time.perf_counter() + LOOK_SECONDS
    while not measured[0] or time.perf_counter() < end:
        for module, found in zip(modules, measured, strict=True):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call(module)
            if device == "cuda":
                torch.cuda.synchronize()
            found.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(found) for found in measured]


def processor() -> str:
    """The processor's name, or else its architecture."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text() if info.exists() else "", re.M)
    if names:
        return str(names[0]).strip()
    name = output("sysctl", "-n", "machdep.cpu.brand_string") if sys.platform == "darwin" else None
    return name or platform.processor() or platform.machine()


def cores() -> str:
    """The machine's cores, and how many of them this process may use."""
    count = os.cpu_count() or 1
    found = [f"{count}"]
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    if allowed < count:
        found.append(f"{allowed} in the affinity mask")
    usable = usable_cores(count)
    if usable < allowed:
        by = "FUSEDRNN_CPU_CORES" if os.environ.get("FUSEDRNN_CPU_CORES") else "the CPU quota"
        found.append(f"{usable} by {by}")
    return ", ".join(found)


def usable_cores(count: int) -> int:
    """The kernels' limit of threads, up to `count`."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        return _ops.cpu_threads()
    finally:
        torch.set_num_threads(threads)


def instruction_set() -> str:
    """The kernels' instruction set, and the machine's best if the environment asks for less."""
    chosen = _ops.cpu_isa()
    if not os.environ.get("FUSEDRNN_CPU_ISA"):
        return chosen
    # The library reads the variable once, so that another process has to tell.
    environment = {k: v for k, v in os.environ.items() if k != "FUSEDRNN_CPU_ISA"}
    paths = os.pathsep.join([str(Path(fusedrnn.__file__).parent.parent), *sys.path])
    code = "from fusedrnn import _ops; print(_ops.cpu_isa())"
    found = output(sys.executable, "-c", code, environment={**environment, "PYTHONPATH": paths})
    return f"{chosen}; this machine has {found or 'unknown'}"


def output(*command: str, environment: dict[str, str] | None = None) -> str | None:
    """The first line that a command prints; None if it fails."""
    try:
        found = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip().partition("\n")[0]


def cuda_lines() -> list[tuple[str, str]]:
    """CUDA in torch, in this build and in the machine, and what to do about what is missing."""
    cuda = torch.version.cuda
    if cuda is None:
        return [
            ("torch", "a CPU build"),
            ("to use a GPU", "install a CUDA build of torch, then in a checkout of fusedrnn run"),
            ("", _ops.REBUILD),
        ]
    lines = [("torch", f"built for CUDA {cuda}")]
    has_kernels = "cuda" in _ops.devices()
    if has_kernels:
        lines.append(("kernels", f"by nvcc {_build.cuda} for {' '.join(_build.cuda_archs)}"))
    else:
        lines += [
            ("kernels", "none in this build: on a GPU layers run on torch's ops, slowly"),
            ("to add them", f"install CUDA {cuda}'s toolkit, then in a checkout of fusedrnn run"),
            ("", f"FUSEDRNN_CUDA=1 {_ops.REBUILD}"),
        ]
    if driver := shutil.which("nvidia-smi") and output(
        "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    ):
        lines.append(("driver", driver))
    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "" if hidden is None else f", CUDA_VISIBLE_DEVICES is {hidden!r}"
        return [*lines, ("GPUs", f"torch finds none{why}")]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = (properties.major, properties.minor)
        name = f"{properties.name}, capability {properties.major}.{properties.minor}"
        lines.append((f"GPU {i}", f"{name}, {properties.total_memory / 2**30:.0f} GiB"))
        if capability < OLDEST_CAPABILITY:
            lines.append(("", "the kernels need capability 8.0: layers there run on torch's ops"))
        elif has_kernels and not runs_on(_build.cuda_archs, capability):
            arch = f"TORCH_CUDA_ARCH_LIST={properties.major}.{properties.minor}"
            lines += [
                ("", "no kernels for it in this build: in a checkout of fusedrnn run"),
                ("", f"{arch} {_ops.REBUILD}"),
            ]
    return lines


def runs_on(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a GPU runs code of one of these archs: sm_80 is code, compute_80 is PTX."""
    for arch in archs:
        kind, number, letter = re.findall(r"^(\w+)_(\d+)([a-z]?)$", arch)[0]
        built = (int(number[:-1]), int(number[-1]))
        if letter == "a":  # a target for one GPU's features
            fits = built == capability
        elif kind == "compute":
            fits = built <= capability
        else:
            fits = built[0] == capability[0] and built <= capability
        if fits:
            return True
    return False


def table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Prints a title, and names with their values."""
    print(title)
    for name, value in rows:
        print(f"  {name:<14}{value}".rstrip())
    print()


def main() -> int:
    """Prints the page; 1 if the self-check fails."""
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    kernels, load = _ops.cpu_threads(), load_average()
    libc = " ".join(platform.libc_ver()).strip()
    table(
        "Versions",
        [
            ("fusedrnn", fusedrnn.__version__),
            ("torch", str(torch.__version__)),
            ("Python", f"{platform.python_version()}, {platform.python_implementation()}"),
            ("system", f"{system}, {libc}" if libc else system),
            ("kernels", ", ".join(sorted(_ops.devices()))),
        ],
    )
    table(
        "CPU",
        [
            ("processor", processor()),
            ("cores", cores()),
            ("threads", f"{torch.get_num_threads()} of torch, {kernels} of the kernels"),
            ("load", "unknown" if load is None else f"{load:.1f}, the last minute's average"),
            ("CPU ISA", instruction_set()),
        ],
    )
    table("CUDA", cuda_lines())
    found = sorted((k, v) for k, v in os.environ.items() if VARIABLES.match(k))
    table("Environment", [(f"{k}={v}", "") for k, v in found] or [("nothing set", "")])

    checks = self_check()
    print("Self-check: the largest difference from torch.nn, relative to a tensor's largest value")
    print(f"  {'':6}{'':10}{'values':>10}{'gradients':>11}")
    for c in checks:
        numbers = f"{c.values:>10.0e}{c.gradients:>11.0e}" if c.failure is None else ""
        state = "" if c.passed else f"  FAILED {c.failure or f'over {TOLERANCE:.0e}'}"
        print(f"  {c.device:<6}{c.name:<10}{numbers}{state}")
    failed = [c for c in checks if not c.passed]
    if not failed:
        print("\nQuick look, no benchmark: milliseconds a call, in turn for a quarter of a second")
        print(f"  {'':6}{'':48}{'torch.nn':>9}{'fusedrnn':>10}{'speed-up':>10}")
        for look in (look for device in devices_here() for look in quick_look(device)):
            print(
                f"  {look.device:<6}{look.call:<48}{look.plain:>9.3f}{look.fused:>10.3f}"
                f"{look.plain / look.fused:>9.1f}x"
            )
        if load is not None and load > BUSY_LOAD * (os.cpu_count() or 1):
            print("  The machine was busy in the last minute: these times may mean little.")
    print()
    for c in failed:
        print(f"self-check FAILED: {c.name} on {c.device}")
    if not failed:
        print("self-check passed: values and gradients agree with torch.nn")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

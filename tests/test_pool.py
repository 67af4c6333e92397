"""The pools of threads, and the cores that a process may use. No test looks at a clock."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedrnn

TESTS = Path(__file__).parent
COMPILER = os.environ.get("CXX", "c++")

# Calls that share rows, steps of one run, steps of two runs, GEMMs and a single step.
CALLS = """
import hashlib, itertools
import torch, fusedrnn

torch.manual_seed(0)
shapes = [(1, 256, 9), (3, 100, 9), (16, 96, 7), (32, 256, 1)]
calls = []
for cell, (rows, hidden, steps), bidirectional in itertools.product(
    ("FusedLSTM", "FusedGRU"), shapes, (False, True)
):
    module = getattr(fusedrnn, cell)(40, hidden, bidirectional=bidirectional)
    calls.append((module, torch.randn(steps, rows, 40)))

def bits():
    found = hashlib.sha256()
    for module, x in calls:
        x = x.clone().requires_grad_()
        y = module(x)[0]
        for t in [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]:
            found.update(t.numpy().tobytes())
    return found.hexdigest()
"""
BITS = f"""{CALLS}
for count in range(1, 8):
    torch.set_num_threads(count)
    found = {{bits() for _ in range(3)}}
    assert len(found) == 1, count
    print(torch.ops.fusedrnn._cpu_threads(), *found)
"""
# The child has one thread and an empty pool. Another thread of the parent uses the pool. The child
# calls only the layer: a lock of torch's may be held, and torch's pool is gone.
FORK = """
import os, signal, threading
import torch, fusedrnn

torch.set_grad_enabled(False)
modules = fusedrnn.FusedLSTM(40, 256), fusedrnn.FusedGRU(40, 96, bidirectional=True)
inputs = torch.randn(9, 1, 40), torch.randn(9, 16, 40)
def outputs():
    return [module(x)[0] for module, x in zip(modules * 20, inputs * 20)]
expected = outputs()
def is_right():
    return all(torch.equal(a, b) for a, b in zip(outputs(), expected))
stop = False
def use():
    while not stop:
        outputs()
other = threading.Thread(target=use, daemon=True)
other.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if is_right() else 1)
    assert os.waitpid(child, 0)[1] == 0
stop = True
other.join()
assert is_right()
"""


def run(code: str, **environment: str) -> str:
    """The output of Python code in a process with these variables."""
    paths = os.pathsep.join(str(Path(p).resolve()) for p in sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_bits() -> None:
    """Pool and cores change no bit: only the number of threads does."""
    found = [
        run(BITS, FUSEDRNN_CPU_POOL=pool, FUSEDRNN_CPU_CORES="7")
        for pool in ("torch", "own", "auto")
    ]
    assert [line.split()[0] for line in found[0].splitlines()] == [*"1234567"]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("pool", ["own", "auto"])
def test_fork(pool: str) -> None:
    run(FORK, FUSEDRNN_CPU_POOL=pool, FUSEDRNN_CPU_CORES="3", OMP_NUM_THREADS="3")


def test_eight_threads_on_the_own_pool() -> None:
    code = f"""{CALLS}
import concurrent.futures
torch.set_num_threads(4)
expected = bits()
with concurrent.futures.ThreadPoolExecutor(8) as threads:
    assert set(threads.map(lambda _: bits(), range(24))) == {{expected}}
"""
    run(code, FUSEDRNN_CPU_POOL="own", FUSEDRNN_CPU_CORES="4")


def output(x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return fusedrnn.FusedLSTM(20, 200)(x)[0]


def test_spawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRNN_CPU_POOL", "own")
    x = torch.randn(25, 1, 20)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as processes:
        for found in processes.map(output, [x] * 4):
            torch.testing.assert_close(found, output(x))


def test_more_threads_than_cores() -> None:
    code = """
import torch, fusedrnn
for count in (1, 2, 8):
    torch.set_num_threads(count)
    print(torch.ops.fusedrnn._cpu_threads())
"""
    assert run(code, FUSEDRNN_CPU_CORES="2").split() == ["1", "2", "2"]
    assert run(code, FUSEDRNN_CPU_CORES="1").split() == ["1", "1", "1"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_affinity_mask() -> None:
    code = """
import os, time
import torch, fusedrnn
torch.set_num_threads(8)
cores = sorted(os.sched_getaffinity(0))
assert torch.ops.fusedrnn._cpu_threads() <= len(cores)
os.sched_setaffinity(0, cores[:1])
for _ in range(100):  # read again after a second
    time.sleep(0.1)
    if torch.ops.fusedrnn._cpu_threads() == 1:
        break
else:
    raise AssertionError("the mask was not read again")
"""
    run(code)


def test_unknown_pool() -> None:
    warning = run("import fusedrnn", FUSEDRNN_CPU_POOL="others")
    assert "FUSEDRNN_CPU_POOL=others is none of auto, torch, own: using auto" in warning


def compiled(tmp_path: Path, name: str, *flags: str) -> Path:
    program = tmp_path / name
    sources = [TESTS / f"kernels/{name}.cpp", TESTS.parent / f"csrc/cpu/{name}.cpp"]
    subprocess.run(
        [*(COMPILER, "-std=c++17", "-O1", "-g", "-pthread"), *flags, "-o", program, *sources],
        check=True,
    )
    return program


@pytest.mark.long
def test_pool_under_thread_sanitizer(tmp_path: Path) -> None:
    """Callers, late workers, growth, exceptions, nesting."""
    program = compiled(tmp_path, "pool", "-fsanitize=thread")
    subprocess.run([program], check=True, timeout=300)


@pytest.mark.long
def test_forks_of_the_pool(tmp_path: Path) -> None:
    """ThreadSanitizer starts no threads in a child of fork."""
    program = compiled(tmp_path, "pool")
    for what in ("jobs", "fork"):
        subprocess.run([program, what], check=True, timeout=300)


MOUNTS_V2 = "30 23 0:25 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNTS_V1 = (
    "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
)
V1 = "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.long
def test_cgroup_quota(tmp_path: Path) -> None:
    """The least quota from the process's own cgroup up to the mount point."""
    program = compiled(tmp_path, "cores")

    def quota(name: str, mounts: str, cgroups: str, **files: str) -> float:
        root = tmp_path / name
        texts = {"proc/self/mountinfo": mounts, "proc/self/cgroup": cgroups, **files}
        for path, text in texts.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
        done = subprocess.run([program, root], check=True, capture_output=True, text=True)
        return float(done.stdout.split()[0])

    def v1(folder: str, quota: int) -> dict[str, str]:
        return {
            f"{V1}{folder}/cpu.cfs_quota_us": f"{quota}\n",
            f"{V1}{folder}/cpu.cfs_period_us": "100000\n",
        }

    top = "sys/fs/cgroup"
    assert quota("none", "", "") == 0
    assert quota("max", MOUNTS_V2, "0::/\n", **{f"{top}/cpu.max": "max 100000\n"}) == 0
    assert quota("namespace", MOUNTS_V2, "0::/\n", **{f"{top}/cpu.max": "150000 100000\n"}) == 1.5
    nested = {f"{top}/a/cpu.max": "400000 100000\n", f"{top}/a/b/cpu.max": "max 100000\n"}
    assert quota("parent", MOUNTS_V2, "0::/a/b\n", **nested) == 4
    assert quota("other", MOUNTS_V2, "0::/c\n", **nested) == 0
    nested[f"{top}/a/b/cpu.max"] = "50000 100000\n"
    assert quota("least", MOUNTS_V2, "0::/a/b\n", **nested) == 0.5
    groups = "5:cpuset:/x\n4:cpu,cpuacct:/docker/ab\n0::/\n"
    mounts = MOUNTS_V1.format(root="/")
    assert quota("v1", mounts, groups, **v1("", -1), **v1("/docker/ab", 300000)) == 3
    # A container without a namespace of its own: the mount point is its own cgroup.
    mounts = MOUNTS_V1.format(root="/docker/ab")
    assert quota("v1 container", mounts, groups, **v1("", 250000)) == 2.5
    mounts = MOUNTS_V1.format(root="/docker/a")
    assert quota("v1 sibling", mounts, groups, **v1("", 250000), **v1("b", 100000)) == 2.5

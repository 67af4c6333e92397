"""Threads, forks, memory, instruction sets."""

from __future__ import annotations

import concurrent.futures
import gc
import itertools
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.cells import LAYERS
from helpers.parity import fused_like
from torch.utils.data import DataLoader, Dataset

import fusedrnn
from fusedrnn import _ops

HERE = Path(__file__).parent


def test_eight_threads_on_one_module() -> None:
    """Each thread has its own input; half the threads also run backward."""
    torch.manual_seed(0)
    for hidden, rows in [(256, 1), (40, 9)]:  # steps shared by threads, rows shared by threads
        module = fusedrnn.FusedLSTM(30, hidden)
        inputs = [torch.randn(20, rows, 30) for _ in range(8)]

        def work(i: int) -> list[torch.Tensor]:
            results = []
            for _ in range(10):
                x = inputs[i].clone().requires_grad_(i % 2 == 0)  # noqa: B023
                with torch.set_grad_enabled(i % 2 == 0):
                    y, (h, c) = module(x)  # noqa: B023
                tensors = [y.detach(), h.detach(), c.detach()]
                if i % 2 == 0:
                    tensors += torch.autograd.grad(y.sum(), x)
                results.append(tensors)
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
            return results[0]

        expected = [work(i) for i in range(8)]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = list(pool.map(work, range(8)))
        for a, b in zip(expected, found, strict=True):
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x, y)


class Encoded(Dataset):
    """A data set that runs a fused layer in the worker."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = fusedrnn.FusedLSTM(20, 200)
        self.x = torch.randn(12, 25, 1, 20)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> torch.Tensor:
        with torch.no_grad():
            return self.module(self.x[i])[0]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers(context: str) -> None:
    data = Encoded()
    expected = torch.stack([data[i] for i in range(len(data))])  # starts the parent's threads
    loader = DataLoader(data, batch_size=3, num_workers=2, multiprocessing_context=context)
    torch.testing.assert_close(torch.cat(list(loader)), expected)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads(threads: int) -> None:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    try:
        shapes = [
            (1, 256, False),
            (1, 256, True),
            (11, 120, False),
            (11, 120, True),
            (2, 70, True),
        ]
        for pair, (rows, hidden, bidirectional) in itertools.product(LAYERS, shapes):
            theirs = pair.make_plain(60, hidden, bidirectional=bidirectional)
            ours = fused_like(theirs)
            x = torch.randn(12, rows, 60)
            torch.set_num_threads(before)
            expected = theirs(x)[0]
            gradients = torch.autograd.grad(expected.square().sum(), list(theirs.parameters()))
            torch.set_num_threads(threads)
            y = ours(x)[0]
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
            found = torch.autograd.grad(y.square().sum(), list(ours.parameters()))
            torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_memory_is_flat() -> None:
    """2,000 calls with random sizes, forward and backward."""
    rng = random.Random(0)

    def call() -> None:
        module = rng.choice(LAYERS).make_fused(
            rng.randint(1, 40),
            rng.randint(1, 80),
            rng.randint(1, 2),
            bidirectional=rng.random() < 0.5,
        )
        x = torch.randn(rng.randint(1, 20), rng.randint(1, 20), module.input_size)
        lengths = [rng.randint(0, x.size(0)) for _ in range(x.size(1))]
        module(x, lengths=lengths if rng.random() < 0.3 else None)[0].sum().backward()

    for _ in range(400):
        call()
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2000):
        call()
    gc.collect()
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    growth //= 1024 if sys.platform == "darwin" else 1  # macOS counts bytes, Linux KiB
    assert growth < 30_000, f"{growth} KiB more at the peak after 2,000 calls"


def available() -> list[str]:
    order = ["baseline", "avx2", "avx512", "avx512vnni", "avx512bf16"]
    return order[: order.index(_ops.cpu_isa()) + 1]


@pytest.mark.parametrize("isa", available())
@pytest.mark.long
def test_every_instruction_set(isa: str) -> None:
    """Parity tests with a few hundred configurations on each instruction set here."""
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "test_parity.py",
            "test_freeze.py",
            "test_variant_ops.py",
            "-k",
            "random or shared or int8 or rounded or compositions or places",
        ],
        cwd=HERE,
        env={
            **os.environ,
            "FUSEDRNN_CPU_ISA": isa,
            "FUSEDRNN_TEST_EXAMPLES": "250",
            "PYTHONPATH": os.pathsep.join(str(Path(p).resolve()) for p in sys.path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr

"""`python -m fusedrnn`: what this build is, what it can use here, and whether it computes right."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch
from torch import nn

import fusedrnn
from fusedrnn import _build, _ops


def self_check() -> list[str]:
    """Runs every module against torch's own on each device with kernels; returns what differs."""
    rnn: Any = torch.backends.cudnn.rnn
    precision, rnn.fp32_precision = rnn.fp32_precision, "ieee"  # TF32 differs by more than a bug
    try:
        return _problems()
    finally:
        rnn.fp32_precision = precision


def _problems() -> list[str]:
    problems = []
    for device in sorted(_ops.devices()):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        for cell in ("LSTM", "GRU"):
            torch.manual_seed(0)
            theirs = getattr(nn, cell)(17, 33, num_layers=2, bidirectional=True).to(device)
            ours = getattr(fusedrnn, f"Fused{cell}")(17, 33, num_layers=2, bidirectional=True)
            ours.load_state_dict(theirs.state_dict())
            ours.to(device)
            x = torch.randn(9, 5, 17, device=device)
            results = []
            for module in (theirs, ours):
                leaf = x.clone().requires_grad_()
                y = module(leaf)[0]
                results.append(
                    (y, *torch.autograd.grad(y.square().sum(), (leaf, *module.parameters())))
                )
            for a, b in zip(*results, strict=True):
                if not torch.allclose(a, b, rtol=1e-3, atol=1e-4):
                    problems.append(f"{cell} on {device} differs from torch.nn.{cell}")
                    break
    return problems


def main() -> int:
    """Prints the report; 1 if the self-check fails."""
    devices = sorted(_ops.devices())
    print(f"fusedrnn   {fusedrnn.__version__}")
    print(f"torch      {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"python     {platform.python_version()}, {platform.system()} {platform.machine()}")
    print(f"kernels    {', '.join(devices)}")
    print(f"CPU ISA    {_ops.cpu_isa()}")
    if "cuda" in devices:
        archs = " ".join(_build.cuda_archs)
        print(f"CUDA       {torch.version.cuda}, kernels by nvcc {_build.cuda} for {archs}")
    elif torch.version.cuda is None:
        print("CUDA       none: this torch is a CPU build")
    else:
        print(f"CUDA       {torch.version.cuda}, no kernels: layers there run on torch's own ops")
    problems = self_check()
    for problem in problems:
        print(f"self-check FAILED: {problem}")
    if not problems:
        print("self-check passed: values and gradients agree with torch.nn")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

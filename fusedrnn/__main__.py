"""`python -m fusedrnn`: the build, the devices it can use here, and a self-check."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch
from torch import nn

import fusedrnn
from fusedrnn import _build, _ops
from fusedrnn.modules import FUSED


def self_check() -> list[str]:
    """Runs every layer against torch's own on each device with kernels; returns the differences."""
    rnn: Any = torch.backends.cudnn.rnn
    precision, rnn.fp32_precision = rnn.fp32_precision, "ieee"  # TF32 would hide a bug
    try:
        return _problems()
    finally:
        rnn.fp32_precision = precision


def _problems() -> list[str]:
    problems = []
    for device in sorted(_ops.devices()):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        for plain, fused in FUSED.items():
            if not issubclass(plain, nn.RNNBase):
                continue
            torch.manual_seed(0)
            theirs, ours = (
                cls(17, 33, num_layers=2, bidirectional=True).to(device) for cls in (plain, fused)
            )
            ours.load_state_dict(theirs.state_dict())
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
                    problems.append(f"{plain.__name__} on {device} differs from torch.nn's")
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

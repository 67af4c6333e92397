"""Runs the CUDA kernels once on small layers, for compute-sanitizer. Exits 1 without a GPU.

Kernels for full tiles are left out: they would need many rows. A regime without room under the tool
is an error: no other regime takes its place.

python tests/helpers/sanitized.py [regime ...]: only these regimes' kernels. "" asks for none.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))

from test_cuda import (
    KINDS,
    REGIMES,
    every_kernel,
    lacks_clusters,
    run_op,
    running,
)


def main() -> int:
    if not torch.cuda.is_available():
        print("needs a GPU")
        return 1
    regimes = [r for r in sys.argv[1:] or [*REGIMES, ""] if not lacks_clusters(r)]
    cases = [(regime, case) for regime, case in every_kernel(None) if regime in regimes]
    for regime, case in cases:
        with running(regime, case.kind):
            found = run_op(case, "cuda", KINDS[case.kind])
        if not all(t.isfinite().all() for t in found):
            print(f"{regime} {case}: not finite")
            return 1
    torch.cuda.synchronize()
    print(f"{len(cases)} cases, forward and backward")
    return 0


if __name__ == "__main__":
    sys.exit(main())

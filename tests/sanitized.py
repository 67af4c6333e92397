"""Every CUDA kernel once, on small layers: what compute-sanitizer runs. Exits 1 without a GPU."""

from __future__ import annotations

import itertools
import sys

import torch
from test_cuda import CELLS, KINDS, LAYOUTS, REGIMES, Case, run_op, running


def cases() -> list[tuple[str, Case]]:
    """Each regime, cell, kind and layout, in both directions; odd sizes; two tiles of rows."""
    modes = itertools.product(REGIMES, CELLS, KINDS, LAYOUTS)
    small = [
        (regime, Case(cell, kind, 3, 17 if layout == "packed" else 3, 4, 21, layout, True))
        for regime, cell, kind, layout in modes
        if kind != "float64" or regime == "step"
    ]
    # Of a few units at a time, where sizes allow it; the larger groups; projections.
    wide = [("step", Case(cell, kind, 2, 3, 4, 8)) for cell in CELLS for kind in KINDS]
    large = [
        ("grid", Case(cell, kind, 2, 3, 4, 272 if kind in ("ieee", "tf32") else 528))
        for cell in CELLS
        for kind in KINDS
        if kind != "float64"
    ]
    projected = [
        ("step", Case("lstm", kind, 3, 3, 4, 8, proj_size=P)) for kind in KINDS for P in (3, 4)
    ]
    return [*small, *wide, *large, *projected]


def main() -> int:
    if not torch.cuda.is_available():
        print("needs a GPU")
        return 1
    for regime, case in cases():
        with running(regime, case.kind):
            found = run_op(case, "cuda", KINDS[case.kind])
        if not all(t.isfinite().all() for t in found):
            print(f"{regime} {case}: not finite")
            return 1
    torch.cuda.synchronize()
    print(f"{len(cases())} cases, forward and backward")
    return 0


if __name__ == "__main__":
    sys.exit(main())

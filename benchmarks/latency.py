"""`python -m benchmarks latency`: single calls in the situations of a service; thread scaling.

A service's slow calls find the other core busy, the workers asleep, or other threads in the
process. Medians hide such calls. So this benchmark times each call by itself and reports the 50th,
90th and 99th percentiles and the maximum. Then it compares all threads with one thread.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from benchmarks import machine, report
from benchmarks.baselines import Call, Candidate, Fused, OnnxRuntime, Torch
from benchmarks.cases import Case, pick
from benchmarks.measure import MODES, in_turn

RESULTS = report.RESULTS / "latency.json"
STEPS = ("step H64", "step H256 x2")
# Calls that threads share, for the situations in which a thread may lose its core.
SHARED = ("B1 T100 H256", "GRU B1 T100 H256", "B8 T50 H128", "LSTMCell B32 H256")
LONG = Case("B64 T60 H256", B=64, T=60, H=256)
SCALING = ("step H256 x2", "B1 T100 H256", "B8 T50 H128", "tagger", "B64 T100 H256")
CALLS = 10_000
IDLE_SECONDS = 0.05
THREADS = 4

Run = Callable[[Candidate, Case], list[float]]


def latencies(call: Call, count: int, seconds: float, idle: float = 0.0) -> list[float]:
    """Microseconds of each call: up to `count` calls or `seconds`; sleeps `idle` before each."""
    clock = time.perf_counter
    end = clock() + 0.2
    for _ in range(100):  # the first calls compile, pack weights and start threads
        call()
        if clock() > end:
            break
    samples: list[float] = []
    end = clock() + seconds
    while len(samples) < count and clock() < end:
        if idle:
            time.sleep(idle)
        start = clock()
        call()
        samples.append(1e6 * (clock() - start))
    return samples


class _Calls(IterableDataset[list[float]]):
    """A data set with one sample: the latencies in the iterating process."""

    def __init__(self, candidate: Candidate, case: Case, count: int, seconds: float) -> None:
        self.candidate, self.case, self.count, self.seconds = candidate, case, count, seconds

    def __iter__(self) -> Iterator[list[float]]:
        call = self.candidate.prepare(self.case, "inference")
        yield latencies(call, self.count, self.seconds)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets torch's number of threads within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def situations(count: int, seconds: float) -> dict[str, Run]:
    """The situations by name; each gives the microseconds of up to `count` calls."""
    many = 4 * cores()

    def quiet(candidate: Candidate, case: Case) -> list[float]:
        return latencies(candidate.prepare(case, "inference"), count, 2 * seconds)

    def after_idling(candidate: Candidate, case: Case) -> list[float]:
        few = max(1, count // 100)
        return latencies(candidate.prepare(case, "inference"), few, 1e3 * seconds, IDLE_SECONDS)

    def busy_neighbour(candidate: Candidate, case: Case) -> list[float]:
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
            try:
                time.sleep(0.1)
                return latencies(candidate.prepare(case, "inference"), count, seconds)
            finally:
                neighbour.kill()

    def more_threads_than_cores(candidate: Candidate, case: Case) -> list[float]:
        with threads(many):
            return latencies(candidate.prepare(case, "inference"), count, seconds)

    def one_thread(candidate: Candidate, case: Case) -> list[float]:
        with threads(1):
            return latencies(candidate.prepare(case, "inference"), count, seconds)

    def data_loader_worker(candidate: Candidate, case: Case) -> list[float]:
        calls = _Calls(candidate, case, count, seconds)
        loader = DataLoader(calls, batch_size=None, num_workers=1, timeout=60 + 10 * seconds)
        (found,) = loader
        return list(found)

    def four_threads(candidate: Candidate, case: Case) -> list[float]:
        calls = candidate.prepare_threads(case, "inference", THREADS)
        found: list[float] = []
        begin = threading.Barrier(THREADS)

        def run(call: Call) -> None:
            begin.wait()
            found.extend(latencies(call, count // THREADS, seconds))

        workers = [threading.Thread(target=run, args=(call,)) for call in calls]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return found

    return {
        "quiet": quiet,
        f"after {1e3 * IDLE_SECONDS:.0f} ms idle": after_idling,
        "busy neighbour process": busy_neighbour,
        f"{many} threads on {cores()} cores": more_threads_than_cores,
        "one thread": one_thread,
        "DataLoader worker": data_loader_worker,
        f"{THREADS} Python threads": four_threads,
    }


def latency_rows(
    candidates: Sequence[Candidate], count: int, seconds: float
) -> list[dict[str, Any]]:
    """Percentiles in microseconds for each situation, case and candidate."""
    rows = []
    for name, run in situations(count, seconds).items():
        cases = pick(STEPS)
        if "idle" in name:
            cases += pick(["B1 T100 H256"])
        if name == "quiet" or "busy" in name or "threads on" in name:
            cases += [*pick(SHARED), LONG]
        for case, candidate in itertools.product(cases, candidates):
            samples = sorted(run(candidate, case))
            last = len(samples) - 1
            row = {
                "name": case.name,
                "situation": name,
                "candidate": candidate.name,
                "calls": len(samples),
                "p50_us": samples[round(0.5 * last)],
                "p90_us": samples[round(0.9 * last)],
                "p99_us": samples[round(0.99 * last)],
                "max_us": samples[-1],
            }
            rows.append(row)
            print(
                f"{case.name:18}{name:25}{candidate.name:13}{row['calls']:7}{row['p50_us']:10.1f}"
                f"{row['p90_us']:10.1f}{row['p99_us']:10.1f}{row['max_us']:10.1f}",
                flush=True,
            )
    return rows


def scaling_rows(names: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """Milliseconds with one thread and with all threads, for fusedrnn and torch."""
    most = torch.get_num_threads()
    rows = []
    for case, mode in itertools.product(pick(names), MODES):
        calls, counts = {}, {}
        for candidate in (Fused(), Torch()):
            call = candidate.prepare(case, mode)
            for count in (1, most):
                calls[f"{candidate.name} {count}"] = call
                counts[f"{candidate.name} {count}"] = count
        try:
            times = in_turn(calls, seconds, lambda key: torch.set_num_threads(counts[key]))  # noqa: B023
        finally:
            torch.set_num_threads(most)
        for name in ("fusedrnn", "torch"):
            one, all = (statistics.median(times[f"{name} {count}"]) for count in (1, most))
            rows.append(
                {
                    "name": case.name,
                    "mode": mode,
                    "candidate": name,
                    "threads": most,
                    "one_ms": one,
                    "all_ms": all,
                    "speedup": one / all,
                }
            )
            print(
                f"{case.name:18}{mode:25}{name:13}{one:10.4f} ms, {all:10.4f} ms with {most} "
                f"threads{'' if all < 1.05 * one else ': slower'}",
                flush=True,
            )
    return rows


def table(run: dict[str, Any]) -> str:
    """The page's two tables: latencies, and thread scaling."""
    tables = (_latency_table(run["rows"]), _scaling_table(run["scaling"]))
    return "\n".join([report.caption(run["header"]), "", *tables[0], "", *tables[1]])


def _latency_table(rows: Sequence[report.Row]) -> list[str]:
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    found = {(r["name"], r["situation"], r["candidate"]): r for r in rows}
    body = []
    for case, situation in dict.fromkeys((r["name"], r["situation"]) for r in rows):
        times = (
            " / ".join(
                report.digits(found[case, situation, name][key])
                for key in ("p50_us", "p90_us", "p99_us", "max_us")
                if key in found[case, situation, name]  # older runs have no p90_us
            )
            for name in names
        )
        body.append([case, situation, *times])
    head = ["case", "situation", *(report.TITLES[name] for name in names)]
    return report.markdown(head, body, text_columns=2)


def _scaling_table(rows: Sequence[report.Row]) -> list[str]:
    head = ["case", "mode", f"fusedrnn, {rows[0]['threads']} threads over 1", "torch"]
    speedups = {(r["name"], r["mode"], r["candidate"]): r["speedup"] for r in rows}
    body = [
        [case, mode, *(f"{speedups[case, mode, name]:.2f}" for name in ("fusedrnn", "torch"))]
        for case, mode in dict.fromkeys((r["name"], r["mode"]) for r in rows)
    ]
    return report.markdown(head, body, text_columns=2)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, stores and reports; gives the exit status."""
    parser = report.parser("latency", __doc__)
    parser.add_argument("--calls", type=int, default=CALLS, help="calls in a row (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="time limit for the calls in a row (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="a JSON file (%(default)s)")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="report a stored run instead of measuring"
    )
    args = parser.parse_args(argv)
    if args.report:
        run = json.loads(args.report.read_text())
    else:
        candidates: list[Candidate] = [Fused(), Torch()]
        missing = OnnxRuntime().available()
        if missing:
            print(f"without onnxruntime: {missing}", file=sys.stderr)
        else:
            candidates.append(OnnxRuntime())
        header = machine.header("cpu", candidates)
        print(f"{'case':18}{'situation':25}{'candidate':13}{'calls':>7}", end="")
        print(f"{'p50 us':>10}{'p90 us':>10}{'p99 us':>10}{'max us':>10}")
        rows = latency_rows(candidates, args.calls, args.seconds)
        run = {"header": header, "rows": rows, "scaling": scaling_rows(SCALING, args.seconds)}
        report.store(args.output, run)
    print(table(run))
    return 0

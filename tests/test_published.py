"""Published figures are those of the stored runs, and the runs agree with themselves."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cases, charts, publish, report

ROOT = publish.ROOT
GRIDS = ("cpu", "cpu_avx2", *publish.gpus())
# Figures of the method, not of a run: how a row counts as noisy, an interval's width, equal speed.
OF_THE_METHOD = {"20 %", "95 %", "1×"}
SPEED_UP = re.compile(r"\d[\d.,]*\s?×|\d[\d.,]* times as (?:fast|long)")
MEASURED = re.compile(r"\d[\d.,]*\s?(?:×|%|[mµun]s\b|GFLOP|GB/s)|\d[\d.,]* times as (?:fast|long)")


def prose(text: str) -> str:
    """A page without code, published parts and addresses."""
    for pattern in (
        r"^```.*?^```$",
        r"<!-- ([a-z][a-z ]*) -->\n.*?<!-- /\1 -->",
        r"<!-- n: .*?<!-- /n -->",
        r"`[^`]*`",
        r"\]\([^)]*\)",
    ):
        text = re.sub(pattern, "", text, flags=re.M | re.S)
    return text


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the pages and charts, which `publish` then takes for the project's."""
    for name in publish.PAGES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for chart in publish.all_charts():
        target = tmp_path / chart.path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(chart.path, target)
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(publish, "FRONT_CHART", tmp_path / publish.FRONT_CHART.relative_to(ROOT))
    runs = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    monkeypatch.setattr(publish, "stored", runs.__getitem__)
    monkeypatch.setattr(publish, "gpus", lambda: iter(GRIDS[2:]))
    return tmp_path


RESULTS = report.RESULTS


def test_pages_and_charts_are_as_stored(capsys: pytest.CaptureFixture[str]) -> None:
    assert publish.main(["--check"]) == 0, capsys.readouterr().out


def figures(text: str) -> Iterator[re.Match[str]]:
    """The published parts with a figure in them."""
    yield from re.finditer(r"(?:<!-- n: [^>]* -->|^\| .*?)(\d+\.\d+)(?=×|%| µs| ms)", text, re.M)


@pytest.mark.parametrize("page", publish.PAGES)
def test_a_figure_changed_by_hand_is_found(
    page: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish.main(["--check"]) == 0
    text = (copy / page).read_text()
    found = list(figures(text))
    assert len(found) > 5
    for part in (found[0], found[len(found) // 2], found[-1]):
        changed = f"{float(part[1]) + 1:.2f}"
        (copy / page).write_text(text[: part.start(1)] + changed + text[part.end(1) :])
        capsys.readouterr()
        assert publish.main(["--check"]) == 1
        assert capsys.readouterr().out == f"{page} differs from the stored runs\n"
    assert publish.main([]) == 0
    assert (copy / page).read_text() == text


def test_figures(copy: Path) -> None:
    """A mean, a case, a clock, the least; and the machine."""
    rows = [
        {"name": name, "mode": "training", "baseline": "torch", "ratio": ratio}
        | {"graph": {"ratio": graph}}
        for name, ratio, graph in (("a b", 2.0, 3.0), ("c", 8.0, None))
    ]
    header = {"processor": "Some", "isa": "avx2", "threads": 4}
    publish.stored("cpu").update(rows=rows, header=header)
    for name, value in {
        "cpu training over torch": "4.0×",
        "cpu training over torch in a b": "2.0×",
        "cpu training over torch by graph": "3.0×",
        "cpu training over torch at least": "2.0×",
        "cpu training over torch in c at least": "8.0×",
        "cpu machine": "Some with AVX2, 4 threads",
    }.items():
        assert publish.figure(name) == value


def test_a_changed_run_is_found(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tables, figures and charts follow a run."""
    for row in publish.stored("cpu")["rows"]:
        row["ratio"] *= 2
    assert publish.main(["--check"]) == 1
    stale = {line.partition(" ")[0] for line in capsys.readouterr().out.splitlines()}
    results = "benchmarks/results/cpu_ratio.png"
    assert stale == {*publish.PAGES, "docs/images/speed.png", results}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "It has <!-- n: cpu inference over nothing -->1×<!-- /n -->",
            "cpu has no inference over nothing",
        ),
        (
            "It has <!-- n: cpu inference over torch in none -->1×<!-- /n -->",
            "cpu has no case 'none'",
        ),
        ("It has <!-- n: fast -->1×<!-- /n -->", "'fast' is no figure"),
        ("<!-- fast -->\n<!-- /fast -->", "'fast' is no table"),
        ("It is\n<!-- n: cpu machine -->old<!-- /n -->", "a line begins with a figure"),
        ("no marker", "a page without a marker"),
    ],
)
def test_unknown_figures_are_errors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        publish.published(text)


@pytest.mark.parametrize("page", publish.PAGES)
def test_every_figure_is_published(page: str) -> None:
    """No figure of a run stands outside of the markers, where nothing would hold it."""
    found = set(MEASURED.findall(prose((ROOT / page).read_text())))
    assert found <= OF_THE_METHOD


def test_other_pages_have_no_speed_ups() -> None:
    pages = {*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")}
    pages -= {ROOT / page for page in publish.PAGES}
    assert len(pages) > 4
    for page in pages:
        assert not SPEED_UP.findall(prose(page.read_text())), page


@pytest.mark.parametrize("name", GRIDS)
def test_rows_agree_with_themselves(name: str) -> None:
    rows = publish.stored(name)["rows"]
    assert len(rows) > 50
    for row in rows:
        clocks = [row, *(row[clock] for clock in report.CLOCKS if clock in row)]
        for found in (c for c in clocks if c["ratio"] is not None):
            assert found["ratio"] == pytest.approx(found["baseline_ms"] / found["ours_ms"])
        if name.startswith("cpu"):
            assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"], row
        if bound := row["roofline_ms"]:
            assert bound <= row["ours_ms"], (
                f"{row['name']} {row['mode']} is over 100 % of the limit"
            )
            assert bound <= row["baseline_ms"], f"{row['name']} {row['mode']} {row['baseline']}"
        assert report.ratio_text(row).startswith("~") == report.is_noisy(row)


def test_no_share_is_over_the_limit() -> None:
    for page in publish.PAGES:
        shares = re.findall(r"\| (\d+)%(?= \|)", (ROOT / page).read_text())
        assert all(int(share) <= 100 for share in shares)


def test_runs_have_the_grids_cases() -> None:
    for name in GRIDS:
        device = "cpu" if name.startswith("cpu") else "cuda"
        expected = [case.name for case in cases.pick([], device)]
        assert list(dict.fromkeys(row["name"] for row in publish.stored(name)["rows"])) == expected
    first, second = (
        [
            (row["name"], row["mode"], row["baseline"])
            for row in publish.stored(name)["rows"]
            if row["baseline"] not in report.OF_FEW_CASES
        ]
        for name in GRIDS[:2]
    )
    assert first == second
    assert set(publish.FRONT) <= {name for name, _, _ in first}
    assert set(publish.FRONT_CASES) <= {name for name, _, _ in first}


def test_runs_agree_with_each_other() -> None:
    """A quiet call takes as long in the latencies, and among the frozen layers, as in the grid."""
    grid: dict[tuple[str, str], float] = {}
    for row in publish.stored("cpu")["rows"]:
        if row["mode"] == "inference":
            grid[row["name"], "fusedrnn"] = row["ours_ms"]
            grid[row["name"], row["baseline"]] = row["baseline_ms"]
    compared: dict[str, dict[tuple[str, str], float]] = {
        "latency": {
            (row["name"], row["candidate"]): row["p50_us"] / 1e3
            for row in publish.stored("latency")["rows"]
            if row["situation"] == "quiet"
        },
        "frozen": {(r["name"], r["candidate"]): r["ms"] for r in publish.stored("frozen")["rows"]},
    }
    for name, times in compared.items():
        both = times.keys() & grid.keys()
        assert len(both) > 10
        for key in both:
            assert 1 / 1.3 < times[key] / grid[key] < 1.3, (name, key, times[key], grid[key])


def test_a_chart_knows_its_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [{"name": "a", "mode": "inference", "baseline": "torch", "ratio": 2.0}]
    header = {"device": "x", "torch": "2", "baselines": {}, "date": "2026-01-02T03:04:05+00:00"}
    run: dict[str, Any] = {"header": header, "rows": rows}
    chart = charts.ratios(run, tmp_path / "a.png")
    assert not chart.is_current()
    charts.draw([chart])
    assert chart.path.read_bytes().startswith(b"\x89PNG")
    assert chart.is_current()
    rows[0]["ratio"] = 2.5
    assert not charts.ratios(run, chart.path).is_current()


def test_addresses_are_of_files() -> None:
    """README's links are addresses, which also work on a package index; each is a file here."""
    text = (ROOT / "README.md").read_text()
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) > 8
    places = "blob/main/|tree/main/|raw.githubusercontent.com/fusedrnn/fusedrnn/main/"
    for target in targets:
        assert target.startswith("https://"), target
        if "fusedrnn/fusedrnn" in target:
            path = re.split(places, target)[-1]
            assert (ROOT / path).exists(), target


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert any(line.startswith("```python") for line in lines[:10])
    assert sum(line.startswith("| ") and line.count("×") >= 2 for line in lines[:20]) >= 5

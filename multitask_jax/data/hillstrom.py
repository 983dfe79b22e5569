"""The MineThatData e-mail experiment (Hillstrom 2008), and customers like its own.

    t = trial("hillstrom.csv")                  # 64,000 people, 3 arms, 3 outcomes
    encoder = encoder_of("hillstrom.csv")
    x, unknown, missing = encode(encoder, features_of(*read_text("customers.csv")))

A third of the customers got an e-mail with men's merchandise, a third one with
women's, a third none; in the two weeks after: did they visit, did they buy, for how
many dollars.

A category that the encoder has not seen is all zeros in its one-hot columns; what is
missing ("", NA, NaN, null) becomes the median, or the most frequent value, of the rows
that the encoder was fitted on. Both are counted.

Legend: N people, F features, O outcomes.
"""

import csv
import json
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from multitask_jax.data.uplift import Trial

ARMS = ("No E-Mail", "Mens E-Mail", "Womens E-Mail")
OUTCOMES = ("visit", "conversion", "spend")
BINARY = (True, True, False)
NUMBERS = ("recency", "history")
FLAGS = ("mens", "womens", "newbie")
CATEGORIES = ("history_segment", "zip_code", "channel")
FEATURES = (*NUMBERS, *FLAGS, *CATEGORIES)
SEGMENTS = (*CATEGORIES, *FLAGS)
_MISSING = ("", "na", "nan", "null", "none")


class Table(NamedTuple):
    """The file's columns, as numbers where they are numbers."""

    columns: Mapping[str, np.ndarray]  # [N] by feature: float64 or strings, see below
    arm: np.ndarray  # [N] int32, an index of ARMS
    y: np.ndarray  # [N, O] float32


class Encoded(NamedTuple):
    """Features of people, and what was wrong with them."""

    x: np.ndarray  # [N, F] float32
    unknown: dict[str, int]  # values by column that the encoder has not seen
    missing: dict[str, int]  # values by column that were not there


class Encoder(NamedTuple):
    """How columns become features. JSON holds all of it."""

    fill: Mapping[str, float | str]  # by column: what stands for a missing value
    scale: Mapping[str, tuple[float, float]]  # by column of numbers: mean, deviation
    categories: Mapping[str, tuple[str, ...]]  # by column of strings

    @property
    def features(self) -> tuple[str, ...]:
        """F names, in the order of x."""
        hot = [f"{name}={v}" for name in CATEGORIES for v in self.categories[name]]
        return ("recency", "log1p(history)", *FLAGS, *hot)

    def to_json(self) -> str:
        """The text that `from_json` takes."""
        return json.dumps(self._asdict())

    @staticmethod
    def from_json(text: str) -> "Encoder":
        """The encoder that `to_json` wrote.

        Raises:
          ValueError: the text is not one.
        """
        try:
            found = json.loads(text)
            return Encoder(
                {name: found["fill"][name] for name in FEATURES},
                {n: tuple(map(float, found["scale"][n])) for n in NUMBERS},
                {n: tuple(found["categories"][n]) for n in CATEGORIES},
            )
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(
                f"the encoder can't be read ({type(e).__name__}: {e}); expected what"
                " Encoder.to_json wrote: train the model again"
            ) from e


def read_text(path: str | os.PathLike[str]) -> tuple[dict[str, list[str]], str]:
    """Columns of a CSV file as they are, and the path for errors.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a table: no rows, a name twice, or a line of another length.
    """
    path = os.fspath(path)
    with open(path, encoding="utf-8-sig", newline="") as f:
        lines = csv.reader(f)
        try:
            header = [name.strip() for name in next(lines, [])]
            # An empty line is no row, as in csv.DictReader.
            rows = [line for line in lines if line]
        except (csv.Error, UnicodeDecodeError) as e:
            raise ValueError(
                f"{path} can't be read ({e}); expected a CSV file in UTF-8"
            ) from e
    if len(set(header)) < len(header):
        twice = sorted({name for name in header if header.count(name) > 1})
        raise ValueError(f"{path}: got the columns {twice} twice, expected each once")
    if not rows:
        raise ValueError(f"{path}: got no rows, expected a header and people below it")
    for i, line in enumerate(rows):
        if len(line) != len(header):
            raise ValueError(
                f"{path}, row {i + 1}: got {len(line)} values, expected {len(header)}"
                " as in the header; quote values that contain commas"
            )
    return dict(zip(header, map(list, zip(*rows, strict=True)), strict=True)), path


def features_of(
    text: Mapping[str, Sequence[str]], where: str = "the table"
) -> dict[str, np.ndarray]:
    """The columns that `encode` takes, checked.

    Args:
      text: columns as strings; others than `FEATURES` are left out.
      where: named in errors.

    Returns:
      [N] by column: numbers and flags as float64 with NaN where missing, categories as
      strings with "" where missing.

    Raises:
      ValueError: a column is not there, or a value is not what it must be.
    """
    _need(text, FEATURES, where)
    columns = {}
    for name in FEATURES:
        if name in CATEGORIES:
            columns[name] = _strings(text[name])
        elif name in FLAGS:
            columns[name] = _numbers(text[name], name, where, flag=True, gaps=True)
        else:
            columns[name] = _numbers(text[name], name, where, gaps=True)
    return columns


def read(path: str | os.PathLike[str]) -> Table:
    """The experiment's file, the public one or a sample of its rows.

    Raises:
      FileNotFoundError: no such file.
      ValueError: columns are missing or unexpected, or a value is not what it must be.
    """
    return table_of(*read_text(path))


def table_of(text: Mapping[str, Sequence[str]], where: str = "the table") -> Table:
    """As `read`, of columns that were read before."""
    expected = (*FEATURES, "segment", *OUTCOMES)
    _need(text, expected, where)
    extra = sorted(set(text) - set(expected))
    if extra:
        raise ValueError(
            f"{where}: got the columns {extra}, expected only {list(expected)}; remove"
            " them, for they may tell the outcome"
        )
    columns = features_of(text, where)
    given = _strings(text["segment"])
    arm = np.full(len(given), -1, np.int32)
    for i, name in enumerate(ARMS):
        arm[given == name] = i
    _check(arm >= 0, text["segment"], "segment", where, f"one of {list(ARMS)}")
    outcomes = [
        _numbers(text[name], name, where, flag=binary)
        for name, binary in zip(OUTCOMES, BINARY, strict=True)
    ]
    return Table(columns, arm, np.stack(outcomes, axis=1).astype(np.float32))


def fit_encoder(
    columns: Mapping[str, np.ndarray], rows: np.ndarray | None = None
) -> Encoder:
    """What `encode` needs to know.

    Args:
      columns: of `features_of` or a Table.
      rows: those to learn from; all if not given.

    Raises:
      ValueError: a column has no value at all.
    """
    fill: dict[str, float | str] = {}
    scale, categories = {}, {}
    for name in FEATURES:
        column = columns[name] if rows is None else columns[name][rows]
        there = column[column != ""] if name in CATEGORIES else column[column == column]
        if not len(there):
            raise ValueError(
                f"column {name}: got no value in {len(column)} rows, expected some to"
                " fit the encoder on"
            )
        values, counts = np.unique(there, return_counts=True)
        common = values[counts.argmax()].item()
        fill[name] = float(np.median(there)) if name in NUMBERS else common
        if name in CATEGORIES:
            categories[name] = tuple(map(str, values))
        elif name in NUMBERS:
            filled = _curve(name, np.where(np.isnan(column), fill[name], column))
            # A constant column is all zeros, not a division by zero.
            scale[name] = float(filled.mean()), float(filled.std()) or 1.0
    return Encoder(fill, scale, categories)


def encode(encoder: Encoder, columns: Mapping[str, np.ndarray]) -> Encoded:
    """Columns as features, and counts of what was unknown or missing.

    Args:
      encoder: of `fit_encoder`.
      columns: of `features_of` or a Table.
    """
    parts, unknown, missing = [], {}, {}
    for name in FEATURES:
        column = columns[name]
        gaps = column == "" if name in CATEGORIES else np.isnan(column)
        missing[name] = int(gaps.sum())
        if name in CATEGORIES:
            known = np.array(encoder.categories[name])
            hot = np.where(gaps, encoder.fill[name], column)[:, None] == known[None]
            unknown[name] = int((~hot.any(axis=1)).sum())
            parts.append(hot)
            continue
        filled = np.where(gaps, encoder.fill[name], column)
        if name in NUMBERS:
            mean, deviation = encoder.scale[name]
            filled = (_curve(name, filled) - mean) / deviation
        parts.append(filled[:, None])
    x = np.concatenate(parts, axis=1, dtype=np.float32)
    return Encoded(x, unknown, missing)


def encoder_of(path: str | os.PathLike[str]) -> Encoder:
    """The encoder of `trial`, fitted on all rows of the file.

    Raises:
      FileNotFoundError, ValueError: as `read`.
    """
    return fit_encoder(read(path).columns)


def trial(path: str | os.PathLike[str], rows: np.ndarray | None = None) -> Trial:
    """The experiment, its features encoded.

    The encoder sees the features of all rows, and no outcome and no arm of any.

    Args:
      path: of the CSV file.
      rows: those to keep; all if not given.

    Raises:
      FileNotFoundError, ValueError: as `read`.
    """
    return trial_of(read(path), rows)


def trial_of(table: Table, rows: np.ndarray | None = None) -> Trial:
    """As `trial`, of a table that was read before."""
    encoder = fit_encoder(table.columns)
    whole = Trial(
        encode(encoder, table.columns).x,
        table.arm,
        table.y,
        encoder.features,
        ARMS,
        OUTCOMES,
        BINARY,
        {name: _segment(name, table.columns[name]) for name in SEGMENTS},
    )
    return whole if rows is None else whole.at(rows)


def _segment(name: str, column: np.ndarray) -> np.ndarray:
    if name in CATEGORIES:
        return np.where(column == "", "missing", column)
    words = np.where(column == 1, "yes", "no")
    return np.where(np.isnan(column), "missing", words)


def _curve(name: str, x: np.ndarray) -> np.ndarray:
    return np.log1p(x) if name == "history" else x


def _strings(text: Sequence[str]) -> np.ndarray:
    x = np.char.strip(np.array(text, dtype=str))
    # Few values are many rows' own, so that only these are lowered.
    values, index = np.unique(x, return_inverse=True)
    gaps = np.array([v.lower() in _MISSING for v in values.tolist()])
    return np.where(gaps[index], "", x)


def _numbers(
    text: Sequence[str],
    name: str,
    where: str,
    *,
    flag: bool = False,
    gaps: bool = False,
) -> np.ndarray:
    """[N] float64, NaN where missing; not negative, and 0 or 1 if it is a flag."""
    expected = "0 or 1" if flag else "a number that is not negative"
    try:
        x = np.array(text, dtype=np.float64)
        there = ~np.isnan(x)
    except ValueError:
        x = np.array([_number(value) for value in text])
        there = np.array([v.strip().lower() not in _MISSING for v in text])
    good = np.isin(x, (0, 1)) if flag else np.isfinite(x) & (x >= 0)
    _check(good | ~there if gaps else good, text, name, where, expected)
    return x


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return np.nan


def _need(text: Mapping[str, Sequence[str]], names: Sequence[str], where: str) -> None:
    lacking = [name for name in names if name not in text]
    if lacking:
        raise ValueError(
            f"{where}: got the columns {list(text)}, expected {lacking} too; name them"
            " as in the experiment's file"
        )


def _check(
    good: np.ndarray, text: Sequence[str], name: str, where: str, expected: str
) -> None:
    if not good.all():
        i = int(np.flatnonzero(~good)[0])
        count = int((~good).sum())
        raise ValueError(
            f"{where}, row {i + 1}, column {name}: got {text[i]!r}, expected {expected}"
            f" ({count} such values in all); correct or remove these rows"
        )

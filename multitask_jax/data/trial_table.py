"""A randomised experiment as a CSV file: a person a row, a kind a column.

    text, where = read_text("trial.csv")
    schema = infer(text, where, features=["age", "history:log", "channel"],
                   arm="group", control="none", outcomes=["visit", "profit"])
    table = table_of(schema, text, where)  # for `trial_features`

Kinds of columns:
    number    any finite number
    amount    one that is not negative
    log       an amount, learned from as log(1 + x)
    flag      0 or 1
    category  one of a few strings

Features may be missing ("", NA, NaN, null; of numbers None, too); arms and outcomes may
not.

Legend: N people, A arms (0 is the control), O outcomes.
"""

import csv
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

Kind = Literal["number", "amount", "log", "flag", "category"]
KINDS: tuple[str, ...] = get_args(Kind)
OUTCOME_KINDS = ("number", "amount", "flag")
MOST_CATEGORIES = 100  # of a column; more are likely names or identifiers
_MISSING = ("", "na", "nan", "null")
_NO_NUMBER = (*_MISSING, "none")  # of categories and arms "none" may be one
Text = Mapping[str, Sequence[str]]  # columns of a file, as they are


class Schema(NamedTuple):
    """What the columns of an experiment's file mean."""

    features: Mapping[str, Kind]
    arm: str  # the column that tells what a person was given
    arms: tuple[str, ...]  # its values: the control, the base arm, the others
    outcomes: Mapping[str, Kind]  # numbers, amounts or flags


class Table(NamedTuple):
    """The file's columns, as numbers where they are numbers."""

    columns: Mapping[str, np.ndarray]  # [N] by feature: float64 or strings, see below
    arm: np.ndarray  # [N] int32, an index of arms
    y: np.ndarray  # [N, O] float32


def blocks(
    path: str | os.PathLike[str], size: int | None = None
) -> Iterator[tuple[int, dict[str, list[str]]]]:
    """A CSV file, `size` people at a time: how many came before, and columns.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a table: no rows, a name twice, or a line of another length.
    """
    path = os.fspath(path)
    with open(path, encoding="utf-8-sig", newline="") as f:
        lines = csv.reader(f)
        try:
            header = [name.strip() for name in next(lines, [])]
            if len(set(header)) < len(header):
                twice = sorted({name for name in header if header.count(name) > 1})
                raise ValueError(
                    f"{path}: got the columns {twice} twice, expected each once"
                )
            before, rows = 0, []
            for line in lines:
                if not line:
                    continue  # an empty line is no row, as in csv.DictReader
                if len(line) != len(header):
                    raise ValueError(
                        f"{path}, row {before + len(rows) + 1}: got {len(line)} values,"
                        f" expected {len(header)} as in the header; quote values that"
                        " contain commas"
                    )
                rows.append(line)
                if len(rows) == size:
                    yield before, _columns(header, rows)
                    before, rows = before + len(rows), []
        except (csv.Error, UnicodeDecodeError) as e:
            raise ValueError(
                f"{path} can't be read ({e}); expected a CSV file in UTF-8"
            ) from e
    if rows:
        yield before, _columns(header, rows)
    elif not before:
        raise ValueError(f"{path}: got no rows, expected a header and people below it")


def _columns(header: Sequence[str], rows: Sequence[list[str]]) -> dict[str, list[str]]:
    return dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))


def read_text(path: str | os.PathLike[str]) -> tuple[dict[str, list[str]], str]:
    """All columns of a CSV file, and its path for errors; raises as `blocks`."""
    ((_, columns),) = blocks(path)
    return columns, os.fspath(path)


def infer(
    text: Text,
    where: str = "the table",
    *,
    features: Sequence[str],
    arm: str,
    control: str,
    outcomes: Sequence[str],
    treated: Sequence[str] | None = None,
) -> Schema:
    """A schema of named columns, their kinds told from their values.

    Args:
      text: columns as strings.
      where: named in errors.
      features: columns, or "COLUMN:KIND". Else 0 and 1 are a flag, other numbers a
        number, anything else a category.
      arm: the column that tells what a person was given.
      control: its value for the untreated.
      outcomes: as features; they are numbers, amounts or flags.
      treated: the column's other values, in the order of arms: the first is the base
        arm, those after it have increments over it. Sorted if not given.

    Raises:
      ValueError: no such column, or one that is named twice; no such control, or
        nothing besides it; other treated arms than told; an outcome that is no number;
        a kind that there is not; a word among numbers; or more than `MOST_CATEGORIES`
        arms, or values of a category.
    """
    if not features or not outcomes:
        raise ValueError(f"{where}: expected one feature and one outcome at least")
    told = [_told(name, text) for name in (*features, *outcomes)]
    names = [column for column, _ in told]
    _need(text, [*names, arm], where)
    if len({*names, arm}) <= len(names):
        raise ValueError(
            f"{where}: got features {list(features)}, outcomes {list(outcomes)} and arm"
            f" {arm!r}, expected each column once"
        )
    kinds: dict[str, Kind] = {}
    for i, (name, kind) in enumerate(told):
        here = f"{where}, column {name}"
        kinds[name] = kind = kind or _kind_of(text[name], here)
        allowed = KINDS if i < len(features) else OUTCOME_KINDS
        if kind not in allowed:
            raise ValueError(f"{here}: got {kind!r}, expected one of {allowed}")
        if kind == "category":
            _check_few(set(text[name]), here)
    words = {*_words(text[arm]).tolist()}
    arms = {w for w in words if w == control or w.lower() not in _MISSING}
    _check_few(arms, f"{where}, column {arm}")
    if control not in arms or len(arms) < 2:
        raise ValueError(
            f"{where}, column {arm}: got {sorted(arms)[:10]}, expected the control"
            f" {control!r} and another arm"
        )
    rest = sorted(arms - {control})
    if treated is not None and sorted(treated) != rest:
        raise ValueError(
            f"{where}, column {arm}: got the treated arms {list(treated)}, expected"
            f" each of {rest} once; name all of them, in the order of arms"
        )
    return Schema(
        {name: kinds[name] for name in names[: len(features)]},
        arm,
        (control, *(rest if treated is None else treated)),
        {name: kinds[name] for name in names[len(features) :]},
    )


def _told(name: str, text: Text) -> tuple[str, str]:
    """Column and kind: "age:log" -> ("age", "log"), "age" -> ("age", "")."""
    column, _, kind = name.rpartition(":")
    # A column's name may have a colon of its own.
    return (column, kind) if column and name not in text else (name, "")


def _kind_of(text: Sequence[str], here: str) -> Kind:
    there = [v for v in dict.fromkeys(text) if v.strip().lower() not in _NO_NUMBER]
    numbers = np.array([_number(v) for v in there])
    words = np.isnan(numbers)
    if 0 < words.sum() < len(there) / 2:
        first = there[int(words.argmax())]
        raise ValueError(
            f"{here}: got {first!r} among numbers; correct it or leave it empty, or"
            " name the kind: COLUMN:category"
        )
    if words.any():
        return "category"
    return "flag" if set(numbers.tolist()) <= {0.0, 1.0} else "number"


def _check_few(values: Collection[str], here: str) -> None:
    if len(values) > MOST_CATEGORIES:
        raise ValueError(
            f"{here}: got {len(values)} different values, expected at most"
            f" {MOST_CATEGORIES}; leave out names and identifiers, or group them"
        )


def features_of(
    kinds: Mapping[str, Kind], text: Text, where: str = "the table", *, before: int = 0
) -> dict[str, np.ndarray]:
    """The columns that `encode` takes, checked.

    Args:
      kinds: of features, by column.
      text: columns as strings; others than these are left out.
      where: named in errors.
      before: rows of the file before these, for errors.

    Returns:
      [N] by column: numbers as float64 with NaN where missing, categories as strings
      with "" where missing.

    Raises:
      ValueError: a column is not there, or a value is not what it must be.
    """
    _need(text, list(kinds), where)
    return {
        name: _strings(text[name])
        if kind == "category"
        else _numbers(text[name], kind, name, where, gaps=True, before=before)
        for name, kind in kinds.items()
    }


def table_of(schema: Schema, text: Text, where: str = "the table") -> Table:
    """Columns, arms and outcomes; other columns are left out.

    Raises:
      ValueError: a column is not there, or a value is not what it must be; of arms and
        outcomes none may be missing.
    """
    _need(text, [*schema.features, schema.arm, *schema.outcomes], where)
    columns = features_of(schema.features, text, where)
    given = _words(text[schema.arm])
    arm = np.full(len(given), -1, np.int32)
    for i, name in enumerate(schema.arms):
        arm[given == name] = i
    expected = f"one of {list(schema.arms)}"
    _check(arm >= 0, text[schema.arm], schema.arm, where, expected)
    outcomes = [
        _numbers(text[name], kind, name, where)
        for name, kind in schema.outcomes.items()
    ]
    return Table(columns, arm, np.stack(outcomes, axis=1).astype(np.float32))


def missing(kind: Kind, column: np.ndarray) -> np.ndarray:
    """Which values [N] of a column of `features_of` were not there."""
    return column == "" if kind == "category" else np.isnan(column)


def segments_of(
    kinds: Mapping[str, Kind], columns: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Categories and flags, as words to report by."""
    found = {}
    for name, kind in kinds.items():
        column = columns[name]
        if kind in ("category", "flag"):
            flags = np.where(column == 1, "yes", "no")
            words = column if kind == "category" else flags
            found[name] = np.where(missing(kind, column), "missing", words)
    return found


def _words(text: Sequence[str]) -> np.ndarray:
    return np.char.strip(np.array(text, dtype=str))


def _strings(text: Sequence[str]) -> np.ndarray:
    """[N], "" where missing."""
    x = _words(text)
    # Few values are many rows' own, so that only these are lowered.
    values, index = np.unique(x, return_inverse=True)
    gaps = np.array([v.lower() in _MISSING for v in values.tolist()])
    return np.where(gaps[index], "", x)


def _numbers(
    text: Sequence[str],
    kind: Kind,
    name: str,
    where: str,
    *,
    gaps: bool = False,
    before: int = 0,
) -> np.ndarray:
    """[N] float64, NaN where missing (if there may be `gaps`); checked by its kind."""
    try:
        x = np.array(text, dtype=np.float64)
        there = ~np.isnan(x)
    except ValueError:
        x = np.array([_number(value) for value in text])
        there = np.array([v.strip().lower() not in _NO_NUMBER for v in text])
    if kind == "flag":
        good, expected = np.isin(x, (0, 1)), "0 or 1"
    elif kind == "number":
        good, expected = np.isfinite(x), "a finite number"
    else:
        good, expected = np.isfinite(x) & (x >= 0), "a number that is not negative"
    _check(good | ~there if gaps else good, text, name, where, expected, before)
    return x


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return np.nan


def _need(text: Text, names: Sequence[str], where: str) -> None:
    lacking = [name for name in names if name not in text]
    if lacking:
        raise ValueError(
            f"{where}: got the columns {list(text)}, expected {lacking} too; name them"
            " as in the experiment's file"
        )


def _check(
    good: np.ndarray,
    text: Sequence[str],
    name: str,
    where: str,
    expected: str,
    before: int = 0,
) -> None:
    if not good.all():
        i = int(np.flatnonzero(~good)[0])
        count = int((~good).sum())
        raise ValueError(
            f"{where}, row {before + i + 1}, column {name}: got {text[i]!r}, expected"
            f" {expected} ({count} such values in all); correct or remove these rows"
        )

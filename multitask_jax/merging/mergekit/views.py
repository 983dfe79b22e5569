"""Readers that present other readers' tensors: renamed, cast, rows moved.

A merge then sees checkpoints whose names, dtypes and shapes agree, and needs to know
nothing of slices of layers or of vocabularies.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from multitask_jax.checkpoints import Reader, TensorInfo


class Rows(NamedTuple):
    """An embedding whose rows follow another vocabulary.

    Row i is row `own[i]` of the tensor, and where that is -1, the mean of the donors'
    rows; with no donor, zeros.
    """

    own: np.ndarray  # (V,) row of the tensor for each row presented, -1: none
    donors: tuple[tuple[Reader, str, np.ndarray], ...]  # tensor, and its rows likewise


class Part(NamedTuple):
    """A tensor as it is presented: which it is, and how."""

    reader: Reader
    name: str
    info: TensorInfo
    rows: Rows | None = None


class View:
    """A `Reader` over parts of other readers, which stay open when it is closed."""

    def __init__(
        self,
        parts: Mapping[str, Part],
        path: Path,
        aliases: Mapping[str, str] | None = None,
    ):
        self.path = path
        self.parts = dict(parts)
        self.tensors = {name: part.info for name, part in parts.items()}
        self.aliases = dict(aliases or {})
        readers = {id(p.reader): p.reader for p in parts.values()}.values()
        formats = {r.format for r in readers}
        # What `peak_memory` estimates with: Orbax decodes large chunks.
        self.format = "orbax" if "orbax" in formats else "safetensors"
        self.cache_bytes = sum(getattr(r, "cache_bytes", 0) for r in readers)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Flat entries [start, stop) of a tensor as presented."""
        part = self.parts[name]
        stop = part.info.size if stop is None else stop
        if part.rows is None:
            flat = part.reader.read(part.name, start, stop)
        else:
            flat = _aligned(part, start, stop)
        return flat.astype(part.info.dtype, copy=False)

    def origin(self, name: str) -> Path:
        """Where a tensor comes from, for errors."""
        return self.parts[name].reader.path

    def close(self) -> None:
        """Nothing: the readers belong to others."""


def _aligned(part: Part, start: int, stop: int) -> np.ndarray:
    """Flat entries of rows that were moved."""
    assert part.rows is not None
    width = part.info.size // part.info.shape[0]
    first, last = start // width, -(-stop // width)
    own = part.rows.own[first:last]
    rows = _gather(part.reader, part.name, own, width)
    lacking = own < 0
    if lacking.any():
        rows = rows.astype(np.promote_types(rows.dtype, np.float32))
        rows[lacking] = _mean_row(part.rows.donors, first, last, lacking, width)
    return rows.reshape(-1)[start - first * width : stop - first * width]


def _mean_row(
    donors: Sequence[tuple[Reader, str, np.ndarray]],
    first: int,
    last: int,
    lacking: np.ndarray,
    width: int,
) -> np.ndarray:
    """Means over the donors that have a row, zeros where none has."""
    total = np.zeros((np.count_nonzero(lacking), width))
    count = np.zeros((len(total), 1))
    for reader, name, rows in donors:
        wanted = rows[first:last][lacking]
        has = wanted >= 0
        total += _gather(reader, name, wanted, width)
        count += has[:, None]
    return total / np.maximum(count, 1)


def _gather(reader: Reader, name: str, rows: np.ndarray, width: int) -> np.ndarray:
    """(len(rows), width); zeros for -1. Reads runs of neighbours at once."""
    info = reader.tensors[name]
    out = np.zeros((len(rows), width), info.dtype)
    breaks = np.flatnonzero((np.diff(rows) != 1) | (rows[:-1] < 0)) + 1
    for begin, end in zip(
        [0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True
    ):
        if end > begin and rows[begin] >= 0:
            row = int(rows[begin])
            flat = reader.read(name, row * width, (row + end - begin) * width)
            out[begin:end] = flat.reshape(-1, width)
    return out

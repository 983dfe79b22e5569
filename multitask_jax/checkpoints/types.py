"""What every checkpoint format offers: lazy tensors in, incremental tensors out."""

import math
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np


class CheckpointError(ValueError):
    """A path, file or directory that is not the checkpoint it should be."""


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120
# What a file holds, in an error: a few entries, a few levels.
brief = _short.repr

# Far more than any model has; with the lengths of names they bound the memory that
# names take, whatever a file claims.
MAX_TENSORS, MAX_NAME = 1_000_000, 1024
_MAX_RANK, _MAX_SIZE = 64, 2**58  # NumPy's axes; its bytes, of any dtype


def name_problem(name: str) -> str:
    """What is wrong with a tensor's name, "" if nothing is.

    Names end in messages, reports and (Orbax) paths: no control characters, no halves
    of surrogate pairs, `MAX_NAME` characters at most.
    """
    if len(name) > MAX_NAME:
        return f"a name of {len(name)} characters, expected {MAX_NAME} at most"
    if not name.isprintable() and any(
        c < " " or "\x7f" <= c < "\xa0" or "\ud800" <= c < "\ue000" for c in name
    ):
        return "a name with control characters or surrogates"
    return ""


def shape_problem(shape: Sequence[object]) -> str:
    """What is wrong with a stored shape, "" if nothing is: no product is formed first.

    A shape with a zero must be one that NumPy can reshape to all the same.
    """
    if len(shape) > _MAX_RANK:
        return f"{len(shape)} axes, expected {_MAX_RANK} at most"
    if not all(type(n) is int and 0 <= n < _MAX_SIZE for n in shape):
        return "expected natural numbers below 2**58"
    if math.prod(max(1, n) for n in shape) >= _MAX_SIZE:  # type: ignore[call-overload]
        return "expected fewer than 2**58 entries"
    return ""


class TensorInfo(NamedTuple):
    """Name, shape and dtype (NumPy's or ml_dtypes') of a stored tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Number of entries (1 for a 0-d tensor)."""
        size = 1
        for n in self.shape:
            size *= n
        return size

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return self.size * np.dtype(self.dtype).itemsize


class Reader(Protocol):
    """An open checkpoint. `read` is thread-safe and costs only what it returns."""

    path: Path
    format: str
    tensors: dict[str, TensorInfo]  # in file order
    aliases: dict[str, str]  # tied name -> stored name

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Flat entries [start, stop) in C order; a view where possible."""

    def close(self) -> None:
        """Releases files and maps."""


class FormatWriter(Protocol):
    """A format's writer into a staging directory: `write` any order, then `finish`."""

    def write(self, name: str, start: int, flat: np.ndarray) -> None:
        """Stores flat entries [start, start + len(flat)); thread-safe."""

    def finish(self) -> None:
        """Completes the files in the staging directory."""

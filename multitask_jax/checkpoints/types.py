"""What every checkpoint format offers: lazy tensors in, incremental tensors out."""

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np


class CheckpointError(ValueError):
    """A path, file or directory that is not the checkpoint it should be."""


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

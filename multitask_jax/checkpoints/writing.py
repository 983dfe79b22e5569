"""Files of known layout, written in place; which entries of a tensor are still due."""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from multitask_jax.checkpoints.types import CheckpointError, TensorInfo


def reserve(path: Path, nbytes: int) -> int:
    """Creates a file of `nbytes` and returns its descriptor.

    Raises:
      OSError: the file exists or, where the system can tell, the disk is too small.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        if nbytes and hasattr(os, "posix_fallocate"):  # Linux has it
            # Reserve the space now: a full disk is an error before work, not after.
            os.posix_fallocate(fd, 0, nbytes)
        else:
            os.truncate(fd, nbytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


def write_all(fd: int, data: bytes | np.ndarray, offset: int) -> None:
    """Writes bytes at an offset, however many calls it takes."""
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


class OpenFiles:
    """Files open for writing, the `most` latest: thousands may be in the making.

    A descriptor is taken out while it is in use, so that no other thread closes it.
    """

    def __init__(self, most: int = 64):
        self._idle: dict[Path, int] = {}  # the longest unused first
        self._most = most
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def use(self, path: Path) -> Iterator[int]:
        """A descriptor of the file, opened if need be."""
        with self._lock:
            fd = self._idle.pop(path, None)
        if fd is None:
            fd = os.open(path, os.O_WRONLY)
        try:
            yield fd
        finally:
            self.keep(path, fd)

    def keep(self, path: Path, fd: int) -> None:
        """Takes a descriptor, to be used again or closed."""
        with self._lock:
            spare = [self._idle.pop(path)] if path in self._idle else []
            self._idle[path] = fd
            if len(self._idle) > self._most:
                spare.append(self._idle.pop(next(iter(self._idle))))
        for other in spare:
            os.close(other)

    def close(self) -> None:
        """Closes all; they may be used again."""
        with self._lock:
            idle, self._idle = self._idle, {}
        for fd in idle.values():
            os.close(fd)


class Due:
    """Counts the entries of each tensor that were not written yet; thread-safe."""

    def __init__(self, tensors: Sequence[TensorInfo]):
        self._tensors = {t.name: t for t in tensors}
        self._left = {t.name: t.size for t in tensors}
        self._lock = threading.Lock()

    def check(self, name: str, start: int, flat: np.ndarray) -> np.ndarray:
        """The entries [start, start + len(flat)), contiguous, if the tensor has them.

        Raises:
          ValueError: of another dtype, or beyond the tensor's end.
        """
        info = self._tensors[name]
        if flat.dtype != info.dtype or start + flat.size > info.size:
            raise ValueError(
                f"{name}: got {flat.size} {flat.dtype} entries at {start}, expected"
                f" {info.dtype} within {info.size}"
            )
        return np.ascontiguousarray(flat).reshape(-1)

    def written(self, name: str, entries: int) -> None:
        """Counts entries down."""
        with self._lock:
            self._left[name] -= entries

    def finish(self) -> None:
        """A tensor not fully written is a CheckpointError."""
        missing = [name for name, left in self._left.items() if left]
        if missing:
            raise CheckpointError(f"not fully written: {missing[:5]}")


def nest(tensors: Sequence[TensorInfo]) -> dict[str, Any]:
    """Nested dictionaries of tensors, from names with "/" between the keys.

    Raises:
      CheckpointError: empty keys, a name twice, or a name inside another.
    """
    tree: dict[str, Any] = {}
    for info in tensors:
        *parents, last = info.name.split("/")
        if not all((*parents, last)):
            raise CheckpointError(
                f"got the name {info.name!r}, expected non-empty keys between '/'"
            )
        here: Any = tree
        for key in parents:
            here = here.setdefault(key, {})
            if not isinstance(here, dict):
                break
        if not isinstance(here, dict) or last in here:
            raise CheckpointError(
                f"the name {info.name!r} occurs twice, or one of it and another name"
                " is a prefix of the other: they fit in no tree; rename one"
            )
        here[last] = info
    return tree

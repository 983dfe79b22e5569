"""flax msgpack files, memory-mapped in and written in place; flax is not imported."""

from pathlib import Path
from typing import Any

import numpy as np

from multitask_jax.checkpoints.msgpack_tree import DTYPES, MappedFile, flatten
from multitask_jax.checkpoints.msgpack_writer import create_writer
from multitask_jax.checkpoints.types import CheckpointError, TensorInfo

__all__ = ["DTYPES", "create_writer", "open_reader"]


class MsgpackReader:
    """Lazy, memory-mapped arrays of a flax msgpack file, named by path."""

    format = "msgpack"

    def __init__(self, path: Path):
        self.path = path
        self.aliases: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._file: MappedFile | None = MappedFile(_find(path))
        tree, end = self._file.tree(0)
        if not isinstance(tree, dict):
            raise self._file.error("expected a dictionary of arrays at the top")
        if end != len(self._file.data):
            raise self._file.error(
                f"the tree ends at byte {end} of {len(self._file.data)}: damaged"
            )
        self._leaves: dict[str, Any] = {}
        for name, leaf in flatten(tree):
            if name in self._leaves:
                raise self._file.error(f"two arrays are called {name!r}")
            self._leaves[name] = leaf
            self.tensors[name] = TensorInfo(name, leaf.shape, leaf.dtype)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Flat entries [start, stop), a view of the file unless chunks meet in it."""
        leaf, info = self._leaves[name], self.tensors[name]
        stop = info.size if stop is None else stop
        if isinstance(leaf, np.ndarray):
            return leaf.reshape(-1)[start:stop]
        found = []
        for offset, size in leaf.parts:
            a, b = max(start, 0), min(stop, size)
            if a < b:
                item = info.dtype.itemsize
                view = self._file.data[offset + a * item : offset + b * item]
                found.append(view.view(info.dtype))
            start, stop = start - size, stop - size
        if not found:
            return np.empty(0, info.dtype)
        return found[0] if len(found) == 1 else np.concatenate(found)

    def close(self) -> None:
        """Drops the map (the file closes when no view is left)."""
        self._file = None


def _find(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.msgpack"))
    if len(files) != 1:
        names = ", ".join(f.name for f in files[:4]) or "none"
        raise CheckpointError(
            f"{path}: expected one *.msgpack file, got {len(files)} ({names}); name"
            " the file to open; shards with an index have to be joined first"
        )
    return files[0]


def open_reader(path: Path) -> MsgpackReader:
    """Opens a file, or a directory with one; CheckpointError where it is damaged."""
    return MsgpackReader(path)

"""flax msgpack files of known layout, written in place."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from multitask_jax.checkpoints.msgpack_tree import CHUNKED, DTYPES, NDARRAY
from multitask_jax.checkpoints.types import CheckpointError, TensorInfo
from multitask_jax.checkpoints.writing import Due, nest, reserve, write_all

FILE_NAME = "flax_model.msgpack"
# flax's limit: msgpack itself holds at most 2**32 - 1 bytes in one value.
MAX_CHUNK_BYTES = 2**30


class MsgpackWriter:
    """One file of known layout, written in place and in any order."""

    def __init__(self, staging: Path, tensors: Sequence[TensorInfo], chunk_bytes: int):
        for t in tensors:
            name = np.dtype(t.dtype).name
            if name not in DTYPES:
                raise CheckpointError(
                    f"{t.name}: got dtype {name}, expected one of {', '.join(DTYPES)}"
                )
        self._due = Due(tensors)
        self._chunk_bytes = chunk_bytes
        # Where entries [start, stop) of each tensor go, and what stands between.
        self._parts: dict[str, list[tuple[int, int, int]]] = {}
        self._pieces: list[tuple[int, bytes]] = []
        self._end = 0
        self._lay(nest(tensors))
        self._fd = reserve(staging / FILE_NAME, self._end)
        try:
            for offset, text in self._pieces:
                write_all(self._fd, text, offset)
        except BaseException:
            self.close()
            raise

    def _emit(self, text: bytes) -> None:
        self._pieces.append((self._end, text))
        self._end += len(text)

    def _lay(self, tree: Mapping[str, Any]) -> None:
        """Fixes where everything goes, depth first."""
        packer = msgpack.Packer()
        self._emit(packer.pack_map_header(len(tree)))
        for key, value in tree.items():
            self._emit(packer.pack(key))
            if isinstance(value, dict):
                self._lay(value)
            elif value.nbytes <= self._chunk_bytes:
                self._lay_array(value, 0, value.size, value.shape)
            else:
                self._lay_chunks(value, packer)

    def _lay_chunks(self, info: TensorInfo, packer: msgpack.Packer) -> None:
        step = max(1, self._chunk_bytes // np.dtype(info.dtype).itemsize)
        starts = range(0, info.size, step)
        self._emit(packer.pack_map_header(3))
        self._emit(packer.pack(CHUNKED) + packer.pack(True) + packer.pack("shape"))
        self._emit(packer.pack({str(i): n for i, n in enumerate(info.shape)}))
        self._emit(packer.pack("chunks") + packer.pack_map_header(len(starts)))
        for i, start in enumerate(starts):
            stop = min(start + step, info.size)
            self._emit(packer.pack(str(i)))
            self._lay_array(info, start, stop, (stop - start,))

    def _lay_array(
        self, info: TensorInfo, start: int, stop: int, shape: tuple[int, ...]
    ) -> None:
        """The extension value around entries [start, stop), which come later."""
        dtype = np.dtype(info.dtype)
        n = (stop - start) * dtype.itemsize
        triple = b"\x93" + msgpack.packb(shape) + msgpack.packb(dtype.name)
        triple += _head(n, {1: 0xC4, 2: 0xC5, 4: 0xC6})
        size = len(triple) + n
        if size in (1, 2, 4, 8, 16):
            head = bytes([0xD4 + size.bit_length() - 1])
        else:
            head = _head(size, {1: 0xC7, 2: 0xC8, 4: 0xC9})
        self._emit(head + bytes([NDARRAY]) + triple)
        self._parts.setdefault(info.name, []).append((start, stop, self._end))
        self._end += n

    def write(self, name: str, start: int, flat: np.ndarray) -> None:
        """Stores flat entries [start, start + len(flat)) of a tensor."""
        flat = self._due.check(name, start, flat)
        for a, b, offset in self._parts[name]:
            low, high = max(a, start), min(b, start + flat.size)
            if low < high:
                piece = flat[low - start : high - start].view(np.uint8)
                write_all(self._fd, piece, offset + (low - a) * flat.itemsize)
        self._due.written(name, flat.size)

    def finish(self) -> None:
        """Closes the file; a tensor not fully written is an error."""
        self.close()
        self._due.finish()

    def close(self) -> None:
        """Closes the file as it is."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _head(n: int, codes: Mapping[int, int]) -> bytes:
    """The shortest of the length prefixes `codes` (bytes of length -> type)."""
    width = next(w for w in codes if n < 1 << 8 * w)
    return bytes([codes[width]]) + n.to_bytes(width, "big")


def create_writer(
    staging: Path,
    tensors: Sequence[TensorInfo],
    *,
    chunk_bytes: int = MAX_CHUNK_BYTES,
    max_shard_size: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> MsgpackWriter:
    """A writer of `flax_model.msgpack`, for `flax.serialization.msgpack_restore`.

    Args:
      staging: an existing directory.
      tensors: names ("/" nests dictionaries), shapes and dtypes, in file order.
      chunk_bytes: larger arrays are stored as chunks, as flax does.
      max_shard_size: not of this format.
      metadata: not stored: the format has no place for it.

    Raises:
      ValueError: `max_shard_size` is given.
      CheckpointError: a dtype that flax cannot read, or names that form no tree.
    """
    del metadata
    if max_shard_size is not None:
        raise ValueError(
            f"got max_shard_size {max_shard_size}, but a msgpack checkpoint is one"
            " file; drop it, or write safetensors"
        )
    return MsgpackWriter(staging, tensors, chunk_bytes)

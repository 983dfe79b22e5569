"""Writing safetensors: one file, or shards of a known layout with an index."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from multitask_jax.checkpoints.safetensors_file import NAMES
from multitask_jax.checkpoints.types import CheckpointError, TensorInfo
from multitask_jax.checkpoints.writing import Due, OpenFiles, reserve, write_all


def plan_shards(
    tensors: Sequence[TensorInfo], max_shard_size: int | None
) -> list[list[TensorInfo]]:
    """Cuts tensors, in order, into shards of at most `max_shard_size` bytes.

    A tensor larger than that gets a shard of its own.
    """
    shards: list[list[TensorInfo]] = [[]]
    used = 0
    for info in tensors:
        if shards[-1] and max_shard_size and used + info.nbytes > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].append(info)
        used += info.nbytes
    return shards


def _check_layout(path: Path, head: bytes, nbytes: int) -> None:
    """A file in the making must be of these tensors."""
    try:
        with path.open("rb") as file:
            same = file.read(len(head)) == head and path.stat().st_size == nbytes
    except OSError:
        same = False
    if not same:
        raise CheckpointError(f"{path}: missing, or the beginning of another merge")


class SafetensorsWriter:
    """Files of known layout, written in place and in any order."""

    def __init__(
        self,
        staging: Path,
        tensors: Sequence[TensorInfo],
        *,
        max_shard_size: int | None = None,
        metadata: Mapping[str, str] | None = None,
        stem: str = "model",
        attach: bool = False,
    ):
        """`attach`: to the files that a writer of the same arguments made before."""
        self._where: dict[str, tuple[Path, int, TensorInfo]] = {}
        self._files = OpenFiles()
        self._due = Due(tensors)
        metadata = {"format": "pt", **(metadata or {})}
        shards = plan_shards(tensors, max_shard_size)
        self.shards = [[t.name for t in shard] for shard in shards]
        weight_map = {}
        for k, shard in enumerate(shards):
            # Wide dtypes first keep every tensor aligned, whatever came before it.
            shard = sorted(shard, key=lambda t: -np.dtype(t.dtype).itemsize)
            file_name = f"{stem}.safetensors"
            if len(shards) > 1:
                file_name = f"{stem}-{k + 1:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= {t.name: file_name for t in shard}
            self._open(staging / file_name, shard, metadata, attach)
        if len(shards) > 1 and not attach:
            index = {
                "metadata": {"total_size": sum(t.nbytes for t in tensors)},
                "weight_map": {t.name: weight_map[t.name] for t in tensors},
            }
            name = f"{stem}.safetensors.index.json"
            (staging / name).write_text(json.dumps(index, indent=2) + "\n")

    def _open(
        self,
        path: Path,
        shard: Sequence[TensorInfo],
        metadata: Mapping[str, str],
        attach: bool,
    ) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        offset = 0
        for t in shard:
            header[t.name] = {
                "dtype": NAMES[np.dtype(t.dtype)],
                "shape": list(t.shape),
                "data_offsets": [offset, offset + t.nbytes],
            }
            offset += t.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)  # the data start on a 64-byte line
        start = 8 + len(text)
        head = len(text).to_bytes(8, "little") + text
        if attach:
            _check_layout(path, head, start + offset)
        else:
            fd = reserve(path, start + offset)
            self._files.keep(path, fd)
            write_all(fd, head, 0)
        for t in shard:
            begin = header[t.name]["data_offsets"][0]
            self._where[t.name] = (path, start + begin, t)

    def write(self, name: str, start: int, flat: np.ndarray) -> None:
        """Stores flat entries [start, start + len(flat)) of a tensor."""
        path, begin, info = self._where[name]
        data = self._due.check(name, start, flat).view(np.uint8)
        with self._files.use(path) as fd:
            write_all(fd, data, begin + start * info.dtype.itemsize)
        self._due.written(name, flat.size)

    def skip(self, names: Sequence[str]) -> None:
        """Says that tensors are written already: by another process, or before."""
        for name in names:
            self._due.written(name, self._where[name][2].size)

    def finish(self) -> None:
        """Closes the files; a tensor not fully written is an error."""
        self.close()
        self._due.finish()

    def close(self) -> None:
        """Closes the files as they are."""
        self._files.close()

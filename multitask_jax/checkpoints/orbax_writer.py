"""Orbax checkpoints written in place: zarr arrays whose chunks are flat ranges."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorstore as ts

from multitask_jax.checkpoints.orbax_reader import MANIFEST, STEP, TREE, reason
from multitask_jax.checkpoints.types import CheckpointError, TensorInfo
from multitask_jax.checkpoints.writing import Due, nest, reserve, write_all
from multitask_jax.checkpoints.zarr_boxes import CHUNK_BYTES, chunk_shape, spans

# The item written: every release of version 1 finds it unasked.
ITEM = "pytree"
INDICATOR = "orbax.checkpoint"
_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
_RESERVED = (TREE, "_sharding", "_strings.json", "array_metadatas", MANIFEST, ".", "..")


class OrbaxWriter:
    """Uncompressed zarr arrays of known layout, written in place and in any order.

    Chunks are flat ranges, so that a slice is written where it belongs, without
    reading a chunk back to change part of it.
    """

    def __init__(
        self,
        staging: Path,
        tensors: Sequence[TensorInfo],
        *,
        chunk_bytes: int = CHUNK_BYTES,
        metadata: Mapping[str, str] | None = None,
    ):
        self._staging, self._metadata = staging, dict(metadata or {})
        self._started = time.time_ns()
        self._tensors = {t.name: t for t in tensors}
        self._due = Due(tensors)
        nest(tensors)  # refuses names that fit in no tree
        self._chunks = {
            t.name: chunk_shape(t.shape, np.dtype(t.dtype).itemsize, chunk_bytes)
            for t in tensors
        }
        self._homes = _homes(staging / ITEM, tensors)
        (staging / ITEM).mkdir()
        for t in tensors:
            self._create(t)

    def _create(self, info: TensorInfo) -> None:
        home, chunk = self._homes[info.name], self._chunks[info.name]
        dtype = np.dtype(info.dtype)
        try:
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": f"{home}/"},
                "dtype": ts.dtype(dtype).name,
                "metadata": {"shape": info.shape, "chunks": chunk, "compressor": None},
            }
            context = ts.Context({"file_io_sync": False})
            ts.open(spec, context=context, create=True).result()
        except ValueError as e:
            raise CheckpointError(
                f"{info.name}: got {dtype} {info.shape}, which tensorstore cannot"
                f" store: {reason(e)}; write safetensors, or convert the tensor"
            ) from None
        nbytes = math.prod(chunk) * dtype.itemsize
        for file, *_ in spans(info.shape, chunk, 0, info.size):
            os.close(reserve(home / file, nbytes))

    def write(self, name: str, start: int, flat: np.ndarray) -> None:
        """Stores flat entries [start, start + len(flat)) of a tensor; thread-safe."""
        flat = self._due.check(name, start, flat)
        shape, chunk = self._tensors[name].shape, self._chunks[name]
        for file, before, a, b in spans(shape, chunk, start, start + flat.size):
            fd = os.open(self._homes[name] / file, os.O_WRONLY)
            try:
                data = flat[a - start : b - start].view(np.uint8)
                write_all(fd, data, before * flat.itemsize)
            finally:
                os.close(fd)
        self._due.written(name, flat.size)

    def finish(self) -> None:
        """Writes Orbax's metadata; a tensor not fully written is an error."""
        self._due.finish()
        # NumPy leaves: `ocp.load` without a target must not pass them through JAX.
        value = {"value_type": "np.ndarray", "skip_deserialize": False}
        entries = {}
        for name in self._tensors:
            keys = name.split("/")
            path = [{"key": key, "key_type": 2} for key in keys]  # 2: of a dictionary
            entries[str(tuple(keys))] = {"key_metadata": path, "value_metadata": value}
        tree = {
            "tree_metadata": entries,
            "use_ocdbt": False,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (self._staging / ITEM / TREE).write_text(json.dumps(tree))
        step = {
            "item_handlers": {ITEM: _HANDLER},
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": self._started,
            "commit_timestamp_nsecs": time.time_ns(),
            "custom_metadata": self._metadata,
        }
        (self._staging / STEP).write_text(json.dumps(step))
        (self._staging / INDICATOR).touch()


def _homes(item: Path, tensors: Sequence[TensorInfo]) -> dict[str, Path]:
    """The directory of each array, called as Orbax calls it."""
    homes: dict[str, Path] = {}
    taken = set(_RESERVED)
    for info in tensors:
        key = info.name.replace("/", ".")
        if key in taken:
            raise CheckpointError(
                f"{info.name}: Orbax calls it {key!r}, which is reserved or another"
                " tensor's; rename one"
            )
        if len(os.fsencode(key)) > 255 or "\0" in key:
            raise CheckpointError(
                f"{info.name!r}: not a file name: expected at most 255 bytes, none 0"
            )
        taken.add(key)
        homes[info.name] = item / key
    return homes


def create_writer(
    staging: Path,
    tensors: Sequence[TensorInfo],
    *,
    max_shard_size: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> OrbaxWriter:
    """A writer that makes `staging` a checkpoint for `ocp.load(path)`.

    Args:
      staging: an empty directory.
      tensors: names ("/" nests dictionaries), shapes and dtypes.
      max_shard_size: bytes of the largest file, if below 8 MiB.
      metadata: kept as Orbax's custom metadata.

    Raises:
      CheckpointError: a dtype that tensorstore lacks, or names that form no tree.
    """
    limit = min(CHUNK_BYTES, max_shard_size or CHUNK_BYTES)
    return OrbaxWriter(staging, tensors, chunk_bytes=limit, metadata=metadata)

"""Orbax checkpoints read in slices, on the host, through tensorstore.

The tree's `_METADATA` is parsed here and each array is opened as what it is: a zarr
array, in an OCDBT database or in a directory of its own.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from multitask_jax.checkpoints.json_file import read_json
from multitask_jax.checkpoints.types import (
    CheckpointError,
    TensorInfo,
    brief,
    name_problem,
    shape_problem,
)
from multitask_jax.checkpoints.zarr_boxes import CHUNK_BYTES, boxes, decoded_bytes

TREE, STEP, MANIFEST = "_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"
# Where parameters are, by Orbax's own names in its versions 0 and 1.
ITEMS = ("default", "state", "pytree")
# A chunk of so many bytes is believed; a larger one if the files could be that much
# compressed.
_PLAUSIBLE, _MOST_COMPRESSED = 1 << 28, 1000
_EMPTY = ("None", "Dict", "List", "Tuple", "NamedTuple")


def reason(error: Exception) -> str:
    """What tensorstore says, without the specification it appends."""
    return str(error).partition(" [")[0][:600]


def find_item(path: Path) -> Path:
    """The directory of the tree: `path`, or the one inside that holds parameters.

    Raises:
      CheckpointError: there is none, there are several, or saving did not finish.
    """
    if ".orbax-checkpoint-tmp" in path.name:
        raise CheckpointError(
            f"{path}: an incomplete checkpoint: its writer did not finish; open an"
            " earlier step"
        )
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected an Orbax directory")
    if (path / TREE).exists():
        return path
    inside = sorted(p.name for p in path.iterdir() if (p / TREE).exists())
    known = [name for name in ITEMS if name in inside]
    if known or len(inside) == 1:
        return path / (known or inside)[0]
    steps = sorted(p.name for p in path.iterdir() if (p / STEP).exists())
    for kind, names in (("items", inside), ("steps", steps)):
        if names:
            raise CheckpointError(
                f"{path}: holds the {kind} {', '.join(names)}; open one of them, for"
                f" example {path / names[-1]}"
            )
    raise CheckpointError(
        f"{path}: no {TREE} in it or in {', '.join(ITEMS)}: not an Orbax checkpoint,"
        " or an incomplete one"
    )


class OrbaxReader:
    """Lazy arrays of an Orbax tree, named by their path ("params/dense/kernel").

    The chunks last decoded are kept, so that slices read in order decode each once.
    `cache_bytes` is how much is kept where stored chunks are large (a whole array, by
    Orbax's default): what slices of one tensor need. Otherwise it is 0, for the few
    megabytes that are kept then do not count.
    """

    format = "orbax"

    def __init__(self, path: Path):
        self.path = path
        self.aliases: dict[str, str] = {}
        self._root = find_item(path).absolute()
        self._tree = read_json(self._root / TREE)
        step = self._root / STEP
        step = step if step.exists() else self._root.parent / STEP
        about = read_json(step) if step.exists() else {}
        self.metadata = about.get("custom_metadata")
        keys = self._leaves()
        self._stores = self._open(keys, CHUNK_BYTES)
        self.tensors = {name: self._info(name, t) for name, t in self._stores.items()}
        self._check_chunks()
        decoded = max(map(self._decoded, self.tensors), default=0)
        self.cache_bytes = decoded if decoded > CHUNK_BYTES else 0
        if self.cache_bytes:  # its size had to be known first
            self._stores = self._open(keys, self.cache_bytes)

    def _leaves(self) -> dict[str, str]:
        """Names of the arrays, and their keys in the store."""
        entries = self._tree.get("tree_metadata")
        if not isinstance(entries, dict):
            raise CheckpointError(f"{self._root / TREE}: damaged: no tree_metadata")
        out: dict[str, str] = {}
        for entry in entries.values():
            keys, kind = _keys(entry, self._root / TREE)
            name, key = "/".join(keys), ".".join(keys)
            if problem := name_problem(name):
                raise CheckpointError(f"{self.path}: {name[:80]!r}: {problem}")
            if kind in _EMPTY:
                continue
            if kind in ("string", "placeholder"):
                raise CheckpointError(
                    f"{self.path}: {name} is a {kind}, expected an array or a number;"
                    " save the parameters alone"
                )
            if name in out or ".." in Path(key).parts or Path(key).is_absolute():
                raise CheckpointError(f"{self.path}: bad or repeated name {name!r}")
            out[name] = key
        return out

    def _open(self, keys: Mapping[str, str], cache: int) -> dict[str, ts.TensorStore]:
        """Opens arrays side by side: their metadata is read, not their data."""
        limit = cache + (1 << 20)  # entries count for more than their data
        context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": limit},
                # Nodes of the database's tree, shared by all arrays.
                "cache_pool#nodes": {"total_bytes_limit": 16 << 20},
                "file_io_concurrency": {"limit": 8},
            }
        )
        full = self._tree.get("store_array_data_equal_to_fill_value", False)
        database = (self._root / MANIFEST).exists()
        futures = {}
        for name, key in keys.items():
            kvstore: dict[str, Any] = {"driver": "file", "path": f"{self._root}/"}
            if database:
                kvstore = {"driver": "ocdbt", "base": kvstore, "path": key}
                kvstore["cache_pool"] = "cache_pool#nodes"
            else:
                kvstore["path"] += key
            spec = {
                "driver": "zarr3" if self._tree.get("use_zarr3") else "zarr",
                "kvstore": kvstore,
                "recheck_cached_data": False,
                "recheck_cached_metadata": False,
                # Missing chunks are damage, where Orbax wrote all of them.
                "fill_missing_data_reads": not full,
            }
            futures[name] = ts.open(spec, context=context, open=True, read=True)
        return {name: self._wait(name, f) for name, f in futures.items()}

    def _wait(self, name: str, future: Any) -> Any:
        try:
            return future.result()
        except (ValueError, OSError, RuntimeError, NotImplementedError) as e:
            raise CheckpointError(
                f"{self.path}: {name} cannot be read, the checkpoint is damaged or"
                f" incomplete: {reason(e)}"
            ) from None

    def _info(self, name: str, store: ts.TensorStore) -> TensorInfo:
        dtype = store.dtype.numpy_dtype
        if dtype is None or dtype.hasobject:
            raise CheckpointError(
                f"{self.path}: {name} has dtype {store.dtype.name}, expected numbers"
            )
        if problem := shape_problem(store.shape):
            raise CheckpointError(f"{self.path}: {name}: {problem}")
        return TensorInfo(name, tuple(store.shape), np.dtype(dtype))

    def _check_chunks(self) -> None:
        """Refuses chunks far larger than the files: tensorstore would allocate them.

        Where it can't, it ends the process.
        """
        sizes = {
            name: info.dtype.itemsize
            * math.prod(self._stores[name].chunk_layout.read_chunk.shape or ())
            for name, info in self.tensors.items()
        }
        name = max(sizes, key=sizes.__getitem__, default="")
        if sizes.get(name, 0) <= _PLAUSIBLE:
            return
        held = sum(p.stat().st_size for p in self._root.rglob("*") if p.is_file())
        if sizes[name] > _MOST_COMPRESSED * held:
            raise CheckpointError(
                f"{self.path}: {name} claims chunks of {sizes[name]:,} bytes, but all"
                f" files hold {held:,}: damaged"
            )

    def _decoded(self, name: str) -> int:
        info = self.tensors[name]
        chunk = self._stores[name].chunk_layout.read_chunk.shape or ()  # 0-d: None
        return decoded_bytes(info.shape, chunk, info.dtype.itemsize)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Flat entries [start, stop) of a tensor, in memory of their own.

        Raises:
          CheckpointError: the data are missing or damaged.
        """
        info, store = self.tensors[name], self._stores[name]
        stop = info.size if stop is None else min(stop, info.size)
        # Side by side, so that boxes of one chunk decode it together.
        futures = [store[box].read() for box in boxes(info.shape, start, stop)]
        parts = [np.ravel(self._wait(name, f)) for f in futures]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, info.dtype)

    def read_box(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        """A box of a tensor, one slice an axis; decodes the chunks that it touches.

        Raises:
          CheckpointError: the data are missing or damaged.
        """
        return self._wait(name, self._stores[name][box].read())

    def close(self) -> None:
        """Drops the arrays and what was kept of them."""
        self._stores = {}


def _keys(entry: Any, where: Path) -> tuple[list[str], str]:
    """The path of a leaf in the tree, and what Orbax took it for."""
    try:
        keys = [str(k["key"]) for k in entry["key_metadata"]]
        kind = str(entry["value_metadata"]["value_type"])
        skip = entry["value_metadata"].get("skip_deserialize", False)
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(
            f"{where}: damaged: a leaf reads {brief(entry)}"
        ) from None
    return keys, "None" if skip else kind


def open_reader(path: Path) -> OrbaxReader:
    """Opens an Orbax checkpoint (version 0 or 1), a step of a manager, or an item.

    Raises:
      CheckpointError: not such a directory, damaged, or without finished writing.
    """
    return OrbaxReader(path)

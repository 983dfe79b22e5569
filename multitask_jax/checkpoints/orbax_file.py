"""Orbax checkpoints, read in slices through tensorstore and written in place.

Orbax loads whole trees onto devices (`restore` does that here); a merge reads and
writes slices of one tensor at a time on the host, and integers must not pass through
JAX. So the tree's `_METADATA` is parsed here and each array is opened as what it is: a
zarr array, in an OCDBT database or in a directory of its own.
"""

import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from multitask_jax.checkpoints.msgpack_file import nest
from multitask_jax.checkpoints.types import CheckpointError, TensorInfo

TREE, STEP, INDICATOR = "_METADATA", "_CHECKPOINT_METADATA", "orbax.checkpoint"
MANIFEST = "manifest.ocdbt"
# Where parameters are, by Orbax's own names in its versions 0 and 1.
ITEMS = ("default", "state", "pytree")
# The item written: every release of version 1 finds it unasked.
ITEM = "pytree"
_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
_RESERVED = (TREE, "_sharding", "_strings.json", "array_metadatas", MANIFEST)
_EMPTY = ("None", "Dict", "List", "Tuple", "NamedTuple")
# A zarr chunk is what is read, decoded and, when written, one file.
CHUNK_BYTES = 8 << 20
CACHE_BYTES = 1 << 30


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[slice, ...]]:
    """Cuts flat entries [start, stop) of an array into boxes, in C order.

    There are at most 2 * rank - 1 of them: part of a row, whole rows, part of a row.
    """
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # rows [first, last) are whole
    if first > last:
        for box in boxes(shape[1:], start - last * row, stop - last * row):
            yield (slice(last, first), *box)
        return
    for box in boxes(shape[1:], start - (first - 1) * row, row * (start % row > 0)):
        yield (slice(first - 1, first), *box)
    if first < last:
        yield (slice(first, last), *(slice(0, n) for n in shape[1:]))
    for box in boxes(shape[1:], 0, stop - last * row):
        yield (slice(last, last + 1), *box)


def _json(path: Path) -> dict[str, Any]:
    try:
        out = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: damaged: not valid JSON: {e}") from None
    if not isinstance(out, dict):
        raise CheckpointError(f"{path}: damaged: expected a JSON object")
    return out


def _item(path: Path) -> Path:
    """The directory of the tree: `path`, or the one inside that holds parameters."""
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
    for name in ITEMS:
        if name in inside:
            return path / name
    if len(inside) == 1:
        return path / inside[0]
    if inside:
        raise CheckpointError(
            f"{path}: holds several items ({', '.join(inside)}); open one of them, for"
            f" example {path / inside[0]}"
        )
    steps = sorted(p.name for p in path.iterdir() if (p / STEP).exists())
    if steps:
        raise CheckpointError(
            f"{path}: holds the steps {', '.join(steps)}; open one of them, for"
            f" example {path / steps[-1]}"
        )
    raise CheckpointError(
        f"{path}: no {TREE} in it or in {', '.join(ITEMS)}: not an Orbax checkpoint,"
        " or an incomplete one"
    )


def _keys(entry: Any, where: Path) -> tuple[list[str], str]:
    """The path of a leaf in the tree, and what Orbax took it for."""
    try:
        keys = [str(k["key"]) for k in entry["key_metadata"]]
        kind = str(entry["value_metadata"]["value_type"])
        skip = entry["value_metadata"].get("skip_deserialize", False)
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(f"{where}: damaged: a leaf reads {entry!r}") from None
    return keys, "None" if skip else kind


def _reason(error: Exception) -> str:
    """What tensorstore says, without the specification it appends."""
    return str(error).partition(" [")[0][:600]


class OrbaxReader:
    """Lazy arrays of an Orbax tree, named by their path ("params/dense/kernel").

    Where the stored chunks are large (a whole array, by Orbax's default), the ones
    last decoded are kept, up to `cache_bytes`: slices read in order decode each once.
    """

    format = "orbax"

    def __init__(self, path: Path, cache_bytes: int = CACHE_BYTES):
        self.path = path
        self.aliases: dict[str, str] = {}
        self._root = _item(path).absolute()
        self._tree = _json(self._root / TREE)
        step = self._root / STEP
        step = step if step.exists() else self._root.parent / STEP
        self.metadata = _json(step).get("custom_metadata") if step.exists() else None
        stored = self._leaves()
        stores = self._open(stored, 0)
        self.tensors = {
            name: TensorInfo(name, tuple(t.shape), self._dtype(name, t))
            for name, t in stores.items()
        }
        decoded = {name: self._decoded(name, t) for name, t in stores.items()}
        large = {n: k for n, k in stored.items() if decoded[n] > CHUNK_BYTES}
        self.cache_bytes = min(cache_bytes, max(decoded.values(), default=0))
        if large and self.cache_bytes:
            stores |= self._open(large, self.cache_bytes)
        self._stores = stores

    def _leaves(self) -> dict[str, str]:
        """Names of the arrays, and their keys in the store."""
        entries = self._tree.get("tree_metadata")
        if not isinstance(entries, dict):
            raise CheckpointError(f"{self._root / TREE}: damaged: no tree_metadata")
        out: dict[str, str] = {}
        for entry in entries.values():
            keys, kind = _keys(entry, self._root / TREE)
            name, key = "/".join(keys), ".".join(keys)
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
        limit = cache and cache + (1 << 20)  # entries count for more than their data
        context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": limit},
                # Nodes of the database's tree, shared by all arrays.
                "cache_pool#nodes": {"total_bytes_limit": 16 << 20},
                "file_io_concurrency": {"limit": 8},
            }
        )
        full = self._tree.get("store_array_data_equal_to_fill_value", False)
        futures = {}
        for name, key in keys.items():
            kvstore: dict[str, Any] = {"driver": "file", "path": f"{self._root}/"}
            if (self._root / MANIFEST).exists():
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
                f" incomplete: {_reason(e)}"
            ) from None

    def _dtype(self, name: str, store: ts.TensorStore) -> np.dtype:
        dtype = store.dtype.numpy_dtype
        if dtype is None or dtype.hasobject:
            raise CheckpointError(
                f"{self.path}: {name} has dtype {store.dtype.name}, expected numbers"
            )
        return np.dtype(dtype)

    def _decoded(self, name: str, store: ts.TensorStore) -> int:
        """Bytes of the chunks that a short range of a tensor may touch."""
        info = self.tensors[name]
        chunk = [*map(min, store.chunk_layout.read_chunk.shape or (), info.shape)]
        axis = next((i for i, n in enumerate(chunk) if n > 1), 0)
        sides = [*chunk[axis : axis + 1], *info.shape[axis + 1 :]]
        return math.prod(sides) * info.dtype.itemsize

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

    def close(self) -> None:
        """Drops the arrays and what was kept of them."""
        self._stores = {}


def open_reader(path: Path, *, cache_bytes: int = CACHE_BYTES) -> OrbaxReader:
    """Opens an Orbax checkpoint (version 0 or 1), a step of a manager, or an item.

    Raises:
      CheckpointError: not such a directory, damaged, or without finished writing.
    """
    return OrbaxReader(path, cache_bytes)


def restore(path: str | os.PathLike[str], abstract_tree: Any) -> Any:
    """Loads a whole tree, every array born with its sharding.

    Args:
      path: an Orbax checkpoint, a step, or an item in one.
      abstract_tree: the tree with `jax.ShapeDtypeStruct(shape, dtype, sharding=...)`
        leaves, as from `jax.eval_shape`, or arrays; dtypes are cast to.

    Raises:
      CheckpointError: damaged, or another tree or other shapes than asked for.
    """
    from orbax.checkpoint import v1 as ocp

    # Checked here: the errors name the leaf, and Orbax leaves tasks behind on its own.
    reader = open_reader(Path(path).expanduser().absolute(), cache_bytes=0)
    _check_target(reader, abstract_tree)
    reader.close()
    root, name = _item(reader.path), "AUTO"
    if not (root / STEP).exists() and (root.parent / STEP).exists():
        root, name = root.parent, root.name
    try:
        return ocp.load(root, abstract_tree, checkpointable_name=name)
    except (ValueError, KeyError, OSError, RuntimeError) as e:
        raise CheckpointError(f"{path}: {_reason(e)}") from e


def _check_target(reader: OrbaxReader, tree: Any) -> None:
    import jax

    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    alone = sorted(leaves.keys() ^ reader.tensors.keys())
    if alone:
        where = ["target" if a in leaves else "checkpoint" for a in alone]
        some = ", ".join(f"{a} ({w})" for a, w in zip(alone[:5], where, strict=False))
        raise CheckpointError(
            f"{reader.path}: {len(alone)} leaves are only in the target or only in the"
            f" checkpoint: {some}"
        )
    for name, leaf in leaves.items():
        shape, stored = np.shape(leaf), reader.tensors[name].shape
        dtype = getattr(leaf, "dtype", None)
        if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
            continue  # stored as the words of its keys
        if shape != stored:
            raise CheckpointError(
                f"{reader.path}: {name}: the checkpoint has shape {stored}, the target"
                f" {shape}"
            )
        sharding = getattr(leaf, "sharding", None)
        try:
            if sharding is not None:
                sharding.shard_shape(shape)
        except ValueError as e:
            raise CheckpointError(f"{reader.path}: {name}: {e}") from None


def chunk_shape(shape: Sequence[int], itemsize: int, limit: int) -> tuple[int, ...]:
    """Zarr chunks of at most `limit` bytes that are flat ranges of the array.

    (1, ..., 1, some rows, all, ..., all); rows are spread evenly, for a chunk at the
    edge takes as much room as the others.
    """
    chunk, room = [1] * len(shape), max(1, limit // itemsize)
    for axis in reversed(range(len(shape))):
        n = max(1, shape[axis])
        if n > room:
            chunk[axis] = -(-n // -(-n // room))
            break
        chunk[axis], room = n, room // n
    return tuple(chunk)


def spans(
    shape: Sequence[int], chunk: Sequence[int], start: int, stop: int
) -> Iterator[tuple[str, int, int, int]]:
    """The chunks of `chunk_shape` that hold flat entries [start, stop).

    Yields:
      (file name, entries before, from, to): entries [from, to) lie in that file after
      `entries before` others.
    """
    axis = next((i for i, n in enumerate(chunk) if n > 1), len(chunk) - 1)
    outer = shape[: max(axis, 0)]
    inner = math.prod(shape[axis + 1 :]) if shape else 1
    plane = shape[axis] * inner if shape else 1
    block = math.prod(chunk)
    while start < stop:
        above, rest = divmod(start, plane)
        k, before = divmod(rest, block)
        end = min(stop, above * plane + min((k + 1) * block, plane))
        index = (*np.unravel_index(above, outer), k, *[0] * (len(shape) - axis - 1))
        yield ".".join(map(str, index)), before, start, end
        start = end


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
        self._tensors = {t.name: t for t in tensors}
        self._left = {t.name: t.size for t in tensors}
        self._lock = threading.Lock()
        self._started = time.time_ns()
        nest(tensors)  # refuses names that fit in no tree
        self._chunks = {
            t.name: chunk_shape(t.shape, np.dtype(t.dtype).itemsize, chunk_bytes)
            for t in tensors
        }
        self._homes: dict[str, Path] = {}
        self._taken: set[Path] = set()
        (staging / ITEM).mkdir()
        for t in tensors:
            self._create(t)

    def _create(self, info: TensorInfo) -> None:
        key = info.name.replace("/", ".")
        home = self._staging / ITEM / key
        if home in self._taken or key in (*_RESERVED, ".", ".."):
            raise CheckpointError(
                f"{info.name}: Orbax calls it {key!r}, which is reserved or another"
                " tensor's; rename one"
            )
        if len(os.fsencode(key)) > 255 or "\0" in key:
            raise CheckpointError(f"{info.name}: too long for a file name (255 bytes)")
        chunk, dtype = self._chunks[info.name], np.dtype(info.dtype)
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
                f" store: {_reason(e)}; write safetensors, or convert the tensor"
            ) from None
        self._homes[info.name] = home
        self._taken.add(home)
        nbytes = math.prod(chunk) * dtype.itemsize
        for file, *_ in spans(info.shape, chunk, 0, info.size):
            fd = os.open(home / file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                # Reserve the space now: a full disk is an error before work.
                os.posix_fallocate(fd, 0, nbytes)
            finally:
                os.close(fd)

    def write(self, name: str, start: int, flat: np.ndarray) -> None:
        """Stores flat entries [start, start + len(flat)) of a tensor; thread-safe."""
        info = self._tensors[name]
        if flat.dtype != info.dtype or start + flat.size > info.size:
            raise ValueError(
                f"{name}: got {flat.size} {flat.dtype} entries at {start}, expected"
                f" {info.dtype} within {info.size}"
            )
        flat = np.ascontiguousarray(flat).reshape(-1)
        stop = start + flat.size
        for file, before, a, b in spans(info.shape, self._chunks[name], start, stop):
            data = memoryview(flat[a - start : b - start].view(np.uint8))
            offset = before * flat.itemsize
            fd = os.open(self._homes[name] / file, os.O_WRONLY)
            try:
                while data:
                    n = os.pwrite(fd, data, offset)
                    data, offset = data[n:], offset + n
            finally:
                os.close(fd)
        with self._lock:
            self._left[name] -= flat.size

    def finish(self) -> None:
        """Writes Orbax's metadata; a tensor not fully written is an error."""
        missing = [name for name, left in self._left.items() if left]
        if missing:
            raise CheckpointError(f"not fully written: {missing[:5]}")
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

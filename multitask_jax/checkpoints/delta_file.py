"""A task vector alone, each tensor sparse where that is smaller: theta = theta_0 + tau.

`delta.safetensors` (or shards of it) holds, of a tensor NAME,

    dense/NAME      tau as it is, or
    values/NAME     its entries that are not 0, in flat order (C),
    positions/NAME  uint16: where each lies in its block of 65536 flat entries,
    starts/NAME     uint64 [blocks + 1]: where a block's entries start in `values`

(compressed rows, the rows being blocks). Its metadata name the base by a fingerprint.
Tensors that the merge took from the base are absent, and read as the base's.
"""

import hashlib
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from multitask_jax.checkpoints import safetensors_file
from multitask_jax.checkpoints.changed import Change, ChangedReader, sum_dtype
from multitask_jax.checkpoints.safetensors_writer import SafetensorsWriter
from multitask_jax.checkpoints.types import CheckpointError, Reader, TensorInfo, brief

FORMAT, STEM = "multitask_jax.delta", "delta"
BLOCK = 1 << 16  # entries that 16 bits can tell apart
_CHUNK = 16 * BLOCK  # entries that are compressed at a time
_POSITION, _START = np.dtype(np.uint16), np.dtype(np.uint64)


def is_format(path: Path) -> bool:
    """Whether `path` is a directory that holds a delta, or the only file of one."""
    if path.is_dir():
        names = (f"{STEM}.safetensors", f"{STEM}.safetensors.index.json")
        return any((path / name).is_file() for name in names)
    return path.name == f"{STEM}.safetensors" and path.is_file()


def fingerprint(base: Reader) -> str:
    """SHA-256 over names, shapes, dtypes, and 64 entries of each of 16 tensors.

    Order does not count. The entries tell apart bases of one architecture.
    """
    digest = hashlib.sha256()
    names = sorted(base.tensors)
    sampled = set(names[:: max(1, len(names) // 16)][:16])
    for name in names:
        info = base.tensors[name]
        digest.update(f"{name}\0{info.shape}\0{np.dtype(info.dtype)}\0".encode())
        if name in sampled:
            start = max(0, info.size // 2 - 32)
            flat = base.read(name, start, min(start + 64, info.size))
            digest.update(np.ascontiguousarray(flat).view(np.uint8).tobytes())
    return digest.hexdigest()


class Sparse(NamedTuple):
    """Entries that are not 0, found by blocks."""

    values: np.ndarray
    positions: np.ndarray
    starts: np.ndarray
    where: str = "a sparse delta"  # what errors begin with

    def add(self, theta: np.ndarray, start: int, stop: int) -> np.ndarray:
        """theta + tau for flat entries [start, stop), in theta's dtype."""
        out = np.array(theta)
        first, last = start // BLOCK, -(-stop // BLOCK)
        counts = np.diff(self.starts[first : last + 1].astype(np.int64))
        here = slice(int(self.starts[first]), int(self.starts[last]))
        flat = np.repeat(np.arange(first, last) * BLOCK, counts) + self.positions[here]
        if (flat[1:] <= flat[:-1]).any():
            raise CheckpointError(f"{self.where}: positions out of order: damaged")
        inside = slice(*np.searchsorted(flat, (start, stop)))
        out[flat[inside] - start] += self.values[here][inside].astype(out.dtype)
        return out


def open_reader(path: Path, base: Reader) -> ChangedReader:
    """The delta at `path` on its base.

    Returns:
      A reader of the base's names and shapes. Tensors with a delta are float32 (float64
      of a float64 base), the rest the base's bytes.

    Raises:
      CheckpointError: made for another base, or damaged.
    """
    file = safetensors_file.open_reader(path)
    about = file.metadata
    if about.get("format") != FORMAT or about.get("version") != "1":
        raise CheckpointError(
            f"{path}: got metadata {brief(about)}, expected the format {FORMAT},"
            " version 1; rename the file if it is a model"
        )
    if about.get("base") != fingerprint(base):
        raise CheckpointError(
            f"{path}: the delta was made for a base of other names, shapes, dtypes or"
            f" values than {base.path} (then it was {brief(about.get('base_name'))});"
            " pass that base"
        )
    changes = {}
    for stored in file.tensors:
        kind, _, name = stored.partition("/")
        if kind in ("positions", "starts") and f"values/{name}" in file.tensors:
            continue
        info = base.tensors.get(name)
        if info is None or kind not in ("dense", "values") or name in changes:
            raise CheckpointError(
                f"{path}: unexpected tensor {stored[:120]!r}: damaged"
            )
        changes[name] = _change(path, kind, info, file)
    return ChangedReader(path, "delta", base, changes)


def read(path: Path, base: Reader) -> dict[str, np.ndarray]:
    """The task vector itself, dense and in memory, by the base's names.

    Raises:
      CheckpointError: made for another base, or damaged.
    """
    reader = open_reader(path, base)
    try:
        out = {}
        for name, change in reader.changes.items():
            info = base.tensors[name]
            zeros = np.zeros(info.size, change.dtype)
            out[name] = change.apply(zeros, 0, info.size).reshape(info.shape)
        return out
    finally:
        reader.close()


def _change(path: Path, kind: str, info: TensorInfo, file: Reader) -> Change:
    dtype = sum_dtype(info.dtype)
    stored = file.tensors[f"{kind}/{info.name}"].dtype
    if not {stored, info.dtype} <= safetensors_file.FLOATS:
        raise CheckpointError(
            f"{path}: {kind}/{info.name}: got {stored} for a tensor of {info.dtype} in"
            " the base, expected floats for floats"
        )
    if kind == "dense":
        key = f"dense/{info.name}"
        if file.tensors[key].shape != info.shape:
            raise CheckpointError(
                f"{path}: {key}: got shape {file.tensors[key].shape}, expected"
                f" {info.shape}"
            )
        return Change(
            dtype, lambda theta, i, j: theta + file.read(key, i, j).astype(dtype)
        )
    parts = (_part(path, k, info.name, file) for k in Sparse._fields[:3])
    sparse = Sparse(*parts, f"{path}: {info.name}")
    blocks = -(-info.size // BLOCK)
    starts = sparse.starts
    sound = (
        (sparse.positions.dtype, starts.dtype) == (_POSITION, _START)
        and len(starts) == blocks + 1
        and len(sparse.positions) == len(sparse.values) == starts[-1]
        and starts[0] == 0
        # Compared first: a difference of unsigned numbers is never negative.
        and (starts[1:] >= starts[:-1]).all()
        and (np.diff(starts) <= BLOCK).all()
        # The last entry, if it is in the last block, lies within the tensor.
        and (
            blocks == 0
            or starts[-1] == starts[-2]
            or int(sparse.positions[-1]) < info.size - (blocks - 1) * BLOCK
        )
    )
    if not sound:
        raise CheckpointError(
            f"{path}: the sparse tensor {info.name!r} does not fit together: damaged"
        )
    return Change(dtype, sparse.add)


def _part(path: Path, kind: str, name: str, file: Reader) -> np.ndarray:
    if f"{kind}/{name}" not in file.tensors:
        raise CheckpointError(f"{path}: {kind}/{name} is missing: damaged")
    return file.read(f"{kind}/{name}")


class DeltaWriter:
    """Collects the dense task vector on disk, then writes the compressed one.

    Which form is smaller is known only when all is written: until then the disk holds
    the dense tensors (in the staging directory), memory no more than a chunk.
    """

    def __init__(
        self,
        staging: Path,
        tensors: Sequence[TensorInfo],
        *,
        base: Reader,
        max_shard_size: int | None = None,
    ):
        self._staging, self._home = staging, staging / "dense"
        self._home.mkdir()
        self._tensors, self._max_shard_size = list(tensors), max_shard_size
        self._about = {
            "format": FORMAT,
            "version": "1",
            "base": fingerprint(base),
            "base_name": base.path.name,
        }
        self._dense = SafetensorsWriter(self._home, tensors)
        self._counts = dict.fromkeys((t.name for t in tensors), 0)
        self._lock = threading.Lock()

    def write(self, name: str, start: int, flat: np.ndarray) -> None:
        """Stores flat entries [start, start + len(flat)) of tau; thread-safe."""
        self._dense.write(name, start, flat)
        count = int(np.count_nonzero(flat))
        with self._lock:
            self._counts[name] += count

    def finish(self) -> None:
        """Writes the final files and removes the dense ones."""
        self._dense.finish()
        infos = [i for t in self._tensors for i in self._layout(t)]
        writer = SafetensorsWriter(
            self._staging,
            infos,
            max_shard_size=self._max_shard_size,
            metadata=self._about,
            stem=STEM,
        )
        try:
            dense = safetensors_file.open_reader(self._home)
            for t in self._tensors:
                _compress(dense, writer, t, is_sparse=len(self._layout(t)) > 1)
            dense.close()
            writer.finish()
        finally:
            writer.close()
        shutil.rmtree(self._home)

    def close(self) -> None:
        """Closes the files as they are."""
        self._dense.close()

    def _layout(self, t: TensorInfo) -> list[TensorInfo]:
        """What is stored of a tensor: the smaller form."""
        count = self._counts[t.name]
        sparse = [
            TensorInfo(f"starts/{t.name}", (-(-t.size // BLOCK) + 1,), _START),
            TensorInfo(f"values/{t.name}", (count,), t.dtype),
            TensorInfo(f"positions/{t.name}", (count,), _POSITION),
        ]
        if sum(s.nbytes for s in sparse) < t.nbytes:
            return sparse
        return [TensorInfo(f"dense/{t.name}", t.shape, t.dtype)]


def _compress(
    dense: Reader, writer: SafetensorsWriter, t: TensorInfo, *, is_sparse: bool
) -> None:
    before = 0
    if is_sparse:
        writer.write(f"starts/{t.name}", 0, np.zeros(1, _START))
    for start in range(0, t.size, _CHUNK):
        flat = dense.read(t.name, start, min(start + _CHUNK, t.size))
        if not is_sparse:
            writer.write(f"dense/{t.name}", start, flat)
            continue
        at = np.flatnonzero(flat)
        ends = np.minimum(np.arange(BLOCK, len(flat) + BLOCK, BLOCK), len(flat))
        starts = (before + np.searchsorted(at, ends)).astype(_START)
        writer.write(f"starts/{t.name}", start // BLOCK + 1, starts)
        writer.write(f"values/{t.name}", before, flat[at])
        writer.write(f"positions/{t.name}", before, (at % BLOCK).astype(_POSITION))
        before += len(at)


def create_writer(
    staging: Path, tensors: Sequence[TensorInfo], **options: object
) -> DeltaWriter:
    """A writer into `staging`; options: `base` (an open reader), `max_shard_size`."""
    return DeltaWriter(staging, tensors, **options)  # type: ignore[arg-type]

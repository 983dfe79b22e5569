"""EMR on disk: a small file a task beside the merged checkpoint, and its use.

A task's file is safetensors: for each merged tensor its mask, packed eight to a byte;
the factor is in the metadata.
"""

import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from multitask_jax import checkpoints
from multitask_jax.checkpoints import CheckpointError, Reader, TensorInfo
from multitask_jax.checkpoints.safetensors_file import SafetensorsReader
from multitask_jax.checkpoints.safetensors_writer import SafetensorsWriter
from multitask_jax.merging.emr import EmrTask
from multitask_jax.merging.plan import CHUNK, Plan

FOLDER = "tasks"
_FORMAT = "multitask_jax.emr_task"


def write_tasks(
    directory: Path, plan: Plan, readers: Sequence[Reader], names: Sequence[str]
) -> list[str]:
    """One more pass over the inputs: `directory`/tasks/NAME.safetensors a model.

    Args:
      directory: of the merged checkpoint, in the making.
      plan: of the merge.
      readers: the base, then the models.
      names: of the models.
    """
    count = len(readers) - 1
    folder = directory / FOLDER
    masks = [
        TensorInfo(e.path, (-(-e.size // 8),), np.dtype(np.uint8)) for e in plan.merged
    ]
    # The factor is known at the end; the header's length must not depend on it.
    staged = [folder / f".{t}" for t in range(count)]
    writers = []
    for path in staged:
        path.mkdir(parents=True)
        writers.append(SafetensorsWriter(path, masks, metadata=_metadata(0.0)))
    own, kept = np.zeros(count), np.zeros(count)
    for e in plan.merged:
        for start in range(0, e.size, CHUNK):  # a multiple of 8
            stop = min(start + CHUNK, e.size)
            theta, *models = [
                r.read(e.path, start, stop).astype(e.compute) for r in readers
            ]
            taus = [m - theta for m in models]
            sign = np.where(sum(taus[1:], taus[0]) > 0, 1, -1).astype(e.compute)
            agrees = [tau * sign > 0 for tau in taus]
            unified = np.zeros_like(theta)
            for tau, mask in zip(taus, agrees, strict=True):
                np.maximum(unified, np.abs(tau), out=unified, where=mask)
            for t, (tau, mask) in enumerate(zip(taus, agrees, strict=True)):
                writers[t].write(e.path, start // 8, np.packbits(mask))
                own[t] += np.abs(tau).sum(dtype=np.float64) / e.size
                kept[t] += unified[mask].sum(dtype=np.float64) / e.size
    files = []
    for t, (writer, path) in enumerate(zip(writers, staged, strict=True)):
        writer.finish()
        factor = own[t] / kept[t] if kept[t] else 1.0
        stem = names[t].removesuffix(".safetensors").replace("/", "_")
        target = folder / f"{stem}.safetensors"
        _set_metadata(path / "model.safetensors", factor)
        (path / "model.safetensors").rename(target)
        path.rmdir()
        files.append(target)
    size = files[0].stat().st_size
    return [
        f"A file a task in {FOLDER}/ ({size:,} bytes each); python -m"
        " experiments.specialise makes a task's model of it."
    ]


def _metadata(factor: float) -> dict[str, str]:
    return {"format": _FORMAT, "rescale": f"{factor:.17e}"}


def _set_metadata(path: Path, factor: float) -> None:
    """Replaces the factor 0 in a header by one as long."""
    before = f'"rescale":"{0.0:.17e}"'.encode()
    after = f'"rescale":"{factor:.17e}"'.encode()
    with path.open("r+b") as f:
        length = int.from_bytes(f.read(8), "little")
        header = f.read(length)
        assert header.count(before) == 1
        assert len(after) == len(before)
        f.seek(8)
        f.write(header.replace(before, after))


class TaskFile:
    """An open task file."""

    def __init__(self, path: str | os.PathLike[str]):
        """Raises CheckpointError for what is no task file."""
        self.path = Path(path).expanduser()
        reader = checkpoints.open(self.path)
        metadata = getattr(reader, "metadata", {})
        if not isinstance(reader, SafetensorsReader) or (
            metadata.get("format") != _FORMAT
        ):
            raise CheckpointError(
                f"{path}: not a task file of an EMR merge; expected OUT/{FOLDER}/"
                "NAME.safetensors, as --method=emr writes them"
            )
        try:
            self.rescale = float(metadata["rescale"])
        except (KeyError, ValueError):
            self.rescale = math.nan
        if not math.isfinite(self.rescale):
            raise CheckpointError(f"{path}: no finite rescale in its metadata")
        self._reader = reader
        self.names = tuple(reader.tensors)

    def check(self, tensors: dict[str, TensorInfo]) -> None:
        """Raises CheckpointError unless the masks are of these tensors."""
        for name in self.names:
            info = self._reader.tensors[name]
            size = tensors[name].size if name in tensors else 0
            if info.shape != (-(-size // 8),) or info.dtype != np.uint8 or not size:
                raise CheckpointError(
                    f"{self.path}: the mask of {name!r} does not fit the merged model"
                    f" ({info.size} bytes for {size} entries); pass the model that this"
                    " task was merged into"
                )

    def mask(self, name: str, start: int, stop: int) -> np.ndarray:
        """Entries [start, stop) of a tensor's mask, bool."""
        first = start // 8
        packed = self._reader.read(name, first, -(-stop // 8))
        return np.unpackbits(packed)[start - 8 * first : stop - 8 * first].view(bool)

    def close(self) -> None:
        """Releases the file."""
        self._reader.close()


def load_task(path: str | os.PathLike[str], merged: dict[str, TensorInfo]) -> EmrTask:
    """A task file in memory, for `specialise`.

    Args:
      path: OUT/tasks/NAME.safetensors.
      merged: the merged checkpoint's tensors, `checkpoints.open(OUT).tensors`.
    """
    file = TaskFile(path)
    file.check(merged)
    masks = {
        name: file.mask(name, 0, merged[name].size).reshape(merged[name].shape)
        for name in file.names
    }
    return EmrTask(masks, np.float64(file.rescale))


class TaskReader:
    """A task's model as a checkpoint: theta_0 + lambda_t m_t (merged - theta_0)."""

    format = "emr_task"

    def __init__(self, base: Reader, merged: Reader, task: TaskFile):
        """Raises CheckpointError where the three do not fit."""
        task.check(base.tensors)
        task.check(merged.tensors)
        self.path = task.path
        self._base, self._merged, self._task = base, merged, task
        self._masked = frozenset(task.names)
        self.tensors = {
            name: info._replace(dtype=self._compute(info))
            if name in self._masked
            else info
            for name, info in merged.tensors.items()
        }
        self.aliases = dict(merged.aliases)

    @staticmethod
    def _compute(info: TensorInfo) -> np.dtype:
        return np.dtype(np.float64 if info.dtype == np.float64 else np.float32)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Flat entries [start, stop) in C order."""
        name = self.aliases.get(name, name)
        info = self.tensors[name]
        stop = info.size if stop is None else stop
        merged = self._merged.read(name, start, stop)
        if name not in self._masked:
            return merged
        theta = self._base.read(name, start, stop).astype(info.dtype)
        tau = merged.astype(info.dtype) - theta
        mask = self._task.mask(name, start, stop)
        return theta + np.where(mask, info.dtype.type(self._task.rescale) * tau, 0)

    def close(self) -> None:
        """Nothing: the three it reads from are their openers'."""


def specialise_checkpoint(
    base: str | os.PathLike[str],
    merged: str | os.PathLike[str],
    task: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Writes the model of one task, in the base's dtypes; streamed.

    Args:
      base: checkpoint of theta_0.
      merged: what `merge_checkpoints` wrote with `METHODS["emr"]` (a delta too).
      task: a file in its folder of tasks.
      output: directory that appears when all is done.
      overwrite: replace a checkpoint at `output`.
      progress: show a bar over bytes.

    Raises:
      CheckpointError: files that do not belong together, or an output that exists.
    """
    from tqdm import tqdm

    with contextlib.ExitStack() as stack:
        close_later = lambda x: stack.enter_context(contextlib.closing(x))  # noqa: E731
        origin = close_later(checkpoints.open(base))
        unified = close_later(checkpoints.open(merged, origin))
        reader = TaskReader(origin, unified, close_later(TaskFile(task)))
        stored = [
            info._replace(dtype=origin.tensors[name].dtype)
            if name in origin.tensors
            else info
            for name, info in reader.tensors.items()
        ]
        inputs = [origin.path, unified.path]
        target = {"overwrite": overwrite, "inputs": inputs}
        total = sum(t.nbytes for t in stored)
        with (
            tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar,
            checkpoints.create(output, stored, **target) as writer,
        ):
            for info in stored:
                for start in range(0, info.size, CHUNK):
                    flat = reader.read(info.name, start, min(start + CHUNK, info.size))
                    writer.write(info.name, start, flat.astype(info.dtype, copy=False))
                    bar.update(flat.size * info.dtype.itemsize)
            checkpoints.copy_companions(origin.path, writer.directory)
    return Path(output)

"""EMR on disk: a small file a task beside the merged checkpoint, and its use.

A task's file is safetensors: for each merged tensor its mask, packed eight to a byte,
the factor, and a sample of the unified task vector, so that a task of another merge is
refused.
"""

import contextlib
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from multitask_jax import checkpoints
from multitask_jax.checkpoints import CheckpointError, Reader, TensorInfo
from multitask_jax.checkpoints.delta_file import fingerprint
from multitask_jax.checkpoints.safetensors_file import FLOATS, SafetensorsReader
from multitask_jax.checkpoints.safetensors_writer import SafetensorsWriter
from multitask_jax.merging.emr import EmrTask
from multitask_jax.merging.plan import CHUNK, Plan

FOLDER = "tasks"
_FORMAT = "multitask_jax.emr_task"
_RESCALE, _SAMPLE = "__rescale__", "__sample__"
_BYTE = np.dtype(np.uint8)


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
    sampled = sample_places(plan.merged)
    places = sum(len(at) for at in sampled.values())
    tensors = [
        TensorInfo(_RESCALE, (1,), np.dtype(np.float64)),
        TensorInfo(_SAMPLE, (places,), np.dtype(np.float32)),
        *(TensorInfo(e.path, (-(-e.size // 8),), _BYTE) for e in plan.merged),
    ]
    about = {"format": _FORMAT, "base": fingerprint(readers[0])}
    files = [folder / f"{stem}.safetensors" for stem in _stems(names)]
    writers = []
    for file in files:
        (folder / file.stem).mkdir(parents=True)
        writers.append(SafetensorsWriter(folder / file.stem, tensors, metadata=about))
    own, kept, seen = np.zeros(count), np.zeros(count), []
    for e in plan.merged:
        for start in range(0, e.size, CHUNK):  # a multiple of 8
            stop = min(start + CHUNK, e.size)
            theta, *models = [
                r.read(e.path, start, stop).astype(e.compute) for r in readers
            ]
            taus = [m - theta for m in models]
            sign = np.where(sum(taus[1:], taus[0]) > 0, 1, -1).astype(e.compute)
            agrees = [np.sign(tau) == sign for tau in taus]
            unified = np.zeros_like(theta)
            for tau, mask in zip(taus, agrees, strict=True):
                np.maximum(unified, np.abs(tau), out=unified, where=mask)
            for t, (tau, mask) in enumerate(zip(taus, agrees, strict=True)):
                writers[t].write(e.path, start // 8, np.packbits(mask))
                own[t] += np.abs(tau).sum(dtype=np.float64) / e.size
                kept[t] += unified[mask].sum(dtype=np.float64) / e.size
            at = sampled[e.path]
            at = at[(at >= start) & (at < stop)] - start
            seen.append((sign * unified)[at].astype(np.float32))
    for t, (writer, file) in enumerate(zip(writers, files, strict=True)):
        factor = own[t] / kept[t] if kept[t] else 1.0
        writer.write(_RESCALE, 0, np.array([factor]))
        writer.write(_SAMPLE, 0, np.concatenate(seen))
        writer.finish()
        (folder / file.stem / "model.safetensors").rename(file)
        (folder / file.stem).rmdir()
    size = files[0].stat().st_size
    return [
        f"A file a task in {FOLDER}/ ({size:,} bytes each); python -m"
        " experiments.specialise makes a task's model of it."
    ]


def sample_places(tensors: Sequence[Any]) -> dict[str, np.ndarray]:
    """A few flat indices of each tensor (path or name, size), evenly spaced."""
    return {
        getattr(t, "path", None) or t.name: np.unique(
            np.linspace(0, t.size - 1, min(t.size, 16)).astype(np.int64)
        )
        for t in tensors
    }


def _stems(names: Sequence[str]) -> list[str]:
    """File names of models' names, all different: a/b, a_b -> a_b, a_b-2."""
    out: list[str] = []
    for name in names:
        stem = re.sub(r"[^\w.-]+", "_", name.removesuffix(".safetensors"))
        tries = (stem, *(f"{stem}-{k}" for k in range(2, len(names) + 2)))
        out.append(next(x for x in tries if x not in out))
    return out


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
        about = [reader.tensors.get(x) for x in (_RESCALE, _SAMPLE)]
        kinds = [x and (len(x.shape), x.dtype) for x in about]
        known = kinds == [(1, np.float64), (1, np.float32)] and about[0].shape == (1,)
        self.rescale = float(reader.read(_RESCALE)[0]) if known else math.nan
        if not math.isfinite(self.rescale):
            raise CheckpointError(
                f"{path}: no finite {_RESCALE} or no {_SAMPLE} in it: damaged"
            )
        self._reader = reader
        self.base = metadata.get("base")
        self.names = tuple(n for n in reader.tensors if n not in (_RESCALE, _SAMPLE))

    def check(self, tensors: dict[str, TensorInfo]) -> None:
        """Raises CheckpointError unless the masks are of these tensors."""
        for name in self.names:
            info = self._reader.tensors[name]
            floats = name in tensors and tensors[name].dtype in FLOATS
            size = tensors[name].size if floats else 0
            if info.shape != (-(-size // 8),) or info.dtype != np.uint8 or not size:
                raise CheckpointError(
                    f"{self.path}: the mask of {name[:120]!r} does not fit the merged"
                    f" model ({info.size} bytes for {size} entries); pass the model"
                    " that this task was merged into"
                )

    def mask(self, name: str, start: int, stop: int) -> np.ndarray:
        """Entries [start, stop) of a tensor's mask, bool."""
        first = start // 8
        packed = self._reader.read(name, first, -(-stop // 8))
        return np.unpackbits(packed)[start - 8 * first : stop - 8 * first].view(bool)

    def check_merge(self, base: Reader, merged: Reader) -> None:
        """Raises CheckpointError unless these are the base and the merge it is of.

        The base by its fingerprint, the merge by samples of its task vector, up to the
        rounding of the dtype it is stored in.
        """
        if self.base != fingerprint(base):
            raise CheckpointError(
                f"{self.path}: the task was merged with another base than {base.path};"
                " pass that base"
            )
        wanted = self._reader.read(_SAMPLE)
        infos = [merged.tensors[merged.aliases.get(n, n)] for n in self.names]
        sampled = sample_places(infos)
        if len(wanted) != sum(map(len, sampled.values())):
            raise CheckpointError(
                f"{self.path}: a sample of {len(wanted)} entries, expected one of"
                f" {sum(map(len, sampled.values()))}; pass the file as it was written"
            )
        for info, at in zip(infos, sampled.values(), strict=True):
            tau, wanted = wanted[: len(at)], wanted[len(at) :]
            theta, found = (
                np.array([r.read(info.name, i, i + 1)[0] for i in at], np.float64)
                for r in (base, merged)
            )
            stored = max(
                float(ml_dtypes.finfo(x.dtype).eps)
                for x in (info, base.tensors[base.aliases.get(info.name, info.name)])
            )
            with np.errstate(all="ignore"):  # a sample may hold anything
                off = np.abs(found - theta - tau)
                most = 2 * stored * np.abs(theta) + np.abs(tau) / 64 + 1e-30
            if not (off <= most).all():  # nor NaN
                raise CheckpointError(
                    f"{self.path}: the task is of another merge than {merged.path}"
                    f" ({info.name} differs); pass the output that it came with"
                )

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
        task.check_merge(base, merged)
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

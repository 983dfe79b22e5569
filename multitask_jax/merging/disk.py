"""Merging from disk to disk: `merge_checkpoints`."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from multitask_jax import checkpoints
from multitask_jax.checkpoints import CheckpointError, Reader
from multitask_jax.merging import core, report
from multitask_jax.merging.census import MOST_MODELS, Census
from multitask_jax.merging.plan import Plan, describe, human, peak_memory, plan_merge
from multitask_jax.merging.streaming import Stream

PathLike = str | os.PathLike[str]


class MergeResult(NamedTuple):
    """What `merge_checkpoints` did."""

    output: Path | None  # None for a dry run
    plan: str  # in words
    notes: tuple[str, ...]  # what a user should know: copies, warnings
    seconds: float


def merge_checkpoints(
    method: core.Method,
    base: PathLike | None,
    models: Sequence[PathLike],
    output: PathLike,
    *,
    weights: Sequence[float] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    dtype: str | None = None,
    out_dtype: str | None = None,
    output_format: str = "safetensors",
    max_shard_size: int | None = None,
    block_pattern: str | None = None,
    allow_missing: Literal["", "base"] = "",
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    report_files: bool = True,
    recipe: Mapping[str, Any] | None = None,
    max_memory: int | None = None,
    dry_run: bool = False,
    progress: bool = True,
    threads: int | None = None,
) -> MergeResult:
    """Merges checkpoints, streamed: memory does not grow with the model.

    Args:
      method: a chain or recipe, as for `merge`.
      base: checkpoint of theta_0; None for methods on parameters alone (linear, slerp),
        where the first model then gives names, dtypes and companion files.
      models: checkpoints of the fine-tuned models.
      output: directory that appears when all is done.
      weights: one a model.
      include, exclude: regexes on tensor names; the rest is copied from the base.
      dtype: of the computation, "float32" or "float64" (by default float32, and float64
        for float64 tensors).
      out_dtype: of merged tensors, by name ("bfloat16"); the base's by default.
      output_format: "safetensors", "orbax" or "msgpack".
      max_shard_size: bytes of a file at most (safetensors).
      block_pattern: how the report finds blocks in unusual names.
      allow_missing: "base" copies tensors that a model lacks from the base.
      allow_nonfinite: merge models with NaN or infinity all the same.
      overwrite: replace a checkpoint at `output`.
      report_files: write merge_report.md, .json, figures and a model card as well.
      recipe: what the report says of the method: flags and values.
      max_memory: bytes; a merge that is expected to need more is refused.
      dry_run: plan only.
      progress: show a bar over bytes.
      threads: two a core by default (some wait for the disk or for XLA), 8 at most.

    Raises:
      CheckpointError: inputs that are damaged, differ or hold NaN, an output that
        exists; nothing is left at `output`.
      ValueError: wrong number of weights or densities, no blocks for LiNeS.
    """
    started = time.perf_counter()
    models = [Path(m).expanduser() for m in models]
    weights = core.check_models(method, len(models), weights)
    dtypes = {k: _dtype(k, v) for k, v in (("dtype", dtype), ("out_dtype", out_dtype))}
    if dtypes["dtype"] is not None and dtypes["dtype"].itemsize < 4:
        raise ValueError(f"dtype: got {dtype}, expected float32 or float64")
    notes = []
    if base is None:
        if (method.start, method.end) != ("parameters", "parameters") or not models:
            raise ValueError("this method needs a base: pass the checkpoint it is")
        base = models[0]
        notes.append(f"No base: names, dtypes and other files are {base.name}'s.")
    readers: list[Reader] = []
    with contextlib.closing(_Closing(readers)):
        for path in (base, *models):
            readers.append(checkpoints.open(path))
        plan = plan_merge(
            method,
            readers[0],
            readers[1:],
            include=include,
            exclude=exclude,
            dtype=dtypes["dtype"],
            out_dtype=dtypes["out_dtype"],
            allow_missing=allow_missing,
        )
        held = sum(
            sum(t.nbytes for t in r.tensors.values()) * r.resident for r in readers
        )
        memory = peak_memory(plan, len(models), output_format == "msgpack", held)
        text = describe(plan, models, memory)
        if max_memory is not None and memory > max_memory:
            raise CheckpointError(
                f"the merge is expected to need {human(memory)}, more than max_memory"
                f" = {human(max_memory)}; use safetensors, or a larger limit"
            )
        if dry_run:
            return MergeResult(None, text, (*notes, *plan.notes), 0.0)
        census = None
        if report_files:
            exact = any(t.trims for t in method.transforms)
            exact = exact and len(models) <= MOST_MODELS
            census = Census(len(models), exact=exact)
        options = (
            {} if output_format != "safetensors" else {"max_shard_size": max_shard_size}
        )
        with (
            _bar(plan, progress) as advance,
            checkpoints.create(
                output,
                plan.outputs,
                format=output_format,
                overwrite=overwrite,
                inputs=[r.path for r in readers],
                **options,
            ) as writer,
        ):
            stream = Stream(
                method,
                plan,
                readers,
                weights,
                census=census,
                allow_nonfinite=allow_nonfinite,
                advance=advance,
                threads=threads or min(8, 2 * (os.cpu_count() or 1)),
            )
            notes += [*plan.notes, *stream.run(writer)]
            checkpoints.copy_companions(readers[0].path, writer.directory)
            _set_config_dtype(writer.directory, dtypes["out_dtype"])
            if census is not None:
                facts = report.Facts(
                    Path(base),
                    models,
                    weights,
                    recipe or {},
                    plan,
                    notes,
                    time.perf_counter() - started,
                )
                notes += report.write(writer.directory, census, facts, block_pattern)
    seconds = time.perf_counter() - started
    return MergeResult(Path(output), text, tuple(notes), seconds)


class _Closing:
    def __init__(self, readers: Sequence[Reader]):
        self._readers = readers

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


def _dtype(name: str, value: str | None) -> np.dtype | None:
    if not value:
        return None
    import ml_dtypes

    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "f32": "float32"}
    value = short.get(value, value)
    try:
        dtype = np.dtype(getattr(ml_dtypes, value, value))
    except TypeError:
        dtype = np.dtype(np.bool_)
    if not core.is_float(dtype):
        raise ValueError(
            f"{name}: got {value!r}, expected float32, float64, bfloat16 or float16"
        )
    return dtype


def _set_config_dtype(directory: Path, dtype: np.dtype | None) -> None:
    """Hugging Face's config.json names the dtype that weights are loaded in."""
    path = directory / "config.json"
    if dtype is None or not path.exists():
        return
    config = json.loads(path.read_text())
    for key in ("torch_dtype", "dtype"):
        if key in config:
            config[key] = dtype.name
    path.write_text(json.dumps(config, indent=2) + "\n")


@contextlib.contextmanager
def _bar(plan: Plan, show: bool) -> Any:
    """A progress bar over bytes with rate and time left."""
    if not show:
        yield lambda nbytes: None
        return
    from tqdm import tqdm

    merged = sum(e.nbytes for e in plan.merged)
    total = merged * len(plan.passes) + plan.read_bytes - merged
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="merging", mininterval=0.2
    ) as bar:
        lock = threading.Lock()

        def advance(nbytes: int) -> None:
            with lock:
                # More passes than planned (a bracket that missed) move the goal.
                bar.total = max(bar.total, bar.n + nbytes)
                bar.update(nbytes)

        yield advance

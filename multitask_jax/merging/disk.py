"""Merging from disk to disk: `merge_checkpoints`."""

import contextlib
import functools
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import ml_dtypes
import numpy as np

from multitask_jax import checkpoints, sharding
from multitask_jax.checkpoints import Reader
from multitask_jax.checkpoints.json_file import read_json
from multitask_jax.merging import core, delta, execution, mesh_plan, on_mesh, report
from multitask_jax.merging.census import MOST_MODELS, Census
from multitask_jax.merging.plan import describe, plan_merge
from multitask_jax.merging.processes import ALONE, Group
from multitask_jax.merging.task_statistics import StatisticsFile

PathLike = str | os.PathLike[str]
NO_MESH_OF_PROCESSES = (
    "several processes merge each on one device; leave the mesh out, or merge with one"
    " process"
)


class MergeResult(NamedTuple):
    """What `merge_checkpoints` did."""

    output: Path | None  # None for a dry run
    plan: str  # in words
    notes: tuple[str, ...]  # what a user should know: copies, warnings
    seconds: float


def merge_checkpoints(
    method: core.Method,
    base: PathLike | Reader | None,
    models: Sequence[PathLike | Reader],
    output: PathLike,
    *,
    weights: Sequence[float] | None = None,
    statistics: Sequence[PathLike] | None = None,
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
    resume: bool = False,
    verify: bool = False,
    report_files: bool = True,
    recipe: Mapping[str, Any] | None = None,
    max_memory: int | None = None,
    dry_run: bool = False,
    progress: bool = True,
    threads: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: sharding.Rules | None = None,
    group: Group = ALONE,
) -> MergeResult:
    """Merges checkpoints, streamed: memory does not grow with the model.

    Args:
      method: a chain or recipe, as for `merge`.
      base: checkpoint of theta_0; None for methods on parameters alone (linear, slerp),
        where the first model then gives names, dtypes and companion files. An open
        reader, which stays open, is a checkpoint as well.
      models: checkpoints of the fine-tuned models, or readers; with a base also PEFT
        LoRA adapters of it, and deltas.
      output: directory that appears when all is done.
      weights: one a model.
      statistics: files by `save_statistics`, one a model, for fisher and regmean.
      include, exclude: regexes on tensor names; the rest is copied from the base.
      dtype: of the computation, "float32" or "float64" (by default float32, and float64
        for float64 tensors).
      out_dtype: of merged tensors, by name ("bfloat16"); the base's by default.
      output_format: "safetensors", "orbax" or "msgpack"; "delta" writes the merged
        task vector alone (float32 unless out_dtype says otherwise), sparse where that
        is smaller. It is a model again, given the same base.
      max_shard_size: bytes of a file at most (safetensors).
      block_pattern: how the report finds blocks in unusual names.
      allow_missing: "base" copies tensors that a model lacks from the base.
      allow_nonfinite: merge models with NaN or infinity all the same.
      overwrite: replace a checkpoint at `output`.
      resume: go on with what a killed run of the same merge had finished, if there is
        such a run; and keep what is finished if this one is interrupted (safetensors).
      verify: write checksums of all tensors, for `python -m experiments.verify`.
      report_files: write merge_report.md, .json, figures and a model card as well.
      recipe: what the report says of the method: flags and values.
      max_memory: bytes; a merge that is expected to need more is refused.
      dry_run: plan only.
      progress: show a bar over bytes.
      threads: two a core by default (some wait for the disk or for XLA), 8 at most;
        fewer where several processes share a host.
      mesh: of this process's devices, to merge on (`sharding.make_mesh`): parameters
        are read into shards and written from them.
      rules: how tensors lie on the mesh; by default `sharding.leaf_spec` says.
      group: the processes that share the merge (`distributed.join`), each of which
        makes this call; safetensors only, and without a mesh.

    Raises:
      CheckpointError: inputs that are damaged, differ or hold NaN, an output that
        exists; nothing is left at `output`.
      ValueError: wrong number of weights or densities, no blocks for LiNeS.
    """
    started = time.perf_counter()
    given_models = list(models)
    models = [_name(m) for m in given_models]
    weights = core.check_models(method, len(models), weights)
    _check_weights(method, weights)
    threads = execution.default_threads(threads, group)
    compute = float_dtype("dtype", dtype, computing=True)
    stored = float_dtype("out_dtype", out_dtype)
    notes = []
    about = dict(recipe or {})
    if mesh is not None and group.count > 1:
        raise ValueError(f"mesh: got {group.count} processes; {NO_MESH_OF_PROCESSES}")
    if mesh is not None:
        about["mesh"] = dict(mesh.shape)
        if resume:
            raise ValueError(
                "resume: a merge on a mesh can't be gone on with; leave out resume or"
                " mesh (--resume, --mesh)"
            )
    if isinstance(base, str | os.PathLike):
        base = Path(base).expanduser()
    given = None if base is None else _name(base)
    if base is None:
        if (method.start, method.end) != ("parameters", "parameters"):
            raise ValueError("this method needs a base: pass the models' common origin")
        if output_format == "delta":
            raise ValueError("output_format='delta' needs a base to be a change of")
        base = given_models[0]
        notes.append(f"No base: names, dtypes and other files are {models[0].name}'s.")
    with contextlib.ExitStack() as stack:
        readers: list[Reader] = []
        for path in (base, *given_models):
            if not isinstance(path, str | os.PathLike):
                readers.append(path)
                continue
            origin = readers[0] if readers and given is not None else None
            readers.append(checkpoints.open(path, origin))
            stack.callback(readers[-1].close)
        known = None if statistics is None else [*map(StatisticsFile, statistics)]
        for file in known or ():
            stack.callback(file.close)
        plan = plan_merge(
            method,
            readers[0],
            readers[1:],
            include=include,
            exclude=exclude,
            dtype=compute,
            out_dtype=stored,
            allow_missing=allow_missing,
            statistics=known,
        )
        tensors: Sequence[checkpoints.TensorInfo] = plan.outputs
        if output_format == "delta":
            method, plan = delta.as_delta(method), delta.delta_plan(plan, stored)
            tensors = delta.written(plan)
        core.settings_of(method, [t.name for t in plan.outputs])  # may refuse the names
        job = execution.Job(method, plan, readers, weights, known or ())
        runner = None
        if mesh is None:
            memory = execution.memory_of([job], threads, max_memory)
        else:
            plan = on_mesh.as_mesh_plan(method, plan, mesh)
            job = job._replace(plan=plan)
            memory = mesh_plan.memory_of(job, mesh, rules, max_memory, dry_run)
            runner = functools.partial(on_mesh.OnMesh, mesh=mesh, rules=rules)
        target = {
            "format": output_format,
            "overwrite": overwrite,
            "inputs": [r.path for r in readers],
        }
        if output or not dry_run:  # a plan needs no output
            checkpoints.check_output(output, **target)
        if dry_run:
            text = describe(plan, models, memory)
            if mesh is not None:
                text += "\n" + mesh_plan.describe(job, mesh, rules)
            return MergeResult(None, text, (*notes, *plan.notes), 0.0)
        if max_shard_size is not None:
            target["max_shard_size"] = max_shard_size
        if output_format == "delta":
            target["base"] = readers[0]
        census = None
        if report_files:
            exact = any(t.trims for t in method.transforms)
            census = Census(len(models), exact=exact and len(models) <= MOST_MODELS)

        def finish(directory: Path, found: list[str]) -> list[str]:
            said = []
            if output_format != "delta":  # it is no model without its base
                checkpoints.copy_companions(readers[0].path, directory)
            set_config_dtype(directory, stored)
            if method.aside is not None:
                names = report.unique_names(models)
                said += method.aside(directory, plan, readers, names)
            if census is not None:
                seconds = time.perf_counter() - started
                before = [*notes, *found, *said]
                facts = report.Facts(
                    given, models, weights, recipe or {}, plan, before, seconds
                )
                said += report.write(directory, census, facts, block_pattern)
            return said

        notes += plan.notes
        notes += execution.execute(
            [job],
            output,
            tensors,
            target,
            finish,
            census=census,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
            threads=threads,
            resume=resume,
            verify=verify,
            about=about,
            runner=runner,
            group=group,
        )
    seconds = time.perf_counter() - started
    text = describe(plan, models, memory)
    return MergeResult(Path(output), text, tuple(notes), seconds)


def _name(model: Any) -> Path:
    """What messages call it: its path, or a reader's `label`, if it has one."""
    return Path(getattr(model, "label", getattr(model, "path", model))).expanduser()


def _check_weights(method: core.Method, weights: Sequence[float]) -> None:
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights: got {tuple(weights)}, expected finite numbers")
    if method.start == "parameters" and method.weighted and abs(sum(weights)) < 1e-8:
        raise ValueError(
            f"weights: got {tuple(weights)}, which add up to 0: no average of"
            " parameters has such weights"
        )


_DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
_SHORT = {"f64": "float64", "f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def float_dtype(
    name: str, value: str | None, *, computing: bool = False
) -> np.dtype | None:
    """The dtype of a name like "bfloat16" or "bf16"; `computing`: wide ones only."""
    if not value:
        return None
    value = _SHORT.get(value.replace("fp", "f"), value)
    known = list(_DTYPES)[:2] if computing else list(_DTYPES)
    if value not in known:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
    return np.dtype(_DTYPES[value])


def set_config_dtype(directory: Path, dtype: np.dtype | None) -> None:
    """Hugging Face's config.json names the dtype that weights are loaded in."""
    path = directory / "config.json"
    if dtype is None or not path.exists():
        return
    config = read_json(path)
    for key in ("torch_dtype", "dtype"):
        if key in config:
            config[key] = dtype.name
    path.write_text(json.dumps(config, indent=2) + "\n")

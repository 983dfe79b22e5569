"""`merge_mergekit`: a mergekit recipe, streamed from disk to disk."""

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from multitask_jax import checkpoints
from multitask_jax.checkpoints import CheckpointError
from multitask_jax.merging import disk, execution, report
from multitask_jax.merging.census import MOST_MODELS, Census
from multitask_jax.merging.execution import Job
from multitask_jax.merging.mergekit import companions, vocabularies
from multitask_jax.merging.mergekit import report as slice_report
from multitask_jax.merging.mergekit.prepare import (
    Prepared,
    describe_recipe,
    prepare,
    whole_plan,
)
from multitask_jax.merging.mergekit.recipe import load
from multitask_jax.merging.processes import ALONE, Group

PathLike = str | os.PathLike[str]


def merge_mergekit(
    recipe: PathLike | Mapping[str, Any],
    output: PathLike,
    *,
    output_format: str = "safetensors",
    max_shard_size: int | None = None,
    block_pattern: str | None = None,
    allow_missing: Literal["", "base"] = "",
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    verify: bool = False,
    report_files: bool = True,
    flags: Mapping[str, Any] | None = None,
    max_memory: int | None = None,
    dry_run: bool = False,
    progress: bool = True,
    threads: int | None = None,
    seed: int = 0,
    group: Group = ALONE,
) -> disk.MergeResult:
    """Runs a mergekit recipe: same results as mergekit 0.1.4, any architecture.

    Args:
      recipe: path of the YAML file, or its content as a mapping. Paths of models in it
        are relative to the file's directory, then to the working directory; a PEFT
        LoRA adapter is a model as "model+adapter", or alone if there is a base_model.
      output: directory that appears when all is done.
      flags: what the report says of how to make the merge again, besides the recipe.
      seed: of random masks (DARE, DELLA).
      output_format, max_shard_size, block_pattern, allow_missing, allow_nonfinite,
        overwrite, resume, verify, report_files, max_memory, dry_run, progress,
        threads, group: as for `merge_checkpoints`. `block_pattern` also finds the
        layers of the recipe.

    Returns:
      What was done.

    Raises:
      CheckpointError: inputs are damaged or differ, the output exists; nothing is left
        at `output`.
      ValueError: the recipe has an unknown key, an impossible value, a filter that
        finds nothing, or slices that leave a model's layers; names the key.
    """
    started = time.perf_counter()
    parsed = load(recipe)
    is_path = not isinstance(recipe, Mapping)
    folder = Path(recipe).expanduser().parent if is_path else Path.cwd()
    threads = execution.default_threads(threads, group)
    if output_format == "delta":
        raise ValueError(
            "output_format: got delta, but a recipe makes a whole model; choose"
            " safetensors, orbax or msgpack"
        )
    with contextlib.ExitStack() as stack:
        try:
            prepared = prepare(
                parsed,
                folder,
                stack,
                block_pattern,
                allow_missing=allow_missing,
                seed=seed,
            )
        except ValueError as e:
            kind = CheckpointError if isinstance(e, CheckpointError) else ValueError
            where = Path(recipe) if is_path else "recipe"
            raise kind(f"{where}: {e}") from None
        jobs, notes = prepared.jobs, list(prepared.notes)
        whole = whole_plan(prepared)
        memory = execution.memory_of(jobs, threads, max_memory)
        target: dict[str, Any] = {
            "format": output_format,
            "overwrite": overwrite,
            "inputs": prepared.read,
        }
        if output or not dry_run:
            checkpoints.check_output(output, **target)
        text = describe_recipe(prepared, whole, memory)
        if dry_run:
            return disk.MergeResult(None, text, tuple(notes), 0.0)
        if max_shard_size is not None:
            target["max_shard_size"] = max_shard_size
        census = _census(prepared) if report_files else None

        def finish(directory: Path, found: list[str]) -> list[str]:
            said = _write_companions(prepared, directory)
            if report_files:
                origin = prepared.inputs.roles[0].origin is not None
                facts = report.Facts(
                    prepared.home if origin else None,
                    prepared.models,
                    _weights(jobs, len(prepared.models)),
                    {**(flags or {}), "method": f"mergekit {parsed.method}"},
                    whole,
                    [*notes, *found, *said],
                    time.perf_counter() - started,
                    parsed.text,
                )
                if census is not None:
                    said += report.write(directory, census, facts, block_pattern)
                else:
                    slice_report.write(directory, facts, prepared.inputs)
            return said

        notes += execution.execute(
            jobs,
            output,
            whole.outputs,
            target,
            finish,
            census=census,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
            threads=threads,
            resume=resume,
            verify=verify,
            about={
                "mergekit_config (its text)": parsed.text,
                "seed": seed,
                "block_pattern": block_pattern,
                "allow_missing": allow_missing,
            },
            group=group,
        )
    seconds = time.perf_counter() - started
    return disk.MergeResult(Path(output), text, tuple(notes), seconds)


# -- after -----------------------------------------------------------------------------


def _census(prepared: Prepared) -> Census | None:
    """Interference is of task vectors of the same models everywhere."""
    methods = {roles.method for roles in prepared.inputs.roles}
    if not prepared.models or methods == {"passthrough"}:
        return None
    count = len(prepared.models)
    trims = any(t.trims for j in prepared.jobs for t in j.method.transforms)
    return Census(count, exact=trims and count <= MOST_MODELS)


def _weights(jobs: Sequence[Job], count: int) -> list[float | None]:
    """A weight a model; None where it differs between tensors."""
    rows = {w for j in jobs for w in j.weights.values() if len(w) == count}
    return [
        next(iter(column)) if len(column) == 1 else None
        for column in map(set, zip(*rows, strict=True))
    ]


def _write_companions(prepared: Prepared, directory: Path) -> list[str]:
    """config.json, tokenizer and what else the base keeps beside its weights."""
    checkpoints.copy_companions(prepared.home, directory)
    alignment, notes = prepared.inputs.alignment, []
    disk.set_config_dtype(directory, prepared.inputs.out)
    config = companions.read_config(directory)
    if prepared.layers is not None:
        old, origins = prepared.layers
        if config is None:
            if len(origins) != old:
                notes.append(f"No config.json: the output has {len(origins)} layers.")
        elif not companions.set_layers(config, old, origins) and len(origins) != old:
            raise CheckpointError(
                f"{prepared.home / 'config.json'}: no key like num_hidden_layers"
                f" has the value {old}, so the output's {len(origins)} layers can't be"
                " told there; correct the file first"
            )
    if alignment is not None:
        if config is not None and not companions.set_vocabulary_size(
            config, alignment.rows
        ):
            notes.append("config.json has no vocab_size: set it where it is kept.")
        vocabularies.write_tokenizer(alignment.output, alignment.source, directory)
        other = companions.read_config(alignment.source)
        if config is not None and other is not None:
            companions.take_token_ids(config, other)
    if config is not None:
        if prepared.untied:
            companions.untie_embeddings(config)
        companions.write_config(directory, config)
    return notes

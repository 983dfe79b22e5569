"""The part of `experiments.merge` that runs mergekit recipes (--mergekit_config)."""

import dataclasses
from typing import Any

from multitask_jax import merging
from multitask_jax.merging.processes import Group

# What a recipe leaves to the command line.
_FLAGS = (
    "mergekit_config",
    "output",
    "seed",
    "block_pattern",
    "allow_missing",
    "allow_nonfinite",
    "output_format",
    "max_shard_size",
    "overwrite",
    "resume",
    "verify",
    "report",
    "dry_run",
    "max_memory",
    "progress",
    "threads",
    "distributed",
    "coordinator",
    "num_processes",
    "process_id",
)
_NOT_IN_REPORT = _FLAGS[-4:]


def check_flags(config: Any) -> None:
    """Refuses flags that say what the recipe says already.

    Raises:
      ValueError: names the flag.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _FLAGS and value != field.default:
            raise ValueError(
                f"--{field.name}={value}: the recipe of --mergekit_config says what is"
                " merged and how; leave the flag out, or write a recipe that says so"
            )


def merge(
    config: Any,
    *,
    max_shard_size: int | None,
    max_memory: int | None,
    group: Group,
) -> Any:
    """Runs --mergekit_config; `config` is `experiments.merge.Config`.

    Raises:
      ValueError: a flag clashes with the recipe, or as `merging.merge_mergekit`.
    """
    check_flags(config)
    given = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if getattr(config, f.name) != f.default and f.name not in _NOT_IN_REPORT
    }
    return merging.merge_mergekit(
        config.mergekit_config,
        config.output,
        output_format=config.output_format,
        max_shard_size=max_shard_size,
        block_pattern=config.block_pattern,
        allow_missing=config.allow_missing,
        allow_nonfinite=config.allow_nonfinite,
        overwrite=config.overwrite,
        resume=config.resume,
        verify=config.verify,
        report_files=config.report,
        flags=given,
        max_memory=max_memory,
        dry_run=config.dry_run,
        progress=config.progress,
        threads=config.threads,
        seed=config.seed or 0,
        group=group,
    )

"""Makes one task's model of an EMR merge.

    python -m experiments.merge --method=emr --base=BASE --models=A,B --output=OUT
    python -m experiments.specialise --base=BASE --merged=OUT \
        --task=OUT/tasks/A.safetensors --output=OUT-A

OUT and a file of one bit a parameter a task replace all the specialists.
"""

import dataclasses
from pathlib import Path

from experiments import flags
from experiments.flags import flag
from multitask_jax import merging


@dataclasses.dataclass(frozen=True)
class Config:
    """Which task, and where to."""

    base: str = flag("Checkpoint that the models were fine-tuned from.", "")
    merged: str = flag("What experiments.merge --method=emr wrote.", "")
    task: str = flag("The task's file in its folder tasks/.", "")
    output: str = flag("Directory to write; it must not exist.", "")
    overwrite: bool = flag("Replace a checkpoint at --output.", False)
    progress: bool = flag("Show a progress bar.", True)


def run(config: Config) -> Path:
    """Writes the task's model; returns its path.

    Raises:
      ValueError (CheckpointError among them): a flag or a file is not as it should be;
        nothing was written.
    """
    for name in ("base", "merged", "task", "output"):
        if not getattr(config, name):
            raise ValueError(f"--{name}: got none; see --help")
    path = merging.specialise_checkpoint(
        config.base,
        config.merged,
        config.task,
        config.output,
        overwrite=config.overwrite,
        progress=config.progress,
    )
    print(f"wrote {path}")
    return path


if __name__ == "__main__":
    flags.main(Config, flags.plain_errors(run))

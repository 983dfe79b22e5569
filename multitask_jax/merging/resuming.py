"""Beginning a merge, or going on with what a killed one had finished."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from multitask_jax import checkpoints
from multitask_jax.checkpoints import CheckpointError, TensorInfo, staging
from multitask_jax.merging import journal, shares
from multitask_jax.merging.census import Census
from multitask_jax.merging.identity import Inputs, differences, identity_of
from multitask_jax.merging.journal import Begun, Progress
from multitask_jax.merging.processes import ALONE, Group


@contextlib.contextmanager
def under_way(
    jobs: Sequence[Any],
    output: str | os.PathLike[str],
    tensors: Sequence[TensorInfo],
    target: Mapping[str, Any],
    *,
    census: Census | None,
    resume: bool,
    about: Mapping[str, Any],
    group: Group = ALONE,
    mine: frozenset[str] = frozenset(),
    **options: Any,
) -> Iterator[Progress]:
    """Begins a checkpoint, or goes on with one that a killed process has begun.

    Args:
      jobs, output, tensors, target, census: as for `execution.execute`.
      resume: go on if there is something; and if this run is interrupted (or the disk
        is full), keep what is finished. Input that is not as it should be leaves
        nothing.
      about, **options: what the identity of the merge has besides.
      group, mine: the processes that share the merge, and what this one writes.

    Yields:
      What takes the place of a writer; its `notes` tell what was found.

    Raises:
      CheckpointError: what there is was begun by another merge, or still runs; an
        input was changed.
      ValueError: resume, but the output is not safetensors, or of several processes.
    """
    path = Path(output).expanduser().absolute()
    kept = {k: v for k, v in target.items() if k not in ("format", "inputs")}
    safetensors = target.get("format", "safetensors") == "safetensors"
    if resume and not safetensors:
        raise ValueError(
            f"resume: an output in {target['format']} can't be gone on with, only one"
            " in safetensors; leave resume (--resume) out"
        )
    files = [s.path for j in jobs for s in j.statistics]
    inputs = Inputs([*target.get("inputs", ()), *files])
    if group.count > 1:  # they keep no journal
        if resume:
            raise ValueError(
                f"resume: got {group.count} processes; one process alone keeps what it"
                " has finished: leave resume (--resume) out"
            )
        with shares.create(group, output, tensors, mine, target) as shared:
            progress = Progress(shared, tensors, jobs, inputs, census)
            yield progress
            inputs.check()
        return
    options["report"] = census is not None
    identity = identity_of(jobs, tensors, target, inputs, about, **options)
    identity = json.loads(json.dumps(identity))  # as it is read back
    begun = staging.unfinished(path)
    found = [
        x for d, runs in begun if runs is None and (x := journal.read(d)) is not None
    ]
    found.sort(key=lambda x: x.written)
    same = [x for x in found if x.identity == identity]
    if resume:
        _refuse_running(path, begun)
        if found and not same:
            _refuse_other(found[-1], identity)
    if resume and same:
        directory = staging.adopt(same[-1].directory, path)
        staging.remove_stale(path)
        writer = checkpoints.attach(directory, path, tensors, **kept)
    else:
        writer = checkpoints.create(path, tensors, **target)
    with writer:
        progress = Progress(writer, tensors, jobs, inputs, census)
        try:
            if resume and same:
                progress.go_on(same[-1].lines, same[-1].nbytes)
            elif safetensors:
                progress.begin(identity)
            progress.notes += _said(same, progress.total, resume=resume)
            yield progress
            inputs.check()
            progress.end()
        except BaseException as e:
            # Input that is not as it should be is a ValueError: leaves nothing.
            writer.keep = resume and not isinstance(e, ValueError)
            if writer.keep:
                with contextlib.suppress(OSError, CheckpointError):
                    progress.save()
            raise
        finally:
            progress.close()


def _said(same: Sequence[Begun], total: int, *, resume: bool) -> list[str]:
    if not same:
        return ["Nothing to resume: began anew."] * resume
    written = f"{same[-1].written} of {total} tensors"
    statistics = sum("measure" in line for line in same[-1].lines)
    if statistics:
        written += f" and {statistics} statistics of the whole model"
    if resume:
        return [f"Resumed: an earlier run had finished {written}."]
    if not same[-1].lines:
        return []
    return [
        f"An earlier run of this merge was killed when it had finished {written};"
        " that was removed. Next time resume (--resume) goes on from there."
    ]


def _refuse_running(path: Path, begun: Sequence[tuple[Path, int | None]]) -> None:
    for directory, process in begun:
        if process is not None:
            raise CheckpointError(
                f"resume: process {process} seems to write to {path} now: wait for it,"
                f" or end it; if it is no merge, remove {directory} or leave resume"
                " (--resume) out"
            )


def _refuse_other(found: Begun, identity: Mapping[str, Any]) -> None:
    changed = differences(found.identity, identity)
    listed = "\n".join(f"  {x}" for x in changed[:8])
    if len(changed) > 8:
        listed += f"\n  and {len(changed) - 8} more"
    raise CheckpointError(
        f"{found.directory}: was begun by another merge than this one:\n{listed}\nGive"
        " it what it had to go on, or leave resume (--resume) out to begin anew, which"
        " removes it"
    )

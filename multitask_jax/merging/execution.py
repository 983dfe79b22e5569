"""Runs what was planned: jobs in, one checkpoint out, whole or not at all."""

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from multitask_jax.checkpoints import CheckpointError, Reader, TensorInfo, checksums
from multitask_jax.merging import resuming, shares
from multitask_jax.merging.census import Census
from multitask_jax.merging.core import Method
from multitask_jax.merging.parallel import cores
from multitask_jax.merging.plan import Plan, human, peak_memory, threads_for
from multitask_jax.merging.processes import ALONE, Group
from multitask_jax.merging.streaming import Stream
from multitask_jax.merging.task_statistics import StatisticsFile


class Job(NamedTuple):
    """Tensors that one method merges: what one `Stream` does."""

    method: Method
    plan: Plan
    readers: Sequence[Reader]  # the base, then the models
    weights: Sequence[float] | Mapping[str, Sequence[float]]  # T, or T by tensor
    statistics: Sequence[StatisticsFile] = ()
    program: Any = None  # jobs of the same key, not None, may share compiled programs


def default_threads(threads: int | None, group: Group = ALONE) -> int:
    """Two a core (some wait for the disk or for XLA), 8 at most.

    A process of a group has its part of the cores of its host.

    Raises:
      ValueError: the number given is not positive.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads: got {threads}, expected at least 1")
    return threads or max(1, min(8, 2 * cores() // group.neighbours))


def memory_of(jobs: Sequence[Job], threads: int, max_memory: int | None) -> int:
    """Estimate of anonymous memory in bytes.

    Raises:
      CheckpointError: it is more than max_memory.
    """
    memory = max(
        (
            peak_memory(j.plan, j.readers, threads_for(j.method, threads), j.method)
            for j in jobs
            if j.plan.merged
        ),
        default=120 << 20,  # the interpreter and JAX
    )
    if max_memory is not None and memory > max_memory:
        raise CheckpointError(
            f"the merge is expected to need {human(memory)}, more than max_memory"
            f" = {human(max_memory)}; pass fewer threads or a larger limit"
        )
    return memory


def execute(
    jobs: Sequence[Job],
    output: str | os.PathLike[str],
    tensors: Sequence[TensorInfo],
    target: Mapping[str, Any],
    finish: Callable[[Path, list[str]], list[str]],
    *,
    census: Census | None = None,
    allow_nonfinite: bool = False,
    progress: bool = True,
    threads: int,
    resume: bool = False,
    verify: bool = False,
    about: Mapping[str, Any] | None = None,
    runner: Callable[..., Any] | None = None,
    group: Group = ALONE,
) -> list[str]:
    """Streams all jobs into one new checkpoint.

    Args:
      jobs: which together write every tensor.
      output: directory that appears when all is done.
      tensors: of the output, in its order.
      target: further arguments of `checkpoints.create`.
      finish: (directory in the making, notes so far) -> more notes; writes what lies
        beside the weights.
      census: gathers what the report says, if there is one.
      allow_nonfinite, progress, threads, resume, verify, group: as for
        `merge_checkpoints`.
      about: flags or recipe, for what a changed one must not go on with.
      runner: what does a job, built as a `Stream` is; a `Stream` by default.

    Returns:
      All notes, in every process.

    Raises:
      CheckpointError: inputs that hold NaN or change meanwhile, a full disk; nothing
        is left at `output`.
    """
    programs: dict[Any, Any] = {}
    plans = [j.plan for j in jobs]
    group.agree("inputs or options", (tensors, plans, [j.weights for j in jobs]))
    mine = shares.split(plans, tensors, group)
    parts = [shares.part_of(p, mine) for p in plans]
    with (
        progress_bar(parts, progress and not group.index) as advance,
        resuming.under_way(
            jobs,
            output,
            tensors,
            target,
            census=census,
            resume=resume,
            about=about or {},
            group=group,
            mine=mine,
            allow_nonfinite=allow_nonfinite,
        ) as writer,
    ):
        by_job: list[list[str]] = []
        for job, part, past in zip(jobs, parts, writer.past, strict=True):
            shared = {"group": group, "share": part} if group.count > 1 else {}
            stream = (runner or Stream)(
                job.method,
                job.plan,
                job.readers,
                job.weights,
                programs=programs.get(job.program),
                statistics=job.statistics,
                census=census,
                allow_nonfinite=allow_nonfinite,
                advance=advance,
                threads=threads_for(job.method, threads),
                past=past,
                **shared,
            )
            if job.program is not None:
                programs[job.program] = stream.programs
            by_job.append(stream.run(writer))
        writer.complete()
        notes = writer.notes + shares.gather_notes(group, by_job)
        if census is not None:
            shares.gather_census(group, census, tensors)
        if group.index == 0:
            notes += finish(writer.directory, notes)
            if verify:
                checksums.write(writer.directory, threads)
    return group.combine(notes, lambda all_notes: all_notes[0])


@contextlib.contextmanager
def progress_bar(plans: Sequence[Plan], show: bool) -> Any:
    """A progress bar over bytes with rate and time left."""
    if not show:
        yield lambda nbytes: None
        return
    from tqdm import tqdm

    total = 0
    for plan in plans:
        merged = sum(e.nbytes for e in plan.merged)
        total += merged * len(plan.passes) + plan.read_bytes - merged
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

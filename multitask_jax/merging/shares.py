"""Which process of a group does which tensors, and how their work becomes one output.

A tensor belongs to one process, which measures, merges, writes and counts it. Tensors
of a share are neighbours in the output: each process writes whole regions of files.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from multitask_jax import checkpoints
from multitask_jax.checkpoints import CheckpointError, TensorInfo, Writer
from multitask_jax.merging import interference
from multitask_jax.merging.census import Census
from multitask_jax.merging.interference import LeafStatistics
from multitask_jax.merging.plan import Plan
from multitask_jax.merging.processes import Group

_VISIBLE = 10.0  # seconds for a new directory to show on other hosts (caches of NFS)


def split(
    plans: Sequence[Plan], tensors: Sequence[TensorInfo], group: Group
) -> frozenset[str]:
    """Names of this process' tensors: a run of the output's with its share of the work.

    Work is bytes read, over all passes, and written. A tensor belongs to the process
    in whose part of the line of all bytes its middle lies.
    """
    work = {t.name: t.nbytes for t in tensors}
    for plan in plans:
        for e in plan.merged:
            work[e.path] += e.nbytes * len(plan.passes)
        for t in plan.copied:
            work[t.name] += t.nbytes
    total, before, mine = max(1, sum(work.values())), 0, []
    for t in tensors:
        middle = 2 * before + work[t.name]
        if min(group.count - 1, middle * group.count // (2 * total)) == group.index:
            mine.append(t.name)
        before += work[t.name]
    return frozenset(mine)


def part_of(plan: Plan, names: frozenset[str]) -> Plan:
    """The plan of some tensors of the output."""
    return plan._replace(
        merged=tuple(e for e in plan.merged if e.path in names),
        copied=tuple(t for t in plan.copied if t.name in names),
    )


@contextlib.contextmanager
def create(
    group: Group,
    output: str | os.PathLike[str],
    tensors: Sequence[TensorInfo],
    mine: frozenset[str],
    target: Mapping[str, Any],
) -> Iterator[Writer]:
    """`checkpoints.create` by process 0, where the others write along.

    On a clean exit the output appears when all have left; then they go on.

    Raises:
      ValueError: a format that several processes can't write, other arguments than
        those of process 0, or a directory that it does not see.
    """
    if group.count == 1:
        with checkpoints.create(output, tensors, **target) as writer:
            yield writer
        return
    if target.get("format", "safetensors") != "safetensors":
        raise ValueError(
            f"output_format: got {target['format']}, which one process writes; several"
            " write safetensors (convert afterwards: a merge of one model by linear)"
        )
    others = [t.name for t in tensors if t.name not in mine]
    path = Path(output).expanduser().absolute()
    if group.index:
        staging = path.parent / group.combine(None, lambda names: names[0])
        writer = _attach(group, staging, path, tensors, target)
        writer.skip(others)
        yield writer
        writer.complete()
        group.barrier()
    else:
        writer = checkpoints.create(output, tensors, **target)
        try:
            if group.watch is not None:  # when another process fails
                directory = writer.directory
                group.watch.cleanup = lambda: shutil.rmtree(directory, True)
            group.combine(writer.directory.name, lambda names: names[0])
            writer.skip(others)
            yield writer
            group.barrier()  # all files are closed
        except BaseException:
            writer.abort()
            raise
        with group.uninterrupted():
            writer.__exit__(None, None, None)
    group.barrier()


def _attach(
    group: Group,
    staging: Path,
    path: Path,
    tensors: Sequence[TensorInfo],
    target: Mapping[str, Any],
) -> Writer:
    deadline = time.monotonic() + _VISIBLE
    while not staging.is_dir():
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{path}: process {group.index} does not see what process 0 writes"
                f" there ({staging.name}); the output must be on a file system that all"
                " processes share"
            )
        time.sleep(0.2)
    options = {k: v for k, v in target.items() if k not in ("format", "inputs")}
    return checkpoints.attach(staging, path, tensors, **options)


def gather_notes(group: Group, notes: Sequence[list[str]]) -> list[str]:
    """Notes of all jobs, each job's in the order of its tensors."""
    rows = group.combine(notes, list)
    return [note for job in zip(*rows, strict=True) for part in job for note in part]


def gather_census(group: Group, census: Census, tensors: Sequence[TensorInfo]) -> None:
    """Adds up what the processes counted, in the output's order; process 0 has it."""
    if group.count > 1:
        parts: dict[str, list[LeafStatistics]] = {}

        def collect(states: list[dict[str, Any]]) -> None:
            for state in states:
                part = Census(census.models, exact=census.exact)
                part.restore(state)
                for path, leaf in part.leaves.items():
                    parts.setdefault(path, []).append(leaf)

        group.combine(census.state(list(census.leaves)), collect)
        if group.index == 0:
            census.leaves = {p: interference.add(leaf) for p, leaf in parts.items()}
    place = {t.name: i for i, t in enumerate(tensors)}
    order = sorted(census.leaves, key=lambda name: place.get(name, len(place)))
    census.leaves = {name: census.leaves[name] for name in order}

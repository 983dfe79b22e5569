"""Directories in the making: hidden beside their final path, and what kills leave."""

import glob
import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from multitask_jax.checkpoints.types import CheckpointError

# Two writers of one process to one path get a directory each.
_serial = itertools.count()
_ours: set[Path] = set()  # of this process: a killed one may have had its number


def ours(path: Path) -> Path:
    """A new name for what is to become `path`, known to be this process's."""
    directory = path.parent / f".{path.name}.partial-{next(_serial)}-{os.getpid()}"
    _ours.add(directory)
    return directory


def replaced(path: Path) -> Path:
    """Where the old output waits until the new one is in its place."""
    directory = path.parent / f".{path.name}.replaced-{os.getpid()}"
    _ours.add(directory)
    return directory


def release(directory: Path) -> None:
    """Leaves a directory to whoever goes on with it, this process perhaps."""
    _ours.discard(directory)


def _left(path: Path, kinds: Sequence[str]) -> list[tuple[str, int, Path]]:
    """(kind, process, directory) of what lies beside `path`, whoever made it."""
    start, out = f".{path.name}.", []
    for left in sorted(path.parent.glob(f"{glob.escape(start)}*-*")):
        kind, *_, pid = left.name[len(start) :].split("-")
        if kind in kinds and pid.isdigit():
            out.append((kind, int(pid), left))
    return out


def unfinished(path: Path) -> list[tuple[Path, int | None]]:
    """What others have begun to write to `path`: (directory, process if it runs).

    That may be another process, which got the number of one that is gone.
    """
    return [
        (left, None if _gone(pid, left) else pid)
        for _, pid, left in _left(path, ["partial"])
        if left not in _ours
    ]


def adopt(left: Path, path: Path) -> Path:
    """Takes over the directory of a process that is gone; returns its new name."""
    directory = ours(path)
    try:
        left.rename(directory)
    except OSError as e:
        raise CheckpointError(
            f"{left}: can't go on with it ({e.strerror}); another process may have"
            " taken it over"
        ) from None
    return directory


def remove_stale(path: Path) -> None:
    """Repairs what killed processes left: staging, or an output moved half-way."""
    for kind, pid, left in _left(path, ["partial", "replaced"]):
        if not _gone(pid, left):
            continue
        if kind == "replaced" and not path.exists():
            left.rename(path)  # killed between the two renames of `commit`
        else:
            shutil.rmtree(left, ignore_errors=True)


def _gone(pid: int, left: Path) -> bool:
    if pid == os.getpid():
        return left not in _ours
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False

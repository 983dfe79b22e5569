"""Directories in the making: hidden beside their final path, and what kills leave.

Beside OUT lie .OUT.partial-SERIAL-HOST-PID (new files) and, for the moment of a swap,
.OUT.replaced-HOST-PID (the checkpoint that OUT was before).
"""

import contextlib
import glob
import itertools
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from multitask_jax.checkpoints.types import CheckpointError

# Two writers of one process to one path get a directory each.
_serial = itertools.count()
_ours: set[Path] = set()  # of this process: a killed one may have had its number
_PULSE, _QUIET = 60.0, 600.0  # seconds


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[:40] or "host"


def ours(path: Path) -> Path:
    """A new name for what is to become `path`, known to be this process's."""
    name = f".{path.name}.partial-{next(_serial)}-{_host()}-{os.getpid()}"
    directory = path.parent / name
    _ours.add(directory)
    return directory


def replaced(path: Path) -> Path:
    """Where the old output waits until the new one is in its place."""
    directory = path.parent / f".{path.name}.replaced-{_host()}-{os.getpid()}"
    _ours.add(directory)
    return directory


def release(directory: Path) -> None:
    """Leaves a directory to whoever goes on with it, this process perhaps."""
    _ours.discard(directory)


def _left(path: Path, kinds: Sequence[str]) -> list[tuple[str, str, int, Path]]:
    """(kind, host, process, directory) of what lies beside `path`, whoever made it."""
    start, out = f".{path.name}.", []
    for left in sorted(path.parent.glob(f"{glob.escape(start)}*-*")):
        name = re.fullmatch(
            r"(partial|replaced)(?:-\d+)?-([A-Za-z0-9]+)-(\d+)", left.name[len(start) :]
        )
        if name is not None and name[1] in kinds:
            out.append((name[1], name[2], int(name[3]), left))
    return out


def unfinished(path: Path) -> list[tuple[Path, int | None]]:
    """What others have begun to write to `path`: (directory, process if it runs).

    That may be another process, which got the number of one that is gone.
    """
    return [
        (left, None if _gone(host, pid, left) else pid)
        for _, host, pid, left in _left(path, ["partial"])
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
    for kind, host, pid, left in _left(path, ["partial", "replaced"]):
        if not _gone(host, pid, left):
            continue
        if kind == "replaced" and not path.exists():
            left.rename(path)  # killed between the two renames of `commit`
        else:
            shutil.rmtree(left, ignore_errors=True)


def _gone(host: str, pid: int, left: Path) -> bool:
    """By its pid on this host; of another one, where a pid says nothing, by its age."""
    if host != _host():
        try:
            return time.time() - left.stat().st_ctime > _QUIET
        except OSError:  # taken over or removed meanwhile
            return False
    if pid == os.getpid():
        return left not in _ours
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


class Pulse:
    """Touches a directory every minute: other hosts see that it is in use."""

    def __init__(self, directory: Path):
        self._stop = threading.Event()
        threading.Thread(target=self._run, args=(directory,), daemon=True).start()

    def _run(self, directory: Path) -> None:
        while not self._stop.wait(_PULSE):
            with contextlib.suppress(OSError):
                os.utime(directory)

    def stop(self) -> None:
        """Touches no more."""
        self._stop.set()

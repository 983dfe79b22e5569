"""Names of directories in the making; which of them were left by a killed process.

Beside OUT lie .OUT.partial-SERIAL-HOST-PID (new files) and, for the moment of a swap,
.OUT.replaced-HOST-PID (the checkpoint that OUT was before).
"""

import contextlib
import itertools
import os
import re
import shutil
import socket
import threading
import time
from pathlib import Path

_PULSE, _QUIET = 60.0, 600.0  # seconds
# Two writers of one process to one path get a directory each.
_serial = itertools.count()


def _me() -> str:
    host = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[:40]
    return f"{host or 'host'}-{os.getpid()}"


def partial(path: Path) -> Path:
    """Where this process prepares what will be at `path`."""
    return path.parent / f".{path.name}.partial-{next(_serial)}-{_me()}"


def replaced(path: Path) -> Path:
    """Where this process puts what was at `path`."""
    return path.parent / f".{path.name}.replaced-{_me()}"


def remove_stale(path: Path) -> None:
    """Repairs what killed processes left: files half-way, or an output moved away."""
    start = f".{path.name}."
    for left in path.parent.glob(f"{start}*-*"):
        name = re.fullmatch(
            r"(partial-\d+|replaced)-([A-Za-z0-9]+)-(\d+)", left.name[len(start) :]
        )
        if name is None or not _abandoned(left, name[2], int(name[3])):
            continue
        if name[1] == "replaced" and not path.exists():
            left.rename(path)  # killed between the two renames of a commit
        else:
            shutil.rmtree(left, ignore_errors=True)


def _abandoned(left: Path, host: str, pid: int) -> bool:
    """By its pid on this host; of another one, where a pid says nothing, by its age."""
    if host != _me().rpartition("-")[0]:
        try:
            return time.time() - left.stat().st_ctime > _QUIET
        except OSError:  # gone, or made by others meanwhile
            return False
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

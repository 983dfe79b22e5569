"""The host's memory between steps, where glibc manages it (Linux)."""

import ctypes
import sys

# Options of mallopt(3), by their numbers in malloc.h.
_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD = -8, -4, -1


def keep_freed_memory() -> bool:
    """Memory that was freed stays with the process: the next step gets it as it is.

    A program on a CPU asks for all its temporary memory at once, and gives it back.
    glibc maps so large a piece anew each time, and the kernel clears it page by page:
    up to a quarter of the time of training steps that need 1 GB, by what the host makes
    of page faults (`experiments.benchmark_egom2p --nokeep_memory` shows it). The price:
    the process stays as large as it ever was, and that is more, for the gaps (3.1 GB,
    not 2.1, with EgoM2P "small"); and threads wait for each other at the one pool:
    steps of many small operations take up to twice as long, so it is not for these.
    Call it before JAX's first operation, whose threads keep their own pools otherwise.
    Accelerators have allocators of their own.

    Returns:
      Whether glibc took it: not on other systems, and no use beside another malloc.
    """
    linux = sys.platform == "linux"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if linux else None
    if mallopt is None:
        return False
    # One pool for all threads, that grows and never shrinks.
    wanted = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
    return all(mallopt(option, value) == 1 for option, value in wanted.items())

"""Work on many items by a few threads."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from threadpoolctl import threadpool_limits

_lock, _users = threading.Lock(), 0
_limits: Any = None


def cores() -> int:
    """Cores that this process may use, which schedulers of clusters cut down."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Decompositions use one thread each: for work that has threads of its own.

    BLAS's threads wait for each other in loops, and take the cores that other
    decompositions need: two SVDs of [384, 1536] at a time took four times as long. The
    limit is the process's; the last of several users to leave lifts it.
    """
    import scipy.linalg  # noqa: F401  JAX's LAPACK; only what is loaded is limited

    global _users, _limits
    with _lock:
        if not _users:
            _limits = threadpool_limits(1, user_api="blas")
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _limits.restore_original_limits()


def parallel(work: Callable[[Any], None], items: Iterable[Any], threads: int) -> None:
    """Calls `work` on each item from a few threads; stops at the first exception."""
    iterator, lock, stop = iter(items), threading.Lock(), threading.Event()

    def loop() -> None:
        while not stop.is_set():
            with lock:
                item = next(iterator, stop)
            if item is stop:
                return
            try:
                work(item)
            except BaseException:
                stop.set()
                raise

    with ThreadPoolExecutor(threads) as pool:
        try:
            for future in [pool.submit(loop) for _ in range(threads)]:
                future.result()
        finally:
            stop.set()


def large_alone(
    work: Callable[[Any], None],
    items: Iterable[Any],
    threads: int,
    large: Callable[[Any], bool],
) -> None:
    """For decompositions: large items in turn, by all of BLAS's threads; then the rest.

    Small matrices keep one thread busy at most; of large ones only one is in memory.
    """
    items = list(items)
    parallel(work, filter(large, items), 1)
    with one_blas_thread():
        parallel(work, (i for i in items if not large(i)), threads)

"""Work on many items by a few threads."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


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

"""Signs of life of the processes of a merge, and how all end when one does.

A process that fails publishes why. One that is killed publishes nothing: process 0
misses its beats and says so. JAX would notice too, but later, and only by aborting.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

PATIENCE = 8.0  # seconds without a beat
_FAILED, _BEATS, _LEFT = ("multitask_jax/" + x for x in ("failed/", "beats/", "left/"))


class Watch:
    """A thread that beats, looks for failures, and ends this process for one."""

    def __init__(self, client: Any, index: int, count: int, patience: float = PATIENCE):
        self._client, self._index, self._count = client, index, count
        self._patience = patience
        self._interval = min(0.5, patience / 4)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        # Of each process its last beat, and when it came.
        self._seen = dict.fromkeys(range(count), ("", time.monotonic()))
        # Held where ending must wait; never released by who ends the process.
        self.ending = threading.Lock()
        # What the process does last, whoever failed: quick, and without exceptions.
        self.cleanup: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Begins to beat."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the watch, when all processes are done."""
        self._stop.set()
        self._thread.join()

    def fail(self, reason: str) -> None:
        """Tells the others why this process fails; ends it when they know."""
        with contextlib.suppress(RuntimeError):  # without a coordinator nobody asks
            self._client.key_value_set(f"{_FAILED}{self._index}", reason)
        self._end()

    def _run(self) -> None:
        beats = 0
        lost = time.monotonic()
        while not self._stop.wait(self._interval):
            beats += 1
            try:
                mine = f"{_BEATS}{self._index}"
                self._client.key_value_set(mine, str(beats), allow_overwrite=True)
                failed = self._values(_FAILED)
                if not failed and self._index == 0:
                    failed = self._missing()
                    for i, reason in failed.items():
                        self._client.key_value_set(f"{_FAILED}{i}", reason)
                lost = time.monotonic()
            except RuntimeError as e:
                if time.monotonic() - lost < self._patience / 2:
                    continue
                failed = {0: f"not reachable, probably killed ({e})"}
            if failed:
                i, reason = next(iter(failed.items()))
                if i != self._index:
                    print(f"error: process {i}: {reason}", file=sys.stderr)
                self._end()

    def _values(self, folder: str) -> dict[int, str]:
        """What processes wrote there, by process."""
        found = self._client.key_value_dir_get(folder)
        return {int(key.rpartition("/")[2]): value for key, value in found}

    def _missing(self) -> dict[int, str]:
        """Processes whose beats stand still."""
        now = time.monotonic()
        for i, beat in self._values(_BEATS).items():
            if self._seen[i][0] != beat:
                self._seen[i] = (beat, now)
        return {
            i: f"no sign of life for {now - since:.0f} s: killed (out of memory?), or"
            " its host is gone"
            for i, (_, since) in self._seen.items()
            if now - since > self._patience
        }

    def _end(self) -> None:
        """Ends the process; process 0 last, since the others ask it."""
        self.ending.acquire()
        self.cleanup()
        with contextlib.suppress(RuntimeError):
            self._client.key_value_set(f"{_LEFT}{self._index}", "", True)
            deadline = time.monotonic() + 6 * self._interval
            while self._index == 0 and time.monotonic() < deadline:
                if len(self._values(_LEFT)) == self._count:
                    break
                time.sleep(0.05)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

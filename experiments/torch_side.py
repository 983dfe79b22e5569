"""A PyTorch program as the other side of a benchmark, in a process of its own."""

import contextlib
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from multitask_jax.host_memory import keep_freed_memory

Timer = Callable[[str, int], float]  # kind, steps -> seconds


KEEP_MEMORY = (
    "Both sides keep freed memory for the next step, as some of our commands that train"
    " do (`multitask_jax.host_memory`)."
)
# The same for a process that is started: what `host_memory` asks of glibc.
_KEPT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**62),
}


def prepare(cores: int, *, keep_memory: bool) -> None:
    """Keeps this process, and what it starts, to some cores where the OS lets us.

    `keep_memory`: see KEEP_MEMORY; of this process, `start` takes it for the other.
    """
    if hasattr(os, "sched_setaffinity"):  # XLA has as many threads as it sees cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    if keep_memory:
        keep_freed_memory()


def timed(run: Callable[[], Any]) -> Callable[[], float]:
    """A call that tells the seconds that `run` took."""

    def seconds() -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    return seconds


def medians(
    timers: Mapping[str, Callable[[], float]], repeats: int
) -> dict[str, float]:
    """Milliseconds by name, the median of turns; two calls first, to compile and warm.

    All timers have a turn before the first has its next.
    """
    for timer in timers.values():
        timer()
        timer()
    turns = [{n: timer() for n, timer in timers.items()} for _ in range(repeats)]
    return {n: 1e3 * statistics.median(turn[n] for turn in turns) for n in timers}


def start(
    script: str,
    settings: Mapping[str, Any],
    *,
    python: str,
    threads: int,
    keep_memory: bool,
    needs: str = "torch and transformers",
) -> tuple[Timer, subprocess.Popen]:
    """Starts a script of this folder, which the caller ends by `communicate()`.

    For every line "KIND STEPS" on its standard input it takes so many steps and prints
    their seconds. `keep_memory`: see KEEP_MEMORY. `needs`: the packages that it
    imports, named where it ends early.

    Raises:
      FileNotFoundError: no such interpreter.
    """
    process = subprocess.Popen(
        [python, str(Path(__file__).with_name(script)), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"OMP_NUM_THREADS": str(threads)}
        | (_KEPT if keep_memory else {}),
    )

    def seconds(kind: str, steps: int) -> float:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{kind} {steps}\n")
            process.stdin.flush()
        if not (line := process.stdout.readline()):
            raise ValueError(
                f"--torch_python={python} ended early; its message is above; it needs"
                f" {needs} (pip install there)"
            )
        return float(line)

    return seconds, process

"""Time of one merge by 1, 2, ... processes of this machine, with the same bytes.

    python -m experiments.scaling_merge --processes=1,2 --workdir=.cache/benchmark_merge

Merges the *synthetic* models of experiments.benchmark_merge (502 M parameters, made on
first use) by TIES over the whole model. Each run starts its processes on a free port of
localhost, as several hosts would be started by hand. Processes of one machine share its
cores and its disk, so the table tells what sharing costs; what it gains, only more
machines can tell (experiments.merge_cost estimates).
"""

import dataclasses
import hashlib
import os
import socket
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from experiments import benchmark_merge, flags, parsing
from experiments.flags import flag


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run, how often."""

    processes: str = flag("Numbers of processes, comma-separated.", "1,2")
    workdir: str = flag("Folder of models and results.", ".cache/benchmark_merge")
    layers: int = flag("Blocks; 34 give 502 M parameters.", 34)
    method: str = flag("How to merge.", "ties")
    repeats: int = flag("Runs of each; the median counts.", 3)
    threads: int | None = flag("Threads a process (by default the cores are shared).")


class Run(NamedTuple):
    """One merge."""

    seconds: float
    memory: float  # bytes of RssAnon, the largest process
    digest: str  # of the weights


def measure(config: Config, paths: list[Path], output: Path, count: int) -> Run:
    """Runs `count` processes until all have ended.

    Raises:
      RuntimeError: one of them failed.
    """
    row = benchmark_merge.Row((f"--method={config.method}",), "")
    options = [f"--threads={config.threads}"] if config.threads else []
    command = benchmark_merge.ours(paths, output, row, *options)
    commands = [command]
    if count > 1:
        with socket.socket() as s:
            s.bind(("", 0))
            port = s.getsockname()[1]
        group = [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
        commands = [[*command, *group, f"--process_id={i}"] for i in range(count)]
    results: list[tuple[float, float]] = []
    failures: list[Exception] = []

    def start(command: list[str]) -> None:
        try:
            results.append(benchmark_merge.measure(command))
        except RuntimeError as e:
            failures.append(e)

    started = time.perf_counter()
    threads = [threading.Thread(target=start, args=(c,)) for c in commands]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    seconds = time.perf_counter() - started
    if failures:
        raise failures[0]
    with (output / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Run(seconds, max(memory for _, memory in results), digest)


def run(config: Config) -> dict[int, list[Run]]:
    """Runs all in turn, prints a table.

    Raises:
      ValueError: no numbers of processes.
      RuntimeError: a merge failed, or the bytes differ.
    """
    counts = [int(n) for n in parsing.numbers("processes", config.processes) or []]
    if not counts or min(counts) < 1:
        raise ValueError(f"--processes: got {config.processes!r}, expected like 1,2")
    workdir = Path(config.workdir).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    sizes = benchmark_merge.Config(layers=config.layers)
    paths = benchmark_merge.make_models(sizes, workdir)
    runs: dict[int, list[Run]] = {n: [] for n in counts}
    for _ in range(config.repeats):
        for n in counts:
            os.sync()
            runs[n].append(measure(config, paths, workdir / "out", n))
            print(f"{n} processes: {runs[n][-1].seconds:.1f} s", flush=True)
    if len({r.digest for some in runs.values() for r in some}) > 1:
        raise RuntimeError(f"the outputs differ: {runs}")
    print(as_table(config, runs))
    return runs


def as_table(config: Config, runs: dict[int, list[Run]]) -> str:
    """Markdown."""
    first = statistics.median(r.seconds for r in next(iter(runs.values())))
    lines = [
        f"{config.method}, base + 3 models, {os.cpu_count()} cores, load"
        f" {os.getloadavg()[0]:.1f}, Python {sys.version.split()[0]};"
        " same bytes in all runs",
        "",
        "| processes | seconds, median (range) | against the first | RssAnon each |",
        "|--:|--:|--:|--:|",
    ]
    for n, some in runs.items():
        seconds = [r.seconds for r in some]
        middle, memory = statistics.median(seconds), max(r.memory for r in some)
        spread = f"{middle:.1f} ({min(seconds):.1f}-{max(seconds):.1f})"
        lines.append(f"| {n} | {spread} | {first / middle:.2f} x | {memory:.0f} MB |")
    return "\n".join(lines)


if __name__ == "__main__":
    flags.main(Config, flags.plain_errors(run))

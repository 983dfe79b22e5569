"""Merging what is large, without storing it: does memory stay flat, and time a tensor?

    python -m experiments.large_merge --case=lazy      # 3 x 10 GB, made up
    python -m experiments.large_merge --case=sparse --gigabytes=30  # 3 files of holes
    python -m experiments.large_merge --case=models    # 2 to 20 models at once
    python -m experiments.large_merge --case=tensors   # 1,000 to 100,000 tensors

`lazy` and `sparse` merge a base and two models of a Llama layout in bfloat16 by TIES
over the whole model (three passes, interference statistics included) through the engine
of `merge_checkpoints`, into a sink that keeps a checksum. The values of `lazy` follow
from a seed and their place; those of `sparse` are holes in a file, so all zero: one
magnitude, which says nothing of thresholds. `models` (50 M parameters each) and
`tensors` (64 x 16 each, two models) run the command line from disk to disk.

Memory is RssAnon, sampled: pages of mapped files do not count. In --workdir each case
leaves result.json (and metrics.jsonl, its memory over time); report.md and memory.png
are about all cases there. On two cores `lazy` takes about ten minutes, `sparse` 15,
`models` 2, `tensors` 10.
"""

import dataclasses
import json
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments import flags, large_sources
from experiments.benchmark_merge import measure, rss_anon
from experiments.flags import flag
from multitask_jax import checkpoints, merging
from multitask_jax.checkpoints import Reader
from multitask_jax.merging import execution, interference
from multitask_jax.merging.census import Census
from multitask_jax.merging.plan import plan_merge
from multitask_jax.merging.report import table
from multitask_jax.merging.streaming import Stream


@dataclasses.dataclass(frozen=True)
class Config:
    """What to merge."""

    case: Literal["lazy", "sparse", "models", "tensors"] = flag(
        "What is large.", "lazy"
    )
    workdir: str = flag("Folder for models and results.", ".cache/large_merge")
    gigabytes: float = flag("lazy, sparse: of each of the three checkpoints.", 10.0)
    width: int = flag("lazy, sparse, models: width of the layout.", 4096)
    counts: str = flag(
        "models, tensors: how many, comma-separated; by default 2,5,10,20 and"
        " 1000,10000,100000.",
        "",
    )
    parameters: float = flag("models: millions of parameters of each.", 50.0)
    methods: str = flag("models, tensors: methods.", "task_arithmetic,ties")
    density: float = flag("Share of entries that TIES keeps.", 0.2)
    threads: int | None = flag("Threads; two a core by default.", None)
    sample: float = flag("Seconds between two looks at the memory.", 0.2)


class MemoryLog:
    """Samples this process's RssAnon, and bytes read so far, into a file.

    `metrics.jsonl`: one {"seconds", "rss_anon_mb", "read_gb"} a line.
    """

    def __init__(self, path: Path, interval: float):
        self._path, self._interval = path, interval
        self._stop, self._lock = threading.Event(), threading.Lock()
        self.read_bytes, self.peak_mb = 0, 0.0

    def advance(self, nbytes: int) -> None:
        """Hears of bytes read; thread-safe."""
        with self._lock:
            self.read_bytes += nbytes

    def __enter__(self) -> "MemoryLog":
        self._started = time.perf_counter()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._started

    def _watch(self) -> None:
        with self._path.open("w") as file:
            while True:
                last = self._stop.wait(self._interval)
                mb = rss_anon(os.getpid()) / 1e6
                self.peak_mb = max(self.peak_mb, mb)
                line = {
                    "seconds": round(self.seconds, 2),
                    "rss_anon_mb": round(mb, 1),
                    "read_gb": round(self.read_bytes / 1e9, 3),
                }
                file.write(json.dumps(line) + "\n")
                file.flush()
                if last:
                    return


def merge_into_sink(
    readers: Sequence[Reader], config: Config, folder: Path
) -> dict[str, Any]:
    """TIES over the whole model, streamed; nothing is written but `folder`'s log."""
    method = merging.ties(density=config.density)
    models = len(readers) - 1
    plan = plan_merge(method, readers[0], readers[1:])
    sink = large_sources.ChecksumSink(plan.outputs)
    census = Census(models, exact=True)
    before = os.times()
    with MemoryLog(folder / "metrics.jsonl", config.sample) as log:
        stream = Stream(
            method,
            plan,
            readers,
            (1.0,) * models,
            census=census,
            advance=log.advance,
            threads=execution.default_threads(config.threads),
        )
        stream.run(sink)
        sink.finish()
        seconds = log.seconds
    after = os.times()
    total = interference.summarise(interference.add(list(census.leaves.values())))
    size = sum(e.size for e in plan.merged)
    return {
        "parameters": size,
        "input_gb": plan.read_bytes / 1e9,
        "passes": len(plan.passes),
        "read_gb": log.read_bytes / 1e9,
        "output_gb": plan.write_bytes / 1e9,
        "seconds": seconds,
        "cpu_seconds": after.user + after.system - before.user - before.system,
        "gb_per_second": log.read_bytes / 1e9 / seconds,
        "peak_mb": log.peak_mb,
        "kept": [1 - float(x) for x in total.redundant],
        "sign_conflicts": float(np.nan_to_num(total.conflict_rate)),  # 0 / 0: none
        "checksum": sink.checksum,
    }


def sparse(config: Config, folder: Path) -> Iterator[dict[str, Any]]:
    """Files of holes."""
    layout = large_sources.llama(config.gigabytes * 1e9 / 2, config.width)
    paths = [folder / name / "model.safetensors" for name in ("base", "m1", "m2")]
    readers = [checkpoints.open(large_sources.make_sparse(p, layout)) for p in paths]
    on_disk = sum(p.stat().st_blocks * 512 for p in paths)
    yield {"on_disk_mb": on_disk / 1e6} | merge_into_sink(readers, config, folder)
    for reader, path in zip(readers, paths, strict=True):
        reader.close()
        shutil.rmtree(path.parent)


def lazy(config: Config, folder: Path) -> Iterator[dict[str, Any]]:
    """Dense values, made up as they are read."""
    layout = large_sources.llama(config.gigabytes * 1e9 / 2, config.width)
    yield merge_into_sink(large_sources.lazy_models(layout, 2), config, folder)


def models(config: Config, folder: Path) -> Iterator[dict[str, Any]]:
    """More and more models at once."""
    counts = _counts(config, "2,5,10,20")
    layout = large_sources.llama(config.parameters * 1e6, min(config.width, 768))
    sources = large_sources.lazy_models(layout, max(counts))
    paths = [large_sources.save(m, folder / m.path) for m in sources]
    for method in config.methods.split(","):
        for count in counts:
            row = command_line(method, paths[: count + 1], folder, config)
            yield {"models": count} | row


def tensors(config: Config, folder: Path) -> Iterator[dict[str, Any]]:
    """More and more tensors of one small size, in two models."""
    for count in _counts(config, "1000,10000,100000"):
        sources = large_sources.lazy_models(large_sources.experts(count), 2)
        home = folder / str(count)
        paths = [large_sources.save(m, home / m.path) for m in sources]
        for method in config.methods.split(","):
            for options in ((), ("--noreport",)):
                row = command_line(method, paths, folder, config, *options)
                yield {"tensors": count} | row
        shutil.rmtree(home)


def _counts(config: Config, default: str) -> list[int]:
    try:
        counts = [int(x) for x in (config.counts or default).split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ValueError(f"--counts: got {config.counts!r}, expected numbers like 2,20")
    return counts


def command_line(
    method: str, paths: Sequence[Path], folder: Path, config: Config, *options: str
) -> dict[str, Any]:
    """A merge as a process of its own, with its time and memory."""
    base, *others = map(str, paths)
    out = folder / "out"
    command = [
        *(sys.executable, "-m", "experiments.merge", f"--method={method}"),
        *(f"--base={base}", f"--models={','.join(others)}", f"--output={out}"),
        *("--noprogress", *options),
    ]
    if method == "ties":
        command.append(f"--density={config.density}")
    if config.threads:
        command.append(f"--threads={config.threads}")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, peak = measure(command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(out)
    return {
        "method": " ".join([method, *options]),
        "seconds": seconds,
        "cpu_seconds": sum(after[:2]) - sum(before[:2]),  # user and system
        "peak_mb": peak,
    }


CASES = {"lazy": lazy, "sparse": sparse, "models": models, "tensors": tensors}


def run(config: Config) -> list[dict[str, Any]]:
    """Merges, and writes what was measured; returns its rows.

    Raises:
      ValueError: counts that are not positive numbers.
    """
    workdir = Path(config.workdir).expanduser().absolute()
    folder = workdir / config.case
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    load = os.getloadavg()[0]
    for row in CASES[config.case](config, folder):
        rows.append(row | {"load": load})
        print(json.dumps(rows[-1]), flush=True)
        load = os.getloadavg()[0]
    result = {"config": dataclasses.asdict(config), "rows": rows}
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    write_report(workdir)
    return rows


def write_report(workdir: Path) -> None:
    """report.md and memory.png, of all cases measured so far."""
    parts = [f"# Large merges, on {os.cpu_count()} cores\n"]
    for case in CASES:
        path = workdir / case / "result.json"
        if path.exists():
            rows = json.loads(path.read_text())["rows"]
            parts.append(f"## {case}\n\n{as_table(rows)}\n")
    (workdir / "report.md").write_text("\n".join(parts))
    draw(workdir)


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: figures to three digits or so, and the cost of each further one.

    "ms more": milliseconds that each further tensor or model took, from the row of the
    same method before.
    """
    key = next((k for k in ("tensors", "models") if k in rows[0]), None)
    before: dict[str, dict[str, Any]] = {}
    lines = []
    for row in rows:
        cells = {k: _text(v) for k, v in row.items()}
        if key:
            last = before.get(row["method"])
            for name, unit in (("ms more", "seconds"), ("CPU ms more", "cpu_seconds")):
                cells[name] = ""
                if last:
                    more = (row[unit] - last[unit]) / (row[key] - last[key])
                    cells[name] = f"{1e3 * more:.3g}"
            before[row["method"]] = row
        lines.append(cells)
    if not key:  # one row: easier to read upright
        return table(["", ""], [[k, v] for k, v in lines[0].items()])
    return table(list(lines[0]), [list(c.values()) for c in lines])


def _text(x: Any) -> str:
    if isinstance(x, list):
        return ", ".join(map(_text, x))
    if isinstance(x, float):
        return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"
    return f"{x:,}" if isinstance(x, int) else str(x)


def draw(workdir: Path) -> None:
    """RssAnon against passes over the inputs, of the sparse and the lazy models."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = {"lazy": "dense, made up", "sparse": "holes, all zero"}
    figure = Figure(figsize=(6, 2.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    drawn = False
    for case, label in labels.items():
        log, result = (workdir / case / f for f in ("metrics.jsonl", "result.json"))
        if not (log.exists() and result.exists()):
            continue
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        row = json.loads(result.read_text())["rows"][0]
        axes.plot(
            [x["read_gb"] / row["input_gb"] for x in lines],
            [x["rss_anon_mb"] for x in lines],
            lw=1,
            label=f"{label}: inputs of {row['input_gb']:.3g} GB",
        )
        drawn = True
    if not drawn:
        return
    axes.set_xlabel("passes over the inputs")
    axes.set_ylabel("anonymous memory, MB")
    axes.set_ylim(0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    FigureCanvasAgg(figure).print_png(workdir / "memory.png")


if __name__ == "__main__":
    flags.main(Config, flags.plain_errors(run))

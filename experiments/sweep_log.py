"""What a sweep keeps and tells: its resumable log, the report and the figure."""

import dataclasses
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import json_files, merge

Log = Sequence[Mapping[str, Any]]  # lines of metrics.jsonl; a failed score is None
Space = Mapping[str, Sequence[Any]]


def open_log(workdir: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Starts a sweep, or returns what an earlier run of the same one logged.

    Raises:
      ValueError: another sweep's directory (says what differs), or a damaged log.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(settings))
    path, metrics = workdir / "config.json", workdir / "metrics.jsonl"
    if not metrics.exists() or not metrics.stat().st_size:  # nothing to lose
        json_files.write(path, settings, indent=1)
        return []
    if not path.exists():
        raise ValueError(f"{metrics} has no config.json; choose another --workdir")
    stored = json.loads(path.read_text())
    differ = [k for k in {**stored, **settings} if stored.get(k) != settings.get(k)]
    if differ:
        changes = [
            f"{k} (changed since)"
            if k in ("inputs", "score_module")
            else f"{k} ({stored.get(k)!r} then, {settings.get(k)!r} now)"
            for k in differ
        ]
        raise ValueError(
            f"{workdir} holds another sweep, with other {', '.join(changes)}; choose"
            " another --workdir, or remove that one to start again"
        )
    return read_lines(workdir)


def read_lines(workdir: Path) -> list[dict[str, Any]]:
    """What `append` wrote; none where there is no file yet.

    Raises:
      ValueError: the file is damaged.
    """
    metrics = workdir / "metrics.jsonl"
    if not metrics.exists():
        return []
    # A line that a kill cut short was never an answer.
    whole, newline, rest = metrics.read_bytes().rpartition(b"\n")
    if rest:
        with metrics.open("r+b") as file:
            file.truncate(len(whole + newline))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as e:
        raise ValueError(f"{metrics} is damaged ({e}); remove {workdir}") from None


def append(workdir: Path, entry: Mapping[str, Any]) -> None:
    """Logs an answer; the file begins with the first one."""
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def command_of(chosen: merge.Config) -> str:
    """The command line of experiments.merge for a config."""
    chosen = dataclasses.replace(chosen, output=chosen.output or "OUT")
    around = ("report", "progress", "overwrite", "threads")
    words = merge.flags_of(chosen, leave_out=around)
    return shlex.join(["python", "-m", "experiments.merge", *words])


def best_of(log: Sequence[Mapping[str, Any]], sign: float) -> Mapping[str, Any]:
    """The first entry with the best score."""
    return max(
        log, key=lambda e: -math.inf if e["score"] is None else sign * e["score"]
    )


def write_report(
    title: str, score: str, space: Space, log: Log, sign: float, command: str
) -> str:
    """Markdown: the best candidates, the command, and what to mind.

    Args:
      title: of the report.
      score: the scoring function's name.
      space: values or ranges by coefficient.
      log: all candidates.
      sign: -1 where lower is better.
      command: that makes the best merge.
    """
    good = [e for e in log if e["score"] is not None]
    best = best_of(log, sign)
    at = best["coefficients"]
    lines = [
        f"# {title}, {len(log)} candidates",
        "",
        f"The {'lowest' if sign < 0 else 'highest'} `{score}` is"
        f" **{best['score']:.6g}**, found at evaluation {best['evaluation']}."
        f" {sum(e['seconds'] for e in log):.0f} s of merging and scoring.",
        "",
        f"| score | {' | '.join(space)} |",
        "|--:|" + "--:|" * len(space),
    ]
    for e in sorted(good, key=lambda e: -sign * e["score"])[:10]:
        values = " | ".join(str(e["coefficients"][name]) for name in space)
        lines.append(f"| {e['score']:.6g} | {values} |")
    lines += ["", f"    {command}", ""]
    if len(good) < len(log):
        lines.append(f"- {len(log) - len(good)} scores were NaN or infinite.")
    for name, values in space.items():
        numbers = not any(isinstance(v, str) for v in values)
        if (
            numbers
            and min(values) < max(values)
            and at[name]
            in (
                min(values),
                max(values),
            )
        ):
            lines.append(f"- {name} = {at[name]} is at the edge of its range.")
    lines.append("- This score chose: report the merge's on data that it did not see.")
    return "\n".join([*lines, "", "![scores](sweep.png)", ""])


def draw(space: Space, log: Log, sign: float, *, grid: bool) -> Figure:
    """Scores over each coefficient; a map of a grid's two, or the best so far."""
    pair = grid and len(space) == 2
    panels = len(space) + (pair or not grid)
    columns = min(3, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(4 * columns, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    scores = np.array([np.nan if e["score"] is None else e["score"] for e in log])
    order = np.arange(len(log))
    for axis, (name, values) in zip(axes, space.items(), strict=False):
        x = [e["coefficients"][name] for e in log]
        if any(isinstance(v, str) for v in values):
            x = list(map(str, x))
        axis.scatter(x, scores, c=order, cmap="viridis", s=16)  # later ones are lighter
        axis.set(xlabel=name, ylabel="score")
    last = axes[len(space)] if panels > len(space) else None
    if last is not None and pair:
        (a, xs), (b, ys) = space.items()
        image = last.imshow(scores.reshape(len(xs), len(ys)), aspect="auto")
        last.set_xticks(range(len(ys)), map(str, ys), rotation=90)
        last.set_yticks(range(len(xs)), map(str, xs))
        last.set(xlabel=b, ylabel=a)
        figure.colorbar(image, ax=last, label="score")
    elif last is not None:
        best = sign * np.fmax.accumulate(sign * scores)  # NaN counts for nothing
        last.plot(order, best, color="#1170aa")
        last.set(xlabel="evaluation", ylabel="best score so far")
    for axis in axes[panels:]:
        axis.remove()
    return figure

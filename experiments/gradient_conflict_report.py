"""Tables and the figure of the experiment on gradient conflict.

Legend: S seeds.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import report_file
from multitask_jax.merging.report import table


class Result(NamedTuple):
    """By variant (`experts`: by measure and variant), [angles, seeds]."""

    cosine: dict[str, np.ndarray]  # of the tasks' gradients, mean over the training
    dormant: dict[str, np.ndarray]  # share of hidden units, at the end
    loss: dict[str, np.ndarray]  # mean squared error over the variance, new data
    below: dict[str, np.ndarray]  # share of the training's cosines below 0
    experts: dict[str, dict[str, np.ndarray]]  # by measure of their use, at the end
    active: dict[str, int]  # parameters of the trunk that serve an input; no array
    report: str = ""


def text(result: Result, angles: Sequence[float], steps: int) -> str:
    """Tables in Markdown: mean and standard deviation over seeds."""
    bottom = next(iter(result.loss))
    seeds = result.loss[bottom].shape[1]
    header = ["", "active parameters", *(f"{a:g}°" for a in angles)]
    parts = [
        "# Gradient conflict\n",
        f"*Synthetic* regression, two tasks, {seeds} seeds, {steps}"
        " steps; mean ± standard deviation over seeds.\n",
    ]
    for title, by_variant, scale, digits in (
        (
            "Cosine of the tasks' gradients at the trunk, over the run",
            result.cosine,
            1,
            2,
        ),
        ("Share of these cosines below 0, %", result.below, 100, 0),
        ("Dormant units of the trunk, %", result.dormant, 100, 1),
        (
            "Squared error on new data over the targets' variance, %",
            result.loss,
            100,
            1,
        ),
    ):
        rows = [
            [
                name,
                f"{result.active[name]:,}",
                *(report_file.over_seeds(scale * each, digits) for each in x),
            ]
            for name, x in by_variant.items()
        ]
        parts += [f"## {title}\n", table(header, rows), ""]
        if seeds > 1 and by_variant is not result.below:
            parts.append(_less(bottom, by_variant, angles, scale, digits))
    parts.append(_experts(result, angles))
    return "\n".join(parts)


def _less(
    bottom: str,
    by_variant: Mapping[str, np.ndarray],
    angles: Sequence[float],
    scale: float,
    digits: int,
) -> str:
    """Each structure less the shared bottom, paired by seed."""
    between = [i for i, a in enumerate(angles) if a % 180]
    rows = []
    for name, x in by_variant.items():
        if name == bottom:
            continue
        gap = scale * (x - by_variant[bottom])
        mean = paired(gap[between].mean(axis=0), digits) if between else ""
        rows.append([name, *(paired(g, digits) for g in gap), mean])
    head = ["", *(f"{a:g}°" for a in angles), "all but 0° and 180°"]
    said = f"Less that of {bottom}: 95 % intervals of differences paired by seed.\n"
    return "\n".join([said, table(head, rows), ""])


def _experts(result: Result, angles: Sequence[float]) -> str:
    """Who uses which expert, at the end of the run."""
    bottom = next(iter(result.loss))  # has one
    rows = [
        [name, *(report_file.over_seeds(x, 2) for x in by_angle)]
        for name, by_angle in result.experts["specialisation"].items()
        if name != bottom
    ]
    mean = {m: {n: x.mean() for n, x in v.items()} for m, v in result.experts.items()}
    for row in rows:
        row += [f"{mean[m][row[0]]:.2f}" for m in ("entropy", "busiest")]
    header = ["", *(f"{a:g}°" for a in angles), "entropy", "busiest"]
    return "\n".join(
        [
            "## Specialisation of routed experts: I(task; expert) / log 2\n",
            "0: both tasks use experts alike, 1: each has its own; weights count. Means"
            " over all runs of the gate's entropy (over log E: 0 is sure) and of the"
            " busiest expert's load (1 is balanced).\n",
            table(header, rows),
            "",
        ]
    )


def paired(difference: np.ndarray, digits: int = 1) -> str:
    """Mean and Student's interval of differences [S], each of one seed's two runs."""
    ends = report_file.between_seeds(difference)
    mean, low, high = (f"{x:+.{digits}f}" for x in (difference.mean(), *ends))
    return f"{mean} [{low}, {high}]"


def _spread(x: np.ndarray) -> list[tuple[float, float]]:
    return [(float(r.mean()), float(r.std(ddof=min(1, len(r) - 1)))) for r in x]


def draw(result: Result, angles: Sequence[float]) -> Figure:
    """The three quantities over the angle: means, and bands of a standard deviation."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    colours = ("#8a8a8a", "#5fa2ce", "#e15c00", "#222222")
    for axes, (title, by_variant, scale) in zip(
        panels,
        (
            ("cosine of gradients at the trunk", result.cosine, 1),
            ("dormant units, %", result.dormant, 100),
            ("squared error / variance, %", result.loss, 100),
        ),
        strict=True,
    ):
        # Fewer variants than colours are no error.
        for (name, x), colour in zip(by_variant.items(), colours, strict=False):
            mean, spread = np.array(_spread(scale * x)).T
            axes.plot(angles, mean, "o-", color=colour, markersize=4, label=name)
            axes.fill_between(
                angles, mean - spread, mean + spread, color=colour, alpha=0.15, lw=0
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("angle between tasks, degrees")
        axes.set_xticks(angles)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].axhline(0, color="0.85", lw=1, zorder=0)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=4,
        frameon=False,
    )
    return figure

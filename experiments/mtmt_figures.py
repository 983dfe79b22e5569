"""Figures of the uplift study: Qini curves, and effects by predicted decile.

Legend: N people, A arms (arm 0 is the control), O outcomes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.mtmt_policy import PER, calibration_of, uplift
from multitask_jax import evaluation
from multitask_jax.data.uplift import Trial

POINTS = 201  # of a drawn curve
COLOURS = ("#e15c00", "#1f77b4", "#222222")
GREY = "#c4c4c4"


def qini(
    trial: Trial, predictions: Mapping[str, np.ndarray], highlighted: Sequence[str]
) -> Figure:
    """A panel for each arm (row) and outcome (column).

    Args:
      trial: what happened.
      predictions: [N, A, O] by model.
      highlighted: three models at most in colour; the others are grey.
    """
    figure, panels = _panels(trial)
    colours = dict(zip(highlighted, COLOURS, strict=False))
    # Grey curves first: those in colour lie above them.
    names = sorted(predictions, key=lambda name: name in colours)
    shares = np.linspace(0, 1, POINTS)
    for axes, arm, outcome, rows in _each(trial, panels):
        treated, y = trial.arm[rows] == arm, trial.y[rows, outcome]
        for name in names:
            score = uplift(predictions[name][rows], arm, outcome)
            curve = evaluation.qini_curve(score, y, treated)
            gain = PER * np.interp(shares, curve.share, curve.gain)
            colour = colours.get(name)
            axes.plot(
                100 * shares,
                gain,
                color=colour or GREY,
                lw=1.8 if colour else 0.9,
                label=name if colour else "other models",
            )
        end = PER * (y[treated].mean() - y[~treated].mean())
        axes.plot([0, 100], [0, end], "--", color="0.4", lw=1, label="random order")
        axes.set_xlabel("people treated, %, by predicted uplift")
        axes.set_ylabel(f"gain per {PER:,} people")
    handles = {
        label: handle
        for handle, label in zip(*panels[0, 0].get_legend_handles_labels(), strict=True)
    }
    _legend(figure, list(handles.values()), list(handles))
    return figure


def deciles(trial: Trial, prediction: np.ndarray, name: str) -> Figure:
    """Observed effects with 95% intervals, and predictions, by predicted decile.

    Args:
      trial: what happened.
      prediction: [N, A, O].
      name: of the model.
    """
    figure, panels = _panels(trial)
    for axes, arm, outcome, _ in _each(trial, panels):
        c = calibration_of(trial, prediction, arm, outcome)
        tenth = np.arange(1, len(c.observed) + 1)
        axes.bar(
            tenth,
            PER * c.observed,
            yerr=PER * evaluation.uplift.NORMAL * c.error,
            color="#9ecae1",
            ecolor="0.35",
            capsize=2,
            label="observed, 95% interval",
        )
        axes.plot(
            tenth,
            PER * c.predicted,
            "o-",
            color=COLOURS[0],
            markersize=4,
            label=f"predicted by {name}",
        )
        axes.axhline(0, color="0.3", lw=0.8)
        axes.set_xticks(tenth)
        axes.set_xlabel("tenth of people, lowest prediction first")
        axes.set_ylabel(f"effect per {PER:,} people")
    _legend(figure, *panels[0, 0].get_legend_handles_labels())
    return figure


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Above the panels, in as few rows as fit into the figure's width."""
    for columns in range(len(labels), 0, -1):
        legend = figure.legend(
            handles, labels, loc="outside upper center", ncols=columns, frameon=False
        )
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def _panels(trial: Trial) -> tuple[Figure, np.ndarray]:
    rows, columns = len(trial.arms) - 1, len(trial.outcomes)
    figure = Figure(figsize=(3.7 * columns, 3 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    for (i, j), axes in np.ndenumerate(panels):
        title = f"{trial.outcomes[j]}: {trial.arms[i + 1]}"
        axes.set_title(title, fontsize=10, parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _each(trial: Trial, panels: np.ndarray) -> Any:
    """Axes, arm, outcome and the rows of the arm and of the control, of each panel."""
    for (i, j), axes in np.ndenumerate(panels):
        rows = np.flatnonzero((trial.arm == 0) | (trial.arm == i + 1))
        yield axes, i + 1, j, rows

"""Of the uplift study's report: effects, policies, cells of values with intervals.

Legend: N people, A arms (arm 0 is the control), O outcomes, R replicates.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from multitask_jax import evaluation
from multitask_jax.data.uplift import Trial
from multitask_jax.merging.report import table

FEW = 30  # outcomes that a difference of policies should rest on at least
PER = 1000  # people: a unit in which effects of e-mails are readable


def cell(point: float, draws: np.ndarray, digits: int | None = None) -> str:
    """A value and its bootstrap interval; digits by the width if not given."""
    return span(float(point), *evaluation.interval(draws), digits)


def span(point: float, low: float, high: float, digits: int | None = None) -> str:
    """A value and an interval."""
    if digits is None:
        digits = 1 if abs(high - low) >= 10 else 2
    return f"{point:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def uplift(prediction: np.ndarray, arm: int, outcome: int) -> np.ndarray:
    """[N, A, O] -> [N], of an arm over the control."""
    # In float64, so that small effects of large outcomes keep their digits.
    p = prediction[:, :, outcome].astype(np.float64)
    return p[:, arm] - p[:, 0]


def calibration_of(
    trial: Trial, prediction: np.ndarray, arm: int, outcome: int
) -> evaluation.Calibration:
    """Deciles of an arm's effect on an outcome; `prediction` is [N, A, O]."""
    rows = np.flatnonzero((trial.arm == 0) | (trial.arm == arm))
    return evaluation.calibration(
        uplift(prediction[rows], arm, outcome),
        trial.y[rows, outcome],
        trial.arm[rows] == arm,
    )


def policies(
    trial: Trial,
    means: Mapping[str, np.ndarray],
    counts: np.ndarray,
    main: str,
    outcome: int,
) -> str:
    """What choosing by each model brings against one arm for everyone.

    Args:
      trial: what happened.
      means: [N, A, O] by model.
      counts: [R, N] of the bootstrap.
      main: the model to speak about.
      outcome: index of what arms are chosen for.
    """
    y = trial.y[:, outcome].astype(np.float64)
    shares = np.bincount(trial.arm, minlength=len(trial.arms)) / len(y)
    single = [y[trial.arm == a].mean() for a in range(len(trial.arms))]
    top = int(np.argmax(single))

    def values(chosen: np.ndarray) -> Any:
        args = chosen, trial.arm, y, shares
        return evaluation.policy_value(*args), evaluation.policy_value(*args, counts)

    base, base_draws = values(np.full(len(y), top))
    rows, said = [], ""
    for name, prediction in means.items():
        chosen = prediction[:, :, outcome].argmax(axis=1)
        value, draws = values(chosen)
        cells = [f"{100 * (chosen == a).mean():.0f}%" for a in range(len(trial.arms))]
        cells.append(cell(PER * value.ips, PER * draws.ips))
        cells.append(cell(PER * value.normalised, PER * draws.normalised))
        gain = PER * (draws.ips - base_draws.ips)
        cells.append(cell(PER * (value.ips - base.ips), gain))
        cells.append(
            cell(
                PER * (value.normalised - base.normalised),
                PER * (draws.normalised - base_draws.normalised),
            )
        )
        if trial.effects is not None:
            true = trial.effects[:, :, outcome]
            won = true[np.arange(len(y)), chosen].mean() - true[:, top].mean()
            cells.append(f"{PER * won:.1f}")
        rows.append([name, *cells])
        if name == main:
            said = _verdict(name, trial.arms[top], evaluation.interval(gain))
            differ = chosen != top
            seen = differ & ((trial.arm == chosen) | (trial.arm == top))
            events = int(np.count_nonzero(y[seen]))
            said += (
                f" The two differ for {differ.sum():,} people, and the gain rests on"
                f" {events:,} outcomes among them that are not 0."
            )
            if events < FEW:
                said += " So few are too few for a bootstrap: take it as undecided."
    header = ["", *trial.arms, "value, IPS", "value, SNIPS", "gain, IPS"]
    header += ["gain, SNIPS"] + ["true gain"] * (trial.effects is not None)
    return "\n".join(
        [
            f"## Policy: each person's best arm for {trial.outcomes[outcome]}\n",
            "Share of people by arm; mean outcome by inverse propensity (IPS), and with"
            f" weights normalised (SNIPS); gain over {trial.arms[top]} for everyone,"
            f" the best single arm here ({PER * single[top]:.1f}; chosen on these very"
            " data, which favours it a little). Arms have no cost. Predictions are"
            " means over seeds.\n",
            table(header, rows),
            "",
            said,
            "",
        ]
    )


def _verdict(name: str, arm: str, gain: tuple[float, float]) -> str:
    low, high = gain
    span = f"[{low:.1f}, {high:.1f}] per {PER:,} people by IPS"
    if low > 0:
        return f"Choosing by {name} gains over {arm} for everyone: {span}."
    if high < 0:
        return f"Choosing by {name} loses against {arm} for everyone: {span}."
    return (
        f"The interval of the gain of {name}, {span}, includes 0: these data do not"
        f" show that choosing for each person beats {arm} for everyone."
    )


def segments(trial: Trial, prediction: np.ndarray, name: str, outcome: int) -> str:
    """Shares of arms that a model chooses, by segment; `prediction` is [N, A, O]."""
    if not trial.segments:
        return ""
    chosen = prediction[:, :, outcome].argmax(axis=1)
    rows = []
    for column, values in trial.segments.items():
        for value in np.unique(values).tolist():
            inside = chosen[values == value]
            share = np.bincount(inside, minlength=len(trial.arms)) / len(inside)
            cells = [f"{100 * s:.0f}%" for s in share]
            rows.append([column, str(value), f"{len(inside):,}", *cells])
    return "\n".join(
        [
            f"## Who should get what, by {name}\n",
            f"Shares of people by their best arm for {trial.outcomes[outcome]}; read"
            " with the interval of the gain above.\n",
            table(["segment", "", "people", *trial.arms], rows),
            "",
        ]
    )

"""Of the uplift study's report: effects, policies, cells of values with intervals.

    outcome, sign = direction(trial.outcomes, "-cost")  # less of it is better
    chosen = best_arms(prediction, outcome, sign)

Legend: N people, A arms (arm 0 is the control), O outcomes, R replicates.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from multitask_jax import evaluation
from multitask_jax.data.uplift import Trial
from multitask_jax.merging.report import table

FEW = 30  # outcomes that a difference of policies should rest on at least
PER = 1000  # people: a unit in which effects of e-mails are readable
MOST = 5  # numbers that people are split by in the report
_QUARTERS = ("1st quarter (lowest)", "2nd quarter", "3rd quarter", "4th quarter")


def direction(outcomes: Sequence[str], name: str | None) -> tuple[int, int]:
    """Which outcome arms are chosen for, and whether more or less of it is better.

    Before/after, of ("visit", "cost"): "visit" -> (0, 1), "-cost" -> (1, -1).

    Args:
      outcomes: O names.
      name: one of them; a "-" before it means that less is better. An outcome whose own
        name begins with "-" is found by that first. The last outcome if not given.

    Returns:
      The index of the outcome, and 1 or -1: the best arm has the largest product.

    Raises:
      ValueError: there is no such outcome.
    """
    names = list(outcomes)
    if name is None:
        return len(names) - 1, 1
    if name in names:
        return names.index(name), 1
    if name.startswith("-") and name[1:] in names:
        return names.index(name[1:]), -1
    raise ValueError(
        f"got policy_outcome={name!r}, expected one of {names}, with a - before it if"
        " less is better"
    )


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


def best_arms(prediction: np.ndarray, outcome: int, sign: int) -> np.ndarray:
    """[N, A, O] -> [N], with the most of an outcome or the least (-1), as `direction`.

    Of equal arms it is the first.
    """
    return (sign * prediction[:, :, outcome]).argmax(axis=1)


def policies(
    trial: Trial,
    means: Mapping[str, np.ndarray],
    counts: np.ndarray,
    main: str,
    outcome: int,
    sign: int = 1,
) -> str:
    """What choosing by each model brings against one arm for everyone.

    Args:
      trial: what happened.
      means: [N, A, O] by model.
      counts: [R, N] of the bootstrap.
      main: the model to speak about.
      outcome: index of what arms are chosen for.
      sign: 1, or -1 if less of it is better; a gain is then what is saved.
    """
    y = trial.y[:, outcome].astype(np.float64)
    shares = np.bincount(trial.arm, minlength=len(trial.arms)) / len(y)
    single = np.array([y[trial.arm == a].mean() for a in range(len(trial.arms))])
    top = int(np.argmax(sign * single))

    def values(chosen: np.ndarray) -> Any:
        args = chosen, trial.arm, y, shares
        return evaluation.policy_value(*args), evaluation.policy_value(*args, counts)

    def gained(value: Any, base: Any) -> Any:
        return sign * PER * (value - base) + 0.0  # never -0, where less is better

    base, base_draws = values(np.full(len(y), top))
    rows, said = [], ""
    for name, prediction in means.items():
        chosen = best_arms(prediction, outcome, sign)
        value, draws = values(chosen)
        cells = [f"{100 * (chosen == a).mean():.0f}%" for a in range(len(trial.arms))]
        cells.append(cell(PER * value.ips, PER * draws.ips))
        cells.append(cell(PER * value.normalised, PER * draws.normalised))
        gain = gained(draws.ips, base_draws.ips)
        cells.append(cell(gained(value.ips, base.ips), gain))
        cells.append(
            cell(
                gained(value.normalised, base.normalised),
                gained(draws.normalised, base_draws.normalised),
            )
        )
        if trial.effects is not None:
            true = trial.effects[:, :, outcome]
            won = gained(true[np.arange(len(y)), chosen].mean(), true[:, top].mean())
            cells.append(f"{won:.1f}")
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
            f"## Policy: each person's best arm for {_named(trial, outcome, sign)}\n",
            "Share of people by arm; mean outcome by inverse propensity (IPS), and with"
            f" weights normalised (SNIPS); gain over {trial.arms[top]} for everyone,"
            f" the best single arm here ({PER * single[top]:.1f}; chosen on these very"
            " data, which favours it a little). Arms have no cost. Predictions are"
            " means over seeds, which are held fixed: an interval tells what these"
            " trained networks choose, not whether a method is better than another."
            + " A gain is how much less there is." * (sign < 0)
            + "\n",
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


def segments(
    trial: Trial, prediction: np.ndarray, name: str, outcome: int, sign: int = 1
) -> str:
    """Shares of arms that a model chooses, by segment; `prediction` is [N, A, O]."""
    chosen = best_arms(prediction, outcome, sign)

    def shares(words: np.ndarray) -> dict[str, np.ndarray]:
        """People and shares of arms, [1 + A], by word."""
        found = {}
        for word in np.unique(words).tolist():
            inside = chosen[words == word]
            count = np.bincount(inside, minlength=len(trial.arms))
            found[word] = np.append(len(inside), count / len(inside))
        return found

    def spread(number: str) -> float:
        return float(np.ptp([s[1:] for s in numbers[number].values()], axis=0).max())

    numbers = {column: shares(words) for column, words in _quarters(trial)}
    most = sorted(numbers, key=spread, reverse=True)[:MOST]
    found = [(column, shares(words)) for column, words in trial.segments.items()]
    found += [(column, numbers[column]) for column in most]
    rows = [
        [column, word, f"{people:,.0f}", *(f"{100 * s:.0f}%" for s in of_arms)]
        for column, by_word in found
        for word, (people, *of_arms) in by_word.items()
    ]
    said = [
        f"Shares of people by their best arm for {_named(trial, outcome, sign)}; read"
        " with the interval of the gain above."
    ]
    if most:
        said.append("Of numbers, quarters of people; equal values stay together.")
    if len(most) < len(numbers):
        said.append(
            f"Of {len(numbers)} numbers these {MOST} have quarters that differ most."
        )
    if not rows:
        said = ["No category, flag or number that varies is there to tell people by."]
    return "\n".join(
        [
            f"## Who should get what, by {name}\n",
            " ".join(said) + "\n",
            table(["segment", "", "people", *trial.arms], rows) if rows else "",
            "",
        ]
    )


def _quarters(trial: Trial) -> Iterator[tuple[str, np.ndarray]]:
    """Names of numbers among the features, and which quarter [N] of people each is in.

    Numbers are standardised: neither quarters nor their order change by that.
    """
    for name, x in zip(trial.features, trial.x.T, strict=True):
        if np.isin(x, (0, 1)).all():
            continue  # a flag, one of a category, or a number that does not vary
        cuts = np.quantile(x, (0.25, 0.5, 0.75))
        yield name, np.array(_QUARTERS)[np.searchsorted(cuts, x)]


def _named(trial: Trial, outcome: int, sign: int) -> str:
    return trial.outcomes[outcome] + " (less is better)" * (sign < 0)

"""How good predicted uplifts are, where each person was seen under one arm only.

All of it holds for outcomes of any kind, and takes the counts of a bootstrap:

    counts = resample(len(y), 1000, seed=0)
    low, high = interval(ranking(uplift, y, treated, counts).qini)

Qini (Radcliffe 2007) and the uplift curve are as in scikit-uplift 0.5.1, which is not
used: it calls what scikit-learn 1.8 deprecates (its warnings are errors here), needs
pandas, and takes binary outcomes only and no weights, so that each replicate would sort
all people again. Tests compare with its numbers.

Legend: N people, R replicates of a bootstrap, A arms (arm 0 is the control),
O outcomes, K groups of people.
"""

import functools
from typing import NamedTuple

import numpy as np

TOP = 0.3  # share of people of "uplift at 30%"
NORMAL = 1.96  # standard errors either side of a mean, for 95%


class Ranking(NamedTuple):
    """Measures of the order that predicted uplifts bring; [] or [R] each.

    All are in the outcome's own units, per person: those of a random order are 0, half
    of the mean effect, and the mean effect.
    """

    qini: np.ndarray  # area between the Qini curve and its chord
    auuc: np.ndarray  # area under the uplift curve
    top: np.ndarray  # effect on the 30% of people with the highest predictions


class Curve(NamedTuple):
    """A Qini curve: what treating the first people brings."""

    share: np.ndarray  # of people, from 0 to 1
    gain: np.ndarray  # outcome that treatment added, per treated person


class Calibration(NamedTuple):
    """Groups of people by predicted uplift, the lowest first."""

    predicted: np.ndarray  # [K] mean of predictions; NaN of nobody
    observed: np.ndarray  # [K] difference of means
    error: np.ndarray  # [K] its standard error; see `calibration`
    people: np.ndarray  # [K]

    @property
    def distance(self) -> float:
        """Mean distance between predicted and observed, by people; without NaN."""
        gap, known = np.abs(self.predicted - self.observed), np.isfinite(self.observed)
        if not known.any():
            return float("nan")
        return float(np.average(gap[known], weights=self.people[known]))


class Value(NamedTuple):
    """Mean outcome if a policy were followed, by inverse propensity; [] or [R]."""

    ips: np.ndarray
    normalised: np.ndarray  # weights divided by their sum: less noise, a little bias


def resample(people: int, replicates: int, seed: int) -> np.ndarray:
    """How often each person is drawn in each replicate, [R, N]; rows sum to N.

    One array for all models makes their differences paired.

    Raises:
      ValueError: fewer than 1 of either.
    """
    if people < 1 or replicates < 1:
        raise ValueError(
            f"got {people} people and {replicates} replicates, expected at least 1 of"
            " each"
        )
    rng = np.random.default_rng(seed)
    counts = np.empty((replicates, people), np.uint8)
    for row in counts:  # one by one, for all at once would be 8 bytes a draw
        row[:] = np.bincount(rng.integers(people, size=people), minlength=people)
    return counts


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of a bootstrap's values [R]; NaN values are left out.

    A replicate without a single treated (or untreated) person among those that count
    has no value.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return np.nan, np.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def ranking(
    uplift: np.ndarray,
    outcome: np.ndarray,
    treated: np.ndarray,
    counts: np.ndarray | None = None,
    *,
    top: float = TOP,
) -> Ranking:
    """Measures of an order of people by their predicted uplift.

    People are sorted once; a replicate is four weighted cumulative sums. Curves have
    points only where the prediction changes, so that people with equal predictions are
    in no order.

    Args:
      uplift: [N] predictions.
      outcome: [N].
      treated: [N] bool; the others are the control.
      counts: [R, N] of `resample`; each person once if not given.
      top: share of people.

    Raises:
      ValueError: shapes differ, a value is not finite, or one of the two groups is
        empty.
    """
    uplift, outcome, treated = _checked(uplift, outcome, treated)
    if counts is not None and (counts.ndim != 2 or counts.shape[1] != len(uplift)):
        raise ValueError(f"got counts {counts.shape}, expected [R, {len(uplift)}]")
    if not 0 < top < 1:
        raise ValueError(f"got top={top}, expected a share in (0, 1)")
    order = np.argsort(uplift, kind="stable")[::-1]
    starts = _starts(uplift[order])
    y, t = outcome[order], treated[order].astype(np.float64)
    factors = np.stack([t, 1 - t, y * t, y * (1 - t)])
    # Arrays that all replicates write to: new ones would cost more than the sums.
    number, product = np.empty((2, len(order)))
    sums, room = np.empty((4, len(starts))), np.empty((2, len(starts)))
    rows = np.ones((1, len(order)), np.uint8) if counts is None else counts
    values = np.empty((len(rows), 3))
    for value, row in zip(values, rows, strict=True):
        number[:] = row[order]
        for factor, out in zip(factors, sums, strict=True):
            np.multiply(number, factor, out=product)
            if len(starts) < len(order):
                np.add.reduceat(product, starts, out=out)
                np.cumsum(out, out=out)
            else:
                np.cumsum(product, out=out)
        value[:] = _measures(sums, room, top)
    return Ranking(*(values[0] if counts is None else values.T))


def _starts(x: np.ndarray) -> np.ndarray:
    """Where each run of equal values begins."""
    return np.append(0, np.flatnonzero(np.diff(x)) + 1)


def _measures(
    sums: np.ndarray, room: np.ndarray, top: float
) -> tuple[float, float, float]:
    """Qini, auuc and effect at the top of one replicate.

    Args:
      sums: [4, M] cumulative, over M different predictions from the highest on: treated
        people, the control's, and the outcomes of both.
      room: [2, M] to write to.
      top: share of people.
    """
    treated, control, y_treated, y_control = sums
    if not (treated[-1] and control[-1]):
        return np.nan, np.nan, np.nan
    people, mean, curve = treated + control, *room
    # As if a group without a person had a mean of 0.
    np.divide(y_control, np.maximum(control, 1, out=mean), out=mean)
    np.subtract(y_treated, np.multiply(mean, treated, out=curve), out=curve)
    chord = 0.5 * curve[-1] / treated[-1]
    qini = _area(people, curve) / (people[-1] * treated[-1]) - chord
    np.divide(y_treated, np.maximum(treated, 1, out=curve), out=curve)
    np.multiply(np.subtract(curve, mean, out=curve), people, out=curve)
    auuc = _area(people, curve) / people[-1] ** 2
    # Sums at the cut: equal predictions share their place.
    cut = top * people[-1]
    i = min(np.searchsorted(people, cut), len(people) - 1)
    before = sums[:, i - 1] if i else np.zeros(4)
    step = sums[:, i] - before
    a, b, ya, yb = before + step * (cut - before[:2].sum()) / step[:2].sum()
    return qini, auuc, ya / a - yb / b if a and b else np.nan


def _area(x: np.ndarray, y: np.ndarray) -> float:
    """Of trapezes under the points (0, 0), (x, y)."""
    # Not `@`, whose threads wait for each other longer than this takes.
    dot = functools.partial(np.einsum, "i,i->")
    return 0.5 * (x[-1] * y[-1] + dot(y[:-1], x[1:]) - dot(y[1:], x[:-1]))


def perfect(outcome: np.ndarray, treated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores [N] of the best Qini and the best uplift curve of binary outcomes.

    They order people with their outcomes at hand, which no model can reach; as in
    scikit-uplift, where the coefficients are divided by theirs:

        best, _ = perfect(y, treated)
        ranking(uplift, y, treated).qini / ranking(best, y, treated).qini

    Raises:
      ValueError: an outcome is not 0 or 1.
    """
    if not np.isin(outcome, (0, 1)).all():
        raise ValueError(
            f"got outcomes from {outcome.min()} to {outcome.max()}, expected 0 and 1:"
            " other outcomes have no best curve"
        )
    y, t = outcome.astype(np.float64), treated.astype(np.float64)
    few_losses = ((y == 1) & (t == 0)).sum() > ((y == 0) & (t == 1)).sum()
    return y * t - y * (1 - t), 2.0 * (y == t) + (y if few_losses else t)


def qini_curve(uplift: np.ndarray, outcome: np.ndarray, treated: np.ndarray) -> Curve:
    """The curve that `ranking` measures the area under: see there."""
    uplift, outcome, treated = _checked(uplift, outcome, treated)
    order = np.argsort(uplift, kind="stable")[::-1]
    y, t = outcome[order], treated[order]
    ends = np.append(_starts(uplift[order])[1:], len(order)) - 1
    nt, yt = np.cumsum(t)[ends], np.cumsum(y * t)[ends]
    nc, yc = ends + 1 - nt, np.cumsum(y * ~t)[ends]
    gain = (yt - yc / np.maximum(nc, 1) * nt) / nt[-1]
    return Curve(np.append(0.0, (ends + 1) / len(order)), np.append(0.0, gain))


def calibration(
    uplift: np.ndarray, outcome: np.ndarray, treated: np.ndarray, groups: int = 10
) -> Calibration:
    """Predicted and observed effects of groups of people, equal but for ties.

    People with equal predictions are in one group, that of the middle one of them, so
    that the order of rows does not count. Large ties leave other groups empty.

    Args:
      uplift, outcome, treated: as `ranking` takes them.
      groups: 10 of them are deciles.

    Returns:
      Groups in which fewer than two people are treated or untreated have a NaN effect.
      Errors of 0/1 outcomes are of shares drawn towards 1/2 (Agresti and Caffo 2000);
      where others do not vary in a group (nobody bought), they vary as in all groups.

    Raises:
      ValueError: as `ranking`, or fewer people than groups.
    """
    uplift, outcome, treated = _checked(uplift, outcome, treated)
    binary = np.isin(outcome, (0, 1)).all()

    def variance(y: np.ndarray, everyone: np.ndarray) -> float:
        if not binary:
            return float(y.var(ddof=1) or everyone.var(ddof=1))
        # As of one more with and one without: a rare outcome that nobody has in a
        # group is not known for certain (Agresti and Caffo 2000).
        share = (y.sum() + 1) / (len(y) + 2)
        return float(share * (1 - share) * len(y) / (len(y) + 2))

    if not 0 < groups <= len(uplift):
        raise ValueError(f"got {groups} groups of {len(uplift)} people, expected fewer")
    _, place, count = np.unique(uplift, return_inverse=True, return_counts=True)
    middle = np.cumsum(count) - count / 2  # of equal predictions, from 0 to N
    group = (middle * groups // len(uplift))[place]
    found = []
    for k in range(groups):
        rows = group == k
        t = treated[rows]
        observed = error = np.nan
        if min(t.sum(), (~t).sum()) > 1:
            a, b = outcome[rows][t], outcome[rows][~t]
            observed = a.mean() - b.mean()
            both = variance(a, outcome[treated]), variance(b, outcome[~treated])
            error = np.sqrt(both[0] / len(a) + both[1] / len(b))
        predicted = uplift[rows].mean() if len(t) else np.nan
        found.append((predicted, observed, error, len(t)))
    return Calibration(*np.array(found).T)


def pehe(predictions: np.ndarray, effects: np.ndarray) -> np.ndarray:
    """Root mean squared error of individual effects against the control, [A - 1, O].

    Precision in estimating heterogeneous effects (Hill 2011); arguments and errors are
    those of `squared_errors`.
    """
    return np.sqrt(np.mean(squared_errors(predictions, effects), axis=0))


def squared_errors(predictions: np.ndarray, effects: np.ndarray) -> np.ndarray:
    """Of each person's effects against the control, [N, A - 1, O].

    Args:
      predictions: [N, A, O] expected outcomes.
      effects: [N, A, O] true ones: expected outcomes, or effects with 0 at the control.

    Raises:
      ValueError: shapes differ.
    """
    if predictions.shape != effects.shape or predictions.ndim != 3:
        raise ValueError(
            f"got predictions {predictions.shape} and effects {effects.shape}, expected"
            " both [N, A, O]"
        )
    error = (predictions - effects).astype(np.float64)
    return (error[:, 1:] - error[:, :1]) ** 2


def policy_value(
    chosen: np.ndarray,
    arm: np.ndarray,
    outcome: np.ndarray,
    shares: np.ndarray,
    counts: np.ndarray | None = None,
) -> Value:
    """Mean outcome if each person got the arm chosen for them.

    Horvitz and Thompson 1952: people who happened to get their arm stand for the rest,
    each for 1 / (probability of that arm).

    Args:
      chosen: [N] arms of the policy; made without the outcomes of these people.
      arm: [N] arms that people were given at random.
      outcome: [N].
      shares: [A] probabilities of arms.
      counts: [R, N] of `resample`; each person once if not given.

    Raises:
      ValueError: shapes differ, or nobody got the arm chosen for them.
    """
    if not chosen.shape == arm.shape == outcome.shape:
        raise ValueError(
            f"got chosen {chosen.shape}, arm {arm.shape} and outcome {outcome.shape},"
            " expected [N] each"
        )
    weight = np.where(chosen == arm, 1 / shares[arm], 0.0)
    if not weight.any():
        raise ValueError("got a policy that nobody was treated by, expected an overlap")
    both = np.stack([weight * outcome, weight], axis=1)
    if counts is None:
        value, total = both.mean(axis=0)
    else:
        # Row by row: all counts as float64 at once would be 8 times their memory.
        sums = np.array([np.einsum("n,nk->k", row, both) for row in counts])
        value, total = sums.T / len(arm)
    with np.errstate(invalid="ignore", divide="ignore"):
        return Value(value, value / total)


def _checked(
    uplift: np.ndarray, outcome: np.ndarray, treated: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    uplift, outcome, treated = (np.asarray(x) for x in (uplift, outcome, treated))
    if not (uplift.shape == outcome.shape == treated.shape and uplift.ndim == 1):
        raise ValueError(
            f"got uplift {uplift.shape}, outcome {outcome.shape} and treated"
            f" {treated.shape}, expected [N] each"
        )
    if treated.dtype != bool:
        raise ValueError(f"got treated of {treated.dtype}, expected bool: arm == a")
    if treated.all() or not treated.any():
        raise ValueError(
            f"got {treated.sum()} treated of {len(treated)} people, expected some of"
            " both groups; take the rows of one arm and of the control"
        )
    for name, x in (("uplift", uplift), ("outcome", outcome)):
        if not np.isfinite(x).all():
            count = int((~np.isfinite(x)).sum())
            raise ValueError(f"got {count} values of {name} that are not finite")
    return uplift, outcome.astype(np.float64), treated

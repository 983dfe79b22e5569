"""The report of the uplift study: who ranks people best, and who should get what.

    text = write(workdir, trial, {"MTMT": p, "S-learner": q}, policy_outcome="spend",
                 bootstrap=1000, seed=0)

Writes report.md, qini.png and deciles.png. Every interval is of a bootstrap over
people, the same draws for all models, seeds averaged; intervals decide, not means.

Legend: N people, A arms (arm 0 is the control), O outcomes, S seeds, R replicates.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata
from tqdm import tqdm

from experiments import mtmt_figures, report_file
from experiments.mtmt_policy import (
    PER,
    calibration_of,
    cell,
    policies,
    segments,
    span,
    uplift,
)
from multitask_jax import evaluation
from multitask_jax.data.uplift import Trial
from multitask_jax.merging.report import table

MAIN = "MTMT"
ENOUGH = 200  # replicates, for 95% intervals
REFERENCES = ("GBM S-learner", "S-learner", MAIN)
MEASURES = evaluation.Ranking._fields

_BY_FOLD = (
    "People are ordered by their rank within the fold that one model predicted; tenths"
    " of calibration and policies compare predictions of different folds' models."
)

Predictions = Mapping[str, np.ndarray]  # [S, N, A, O] by model


class Measured(NamedTuple):
    """A model's measures, means over seeds."""

    point: np.ndarray  # [A - 1, O, 3]
    draws: np.ndarray  # [A - 1, O, 3, R]


def write(
    workdir: str | os.PathLike[str],
    trial: Trial,
    predictions: Predictions,
    *,
    policy_outcome: str,
    bootstrap: int,
    seed: int,
    folds: np.ndarray | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Measures all models and writes the report and its figures.

    Args:
      workdir: where to.
      trial: what happened.
      predictions: [S, N, A, O] by model, each person's by a model that has not seen
        them. The calibration, the policy's shares and the highlight are MTMT's, or the
        first model's if there is no MTMT.
      policy_outcome: what each person's best arm is the best for.
      bootstrap: R.
      seed: of the bootstrap.
      folds: [S, N], whose model predicted whom; one model's if not given.
      notes: paragraphs for the top of the report.

    Returns:
      The report.

    Raises:
      ValueError: shapes, names or numbers are wrong.
    """
    _check(trial, predictions, policy_outcome)
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if bootstrap < ENOUGH:
        notes = (
            *notes,
            f"Only {bootstrap} bootstrap replicates: these intervals are too rough to"
            f" decide anything. Give --bootstrap={ENOUGH} or more.",
        )
    counts = evaluation.resample(len(trial.y), bootstrap, seed)
    means = {name: p.mean(axis=0) for name, p in predictions.items()}
    main = MAIN if MAIN in predictions else next(iter(predictions))
    ranked = dict(predictions)
    if folds is not None:
        ranked = {name: within_folds(p, folds) for name, p in predictions.items()}
        notes = (*notes, _BY_FOLD)
    measured, best = measure(trial, ranked, counts)
    orders = {name: p.mean(axis=0) for name, p in ranked.items()}
    outcome = trial.outcomes.index(policy_outcome)
    parts = [
        _opening(trial, predictions, bootstrap, notes),
        _rankings(trial, measured, best),
        *(_differences(trial, measured, r) for r in REFERENCES if r in measured),
        _calibration(trial, means, main),
        _errors(trial, predictions, main),
        policies(trial, means, counts, main, outcome),
        segments(trial, means[main], main, outcome),
    ]
    text = "\n".join(part for part in parts if part)
    (workdir / "report.md").write_text(text, encoding="utf-8")
    for name, figure in (
        ("qini", mtmt_figures.qini(trial, orders, (main, *REFERENCES))),
        ("deciles", mtmt_figures.deciles(trial, means[main], main)),
    ):
        figure.savefig(workdir / f"{name}.png", dpi=120)
    return text


def within_folds(prediction: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Predictions whose uplift is a person's rank in the own fold, from 0 to 1.

    The models of two folds are not to be compared: that of the fold with the larger
    effect by chance was trained on the smaller ones, so that in one order of all
    people large effects would get low scores, and a measure would be too small.

    Args:
      prediction: [S, N, A, O].
      folds: [S, N].
    """
    found = np.zeros(prediction.shape)
    for out, p, fold in zip(found, prediction, folds, strict=True):
        for k in np.unique(fold):
            rows = fold == k
            effect = p[rows, 1:].astype(np.float64) - p[rows, :1]
            out[rows, 1:] = (rankdata(effect, axis=0) - 0.5) / rows.sum()
    return found


def measure(
    trial: Trial, predictions: Predictions, counts: np.ndarray
) -> tuple[dict[str, Measured], Measured]:
    """Each arm against the control, of all models and outcomes.

    Returns:
      By model, and of the best Qini (NaN for outcomes that are not binary).
    """
    a, o, r = len(trial.arms) - 1, len(trial.outcomes), len(counts)

    def empty() -> Measured:
        return Measured(np.full((a, o, 3), np.nan), np.full((a, o, 3, r), np.nan))

    found = {name: empty() for name in predictions}
    best = empty()
    total = a * o * sum(len(p) for p in predictions.values())
    with tqdm(total=total, unit="ranking", desc="bootstrap", disable=None) as bar:
        for arm in range(1, a + 1):
            rows = np.flatnonzero((trial.arm == 0) | (trial.arm == arm))
            treated, drawn = trial.arm[rows] == arm, counts[:, rows]
            for outcome in range(o):
                y = trial.y[rows, outcome]

                def both(
                    score: np.ndarray,
                    y: np.ndarray = y,
                    treated: np.ndarray = treated,
                    drawn: np.ndarray = drawn,
                ) -> tuple[np.ndarray, np.ndarray]:
                    point = evaluation.ranking(score, y, treated)
                    draws = evaluation.ranking(score, y, treated, drawn)
                    return np.array(point), np.array(draws)

                place = arm - 1, outcome
                for name, p in predictions.items():
                    each = []
                    for one in p:
                        each.append(both(uplift(one[rows], arm, outcome)))
                        bar.update()
                    for whole, values in zip(
                        found[name], zip(*each, strict=True), strict=True
                    ):
                        whole[place] = np.mean(values, axis=0)
                if trial.binary[outcome]:
                    best.point[place], best.draws[place] = both(
                        evaluation.perfect(y, treated)[0]
                    )
    return found, best


def _check(trial: Trial, predictions: Predictions, policy_outcome: str) -> None:
    if policy_outcome not in trial.outcomes:
        raise ValueError(
            f"got policy_outcome={policy_outcome!r}, expected one of {trial.outcomes}"
        )
    if not predictions:
        raise ValueError("got no predictions, expected those of a model or more")
    shape = (len(trial.y), len(trial.arms), len(trial.outcomes))
    for name, p in predictions.items():
        if p.ndim != 4 or p.shape[1:] != shape or not len(p):
            raise ValueError(
                f"predictions of {name}: got {p.shape}, expected [seeds, {shape[0]}"
                f" people, {shape[1]} arms, {shape[2]} outcomes]"
            )
        if not np.isfinite(p).all():
            raise ValueError(
                f"predictions of {name}: got {(~np.isfinite(p)).sum()} values that are"
                " not finite; has its training diverged?"
            )


def _opening(
    trial: Trial, predictions: Predictions, bootstrap: int, notes: Sequence[str]
) -> str:
    seeds = sorted({len(p) for p in predictions.values()})
    rates = [
        [name, f"{(trial.arm == i).sum():,}"]
        + [f"{PER * y:.1f}" for y in trial.y[trial.arm == i].mean(axis=0)]
        for i, name in enumerate(trial.arms)
    ]
    known = (
        "\nThe data are *synthetic*: true effects are known.\n"
        if trial.effects is not None
        else ""
    )
    return "\n".join(
        [
            "# MTMT: which treatment for whom\n",
            f"{len(trial.y):,} people. Seeds that are averaged:"
            f" {' or '.join(map(str, seeds))}. 95% intervals of {bootstrap:,} bootstrap"
            f" replicates over people, seeds held fixed. Outcomes and effects are per"
            f" {PER:,} people.",
            known,
            *(f"{note}\n" for note in notes),
            table(["arm", "people", *trial.outcomes], rates),
            "",
        ]
    )


def _rankings(trial: Trial, measured: Mapping[str, Measured], best: Measured) -> str:
    parts = [
        "## Ranking people by predicted uplift\n",
        "Qini: area between the Qini curve and its chord, 0 for a random order;"
        " Qini / best: over that of the best order in hindsight, as scikit-uplift has"
        " it (binary outcomes). AUUC: area under the uplift curve. The figure draws"
        " each model's mean prediction of the seeds.\n",
        "![Qini curves](qini.png)\n",
    ]
    rows = [
        [
            name,
            *(
                cell(PER * point, PER * draws)
                for point, draws in zip(
                    m.point[..., 0].mean(axis=0),
                    m.draws[..., 0, :].mean(axis=0),
                    strict=True,
                )
            ),
        ]
        for name, m in measured.items()
    ]
    parts += ["### Qini, mean of arms\n", table(["", *trial.outcomes], rows), ""]
    for o, outcome in enumerate(trial.outcomes):
        for a, arm in enumerate(trial.arms[1:]):
            rows = []
            for name, m in measured.items():
                cells = [
                    cell(PER * m.point[a, o, k], PER * m.draws[a, o, k])
                    for k in range(len(MEASURES))
                ]
                if trial.binary[o]:
                    # A replicate in which nobody had the outcome has no best order.
                    some = best.draws[a, o, 0] > 0
                    ratio = m.draws[a, o, 0][some] / best.draws[a, o, 0][some]
                    point = m.point[a, o, 0] / max(best.point[a, o, 0], 1e-12)
                    cells.insert(1, cell(point, ratio, 3) if some.any() else "")
                rows.append([name, *cells])
            header = ["", "Qini", "AUUC", "uplift at 30%"]
            if trial.binary[o]:
                header.insert(2, "Qini / best")
            parts += [f"### {outcome}: {arm}\n", table(header, rows), ""]
    return "\n".join(parts)


def _differences(trial: Trial, measured: Mapping[str, Measured], reference: str) -> str:
    """Of Qini, paired; and what they decide."""
    other = measured[reference]
    rows, better, worse = [], [], []
    for name, m in measured.items():
        if name == reference:
            continue
        cells = []
        for o, outcome in enumerate(trial.outcomes):
            for a, arm in enumerate(trial.arms[1:]):
                draws = m.draws[a, o, 0] - other.draws[a, o, 0]
                point = m.point[a, o, 0] - other.point[a, o, 0]
                low, high = evaluation.interval(draws)
                mark = "**" if low > 0 or high < 0 else ""
                cells.append(f"{mark}{cell(PER * point, PER * draws)}{mark}")
                if mark:
                    kind = better if low > 0 else worse
                    kind.append(f"{name} ({outcome}, {arm})")
        rows.append([name, *cells])
    if not rows:
        return ""
    count = sum(len(row) - 1 for row in rows)
    header = [f"{o}: {a}" for o in trial.outcomes for a in trial.arms[1:]]
    said = [f"Better than {reference}: {', '.join(better) or 'none'}."]
    said += [f"Worse: {', '.join(worse) or 'none'}.", "The rest is undecided."]
    return "\n".join(
        [
            f"## Qini less that of {reference}\n",
            "Paired differences; intervals decide, not means. Bold: the interval"
            f" excludes 0. Of {count} intervals, {0.05 * count:.1f} would by chance"
            " alone if no model differed.\n",
            table(["", *header], rows),
            "",
            " ".join(said),
            "",
        ]
    )


def _calibration(trial: Trial, means: Mapping[str, np.ndarray], name: str) -> str:
    rows = [
        [
            model,
            *(
                f"{PER * calibration_of(trial, p, a, o).distance:.1f}"
                for o in range(len(trial.outcomes))
                for a in range(1, len(trial.arms))
            ),
        ]
        for model, p in means.items()
    ]
    header = [f"{o}: {a}" for o in trial.outcomes for a in trial.arms[1:]]
    prediction = means[name]
    parts = [
        f"## Is {name} calibrated?\n",
        "Tenths of people by predicted effect, mean prediction of the seeds; observed:"
        " difference of means and its 95% interval.\n",
        "![Effects by decile](deciles.png)\n",
        "### Mean distance of predicted and observed effects of tenths, all models\n",
        "Chance alone makes some of it.\n",
        table(["", *header], rows),
        "",
    ]
    for o, outcome in enumerate(trial.outcomes):
        parts += [f"### Tenths by effect on {outcome}\n", _tenths(trial, prediction, o)]
    return "\n".join(parts)


def _tenths(trial: Trial, prediction: np.ndarray, outcome: int) -> str:
    cells, said = [], []
    for a, arm in enumerate(trial.arms[1:], start=1):
        c = calibration_of(trial, prediction, a, outcome)
        half = evaluation.uplift.NORMAL * c.error
        cells.append(
            [
                (f"{PER * p:.1f}", _observed(PER * y, PER * h))
                for p, y, h in zip(c.predicted, c.observed, half, strict=True)
            ]
        )
        inside = np.abs(c.predicted - c.observed) <= half
        said.append(
            f"{arm}: mean distance {PER * c.distance:.1f}, {inside.sum()} of"
            f" {np.isfinite(half).sum()} predictions within the interval."
        )
    header = ["tenth"]
    for arm in trial.arms[1:]:
        header += [f"{arm}, predicted", "observed"]
    rows = [
        [str(i + 1), *(x for pair in row for x in pair)]
        for i, row in enumerate(zip(*cells, strict=True))
    ]
    return "\n".join([table(header, rows), "", " ".join(said), ""])


def _observed(effect: float, half: float) -> str:
    if np.isfinite(half):
        return span(effect, effect - half, effect + half)
    return f"{effect:.1f} [unknown]" if np.isfinite(effect) else "unknown"


def _errors(trial: Trial, predictions: Predictions, main: str) -> str:
    """PEHE, and where the main model's squared errors are smaller or larger.

    Decided is what holds for other people *and* for other seeds: with many people, an
    interval over them alone tells two trained networks apart, not two methods.
    """
    if trial.effects is None:
        return ""
    rows = []
    for name, p in predictions.items():
        each = PER * np.stack([evaluation.pehe(x, trial.effects) for x in p])
        cells = each.transpose(2, 1, 0).reshape(-1, len(p))  # [outcomes and arms, S]
        rows.append([name, *map(report_file.over_seeds, cells)])
    header = [f"{o}: {a}" for o in trial.outcomes for a in trial.arms[1:]]

    paired = []
    for name, p in predictions.items():
        if name == main:
            continue
        # Above 0: the main model errs less. Pairs are of one seed, and of one person.
        people, seeds = [], []
        for own, other in zip(predictions[main], p, strict=False):
            one, two = (
                evaluation.squared_errors(x, trial.effects) for x in (own, other)
            )
            people.append(two - one)  # [N, A - 1, O]
            seeds.append(people[-1].mean(axis=0))
        gap = np.mean(people, axis=0)
        half = evaluation.uplift.NORMAL * gap.std(axis=0, ddof=1) / np.sqrt(len(gap))
        low, high = report_file.between_seeds(np.stack(seeds))
        better = ((gap.mean(axis=0) > half) & (low > 0)).sum()
        worse = ((gap.mean(axis=0) < -half) & (high < 0)).sum()
        paired.append([name, *map(str, (better, worse, low.size - better - worse))])
    parts = [
        "## Error of individual effects (PEHE), *synthetic*\n",
        "Root mean squared error of predicted uplifts; mean ± standard deviation over"
        " seeds.\n",
        table(["", *header], rows),
        "",
    ]
    if paired:
        parts += [
            f"In how many of these {len(header)} columns {main} is better: both 95%"
            " intervals of the difference of squared errors exclude 0, that over"
            " people, paired by person (seeds averaged and held fixed), and Student's"
            f" over seeds, paired by seed ({len(predictions[main])} of them; one alone"
            " decides nothing). No interval is corrected for their number.\n",
            table([f"{main} against", "better", "worse", "undecided"], paired),
            "",
        ]
    return "\n".join(parts)

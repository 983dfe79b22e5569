"""The report of the uplift study: who ranks people best, and who should get what.

    text = write(workdir, trial, {"MTMT": p, "S-learner": q}, policy_outcome="spend",
                 bootstrap=1000, seed=0)

Writes report.md, qini.png and deciles.png. Intervals are of a bootstrap over people,
the same draws for all models, seeds averaged; they decide, not means, and whether a
method is better needs an interval over seeds as well (`mtmt_verdicts`).

Legend: N people, A arms (arm 0 is the control), O outcomes, S seeds, R replicates.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import rankdata
from tqdm import tqdm

from experiments import mtmt_figures, mtmt_verdicts
from experiments.mtmt_policy import (
    PER,
    calibration_of,
    cell,
    direction,
    policies,
    segments,
    span,
    uplift,
)
from experiments.mtmt_verdicts import Measured
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
    progress: bool = True,
) -> str:
    """Measures all models and writes the report and its figures.

    Args:
      workdir: where to.
      trial: what happened.
      predictions: [S, N, A, O] by model, each person's by a model that has not seen
        them. The calibration, the policy's shares and the highlight are MTMT's, or the
        first model's if there is no MTMT.
      policy_outcome: what each person's best arm is the best for; "-cost" if less of
        it is better, as `mtmt_policy.direction` has it.
      bootstrap: R.
      seed: of the bootstrap.
      folds: [S, N], whose model predicted whom; one model's if not given.
      notes: paragraphs for the top of the report.
      progress: whether to show a bar, on a terminal.

    Returns:
      The report.

    Raises:
      ValueError: shapes, names or numbers are wrong.
    """
    outcome, sign = direction(trial.outcomes, policy_outcome)
    _check(trial, predictions)
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
    measured, best = measure(trial, ranked, counts, progress=progress)
    orders = {name: p.mean(axis=0) for name, p in ranked.items()}
    parts = [
        _opening(trial, predictions, bootstrap, notes),
        _rankings(trial, measured, best),
        *(
            mtmt_verdicts.differences(trial, measured, r)
            for r in REFERENCES
            if r in measured
        ),
        _calibration(trial, means, main),
        mtmt_verdicts.errors(trial, predictions, main),
        policies(trial, means, counts, main, outcome, sign),
        segments(trial, means[main], main, outcome, sign),
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
    trial: Trial,
    predictions: Predictions,
    counts: np.ndarray,
    *,
    progress: bool = True,
) -> tuple[dict[str, Measured], Measured]:
    """Each arm against the control, of all models and outcomes.

    Args:
      trial: what happened.
      predictions: [S, N, A, O] by model.
      counts: [R, N] of the bootstrap.
      progress: whether to show a bar, on a terminal.

    Returns:
      By model, and of the best Qini (NaN for outcomes that are not binary).
    """
    a, o, r = len(trial.arms) - 1, len(trial.outcomes), len(counts)

    def empty(seeds: int) -> Measured:
        shape = a, o, len(MEASURES)
        return Measured(np.full((seeds, *shape), np.nan), np.full((*shape, r), np.nan))

    found = {name: empty(len(p)) for name, p in predictions.items()}
    best = empty(1)
    with tqdm(
        total=a * o * sum(len(p) for p in predictions.values()),
        unit="ranking",
        desc="bootstrap",
        disable=None if progress else True,
    ) as bar:
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
                    points, draws = zip(*each, strict=True)
                    found[name].seeds[:, *place] = points
                    found[name].draws[place] = np.mean(draws, axis=0)
                if trial.binary[outcome]:
                    best.seeds[0, *place], best.draws[place] = both(
                        evaluation.perfect(y, treated)[0]
                    )
    return found, best


def _check(trial: Trial, predictions: Predictions) -> None:
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
            f" {PER:,} people.\n",
            mtmt_verdicts.NEEDS.format(" or ".join(map(str, seeds))),
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
        " it (binary outcomes). AUUC: area under the uplift curve. The largest effects"
        " come first, also of what had better be small. The figure draws each model's"
        " mean prediction of the seeds.\n",
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
        " difference of means and its 95% interval. Equal predictions are in one tenth,"
        " so that others may be without people.\n",
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
                (
                    f"{PER * p:.1f}" if np.isfinite(p) else "nobody",
                    _observed(PER * y, PER * h),
                )
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

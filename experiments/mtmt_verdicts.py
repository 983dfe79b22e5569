"""Which method of the uplift study is better: Qini and PEHE, compared in pairs.

A verdict needs two 95% intervals of a difference that both exclude 0: one over people,
with seeds averaged and held fixed, and one over seeds. With many people, that over them
alone tells two trained networks apart, not two methods; a single seed decides nothing.

Legend: N people, A arms (arm 0 is the control), O outcomes, S seeds, R replicates.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from experiments import report_file
from experiments.mtmt_policy import PER, cell
from multitask_jax import evaluation
from multitask_jax.data.uplift import Trial
from multitask_jax.merging.report import table

# For the top of the report; {} are the seeds.
NEEDS = (
    "That a method is better or worse is said where two 95% intervals of the difference"
    " exclude 0: that over people, paired by person (seeds averaged and held fixed),"
    " and Student's over seeds, paired by seed ({} of them; one alone decides nothing)."
    " The former alone tells of these trained networks. No interval is corrected for"
    " their number."
)

Ends = tuple[np.ndarray, np.ndarray]  # of intervals, low and high


class Measured(NamedTuple):
    """A model's measures."""

    seeds: np.ndarray  # [S, A - 1, O, 3]
    draws: np.ndarray  # [A - 1, O, 3, R], means over seeds

    @property
    def point(self) -> np.ndarray:
        """Means over seeds, [A - 1, O, 3]."""
        return self.seeds.mean(axis=0)


def verdicts(people: Ends, seeds: Ends) -> np.ndarray:
    """1 where both intervals are above 0, -1 where both are below, else 0."""
    low, high = np.minimum(people[0], seeds[0]), np.maximum(people[1], seeds[1])
    return (low > 0).astype(int) - (high < 0)


def differences(trial: Trial, measured: Mapping[str, Measured], reference: str) -> str:
    """Of Qini to that of a reference, paired; and what they decide."""
    other = measured[reference]
    rows: list[list[str]] = []
    better, worse, apart = [], [], []
    for name, m in measured.items():
        if name == reference:
            continue
        pairs = min(len(m.seeds), len(other.seeds))  # each of one seed
        ends = report_file.between_seeds(
            m.seeds[:pairs, ..., 0] - other.seeds[:pairs, ..., 0]
        )
        cells = []
        for o, outcome in enumerate(trial.outcomes):
            for a, arm in enumerate(trial.arms[1:]):
                draws = m.draws[a, o, 0] - other.draws[a, o, 0]
                point = m.point[a, o, 0] - other.point[a, o, 0]
                people = evaluation.interval(draws)
                verdict = verdicts(people, (ends[0][a, o], ends[1][a, o]))
                mark = "**" if verdict else ""
                cells.append(f"{mark}{cell(PER * point, PER * draws)}{mark}")
                where = f"{name} ({outcome}, {arm})"
                if verdict:
                    (better if verdict > 0 else worse).append(where)
                elif people[0] > 0 or people[1] < 0:
                    apart.append(where)
        rows.append([name, *cells])
    if not rows:
        return ""
    count = sum(len(row) - 1 for row in rows)
    header = [f"{o}: {a}" for o in trial.outcomes for a in trial.arms[1:]]
    said = [
        f"Better than {reference}: {', '.join(better) or 'none'}.",
        f"Worse: {', '.join(worse) or 'none'}.",
        "Apart over people alone, which tells of these trained networks and of no"
        f" method: {', '.join(apart) or 'none'}.",
        "The rest is undecided.",
    ]
    return "\n".join(
        [
            f"## Qini less that of {reference}\n",
            "Paired differences and their intervals over people; intervals decide, not"
            " means. Bold: those over people and over seeds exclude 0. Of"
            f" {count} intervals over people, {0.05 * count:.1f} would by chance alone"
            " if no network differed.\n",
            table(["", *header], rows),
            "",
            " ".join(said),
            "",
        ]
    )


def errors(trial: Trial, predictions: Mapping[str, np.ndarray], main: str) -> str:
    """PEHE, and where the main model's squared errors are smaller or larger.

    Args:
      trial: what happened; there is nothing to say if its effects are not known.
      predictions: [S, N, A, O] by model.
      main: the model that others are compared with.
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
        mean = gap.mean(axis=0)
        half = evaluation.uplift.NORMAL * gap.std(axis=0, ddof=1) / np.sqrt(len(gap))
        over_seeds = report_file.between_seeds(np.stack(seeds))
        found = verdicts((mean - half, mean + half), over_seeds)
        counts = [(found == verdict).sum() for verdict in (1, -1, 0)]
        paired.append([name, *map(str, counts)])
    parts = [
        "## Error of individual effects (PEHE), *synthetic*\n",
        "Root mean squared error of predicted uplifts; mean ± standard deviation over"
        " seeds.\n",
        table(["", *header], rows),
        "",
    ]
    if paired:
        parts += [
            f"In how many of these {len(header)} columns {main}'s squared errors are"
            " smaller, by both intervals, over people and over seeds:\n",
            table([f"{main} against", "better", "worse", "undecided"], paired),
            "",
        ]
    return "\n".join(parts)

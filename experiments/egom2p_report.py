"""The tables of EgoM2P's report.

Legend: N clips.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.egom2p_evaluation import MEASURES, TASKS, bootstrap, called
from multitask_jax.data.egocentric import Clips
from multitask_jax.merging.report import table

Measured = Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]  # [N] of a measure

_NOTES = """\
Each number is a mean over clips with its 95 % bootstrap interval (and the number of
clips that have a value), which is of clips of these few maps, not of other maps.
*mean*: what the model expects, the mean of 256 paths or 64 depths, each token drawn by
itself (of RGB, the decoder gets the mean of the codes' vectors); *shown another clip*:
that mean, had it been given another clip's tokens, which a model that uses them does
worse by; *sample*: a clip that could be, its tokens drawn together.
*constant*: the mean of the training clips, of depth in log; *of least AbsRel*: the one
that fits them best by that measure (0 m has 1). *first held*: the *true* first value of
the target (of a depth, each pixel's first known one), held for the whole clip; the
model is given no true value of its target.
*its own tokens*: the truth through the tokenizer, the best that a model of tokens can
do. Gaze is a *proxy*: the lagged bearing to the nearest labelled object. Poses are
compared as they are, so that ATE is without alignment: they begin at the same one.
Frechet distances are on features of our own (the model's encoder), of that many clips
only, and compare rows of this table alone.
"""
_PAIRED = """\
Gains are means over clips of the difference, with its 95 % bootstrap interval (and the
number of clips that have a value), above 0 where the first is better."""


def results(
    found: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]],
    frechet: Mapping[str, float],
) -> str:
    """A table a task: rows are methods, columns measures.

    Args:
      found: each clip's measures [N] by task, by method, by measure.
      frechet: of the generated videos, by method.
    """
    out = []
    for task in TASKS:
        if task.name not in found:
            continue
        rows_of = found[task.name]
        units = MEASURES[task.wanted]
        header = [called(task.name)]
        for name, (unit, more) in units.items():
            label = f"{called(name)}{f', {unit}' if unit else ''}"
            header.append(f"{label} {'up' if more else 'down'}")
        if task.wanted == "rgb" and frechet:
            header.append("Frechet down")
        rows = []
        for method, values in rows_of.items():
            row = [method]
            for name in units:
                x = bootstrap(values[name])
                row.append(f"{x.mean:.3g} ({x.low:.3g} to {x.high:.3g}; {x.clips})")
            if task.wanted == "rgb" and frechet:
                row.append(f"{frechet[method]:.3g}")
            rows.append(row)
        out.append(table(header, rows))
    return "\n\n".join(out)


def compared(
    first: Sequence[Measured], second: Sequence[Measured], names: tuple[str, str]
) -> tuple[str, dict[str, int]]:
    """Two lists over seeds in one table, with intervals of the difference.

    Returns:
      The table, and how often the first is "better", "worse" or "undecided": whether
      the interval of the difference over clips, mean over seeds, excludes 0.
    """
    rows, count = [], {"better": 0, "worse": 0, "undecided": 0}
    for task in TASKS:
        if task.name not in first[0]:
            continue  # not asked for
        for measure, (unit, more) in MEASURES[task.wanted].items():
            values = [
                np.stack([next(iter(m[task.name].values()))[measure] for m in some])
                for some in (first, second)
            ]  # [S, N] each
            difference = np.mean(values[0] - values[1], axis=0)
            x = bootstrap(difference if more else -difference)
            said = "better" if x.low > 0 else "worse" if x.high < 0 else "undecided"
            count[said] += 1
            label = called(f"{task.name}, {measure}{f', {unit}' if unit else ''}")
            rows.append(
                [
                    f"{label} {'up' if more else 'down'}",
                    *map(_over_seeds, values),
                    f"{x.mean:+.3g} ({x.low:+.3g} to {x.high:+.3g}; {x.clips})",
                    said,
                ]
            )
    header = ["", *names, f"gain of {names[0]}", ""]
    return table(header, rows), count


def _over_seeds(values: np.ndarray) -> str:
    each = np.nanmean(values, axis=1)
    spread = f" +- {each.std(ddof=1):.2g}" if len(each) > 1 else ""
    return f"{each.mean():.3g}{spread}"


def only(found: Measured, method: str) -> Measured:
    """What was measured of one method, in the tasks that have it."""
    return {
        task: {method: methods[method]}
        for task, methods in found.items()
        if method in methods
    }


def counted(count: Mapping[str, int]) -> str:
    """Such as "better in 2, worse in 0, undecided in 6 measures"."""
    return ", ".join(f"{k} in {v}" for k, v in count.items()) + " measures"


def against(found: Measured, model: str, other: str) -> str:
    """How often one method is better than another, by paired intervals, and a table."""
    second = only(found, other)
    first = {task: x for task, x in only(found, model).items() if task in second}
    rows, count = compared([first], [second], (model, other))
    return f"**{model}** against **{other}**: {counted(count)}.\n\n{rows}"


def reconstructions(tokenizers: Mapping[str, Mapping[str, Any]]) -> str:
    """How well clips survive tokenizers, from KIND.json by kind."""
    rows = []
    for kind, made in tokenizers.items():
        quality = dict(made["quality"])
        used, perplexity = quality.pop("used"), quality.pop("perplexity")
        said = ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in quality.items())
        # Earlier versions did not tell.
        of = " (training clips)" if made.get("split") == "train" else ""
        name = called(kind) + of
        rows.append([name, said, f"{100 * used:.0f} %", f"{perplexity:.0f}"])
    return table(["", "reconstruction", "codes used", "perplexity"], rows)


def text(
    found: Mapping[str, Any],
    frechet: Mapping[str, float],
    tokenizers: Mapping[str, Mapping[str, Any]],
    test: Clips,
    about: Sequence[str],
    *,
    grid: bool,
) -> str:
    """The whole report.md; `tokenizers`: KIND.json by kind; `grid`: there is one."""
    groups = sorted(set(test.group))
    return "\n\n".join(
        [
            "# EgoM2P at a small size",
            "\n".join(about),
            f"Held-out: {len(test.names)} clips of {', '.join(groups)}.",
            "## Any modality from another",
            results(found, frechet),
            _NOTES,
            "## Is it better than a constant, and does it use what it is shown?",
            _PAIRED,
            *(
                against(found, "EgoM2P, mean", other)
                for other in (
                    "constant",
                    "constant of least AbsRel",
                    "EgoM2P, shown another clip",
                    "first held",
                )
                if any(other in methods for methods in found.values())
            ),
            "## Tokenizers, on validation clips where a row tells no others",
            reconstructions(tokenizers),
            *(["![pictures](grid.png)"] if grid else []),
            "![learning curves](curves.png)",
        ]
    )


def moving(test: Clips, count: int = 6) -> list[int]:
    """Complete clips to draw, evenly among those that move more than the median."""
    complete = np.logical_and.reduce(list(test.present.values()))
    length = np.linalg.norm(test.arrays["camera"][:, -1, :3, 3], axis=-1)
    rows = np.flatnonzero(complete)
    if not len(rows):
        return []
    rows = rows[length[rows] >= np.median(length[rows])]
    return [
        int(rows[i])
        for i in np.linspace(0, len(rows) - 1, min(count, len(rows)), dtype=int)
    ]

"""The tables of EgoM2P's report.

Legend: N clips.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.egom2p_evaluation import MEASURES, TASKS, bootstrap
from multitask_jax.data.egocentric import Clips
from multitask_jax.merging.report import table

_NOTES = """\
Each number is a mean over clips with its 95 % bootstrap interval. *mean*: what the
model expects of each token by itself (the decoder gets the mean of the codes' vectors),
which is of least error; *shown another clip*: that mean, had it been given another
clip's tokens, which a model that uses them does worse by; *sample*: a clip that could
be, its tokens drawn together.
*constant*: the mean of the training clips. *first held*: the *true* first value of the
target, held for the whole clip; the model is given no true value of its target. *its
own tokens*: the truth through the tokenizer, the best that a model of tokens can do.
Gaze is a *proxy*: the lagged bearing to the nearest labelled object. Poses are compared
as they are, without alignment: they begin at the same one. Frechet distances are on
features of our own (the model's encoder), of that many clips only, and compare rows of
this table alone.
"""


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
        header = [task.name]
        for name, (unit, more) in units.items():
            header.append(
                f"{name}{f', {unit}' if unit else ''} {'up' if more else 'down'}"
            )
        if task.wanted == "rgb" and frechet:
            header.append("Frechet down")
        rows = []
        for method, values in rows_of.items():
            row = [method]
            for name in units:
                mean, low, high = bootstrap(values[name])
                row.append(f"{mean:.3g} ({low:.3g} to {high:.3g})")
            if task.wanted == "rgb" and frechet:
                row.append(f"{frechet[method]:.3g}")
            rows.append(row)
        out.append(table(header, rows))
    return "\n\n".join(out)


def text(
    found: Mapping[str, Any],
    frechet: Mapping[str, float],
    tokenizers: Mapping[str, Mapping[str, Any]],
    test: Clips,
    about: Sequence[str],
) -> str:
    """The whole report.md; `tokenizers`: KIND.json by kind."""
    rows = []
    for kind, made in tokenizers.items():
        quality = dict(made["quality"])
        used, perplexity = quality.pop("used"), quality.pop("perplexity")
        said = ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in quality.items())
        rows.append([kind, said, f"{100 * used:.0f} %", f"{perplexity:.0f}"])
    groups = sorted(set(test.group))
    return "\n\n".join(
        [
            "# EgoM2P at a small size",
            "\n".join(about),
            f"Held-out: {len(test.names)} clips of {', '.join(groups)}.",
            "## Any modality from another",
            results(found, frechet),
            _NOTES,
            "## Tokenizers, on validation clips",
            table(["", "reconstruction", "codes used", "perplexity"], rows),
            "![pictures](grid.png)",
            "![learning curves](curves.png)",
        ]
    )


def moving(test: Clips, count: int = 6) -> list[int]:
    """Complete clips to draw, evenly among those that move more than the median."""
    complete = np.logical_and.reduce(list(test.present.values()))
    length = np.linalg.norm(test.arrays["camera"][:, -1, :3, 3], axis=-1)
    rows = np.flatnonzero(complete)
    rows = rows[length[rows] >= np.median(length[rows])]
    return [
        int(rows[i])
        for i in np.linspace(0, len(rows) - 1, min(count, len(rows)), dtype=int)
    ]

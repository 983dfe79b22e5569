r"""Customers of a CSV file, scored by a trained MTMT: what each arm would bring them.

    python -m experiments.mtmt --predict --checkpoint=WORKDIR/model \
      --input=customers.csv --output=scored.csv

The file needs the features that the model was trained on; other columns, such as a
number of the customer, are passed through. Added: the expected outcome of each arm, the
uplift of each treated arm, and the best arm.

Legend: N people, F features, A arms (arm 0 is the control), O outcomes.
"""

import contextlib
import csv
import itertools
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from experiments import mtmt_model, mtmt_policy
from multitask_jax.data import trial_table
from multitask_jax.data.trial_features import Encoder, encode

BATCH = 8192  # people at a time: one compiled shape, and memory that does not grow

Predict = Callable[[np.ndarray], Any]  # [n, F] -> [n, A, O]


def run(
    checkpoint: str | os.PathLike[str],
    input_csv: str | os.PathLike[str],
    output_csv: str | os.PathLike[str],
    policy_outcome: str | None = None,
) -> None:
    """Scores a file with a saved model.

    Args:
      checkpoint: a folder of `mtmt_model.save`.
      input_csv: people to score.
      output_csv: where to; it is there in full or not at all.
      policy_outcome: what the best arm is the best for, as `mtmt_policy.direction`
        reads it; as in training if not given.

    Raises:
      FileNotFoundError: no such checkpoint or file.
      ValueError: the file's columns or values are wrong, or the model is of other data.
    """
    model, about = mtmt_model.load(checkpoint)
    predict(checkpoint, input_csv, output_csv, model, about, policy_outcome)


def predict(
    checkpoint: str | os.PathLike[str],
    input_csv: str | os.PathLike[str],
    output_csv: str | os.PathLike[str],
    model: Predict,
    about: Mapping[str, Any],
    policy_outcome: str | None = None,
) -> None:
    """As `run`, with the model and what is known about it at hand."""
    started = time.perf_counter()
    if not about.get("encoder"):
        raise ValueError(
            f"{checkpoint}: got a model without an encoder of people, expected one that"
            " was trained on a file, not with --data=simulator"
        )
    arms, outcomes = about["arms"], about["outcomes"]
    told = policy_outcome or about.get("policy_outcome")
    outcome, sign = mtmt_policy.direction(outcomes, told)
    if os.path.exists(output_csv) and os.path.samefile(input_csv, output_csv):
        raise ValueError(f"got {output_csv} as input and output, expected two files")
    check_names(arms, outcomes)
    encoder = Encoder.from_json(about["encoder"])
    where, people = os.fspath(input_csv), 0
    for before, text in trial_table.blocks(input_csv, BATCH):  # errors before work
        trial_table.features_of(encoder.kinds, text, where, before=before)
    unknown: Counter[str] = Counter()
    missing: Counter[str] = Counter()
    untrained: Counter[str] = Counter()
    best: Counter[str] = Counter()
    with _whole_file(output_csv) as file:
        writer = csv.writer(file, lineterminator="\n")
        for before, text in trial_table.blocks(input_csv, BATCH):
            given = trial_table.features_of(encoder.kinds, text, where, before=before)
            encoded = encode(encoder, given)
            expected = in_one_shape(model, encoded.x, BATCH if before else None)
            shape = (len(encoded.x), len(arms), len(outcomes))
            if expected.shape != shape or not np.isfinite(expected).all():
                raise ValueError(
                    f"{checkpoint}: got predictions {expected.shape}, expected {shape},"
                    " all finite; train the model again"
                )
            added = columns(expected, arms, outcomes)
            chosen = mtmt_policy.best_arms(expected, outcome, sign)
            added["best_arm"] = [arms[a] for a in chosen.tolist()]
            if clash := [name for name in added if name in text]:
                raise ValueError(
                    f"{where}: got the columns {clash}, which scoring adds; rename or"
                    " remove them"
                )
            if not before:
                writer.writerow([*text, *added])
            writer.writerows(zip(*text.values(), *added.values(), strict=True))
            people += len(expected)
            unknown.update(encoded.unknown)
            missing.update(encoded.missing)
            untrained.update(encoded.untrained)
            best.update(added["best_arm"])
    print(f"{people:,} people in {time.perf_counter() - started:.1f} s")
    for kind, counts in (
        ("unknown (no category)", unknown),
        ("missing (filled in)", missing),
        ("values of columns that never varied in the trial (left out)", untrained),
    ):
        found = ", ".join(f"{name} {n:,}" for name, n in counts.items() if n)
        print(f"{kind}: {found or 'none'}")
    aim = f"{'less ' if sign < 0 else ''}{outcomes[outcome]}"
    for arm in arms:
        print(f"best for {aim}: {arm}, {100 * best[arm] / people:.1f}%")
    print(f"written: {output_csv}")


def in_one_shape(model: Predict, x: np.ndarray, size: int | None) -> np.ndarray:
    """[n, F] -> [n, A, O] of at most `size` people, filled up by the last one.

    So the last block of a file compiles nothing anew.
    """
    lacking = 0 if size is None else size - len(x)
    filled = np.concatenate([x, np.repeat(x[-1:], lacking, axis=0)])
    return np.asarray(model(filled))[: len(x)]


def columns(
    expected: np.ndarray, arms: Sequence[str], outcomes: Sequence[str]
) -> dict[str, list[str]]:
    """Numbers that are added to the file, as text.

    Args:
      expected: [N, A, O].
      arms: A names.
      outcomes: O names.

    Returns:
      expected_OUTCOME_ARM and uplift_OUTCOME_ARM.
    """
    expected = expected.astype(np.float64)  # small differences of large numbers
    found = {}
    for o, name in enumerate(outcomes):
        for a, arm in enumerate(arms):
            found[f"expected_{_plain(name)}_{_plain(arm)}"] = expected[:, a, o]
    for o, name in enumerate(outcomes):
        for a, arm in list(enumerate(arms))[1:]:
            key = f"uplift_{_plain(name)}_{_plain(arm)}"
            found[key] = expected[:, a, o] - expected[:, 0, o]
    return {n: [f"{v:.9g}" for v in x.tolist()] for n, x in found.items()}


def check_names(arms: Sequence[str], outcomes: Sequence[str]) -> None:
    """Raises ValueError where two arms or outcomes get one name of a column."""
    of: dict[str, tuple[str, str]] = {}
    for pair in itertools.product(outcomes, arms):
        name = "_".join(map(_plain, pair))
        if of.setdefault(name, pair) != pair:
            raise ValueError(
                f"outcomes and arms: got {of[name]} and {pair}, which both are {name!r}"
                " in the names of scored columns; rename one"
            )


def _plain(name: str) -> str:
    """As a column's name: Mens E-Mail -> mens_e_mail."""
    return re.sub(r"\W+", "_", name.lower()).strip("_")


@contextlib.contextmanager
def _whole_file(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """A file that is there whole or not at all: another name first, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, other = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as f:
            yield f
        # mkstemp's files are their owner's alone; this one is as any other.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(other, 0o666 & ~mask)
        os.replace(other, path)
    except BaseException:
        Path(other).unlink(missing_ok=True)
        raise

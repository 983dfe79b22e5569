r"""Customers of a CSV file, scored by a trained MTMT: what each arm would bring them.

    python -m experiments.mtmt --predict --checkpoint=WORKDIR/model \
      --input=customers.csv --output=scored.csv

The file needs the features of the e-mail experiment (`multitask_jax.data.hillstrom`):
other columns, such as a number of the customer, are passed through. Added: the
expected outcome of each arm, the uplift of each treated arm, and the best arm.

Legend: N people, F features, A arms (arm 0 is the control), O outcomes.
"""

import csv
import itertools
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from multitask_jax.data import hillstrom

BATCH = 8192  # people at a time: one compiled shape, and little memory

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
      policy_outcome: what the best arm is the best for; as in training if not given.

    Raises:
      FileNotFoundError: no such checkpoint or file.
      ValueError: the file's columns or values are wrong, or the model is of other data.
    """
    from experiments import mtmt_model  # the only part that needs JAX

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
            f"{checkpoint}: got a model without an encoder of customers, expected one"
            " that was trained with --data=hillstrom"
        )
    outcome = policy_outcome or about.get("policy_outcome") or about["outcomes"][-1]
    if outcome not in about["outcomes"]:
        raise ValueError(
            f"got policy_outcome={outcome!r}, expected one of {about['outcomes']}"
        )
    if os.path.exists(output_csv) and os.path.samefile(input_csv, output_csv):
        raise ValueError(f"got {output_csv} as input and output, expected two files")
    text, where = hillstrom.read_text(input_csv)
    encoder = hillstrom.Encoder.from_json(about["encoder"])
    encoded = hillstrom.encode(encoder, hillstrom.features_of(text, where))
    expected = in_batches(model, encoded.x)
    shape = (len(encoded.x), len(about["arms"]), len(about["outcomes"]))
    if expected.shape != shape or not np.isfinite(expected).all():
        raise ValueError(
            f"{checkpoint}: got predictions {expected.shape}, expected {shape}, all"
            " finite; train the model again"
        )
    added = columns(expected, about["arms"], about["outcomes"], outcome)
    clash = [name for name in added if name in text]
    if clash:
        raise ValueError(
            f"{where}: got the columns {clash}, which scoring adds; rename or remove"
            " them"
        )
    _write(output_csv, text | added)
    print(f"{len(encoded.x):,} people in {time.perf_counter() - started:.1f} s")
    for kind, counts in (
        ("unknown (no category)", encoded.unknown),
        ("missing (filled in)", encoded.missing),
    ):
        found = ", ".join(f"{name} {n:,}" for name, n in counts.items() if n)
        print(f"{kind}: {found or 'none'}")
    best = expected[:, :, about["outcomes"].index(outcome)].argmax(axis=1)
    for a, arm in enumerate(about["arms"]):
        print(f"best for {outcome}: {arm}, {100 * (best == a).mean():.1f}%")
    print(f"written: {output_csv}")


def in_batches(model: Predict, x: np.ndarray) -> np.ndarray:
    """[N, F] -> [N, A, O], every batch of the same size.

    The last people of the file are scored again to fill the last batch.
    """
    size = min(BATCH, len(x))
    starts = [min(i, len(x) - size) for i in range(0, len(x), size)]
    parts = [np.asarray(model(x[i : i + size])) for i in starts]
    parts[-1] = parts[-1][size * len(parts) - len(x) :]
    return np.concatenate(parts)


def columns(
    expected: np.ndarray, arms: Sequence[str], outcomes: Sequence[str], outcome: str
) -> dict[str, list[str]]:
    """What is added to the file, as text.

    Args:
      expected: [N, A, O].
      arms: A names.
      outcomes: O names.
      outcome: what the best arm is the best for; of equal arms, the first.

    Returns:
      expected_OUTCOME_ARM, uplift_OUTCOME_ARM and best_arm.
    """
    found = {}
    for o, name in enumerate(outcomes):
        for a, arm in enumerate(arms):
            found[f"expected_{_plain(name)}_{_plain(arm)}"] = expected[:, a, o]
    for o, name in enumerate(outcomes):
        for a, arm in list(enumerate(arms))[1:]:
            key = f"uplift_{_plain(name)}_{_plain(arm)}"
            found[key] = expected[:, a, o] - expected[:, 0, o]
    as_text = {n: [f"{v:.6g}" for v in x.tolist()] for n, x in found.items()}
    best = expected[:, :, list(outcomes).index(outcome)].argmax(axis=1)
    return as_text | {"best_arm": [arms[a] for a in best.tolist()]}


def _plain(name: str) -> str:
    """As a column's name: Mens E-Mail -> mens_e_mail."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _write(path: str | os.PathLike[str], text: Mapping[str, Sequence[str]]) -> None:
    """A CSV file, whole or not at all: another name first, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, other = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as f:
            writer = csv.writer(f, lineterminator="\n")
            rows = zip(*text.values(), strict=True)
            writer.writerows(itertools.chain([list(text)], rows))
        # mkstemp's files are their owner's alone; this one is as any other.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(other, 0o666 & ~mask)
        os.replace(other, path)
    except BaseException:
        Path(other).unlink(missing_ok=True)
        raise

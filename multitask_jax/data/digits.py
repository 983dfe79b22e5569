"""Several tasks over scikit-learn's digits: 1797 real scans of 8 x 8, in the wheel.

The tasks were fixed before any merge was run, because they pull one small network in
different directions:

- digit: which of ten digits, the picture as it is.
- parity: odd or even, of the *same* pictures. It puts unlike shapes together (1 and 9,
  0 and 4) and alike ones apart (3 and 8, 5 and 6), against how `digit` groups them.
- turned: which digit, turned by 90 degrees. Where a stroke lies, and hence the position
  embedding, now means something else.
- negative: which digit, ink and paper swapped, so that every stroke detector sees the
  opposite sign.

Legend: N images.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

SIZE = 8  # pixels a side
LEVELS = 16  # the brightest pixel as stored


class Split(NamedTuple):
    """Images [N, 8, 8] float32 in [0, 1] (1 is ink) and digits [N] int32 in 0..9."""

    images: np.ndarray
    digits: np.ndarray


class Splits(NamedTuple):
    """Three disjoint parts: for fitting, for choosing, and for the table."""

    train: Split
    validation: Split
    test: Split


class Task(NamedTuple):
    """What the network is shown and what it must say; both are pure functions."""

    classes: int
    view: Callable[[np.ndarray], np.ndarray]  # [N, 8, 8] -> [N, 8, 8]
    label: Callable[[np.ndarray], np.ndarray]  # digits [N] -> labels [N]


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _quarter_turn(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(images, axes=(1, 2)))


TASKS: dict[str, Task] = {
    "digit": Task(10, _same, _same),
    "parity": Task(2, _same, lambda digits: digits % 2),
    "turned": Task(10, _quarter_turn, _same),
    "negative": Task(10, lambda images: 1 - images, _same),
}
CLASSES = max(t.classes for t in TASKS.values())  # width of a padded head


def load(*, seed: int = 0, validation: float = 0.17, test: float = 0.28) -> Splits:
    """Loads and splits the images, each digit in the same proportions.

    Args:
      seed: of the split; the same seed gives the same split everywhere.
      validation, test: shares of the images; the rest is for training.

    Raises:
      ValueError: the shares leave nothing for a part.
    """
    if not (validation > 0 and test > 0 and validation + test < 1):
        raise ValueError(
            f"got shares validation={validation}, test={test}; expected positive"
            " numbers with a sum below 1, the rest being for training"
        )
    from sklearn import datasets  # a second to import, so only on use

    stored = datasets.load_digits()
    images = (stored.images / LEVELS).astype(np.float32)
    digits = stored.target.astype(np.int32)
    rng = np.random.default_rng(seed)
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(digits == digit))
        cut = round(len(rows) * test)
        for part, chosen in zip(
            parts,
            np.split(rows, [len(rows) - cut - round(len(rows) * validation), -cut]),
            strict=True,
        ):
            part.append(chosen)
    rows_of = [np.sort(np.concatenate(part)) for part in parts]
    return Splits(*(Split(images[rows], digits[rows]) for rows in rows_of))


def examples(split: Split, task: str) -> Split:
    """A task's images [N, 8, 8] and labels [N] (in place of the digits).

    Raises:
      ValueError: unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"got task {task!r}, expected one of {', '.join(TASKS)}")
    t = TASKS[task]
    return Split(t.view(split.images), t.label(split.digits).astype(np.int32))

"""A randomised experiment with several treatments and several outcomes.

Legend: N people, F features, A arms (arm 0 is the control), O outcomes.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


def tiers(arms: int) -> np.ndarray:
    """[A, A - 1] of 0 and 1: which effects an arm sums, in a tiered experiment.

    One of any treatment, and an increment of each treated arm but the first.
    """
    rows = np.zeros((arms, max(1, arms - 1)))
    rows[1:, 0] = 1
    rows[range(2, arms), range(1, arms - 1)] = 1
    return rows


class Trial(NamedTuple):
    """What was given to whom, and what came of it."""

    x: np.ndarray  # [N, F] float32
    arm: np.ndarray  # [N] int32, 0 is the control
    y: np.ndarray  # [N, O] float32, binary outcomes as 0 and 1
    features: tuple[str, ...]  # F names
    arms: tuple[str, ...]  # A names
    outcomes: tuple[str, ...]  # O names
    binary: tuple[bool, ...]  # O: which outcomes are 0 or 1
    segments: Mapping[str, np.ndarray]  # [N] strings by column, to report by
    effects: np.ndarray | None = None  # [N, A, O], true ones, where they are known

    def at(self, rows: np.ndarray) -> "Trial":
        """The same of some rows."""
        return self._replace(
            x=self.x[rows],
            arm=self.arm[rows],
            y=self.y[rows],
            segments={name: s[rows] for name, s in self.segments.items()},
            effects=None if self.effects is None else self.effects[rows],
        )

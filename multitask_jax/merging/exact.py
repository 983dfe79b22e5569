"""Sums of floats that depend on nothing but what is summed."""

import math
from collections.abc import Iterable, Sequence

_SCALE = 1074  # the smallest positive double is 2**-1074


class ExactSum:
    """The correctly rounded sum of doubles, whatever the order they come in.

    Threads finish in any order, and rounded additions do not commute with that. A
    double is an integer times 2**-1074, and integers add exactly: one of at most 2200
    bits is held, however many terms there are (`math.fsum` would need all of them).
    """

    def __init__(self, terms: Iterable[float] = ()):
        self._units = 0
        self._nonfinite = 0.0  # infinities and NaN add to the same in any order
        for x in terms:
            self.add(x)

    def add(self, x: float) -> None:
        """Adds a term."""
        if not math.isfinite(x):
            self._nonfinite += x
            return
        numerator, denominator = x.as_integer_ratio()
        self._units += numerator << (_SCALE + 1 - denominator.bit_length())

    @property
    def parts(self) -> tuple[int, float]:
        """What is held, for `of_parts`, of another process perhaps."""
        return self._units, self._nonfinite

    @classmethod
    def of_parts(cls, parts: Iterable[Sequence[float]]) -> "ExactSum":
        """The sum of sums."""
        total = cls()
        for units, nonfinite in parts:
            total._units += int(units)
            total._nonfinite += nonfinite
        return total

    def __float__(self) -> float:
        if self._nonfinite != 0:  # NaN too
            return self._nonfinite
        try:
            return self._units / (1 << _SCALE)
        except OverflowError:
            return math.inf if self._units > 0 else -math.inf

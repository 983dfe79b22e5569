"""Statistics added up over chunks on the host, for the stream."""

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from multitask_jax.merging import statistics
from multitask_jax.merging.processes import ALONE, Group
from multitask_jax.merging.selection import Selection, magnitude


class SumTotal:
    """Exact counts, or sums of float64 that are rounded once, at the end.

    So neither threads nor processes, which decide the order, show in the result.
    """

    def __init__(
        self,
        terms: Callable[[Any], Sequence[Any]],
        kind: Literal["sum", "count"],
        dtype: np.dtype,
    ):
        self._terms = terms
        self._kind = kind
        self._dtype = dtype  # of the sums that `result` returns
        self._sums: list[Any] = []  # of counts a number each, of sums lists of terms
        self._lock = threading.Lock()

    def add(self, chunk: Any) -> None:
        """Adds a chunk's terms; thread-safe."""
        if self._kind == "count":
            terms = [int(x) for x in self._terms(chunk)]
        else:
            terms = [[float(x)] for x in self._terms(chunk)]
        with self._lock:
            self._sums = _add([self._sums, terms])
            if self._kind == "sum" and len(self._sums[0]) > _MANY:
                self._sums = [*map(expand, self._sums)]

    def result(self, group: Group = ALONE) -> tuple[Any, ...]:
        """As `merge` has it in memory: (high, low) pairs, or floats.

        Of what all processes of the group added, if it is more than one.
        """
        sums = self._sums
        if self._kind == "sum":
            sums = [*map(expand, sums)]
        sums = group.combine(sums, _add)
        if self._kind == "count":
            pairs = [statistics.split(n) for n in sums]
            return tuple((np.int32(high), np.int32(low)) for high, low in pairs)
        return tuple(self._dtype.type(_total(x)) for x in sums)


_MANY = 4096  # terms that are kept before they are put together


def _add(rows: Sequence[list[Any]]) -> list[Any]:
    """Numbers or lists, added by column; a row without any adds nothing."""
    filled = [row for row in rows if row]
    return [sum(c[1:], c[0]) for c in zip(*filled, strict=True)]


def expand(terms: Sequence[float]) -> list[float]:
    """A few floats whose exact sum is that of the terms, the largest first."""
    left, parts = list(terms), []
    while part := _total(left):
        parts.append(part)
        if not math.isfinite(part):
            break
        left.append(-part)
    return parts or [0.0]


def _total(terms: Sequence[float]) -> float:
    """The exact sum, rounded once; if not all terms are finite, what float64 has."""
    try:
        return math.fsum(terms) if all(map(math.isfinite, terms)) else sum(terms)
    except OverflowError:
        return sum(terms)


class KthTotal:
    """Thresholds: one selection a rank, the terms taking turns."""

    def __init__(
        self,
        selections: Sequence[Selection],
        keys: Callable[[Any], Sequence[np.ndarray]],
    ):
        self._selections = list(selections)
        self._found: dict[int, int] = {}
        self._keys = keys

    def add(self, chunk: Any) -> None:
        """Shows the chunk's keys to every selection still looking; thread-safe."""
        keys = self._keys(chunk)
        for t, selection in enumerate(self._selections):
            if t not in self._found:
                selection.add(keys[t % len(keys)])

    def result(self, group: Group = ALONE) -> tuple[np.float32, ...] | None:
        """The thresholds, or None if one of the brackets missed: add all again."""
        for t, selection in enumerate(self._selections):
            if t not in self._found:
                key = selection.result(group)
                if key is not None:
                    self._found[t] = key
        if len(self._found) < len(self._selections):
            return None
        return tuple(magnitude(self._found[t]) for t in range(len(self._selections)))

"""Statistics added up over chunks on the host, for the stream."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from multitask_jax.merging import statistics
from multitask_jax.merging.exact import ExactSum
from multitask_jax.merging.processes import ALONE, Group
from multitask_jax.merging.selection import Selection, magnitude


class SumTotal:
    """Exact counts, or exact sums of the chunks' terms, rounded once.

    Threads and processes add chunks in any order: the result does not depend on it.
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
        self._sums: list[Any] = []
        self._lock = threading.Lock()

    def add(self, chunk: Any) -> None:
        """Adds a chunk's terms; thread-safe."""
        counts = self._kind == "count"
        terms = [int(x) if counts else float(x) for x in self._terms(chunk)]
        with self._lock:
            if not self._sums:
                self._sums = [0 if counts else ExactSum() for _ in terms]
            for i, x in enumerate(terms):
                if counts:
                    self._sums[i] += x
                else:
                    self._sums[i].add(x)

    def result(self, group: Group = ALONE) -> tuple[Any, ...]:
        """As `merge` has it in memory: (high, low) pairs, or floats.

        Of what all processes of the group added; one without chunks adds nothing.
        """
        if self._kind == "count":
            rows = group.combine(self._sums, lambda rows: [r for r in rows if r])
            pairs = [
                statistics.split(sum(column)) for column in zip(*rows, strict=True)
            ]
            return tuple((np.int32(high), np.int32(low)) for high, low in pairs)
        parts = [x.parts for x in self._sums]
        rows = group.combine(parts, lambda rows: [r for r in rows if r])
        sums = [ExactSum.of_parts(column) for column in zip(*rows, strict=True)]
        return tuple(self._dtype.type(float(x)) for x in sums)


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

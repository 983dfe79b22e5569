"""Interference statistics gathered while a merge streams past: no pass of their own."""

import threading
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from multitask_jax.merging.core import Values
from multitask_jax.merging.interference import LeafStatistics, leaf_statistics
from multitask_jax.merging.statistics import chunk_sum

# Models whose method does not trim are judged at this density, on a sample.
SAMPLE_DENSITY = 0.2


class Census:
    """Sums by leaf path; its methods are thread-safe."""

    def __init__(self, models: int, *, exact: bool):
        self.models = models
        self.exact = exact  # whether the method trims, so that all entries are counted
        self.leaves: dict[str, LeafStatistics] = {}
        self._lock = threading.Lock()

    def _leaf(self, path: str) -> LeafStatistics:
        return self.leaves.setdefault(path, LeafStatistics.zeros(self.models))

    def products(
        self, path: str, base: np.ndarray, deltas: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Adds a chunk's inner products; returns |tau_t|^2 and |theta_0|^2 of it."""
        vectors = [*deltas, base]
        gram = np.empty((len(vectors), len(vectors)))
        with np.errstate(over="ignore", invalid="ignore"):
            for i, x in enumerate(vectors):
                for j in range(i, len(vectors)):
                    gram[i, j] = gram[j, i] = np.dot(x, vectors[j])
        with self._lock:
            leaf = self._leaf(path)
            leaf.size += base.size
            leaf.gram += gram
        return np.diag(gram)

    def trimmed(self, path: str, size: int, counts: Any, masses: Any) -> None:
        """Adds what `count_trimmed` found in a chunk of `size` entries."""
        counts, masses = np.asarray(counts), np.asarray(masses, np.float64)
        n = self.models
        with self._lock:
            leaf = self._leaf(path)
            leaf.counted += size
            leaf.kept += counts[:n]
            leaf.contested += float(counts[n])
            leaf.conflicts += float(counts[n + 1])
            leaf.mass += masses[:n]
            leaf.kept_mass += masses[n:]

    def sampled(self, sample: Sequence[tuple[str, Sequence[np.ndarray]]]) -> None:
        """Judges (path, task vectors) of a sample, trimmed over the whole model."""
        if not sample:
            return
        thresholds = []
        for t in range(self.models):
            magnitudes = np.abs(np.concatenate([deltas[t] for _, deltas in sample]))
            at = len(magnitudes) - 1 - int(len(magnitudes) * SAMPLE_DENSITY)
            thresholds.append(float(np.partition(magnitudes, at)[at]))
        for path, deltas in sample:
            part = leaf_statistics(deltas[0], deltas, thresholds)
            with self._lock:
                leaf = self._leaf(path)
                for name in ("counted", "kept", "mass", "kept_mass"):
                    setattr(leaf, name, getattr(leaf, name) + getattr(part, name))
                leaf.contested += part.contested
                leaf.conflicts += part.conflicts


def count_trimmed(before: Values, after: Values) -> tuple[Any, Any]:
    """In JAX, of a chunk: counts (kept_1.., contested, conflicts), masses of both."""
    kept = [chunk_sum((x != 0).astype(jnp.int32)) for x in after]
    positive = sum((x > 0).astype(jnp.int32) for x in after)
    negative = sum((x < 0).astype(jnp.int32) for x in after)
    contested = chunk_sum((positive + negative >= 2).astype(jnp.int32))
    conflicts = chunk_sum(((positive > 0) & (negative > 0)).astype(jnp.int32))
    masses = [chunk_sum(jnp.abs(x.astype(jnp.float32))) for x in (*before, *after)]
    return jnp.stack([*kept, contested, conflicts]), jnp.stack(masses)

"""Interference statistics gathered while a merge streams past: no pass of their own."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from multitask_jax.merging.core import Values
from multitask_jax.merging.interference import LeafStatistics, leaf_statistics

# Models whose method does not trim are judged at this density, on a sample.
SAMPLE_DENSITY = 0.2
# Bits of the integers that mark who keeps an entry; more models are sampled.
MOST_MODELS = 32


class Census:
    """Sums by leaf path; its methods are thread-safe."""

    def __init__(self, models: int, *, exact: bool):
        self.models = models
        self.exact = exact  # whether the method trims, so that all entries are counted
        self.leaves: dict[str, LeafStatistics] = {}
        self._lock = threading.Lock()

    def _leaf(self, path: str) -> LeafStatistics:
        leaf = self.leaves.get(path)
        if leaf is None:
            leaf = self.leaves[path] = LeafStatistics.zeros(self.models)
        return leaf

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
            if self.exact:
                leaf.mass += np.diag(gram)[:-1]
        return np.diag(gram)

    def trimmed(self, path: str, size: int, signs: Any, kept_mass: Any) -> None:
        """Adds what `mark_kept` found in a chunk of `size` entries."""
        positive, negative = (np.asarray(x).reshape(-1) for x in signs)
        either = positive | negative
        kept = [np.count_nonzero(either & (1 << t)) for t in range(self.models)]
        contested = np.count_nonzero(either & (either - 1))  # two bits or more
        conflicts = np.count_nonzero((positive != 0) & (negative != 0))
        with self._lock:
            leaf = self._leaf(path)
            leaf.counted += size
            leaf.kept += kept
            leaf.contested += contested
            leaf.conflicts += conflicts
            leaf.kept_mass += np.asarray(kept_mass)

    def sampled(self, sample: Sequence[tuple[str, Sequence[np.ndarray]]]) -> None:
        """Judges (path, task vectors) of a sample, trimmed over the whole model."""
        if not sample:
            return
        thresholds = []
        for t in range(self.models):
            magnitudes = np.abs(np.concatenate([deltas[t] for _, deltas in sample]))
            at = len(magnitudes) - 1 - int(len(magnitudes) * SAMPLE_DENSITY)
            thresholds.append(float(np.partition(magnitudes, at)[at]))
        by_path: dict[str, list[Sequence[np.ndarray]]] = {}
        for path, deltas in sample:
            by_path.setdefault(path, []).append(deltas)
        for path, pieces in by_path.items():
            taus = [np.concatenate(x) for x in zip(*pieces, strict=True)]
            part = leaf_statistics(taus[0], taus, thresholds)
            with self._lock:
                leaf = self._leaf(path)
                for name in ("counted", "kept", "mass", "kept_mass"):
                    setattr(leaf, name, getattr(leaf, name) + getattr(part, name))
                leaf.contested += part.contested
                leaf.conflicts += part.conflicts

    def state(self, paths: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What is known of some leaves, fit for JSON; `restore` takes it back."""
        with self._lock:
            return {
                p: {k: _plain(v) for k, v in vars(leaf).items()}
                for p, leaf in ((p, self.leaves.get(p)) for p in paths)
                if leaf is not None
            }

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes the place of what is known of these leaves."""
        for path, fields in state.items():
            self.leaves[path] = LeafStatistics(
                **{
                    k: np.array(v, np.float64) if isinstance(v, list) else v
                    for k, v in fields.items()
                }
            )


def _plain(x: Any) -> Any:
    return x if type(x) in (int, float) else np.asarray(x).tolist()


def mark_kept(before: Values, after: Values) -> tuple[Any, Any]:
    """In JAX, of a chunk: which models keep an entry, and sum tau^2 of what they keep.

    Returns:
      Two arrays of integers whose bit t says that model t keeps a positive (negative)
      value there, and a (T,) array. Bits, because XLA on a CPU takes several times as
      long to count as NumPy does.
    """
    dtype = jnp.uint8 if len(after) <= 8 else jnp.uint32
    positive = sum((x > 0).astype(dtype) << t for t, x in enumerate(after))
    negative = sum((x < 0).astype(dtype) << t for t, x in enumerate(after))
    kept = [
        jnp.where(x != 0, tau, 0).astype(jnp.float32).reshape(-1)
        for tau, x in zip(before, after, strict=True)
    ]
    return (positive, negative), jnp.stack([jnp.dot(x, x) for x in kept])

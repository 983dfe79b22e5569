"""A base checkpoint some of whose tensors change as they are read (LoRA, deltas)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from multitask_jax.checkpoints.types import Reader, TensorInfo


class Change(NamedTuple):
    """What becomes of one tensor.

    `apply(theta, start, stop)` gets the base's flat entries [start, stop) in `dtype`
    (None: it needs none of them) and returns the model's, a new array of `dtype`.
    """

    dtype: np.dtype
    apply: Callable[[np.ndarray | None, int, int], np.ndarray]
    whole: bool = False  # takes the base's place: `apply` gets None


def sum_dtype(base: np.dtype) -> np.dtype:
    """What base + change is added in: float64 for a float64 base, else float32."""
    return np.dtype(np.float64 if base == np.float64 else np.float32)


class ChangedReader:
    """A model as a base and changes of it, formed for the range asked for only.

    Names, shapes, order and ties are the base's. Tensors without a change are read as
    the base's bytes, so that their task vectors are exactly zero. base + change is
    rounded to `sum_dtype`: what a merge subtracts the base from again is the change to
    within one unit in the last place of the larger of base and model.
    """

    def __init__(
        self, path: Path, format: str, base: Reader, changes: Mapping[str, Change]
    ):
        """`base` stays the caller's to close."""
        self.path, self.format = path, format
        self._base, self.changes = base, dict(changes)
        self.aliases = dict(base.aliases)
        self.tensors = {
            name: TensorInfo(name, info.shape, self.changes[name].dtype)
            if name in self.changes
            else info
            for name, info in base.tensors.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Flat entries [start, stop) in C order."""
        name = self.aliases.get(name, name)
        stop = self.tensors[name].size if stop is None else stop
        change = self.changes.get(name)
        if change is None:
            return self._base.read(name, start, stop)
        if change.whole:
            return change.apply(None, start, stop)
        theta = self._base.read(name, start, stop).astype(change.dtype, copy=False)
        return change.apply(theta, start, stop)

    def close(self) -> None:
        """Drops the changes and the files they lie in; the base stays open."""
        self.changes = {}

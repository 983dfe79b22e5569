"""Batches of one shape: a ragged last one is padded, and a mask says what counts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np


def check_batches(batches: Sequence[Iterable[Any]], count: int) -> None:
    """Whether there is something to iterate over, again and again, for each task.

    Raises:
      ValueError: another number of tasks, an iterator, or arrays in the place of a
        list of batches.
    """
    what = f"expected for each of {count} tasks a list of batches: [[images_a], ...]"
    if isinstance(batches, Iterator | Mapping) or hasattr(batches, "shape"):
        raise ValueError(f"batches: got a {type(batches).__name__}, {what}")
    if len(batches) != count:
        raise ValueError(f"got batches of {len(batches)} tasks for {count} models")
    for t, data in enumerate(batches):
        if isinstance(data, Iterator):
            raise ValueError(
                f"batches[{t}]: got an iterator, which runs out; pass a list, or"
                " anything that can be iterated over again"
            )
        check_list(data, f"batches[{t}]")


def check_list(batches: Iterable[Any], name: str = "batches") -> None:
    """Raises ValueError for one batch, whose rows would be taken for batches."""
    if isinstance(batches, Mapping) or hasattr(batches, "shape"):
        shapes = [np.shape(x) for x in jax.tree.leaves(batches)]
        raise ValueError(
            f"{name}: got one batch (arrays of shapes {shapes[:5]}), expected a list"
            " of them; put it in brackets"
        )


def batch_size(batch: Any) -> int:
    """The length of the leading axis that all arrays of a batch share.

    Raises:
      ValueError: no arrays, a scalar, or different lengths.
    """
    shapes = [np.shape(x) for x in jax.tree.leaves(batch)]
    sizes = {s[0] if s else None for s in shapes}
    if len(sizes) != 1 or None in sizes or sizes == {0}:
        raise ValueError(
            f"a batch has arrays of shapes {shapes}, expected one leading axis of"
            " examples, the same for all"
        )
    (size,) = sizes
    return int(size)  # type: ignore[arg-type]


def pad(batch: Any, size: int) -> Any:
    """Repeats the first example until there are `size`.

    An example that exists is fit for any model, unlike zeros.
    """
    missing = size - batch_size(batch)

    def extend(x: Any) -> Any:
        return np.concatenate([x, np.repeat(np.asarray(x[:1]), missing, axis=0)])

    return jax.tree.map(extend, batch) if missing else batch


def padded(batches: Iterable[Any]) -> Iterator[tuple[Any, np.ndarray]]:
    """(batch, mask [B] of 1s and 0s), all of the first batch's size.

    Before/after, sizes 8, 8, 3: batches of 8; the last mask is 1 1 1 0 0 0 0 0.

    Raises:
      ValueError: no batch, one larger than the first, or arrays in place of a list.
    """
    check_list(batches)
    size = 0
    for batch in batches:
        n = batch_size(batch)
        size = size or n
        if n > size:
            raise ValueError(
                f"got a batch of {n} examples after one of {size}; give all batches one"
                " size (the last may be smaller)"
            )
        yield pad(batch, size), (np.arange(size) < n).astype(np.float32)
    if not size:
        raise ValueError("got no batches, expected at least one")

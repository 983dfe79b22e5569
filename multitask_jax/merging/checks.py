"""What values must be, so that a merge goes on."""

from collections.abc import Sequence

import numpy as np

from multitask_jax.checkpoints import CheckpointError, Reader
from multitask_jax.merging.plan import Chunk, Entry


def refuse_nonfinite(
    readers: Sequence[Reader], c: Chunk, arrays: Sequence[np.ndarray]
) -> None:
    """Names the tensor; sums may overflow where no entry is infinite."""
    for reader, x in zip(readers, arrays, strict=True):
        places = np.flatnonzero(~np.isfinite(x.astype(np.float64, copy=False)))
        if len(places):
            origin = getattr(reader, "origin", lambda _, r=reader: r.path)
            raise CheckpointError(
                f"{origin(c.entry.path)}: tensor {c.entry.path!r} has"
                f" {x[places[0]]} at flat index {c.start + int(places[0])} (and"
                " maybe more): the fine-tuning diverged, or the file is damaged."
                " Leave the model out, exclude the tensor, or pass allow_nonfinite"
            )


def check_fits(entry: Entry, merged: np.ndarray) -> None:
    """Refuses what overflows a dtype narrower than float32."""
    narrow = entry.out.itemsize == 1 or entry.out == np.float16
    if narrow and not np.isfinite(merged).all():
        raise CheckpointError(
            f"{entry.path}: the merged values do not fit {entry.out}; choose a wider"
            " out_dtype (bfloat16, float32), or pass allow_nonfinite"
        )

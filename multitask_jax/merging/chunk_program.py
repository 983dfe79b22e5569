"""What JAX computes of a chunk, and how arrays get there and back.

One program serves all chunks of a size: they are padded, and what differs between them
(settings, statistics, places) is an argument.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from multitask_jax.merging import core
from multitask_jax.merging.census import mark_kept
from multitask_jax.merging.plan import Entry
from multitask_jax.merging.statistics import chunk_sum


def compute_chunk(
    method: core.Method,
    stage: tuple[str, int, int],
    count: bool,
    arrays: tuple[Any, ...],
    weights: tuple[Any, ...],
    settings: Sequence[Any],
    stats: Sequence[Any],
    offset: tuple[Any, Any],
    size: Any,
    statistics: tuple[Any, ...],
    ranks: tuple[Any, ...],
    *,
    compute: str,
    out: str,
    check: bool,
) -> tuple[Any, Any]:
    """What JAX computes of a chunk: the merge, or the terms of a measure.

    `stage`: ("apply", ..), ("reduce", i, j) or ("values", i, j). Also returns the
    number of entries that are not finite (if `check`).
    """
    bad = None
    if check:  # before the rest, which can then overwrite what both compute
        base, *models = [x.astype(compute) for x in arrays]
        total = base + core.add_up(core.start_values(method, base, tuple(models)))
        bad = jnp.sum(~jnp.isfinite(total), dtype=jnp.int32)
        arrays, bad = jax.lax.optimization_barrier((arrays, bad))
    base, *models = [x.astype(compute) for x in arrays]
    known = jax.tree.map(lambda x: x.astype(compute), statistics)
    scaled = tuple(w.astype(compute) for w in weights)
    leaf = core.Leaf(base, scaled, (), offset, size, known, ranks)
    before = after = values = core.start_values(method, base, tuple(models))
    what, stop, j = stage
    if what == "apply":
        for i, t in enumerate(method.transforms):
            values = t.apply(values, core.at_transform(leaf, i, settings), stats[i])
            if t.trims and len(values) == len(before):
                after = values
        theta = core.finish(method, values, base).astype(out)
        counted = mark_kept(before, after) if count else None
        return (theta, counted), bad
    values = core.run_transforms(method, values, leaf, settings, stats, stop)
    measure = method.transforms[stop].measures[j]
    leaf = core.at_transform(leaf, stop, settings)
    terms = measure.values(values, leaf, stats[stop][:j])
    if what == "values":
        return terms, bad
    if measure.kind == "count":
        terms = tuple(x.astype(jnp.int32) for x in terms)
    return tuple(map(chunk_sum, terms)), bad


def to_compute(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Any float dtype -> float32 or float64, on the host."""
    return x.astype(dtype, copy=False)


def for_jax(x: np.ndarray) -> np.ndarray:
    """float8 goes in as float32; XLA has it on few devices."""
    return to_compute(x, np.dtype(np.float32)) if x.dtype.itemsize == 1 else x


def from_jax(e: Entry) -> np.dtype:
    """What a program returns; the host casts to float8, and wider than computed."""
    wider = e.out.itemsize > e.compute.itemsize
    return e.compute if wider or e.out.itemsize == 1 else e.out


def pad(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A flat chunk in the shape of its program, with zeros behind."""
    size = math.prod(shape)
    if x.size == size:
        return x.reshape(shape)
    out = np.zeros(size, x.dtype)
    out[: x.size] = x
    return out.reshape(shape)


def as_scalar(dtype: np.dtype, x: Any) -> Any:
    """A setting or a weight; integers are seeds, which keep all their bits."""
    return np.uint32(x) if isinstance(x, int) else dtype.type(x)

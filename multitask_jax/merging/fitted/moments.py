"""Mean and variance of the inputs of a model's dense layers.

A gate of a mixture of experts can be made of them: tokens go to the specialist whose
own data's mean is nearest (`moe.upcycling.gate_from_means`).
"""

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from multitask_jax import checkpoints
from multitask_jax.checkpoints import CheckpointError
from multitask_jax.merging.fitted import gram
from multitask_jax.merging.fitted.batching import check_list


class Moments(NamedTuple):
    """Of a dense layer's inputs, n wide (stacked layers: with leading axes)."""

    mean: Any  # [n]
    variance: Any  # []: mean squared distance from the mean, summed over n


def _sums(x: jax.Array) -> jax.Array:
    """[..., rows, n] -> [..., 3, n]: sum, sum of squares, number of rows."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    rows = jnp.full((*x.shape[:-2], x.shape[-1]), x.shape[-2], x.dtype)
    return jnp.stack([jnp.sum(x, -2), jnp.sum(x**2, -2), rows], axis=-2)


@functools.partial(jax.jit, static_argnums=0)
def _of_batch(apply_fn: Any, params: Any, inputs: Any) -> dict[str, jax.Array]:
    found, _ = gram.captured(apply_fn, params, inputs, _sums)
    return {path: g.matrix for path, g in found.items()}


def input_moments(
    apply_fn: Callable[..., Any], params: Any, batches: Iterable[Any]
) -> dict[str, Moments]:
    """Moments by the path of each dense layer's weight.

    Args:
      apply_fn, params, batches: as for `gram_matrices`.

    Raises:
      ValueError: no batches, one that is not in a list, or no dense layer.
    """
    check_list(batches)
    total: dict[str, jax.Array] = {}
    for batch in batches:
        new = _of_batch(apply_fn, params, batch)
        total = {p: x + total[p] if total else x for p, x in new.items()}
    if not total:
        raise ValueError("got no batches or no dense layer, expected some of both")
    out = {}
    for path, sums in total.items():
        first, second, rows = jnp.moveaxis(sums, -2, 0)
        mean = first / rows
        spread = jnp.maximum(second / rows - mean**2, 0)
        out[path] = Moments(mean, jnp.sum(spread, axis=-1))
    return out


def save_moments(path: str | os.PathLike[str], moments: Mapping[str, Moments]) -> None:
    """Writes a safetensors file, whole or not at all."""
    path = Path(path)
    flat = {
        f"{name}:{field}": np.ascontiguousarray(x, np.float32)
        for name, m in moments.items()
        for field, x in m._asdict().items()
    }
    partial = path.with_name(path.name + ".partial")
    save_file(flat, partial)
    os.replace(partial, path)


def load_moments(path: str | os.PathLike[str]) -> dict[str, Moments]:
    """What `save_moments` wrote.

    Raises:
      CheckpointError: not such a file.
    """
    flat = checkpoints.read_tensors(path)
    names = {name.rpartition(":")[0] for name in flat}
    wanted = {f"{name}:{field}" for name in names for field in Moments._fields}
    if not flat or set(flat) != wanted:
        raise CheckpointError(
            f"{path}: got tensors like {sorted(flat)[:3]}, expected NAME:mean and"
            " NAME:variance; make it with merging.save_moments"
        )
    return {
        name: Moments(*(flat[f"{name}:{field}"] for field in Moments._fields))
        for name in sorted(names)
    }

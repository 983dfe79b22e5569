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


def _measured(weights: jax.Array | None, x: jax.Array) -> jax.Array:
    """[..., rows, n] -> [..., 3, n]: weight, mean, weighted squares around the mean.

    Around the mean, for the difference of a mean of squares and a squared mean has few
    digits where the mean is large.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if weights is None:
        weights = jnp.ones(x.shape[-2])
    gram.check_weights(weights, x)
    weight = jnp.sum(weights).astype(x.dtype)
    weighted = functools.partial(
        jnp.einsum, "...rn,r->...n", precision="highest", preferred_element_type=x.dtype
    )
    mean = weighted(x, weights) / jnp.where(weight > 0, weight, 1)
    around = weighted((x - mean[..., None, :]) ** 2, weights)
    return jnp.stack([jnp.full(mean.shape, weight, x.dtype), mean, around], axis=-2)


def _total(measured: Any) -> Any:
    """Of parts, [k, ..., 3, n] -> [..., 3, n] (Chan et al. 1979); of NumPy or JAX."""
    xp = jnp if isinstance(measured, jax.Array) else np
    weight, mean, around = xp.moveaxis(measured, -2, 0)  # [k, ..., n] each
    whole = weight.sum(axis=0)
    center = (weight * mean).sum(axis=0) / xp.where(whole > 0, whole, 1)
    between = weight * (mean - center[None]) ** 2
    return xp.stack([whole, center, (around + between).sum(axis=0)], axis=-2)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _of_batch(
    apply_fn: Any, rows: gram.RowsFn | None, params: Any, inputs: Any
) -> dict[str, jax.Array]:
    weights = None if rows is None else rows(inputs).astype(jnp.float32)
    measure = functools.partial(_measured, weights)
    found, _ = gram.captured(apply_fn, params, inputs, measure, total=_total)
    return {path: g.matrix for path, g in found.items()}


def input_moments(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    rows: gram.RowsFn | None = None,
) -> dict[str, Moments]:
    """Moments by the path of each dense layer's weight, float32 NumPy arrays.

    Args:
      apply_fn, params, batches: as for `gram_matrices`.
      rows: as for `gram_matrices`: inputs -> the weight of each row, such as a mask's
        [B L] where 0 is padding. Without it padding counts as any token.

    Raises:
      ValueError: no batches, one that is not in a list, no dense layer, weights of
        another number of rows than a layer has, or no row of any weight.
    """
    check_list(batches)
    total: dict[str, np.ndarray] = {}
    for batch in batches:
        new = jax.device_get(_of_batch(apply_fn, rows, params, batch))
        new = {p: np.float64(x) for p, x in new.items()}
        total = {
            p: _total(np.stack([total[p], x])) if total else x for p, x in new.items()
        }
    if not total:
        raise ValueError("got no batches or no dense layer, expected some of both")
    return _finished(total)


def moments_of_rows(batches: Iterable[Mapping[str, Any]]) -> dict[str, Moments]:
    """Moments of arrays, such as activations of a model that is not in JAX.

        moments_of_rows([{"layers.0.mlp.up_proj.weight": x}, ...])  # x [B, L, n]

    Args:
      batches: of each the inputs [..., n] of dense layers, by the names of their
        weights. Each row counts once, so leave padding out: x[mask].

    Returns:
      As `input_moments`, float32 NumPy arrays.

    Raises:
      ValueError: no batches, one that is not in a list, an array without rows in all
        batches, of another width than before, or of values that are not finite.
    """
    check_list(batches)
    total: dict[str, np.ndarray] = {}
    for batch in batches:
        for name, x in batch.items():
            x = np.asarray(x, np.float64)
            if x.ndim == 0 or not np.isfinite(x).all():
                raise ValueError(
                    f"{name}: got {x.shape}, expected finite inputs [..., n]"
                )
            x = x.reshape(-1, x.shape[-1])
            new = np.zeros((3, x.shape[1]))
            if len(x):
                mean = x.mean(axis=0)
                new = np.stack(
                    [np.full(len(mean), len(x)), mean, ((x - mean[None]) ** 2).sum(0)]
                )
            old = total.get(name, np.zeros_like(new))
            if old.shape != new.shape:
                raise ValueError(
                    f"{name}: got inputs {x.shape[1]} wide after some {old.shape[1]}"
                    " wide, expected one width"
                )
            total[name] = _total(np.stack([old, new]))
    if not total:
        raise ValueError("got no batches or no arrays, expected some of both")
    return _finished(total)


def _finished(total: Mapping[str, np.ndarray]) -> dict[str, Moments]:
    """Weight, mean and squares around it of all rows, [..., 3, n] by path."""
    out = {}
    for path, x in total.items():
        weight, mean, around = np.moveaxis(x, -2, 0)
        if not (weight > 0).all():
            raise ValueError(f"{path}: got no rows, or weights that are all 0")
        spread = np.float32((around / weight).sum(axis=-1))
        out[path] = Moments(np.float32(mean), spread)
    return out


def save_moments(path: str | os.PathLike[str], moments: Mapping[str, Moments]) -> None:
    """Writes a safetensors file, whole or not at all."""
    path = Path(path)
    flat = {
        f"{name}:{field}": np.asarray(x, np.float32, order="C")
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

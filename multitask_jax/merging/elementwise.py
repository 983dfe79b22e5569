"""Merging entry by entry: Nearswap, RAM.

Legend: tau_t task vector of model t, p an entry.
"""

from typing import Any

import jax.numpy as jnp

from multitask_jax.merging.core import (
    Array,
    Leaf,
    Measure,
    Transform,
    Values,
    add_up,
    times,
)
from multitask_jax.merging.statistics import BITS


def limit_step(*, t: Any = 0.001) -> Transform:
    """Nearswap: w tau with w = clip(t / |tau|, 0, 1), so no entry moves more than t."""

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        out = []
        for tau in values:
            size = jnp.maximum(jnp.abs(tau), jnp.asarray(1e-6, tau.dtype))
            out.append(times(jnp.clip(jnp.asarray(t, tau.dtype) / size, 0, 1), tau))
        return tuple(out)

    return Transform(apply)


def mean_of_active(
    *, epsilon: float = 1e-5, r: Any = 0.0, alpha: float = 0.2
) -> Transform:
    """RAM: averages where several models changed, keeps what only one changed.

    An entry is active in a model where |tau_t| > epsilon. Unique entries are scaled by
    1 + r clip(shared_t / unique_t, 0, alpha) (RAM+), with the counts of model t's
    active entries that others share, and do not, in the tensor. r = 0 is RAM.

    Raises:
      ValueError: epsilon or alpha is negative.
    """
    if epsilon < 0 or alpha < 0:
        raise ValueError(
            f"got epsilon {epsilon}, alpha {alpha}; expected neither to be negative"
        )

    def active(values: Values) -> tuple[list[Array], Array]:
        masks = [jnp.abs(v) > jnp.asarray(epsilon, v.dtype) for v in values]
        return masks, add_up([m.astype(jnp.int32) for m in masks])

    def shared_and_unique(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        masks, count = active(values)
        return tuple(m & (count > 1) for m in masks) + tuple(
            m & (count == 1) for m in masks
        )

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        masks, count = active(values)
        scaled = values
        if stats:
            numbers = [high * float(1 << BITS) + low for high, low in stats[0]]
            shared, unique = numbers[: len(values)], numbers[len(values) :]
            scaled = tuple(
                times(1 + times(r, jnp.clip(s / jnp.maximum(u, 1), 0, alpha)), v)
                for s, u, v in zip(shared, unique, values, strict=True)
            )
        unique_sum = add_up(
            [jnp.where(m, v, 0) for m, v in zip(masks, scaled, strict=True)]
        )
        mean = add_up([jnp.where(m, v, 0) for m, v in zip(masks, values, strict=True)])
        mean = mean / jnp.maximum(count, 1).astype(mean.dtype)
        return (jnp.where(count > 1, mean, unique_sum).astype(mean.dtype),)

    plain = isinstance(r, (int, float)) and r == 0
    measures = () if plain else (Measure("count", "tensor", shared_and_unique),)
    return Transform(apply, measures)

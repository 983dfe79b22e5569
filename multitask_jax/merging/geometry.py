"""Merging by angles: SLERP on parameters, Model Stock on task vectors."""

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp

from multitask_jax.merging.arguments import check_choice
from multitask_jax.merging.core import (
    Array,
    Leaf,
    Measure,
    Transform,
    Values,
    add_up,
    times,
)

Antiparallel = Literal["nearest", "lerp"]


def gram_terms(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
    """Terms of <v_i, v_j>, i <= j, in the order of combinations_with_replacement."""
    return tuple(a * b for a, b in itertools.combinations_with_replacement(values, 2))


def _cosines(gram: dict[tuple[int, int], Array], count: int) -> list[Array]:
    """Pairwise cosines; 0 where a vector is zero."""
    out = []
    for i, j in itertools.combinations(range(count), 2):
        square = gram[i, i] * gram[j, j]
        some = square > 0
        # The inner `where` keeps gradients finite where a vector is zero.
        cos = gram[i, j] / jnp.sqrt(jnp.where(some, square, 1))
        out.append(jnp.clip(jnp.where(some, cos, 0), -1, 1))
    return out


def norm_of(square: Array) -> Array:
    """sqrt, with gradient 0 at 0."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def by_pair(stats: Any, count: int) -> dict[tuple[int, int], Array]:
    """Statistics of `gram_terms`, by (i, j)."""
    pairs = itertools.combinations_with_replacement(range(count), 2)
    return dict(zip(pairs, stats, strict=True))


def slerp_factors(
    gram: Sequence[Array],
    time: Array,
    parallel_cosine: float,
    antiparallel: Antiparallel,
) -> tuple[Array, Array]:
    """What v_0 and v_1 are multiplied by, from <v_0, v_0>, <v_0, v_1>, <v_1, v_1>."""
    n00, n01, n11 = gram
    n0, n1 = norm_of(n00), norm_of(n11)
    # A (near) zero vector has no direction; it counts as it is.
    unit0, unit1 = jnp.where(n0 > 1e-8, n0, 1), jnp.where(n1 > 1e-8, n1, 1)
    cos = jnp.clip(n01 / (unit0 * unit1), -1, 1)
    linear = jnp.abs(cos) > parallel_cosine
    angle = jnp.arccos(jnp.where(linear, 0, cos))
    a = jnp.where(linear, 1 - time, jnp.sin((1 - time) * angle) / jnp.sin(angle))
    b = jnp.where(linear, time, jnp.sin(time * angle) / jnp.sin(angle))
    if antiparallel == "nearest":
        opposite = cos < -parallel_cosine
        norm = (1 - time) * n0 + time * n1
        a = jnp.where(opposite, jnp.where(time <= 0.5, norm / unit0, 0), a)
        b = jnp.where(opposite, jnp.where(time <= 0.5, 0, norm / unit1), b)
    return a, b


def interpolate_spherically(
    *,
    t: Any = 0.5,
    parallel_cosine: float = 0.9995,
    antiparallel: Antiparallel = "nearest",
) -> Transform:
    """SLERP of two tensors: sin((1 - t) a) / sin a v_0 + sin(t a) / sin a v_1.

    a is the angle of the flat tensors. Near-parallel ones are interpolated linearly.
    Antiparallel ones have no shortest arc: "nearest" keeps the direction of the nearer
    end with the interpolated norm (a linear path would pass through zeros), "lerp" is
    what mergekit does. `t=None` takes it from the weights: w_1 / (w_0 + w_1).
    """
    check_choice("antiparallel", antiparallel, ("nearest", "lerp"))

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        v0, v1 = values
        w0, w1 = leaf.weights
        time = jnp.asarray(w1 / (w0 + w1) if t is None else t, stats[0][0].dtype)
        a, b = slerp_factors(stats[0], time, parallel_cosine, antiparallel)
        return (times(a.astype(v0.dtype), v0) + times(b.astype(v1.dtype), v1),)

    return Transform(apply, (Measure("sum", "tensor", gram_terms),))


def stock(
    *,
    filter_wise: bool = False,
    average: Literal["cosines", "angles"] = "cosines",
    ratio: Literal["clipped", "formula"] = "clipped",
) -> Transform:
    """Model Stock: t mean(tau), t = N c / (1 + (N - 1) c), c = mean pairwise cosine.

    Args:
      filter_wise: an angle for each row (last axis) instead of one for the tensor.
      average: c is the mean of "cosines", or the cosine of the mean of "angles"
        (FusionBench); the same for two models.
      ratio: "clipped" keeps t in [0, 1], as the theory has it; the "formula" alone
        (mergekit) leaves that where models pull apart, and without bound in tensors of
        one entry.

    Raises:
      ValueError: unknown average or ratio; fewer than two models (one has no angle).
    """
    check_choice("average", average, ("cosines", "angles"))
    check_choice("ratio", ratio, ("clipped", "formula"))

    def shrink(gram: dict[tuple[int, int], Array], count: int) -> Array:
        if count < 2:
            raise ValueError(f"model_stock needs at least 2 models, got {count}")
        cosines = _cosines(gram, count)
        if average == "angles":
            c = jnp.cos(add_up([jnp.arccos(x) for x in cosines]) / len(cosines))
        else:
            c = add_up(cosines) / len(cosines)
        divisor = 1 + (count - 1) * c
        t = count * c / jnp.where(jnp.abs(divisor) < 1e-6, 1e-6, divisor)
        # A divisor of 0 or less has c < 0 as well: t is 0 then.
        clipped = jnp.where(divisor > 1e-6, jnp.clip(t, 0, 1), 0)
        return clipped if ratio == "clipped" else t

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        count = len(values)
        if filter_wise:
            terms = gram_terms(values, leaf, ())
            sums = [jnp.sum(x, axis=-1, keepdims=True) if x.ndim else x for x in terms]
            gram = by_pair(sums, count)
        else:
            gram = by_pair(stats[0], count)
        mean = times(1 / count, add_up(values))
        return (times(shrink(gram, count).astype(mean.dtype), mean),)

    if filter_wise:
        return Transform(apply, needs="row")
    return Transform(apply, (Measure("sum", "tensor", gram_terms),))

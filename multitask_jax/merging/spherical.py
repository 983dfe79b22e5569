"""Means on the sphere: NuSLERP of two models, multi-SLERP and Karcher of many.

Every point on the way lies in the span of the models, so all angles follow from the
inner products <v_i, v_j>: one pass over a tensor, then a weighted sum of the models.

Legend: u_t = v_t / |v_t|, w_t weights, m a unit vector given by its coefficients c:
m = sum c_t u_t.
"""

from typing import Any

import jax
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
from multitask_jax.merging.geometry import (
    Antiparallel,
    by_pair,
    gram_terms,
    norm_of,
    slerp_factors,
)

# 1 - cos below which float32 tells no angle: parallel or antiparallel.
_TINY = 1e-6


def interpolate_by_weights(
    *,
    flatten: bool = True,
    row_wise: bool = False,
    antiparallel: Antiparallel = "nearest",
) -> Transform:
    """NuSLERP: SLERP of two models with t = w_1 / (w_0 + w_1).

    Args:
      flatten: of the whole tensor as a vector; otherwise of each vector along the last
        axis, or, with `row_wise` (mergekit's name), along the first.
      row_wise: see `flatten`.
      antiparallel: see `interpolate_spherically`.
    """
    check_choice("antiparallel", antiparallel, ("nearest", "lerp"))
    if flatten and row_wise:
        raise ValueError("row_wise is about single vectors: pass flatten=False too")

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        v0, v1 = values
        w0, w1 = leaf.weights
        total = w0 + w1
        time = w1 / jnp.where(jnp.abs(total) < 1e-8, 1, total)
        gram = stats[0] if flatten else gram_terms(values, leaf, ())
        if not flatten and v0.ndim:
            axis = 0 if row_wise else -1
            gram = tuple(jnp.sum(x, axis=axis, keepdims=True) for x in gram)
        a, b = slerp_factors(gram, time, 1 - _TINY, antiparallel)
        return (times(a.astype(v0.dtype), v0) + times(b.astype(v1.dtype), v1),)

    if flatten:
        return Transform(apply, (Measure("sum", "tensor", gram_terms),))
    return Transform(apply, needs="tensor" if row_wise else "row")


def spherical_mean(
    *,
    iterations: int = 0,
    tol: float = 1e-5,
    normalise: bool = True,
    antiparallel: Antiparallel = "nearest",
) -> Transform:
    """The mean direction of the models, times their weighted mean norm.

    m starts as the normalised sum w_t u_t. A step goes to exp_m(sum w_t log_m u_t); the
    steps converge to the Karcher (Riemannian) mean. Multi-SLERP takes none: it steps by
    projections u_t - <u_t, m> m instead of logarithms, and their sum is 0.

    Args:
      iterations: steps at most.
      tol: a shorter step is the last.
      normalise: divide the weights by their sum (unless that is 0).
      antiparallel: where the sum w_t u_t vanishes, m starts as the model of largest
        weight ("nearest"), or an opposite pair is summed linearly ("lerp", mergekit).
    """
    check_choice("antiparallel", antiparallel, ("nearest", "lerp"))

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        count = len(values)
        entries = by_pair(stats[0], count)
        gram = jnp.stack(
            [
                jnp.stack([entries[min(i, j), max(i, j)] for j in range(count)])
                for i in range(count)
            ]
        )
        weights = jnp.stack(leaf.weights).astype(gram.dtype)
        weights = _normalised(weights) if normalise else weights
        norms = norm_of(jnp.diagonal(gram))
        some = norms > 1e-8
        inverse = jnp.where(some, 1 / jnp.where(some, norms, 1), 0)
        cosines = jnp.clip(gram * inverse[:, None] * inverse[None, :], -1, 1)
        directed = jnp.where(some, weights, 0)  # zero tensors have no direction
        directed = _normalised(directed) if normalise else directed
        c = _mean_direction(cosines, directed, iterations, tol)
        factors = c * inverse * jnp.sum(weights * norms)
        if antiparallel == "lerp" and count == 2:
            factors = jnp.where(cosines[0, 1] < -1 + _TINY, weights, factors)
        factors = factors.astype(values[0].dtype)
        return (add_up([times(factors[t], v) for t, v in enumerate(values)]),)

    return Transform(apply, (Measure("sum", "tensor", gram_terms),))


def _normalised(weights: Array) -> Array:
    total = jnp.sum(weights)
    return weights / jnp.where(jnp.abs(total) < 1e-8, 1, total)


def _mean_direction(
    cosines: Array, weights: Array, iterations: int, tol: float
) -> Array:
    """Coefficients (T,) of the mean direction; weights of zero vectors are 0."""

    def dot(a: Array, b: Array) -> Array:
        return jnp.sum(a * jnp.sum(cosines * b[None, :], axis=1))

    def unit(c: Array) -> Array:
        norm = norm_of(dot(c, c))
        return c / jnp.where(norm > 0, norm, 1)

    total = jnp.sum(jnp.abs(weights))
    cancelled = dot(weights, weights) <= _TINY * total**2
    heaviest = jax.nn.one_hot(jnp.argmax(weights), len(weights), dtype=weights.dtype)
    start = jnp.where(cancelled, jnp.where(total > 0, heaviest, 0), unit(weights))

    def step(_: Any, c: Array) -> Array:
        cos = jnp.clip(jnp.sum(cosines * c[None, :], axis=1), -1, 1)
        tangled = jnp.abs(cos) > 1 - _TINY
        angle = jnp.arccos(jnp.where(tangled, 0, cos))
        # log_m u = angle / sin angle (u - cos m); none is shortest to an antipode.
        stretch = jnp.where(tangled, jnp.where(cos > 0, 1, 0), angle / jnp.sin(angle))
        a = weights * stretch
        tangent = a - jnp.sum(a * cos) * c
        length = norm_of(dot(tangent, tangent))
        # exp_m x = cos |x| m + sin |x| / |x| x
        sinc = jnp.where(
            length > 0, jnp.sin(length) / jnp.where(length > 0, length, 1), 1
        )
        moved = unit(jnp.cos(length) * c + sinc * tangent)
        return jnp.where(length < tol, c, moved)

    return jax.lax.fori_loop(0, iterations, step, start)

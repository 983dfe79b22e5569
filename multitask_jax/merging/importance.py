"""Which entries matter: SCE (variance), PCB (competition), Arcee Fusion (divergence).

Legend: tau_t task vector of model t, d values of the whole model, n of a tensor.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from multitask_jax.merging.arguments import check_share
from multitask_jax.merging.core import (
    Array,
    Leaf,
    Measure,
    Transform,
    Values,
    add_up,
    times,
    unchanged,
)
from multitask_jax.merging.statistics import part_of


def _variance(values: Values) -> Array:
    mean = times(1 / len(values), add_up(values))
    return add_up([times(v - mean, v - mean) for v in values])


def keep_varying(*, topk: float = 1.0, at_least: Literal[0, 1] = 1) -> Transform:
    """SCE, select: keeps the entries that differ most between models.

    Per tensor, of the entries whose variance over models is not 0, the share `topk`
    with the largest.

    Args:
      topk: share that is kept.
      at_least: entries to keep where the share is less than one: of a small tensor, 0
        keeps none (mergekit).

    Raises:
      ValueError: topk outside (0, 1].
    """
    check_share("topk", topk)
    if topk == 1:
        return Transform(lambda values, leaf, stats: values)

    def varies(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        return (_variance(values) > 0,)

    def variances(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        return (_variance(values),)

    def rank(n: int, terms: int, earlier: tuple[Any, ...]) -> list[Any]:
        high, low = part_of(earlier[0][0], topk)
        return [(high, jnp.where((high == 0) & (low == 0), 1, low))]

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        variance = _variance(values)
        kept = (variance > 0) & (variance.astype(jnp.float32) >= stats[1][0])
        if not at_least:
            high, low = part_of(stats[0][0], topk)
            kept &= (high > 0) | (low > 0)
        return tuple(jnp.where(kept, v, 0) for v in values)

    return Transform(
        apply,
        (
            Measure("count", "tensor", varies),
            Measure("kth", "tensor", variances, rank),
        ),
        trims=True,
    )


def energy_mean() -> Transform:
    """SCE, calculate and erase: a mean weighted by what each model changed.

    w_t = mean tau_t^2 per tensor, made to sum to 1 (equal where all are tiny). Entries
    against the sign of sum_t tau_t (0 counts as +) are erased, and their weights with
    them.
    """

    def squares(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        return tuple(v * v for v in values)

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        energies = [s / leaf.size for s in stats[0]]
        total = add_up(energies)
        tiny = total < 1e-6
        weights = [
            jnp.where(tiny, 1 / len(values), e / jnp.where(tiny, 1, total))
            for e in energies
        ]
        sign = jnp.where(add_up(values) >= 0, 1.0, -1.0)
        agree = [v * sign.astype(v.dtype) > 0 for v in values]
        dtype = values[0].dtype
        terms = [
            jnp.where(a, times(w.astype(dtype), v), 0)
            for a, w, v in zip(agree, weights, values, strict=True)
        ]
        divisor = add_up(
            [
                jnp.where(a, w.astype(dtype), 0)
                for a, w in zip(agree, weights, strict=True)
            ]
        )
        return (add_up(terms) / jnp.maximum(divisor, jnp.asarray(1e-6, dtype)),)

    return Transform(apply, (Measure("sum", "tensor", squares),))


def balance_competition(
    *, density: float = 0.1, clamp_ratio: float = 1e-4
) -> Transform:
    """PCB-Merging: balances parameters within and between tasks, keeps the top.

    a_t = |tau_t| clipped to its own quantiles clamp_ratio and 1 - clamp_ratio;
    s_t = exp(T norm(a_t)^2) tanh(tau_t sum_i tau_i), norm to [0, 1] over the model;
    scale_t = s_t cut off below its top `density`, to [0, 1]. The merged task vector is
    sum_t scale_t sgn(tau_t) a_t / sum_t scale_t.

    Args:
      density: share of each model's entries that counts (the paper's ratio).
      clamp_ratio: share of tails that are clipped at either end.
    """
    check_share("density", density)
    if not 0 <= clamp_ratio < 0.5:
        raise ValueError(f"clamp_ratio: got {clamp_ratio}, expected [0, .5)")

    def tails(d: int, count: int, earlier: tuple[Any, ...]) -> list[int]:
        low = d - int(d * clamp_ratio)
        high = d - max(0, int(d * (1 - clamp_ratio) - 1))
        return [*[low] * count, *[high] * count]

    def clipped(values: Values, tails: Values) -> list[Array]:
        count = len(values)
        return [
            jnp.clip(jnp.abs(v), tails[t], jnp.maximum(tails[t], tails[count + t]))
            for t, v in enumerate(values)
        ]

    def scores(values: Values, tails: Values) -> list[Array]:
        count = len(values)
        together = add_up(values)
        out = []
        for t, (v, a) in enumerate(zip(values, clipped(values, tails), strict=True)):
            low, width = tails[t], tails[count + t] - tails[t]
            norm = (a - low) / jnp.where(width > 0, width, 1)
            within = jnp.exp(times(float(count), norm * norm))
            out.append(times(within, jnp.tanh(times(v, together))))
        return out

    # The rank of signed numbers, by ranks of what is above and what is below zero.
    def signed(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        s = scores(values, stats[0])
        return (*[jnp.maximum(x, 0) for x in s], *[jnp.maximum(-x, 0) for x in s])

    def cut(d: int, terms: int, earlier: tuple[Any, ...]) -> list[int]:
        k = d - min(d - 1, int(d * (1 - density)))
        half = terms // 2
        return [*[k] * half, *[d - k + 1] * half, *[1] * half, *[d] * half]

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        count = len(values)
        k = stats[1]
        scales, terms = [], []
        for t, (v, a, s) in enumerate(
            zip(
                values,
                clipped(values, stats[0]),
                scores(values, stats[0]),
                strict=True,
            )
        ):
            low = k[t] - k[count + t]
            width = k[2 * count + t] - k[3 * count + t] - low
            scale = jnp.maximum(s - low, 0) / jnp.where(width > 0, width, 1)
            scales.append(scale)
            terms.append(times(scale, jnp.sign(v) * a))
        return (add_up(terms) / jnp.maximum(add_up(scales), 1e-12),)

    return Transform(
        apply,
        (
            Measure("kth", "model", unchanged, tails),
            Measure("kth", "model", signed, cut),
        ),
    )


def keep_diverging(*, iqr_factor: float = 1.5) -> Transform:
    """Arcee Fusion: takes the changes of unusual importance, the base elsewhere.

    importance = |tau| KL(softmax(theta) || softmax(theta_0)) of the row (last axis);
    kept from the median + iqr_factor (q_75 - q_25) of the tensor on, with quantiles
    q = sorted[floor(q (n - 1))].
    """

    def importance(tau: Array, base: Array) -> Array:
        if not tau.ndim:  # the softmax of one number is 1 in either model
            return jnp.zeros_like(tau)
        p = jax.nn.softmax(base + tau, axis=-1) + 1e-8
        q = jax.nn.softmax(base, axis=-1) + 1e-8
        kl = jnp.sum(p * jnp.log(p / q), axis=-1, keepdims=True)
        return jnp.abs(tau) * jnp.maximum(kl, 0)

    def terms(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        return tuple(importance(v, leaf.base) for v in values)

    def quartiles(n: int, count: int, earlier: tuple[Any, ...]) -> list[int]:
        return [
            n - math.floor(q * (n - 1)) for q in (0.25, 0.5, 0.75) for _ in range(count)
        ]

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        count = len(values)
        out = []
        for t, tau in enumerate(values):
            q25, q50, q75 = stats[0][t], stats[0][count + t], stats[0][2 * count + t]
            threshold = q50 + times(iqr_factor, q75 - q25)
            out.append(jnp.where(importance(tau, leaf.base) >= threshold, tau, 0))
        return tuple(out)

    return Transform(
        apply,
        (Measure("kth", "tensor", terms, quartiles),),
        needs="row",
        trims=True,
    )

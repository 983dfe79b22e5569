"""Task-vector transformations. Each is one equation of one paper.

tau_t is the task vector of model t, w_t its weight, tau^ what is left after trimming.
Sums over models are unrolled from left to right, so that a chunk, a shard and a whole
tensor give the same bits.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp

from multitask_jax.merging.arguments import (
    Shares,
    at_leaf,
    check_choice,
    per_model,
    shares,
)
from multitask_jax.merging.core import (
    Array,
    Leaf,
    Measure,
    Scope,
    Transform,
    Values,
    add_up,
    times,
    unchanged,
)
from multitask_jax.merging.random import path_seed, uniform
from multitask_jax.merging.statistics import at_least

Election = Literal["mass", "weighted_mass", "frequency"]
ZeroSign = Literal["majority", "positive", "negative", "zero"]
Combine = Literal["mean", "sum", "max"]
Normalise = Literal["weights", "count"]


def l1_measure(kept: Any) -> Measure:
    """Per tensor: sum |tau_t| and sum |kept_t|, for rescaling to the old L1 norm."""
    return Measure(
        "sum",
        "tensor",
        lambda v, leaf, stats: tuple(
            jnp.abs(x) for x in (*v, *kept(v, leaf, stats[:1]))
        ),
    )


def rescale_l1(kept: Values, sums: Sequence[Array]) -> Values:
    """Scales kept entries to the L1 norm before (unchanged where all were zero)."""
    count = len(kept)
    return tuple(
        times(jnp.where(after > 0, before / jnp.where(after > 0, after, 1), 1), x)
        for x, before, after in zip(kept, sums[:count], sums[count:], strict=True)
    )


def trim(
    *,
    density: Shares = 0.2,
    scope: Scope = "model",
    rescale: Literal["none", "l1"] = "none",
) -> Transform:
    """Keeps the largest |tau_t|, zeroes the rest (TIES, step 1).

    scope="model" (the paper): over all d values as one vector, |tau| >= the k-th
    smallest with k = d - int(density d), so int(density d) + 1 values and all that
    equal the last. scope="tensor" (mergekit, PEFT): int(density n) values of each
    tensor, at least one; values that equal the last are all kept.

    Args:
      density: share that is kept, one for all or one per model.
      scope: over the whole model or per tensor.
      rescale: "l1" scales what is kept to the L1 norm before, per tensor (mergekit).

    Raises:
      ValueError: density outside (0, 1], unknown scope or rescale.
    """
    check_choice("trim scope", scope, ("model", "tensor"))
    check_choice("rescale", rescale, ("none", "l1"))

    def rank(density: float) -> Any:
        if scope == "model":
            return lambda d: min(d, int(d * density) + 1)
        return lambda n: min(n, max(1, int(n * density)))

    def kept(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        return tuple(
            jnp.where(jnp.abs(tau.astype(jnp.float32)) >= threshold, tau, 0)
            for tau, threshold in zip(values, stats[0], strict=True)
        )

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        out = kept(values, leaf, stats)
        return rescale_l1(out, stats[1]) if rescale == "l1" else out

    threshold = Measure(
        "kth",
        scope,
        unchanged,
        tuple(rank(d) for d in shares("density", density)),
    )
    measures = (threshold, l1_measure(kept)) if rescale == "l1" else (threshold,)
    return Transform(apply, measures, trims=True)


def drop(
    *,
    density: Shares | Mapping[str, Shares] = 0.5,
    rescale: Literal["density", "l1", "none"] = "density",
    seed: int = 0,
) -> Transform:
    """Keeps each entry with probability `density` (DARE).

    Args:
      density: probability to keep, one for all or one per model; or such by leaf path.
      rescale: "density" divides by it (the paper), "l1" scales to the L1 norm before
        (mergekit), "none" leaves as is.
      seed: same seed, same mask, whatever the sharding or the order of tensors.

    Raises:
      ValueError: density outside (0, 1], unknown rescale.
    """
    check_choice("rescale", rescale, ("density", "l1", "none"))

    def setting(path: str) -> Any:
        keep = shares("density", at_leaf("density", density, path))
        return path_seed(path, seed), keep, tuple(1 / p for p in keep)

    for path in density if isinstance(density, Mapping) else ("",):
        setting(path)  # refuses now rather than when merging

    def masked(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        salt, densities, _ = leaf.setting
        keep = per_model(densities, len(values), "density")
        return tuple(
            jnp.where(
                uniform(tau.shape, seed=salt, model=t, offset=leaf.offset)
                < jnp.asarray(keep[t], jnp.float32),
                tau,
                0,
            )
            for t, tau in enumerate(values)
        )

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        out = masked(values, leaf, stats)
        if rescale == "density":
            inverse = per_model(leaf.setting[2], len(values), "density")
            return tuple(
                times(jnp.asarray(p, x.dtype), x)
                for x, p in zip(out, inverse, strict=True)
            )
        return rescale_l1(out, stats[0]) if rescale == "l1" else out

    return Transform(
        apply,
        measures=(l1_measure(masked),) if rescale == "l1" else (),
        settings=lambda paths: {p: setting(p) for p in paths},
    )


def elect_sign(
    *, election: Election = "mass", zero_sign: ZeroSign = "majority"
) -> Transform:
    """Zeroes the entries whose sign was not elected (TIES, step 2).

    gamma = sgn(sum_t e_t), with e_t = tau^_t ("mass", the paper and PEFT's "total"),
    w_t tau^_t ("weighted_mass", mergekit) or sgn(tau^_t) ("frequency", PEFT).

    Args:
      election: what votes.
      zero_sign: gamma where the sum is 0: "majority" of all elected signs of the whole
        model (the paper), "positive" (mergekit, PEFT), "negative", or "zero" (no
        entry is kept).

    Raises:
      ValueError: unknown election or zero_sign.
    """
    check_choice("election", election, ("mass", "weighted_mass", "frequency"))
    check_choice("zero_sign", zero_sign, ("majority", "positive", "negative", "zero"))

    def votes(values: Values, leaf: Leaf) -> Values:
        if election == "weighted_mass":
            return _weigh(values, leaf)
        return values

    def sums(e: Values) -> Array:
        return add_up([jnp.sign(v) for v in e] if election == "frequency" else e)

    def elected(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        s = sums(votes(values, leaf))
        return (s > 0, s < 0)

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        e = votes(values, leaf)
        gamma = jnp.sign(sums(e))
        if zero_sign == "majority":
            positive, negative = stats[0]
            # In an exact draw of the whole model there is no sign: 1 - 1 = 0.
            other = at_least(positive, negative).astype(jnp.float32) - at_least(
                negative, positive
            ).astype(jnp.float32)
        else:
            other = {"positive": 1.0, "negative": -1.0, "zero": 0.0}[zero_sign]
        gamma = jnp.where(gamma == 0, jnp.asarray(other, gamma.dtype), gamma)
        return tuple(
            jnp.where(jnp.sign(v) * gamma > 0, tau, 0)
            for v, tau in zip(e, values, strict=True)
        )

    majority = Measure("count", "model", elected)
    return Transform(apply, (majority,) if zero_sign == "majority" else ())


def disjoint_mean(*, normalise: Normalise = "weights") -> Transform:
    """Mean over the models that are not zero at an entry (TIES, step 3).

    sum_t w_t tau^_t / sum_t w_t [tau^_t != 0], 0 where no model is left; "count"
    divides by the number of such models instead (PEFT).
    """
    check_choice("normalise", normalise, ("weights", "count"))

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        present = [v != 0 for v in values]
        weights = leaf.weights if normalise == "weights" else (1.0,) * len(values)
        divisor = add_up(
            [jnp.where(p, w, 0.0) for p, w in zip(present, weights, strict=True)]
        )
        divisor = jnp.where(divisor == 0, 1, divisor)
        return (add_up(_weigh(values, leaf)) / divisor.astype(values[0].dtype),)

    return Transform(apply)


def _weigh(values: Values, leaf: Leaf) -> Values:
    return tuple(times(w, v) for w, v in zip(leaf.weights, values, strict=True))


def weighted_sum(*, normalise: bool = False) -> Transform:
    """sum_t w_t tau_t, divided by sum_t w_t if `normalise` (guarding a zero sum)."""

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        out = add_up(_weigh(values, leaf))
        if not normalise:
            return (out,)
        divisor = add_up(leaf.weights)
        small = jnp.abs(jnp.asarray(divisor)) < 1e-8
        return (times(1 / jnp.where(small, 1, divisor).astype(out.dtype), out),)

    return Transform(apply)


def max_magnitude(*, tie: Literal["first", "last"] = "first") -> Transform:
    """The entry w_t tau_t of largest magnitude; the first or last model wins a tie."""
    check_choice("tie", tie, ("first", "last"))

    def larger(a: Array, b: Array) -> Array:
        wins = jnp.abs(b) >= jnp.abs(a) if tie == "last" else jnp.abs(b) > jnp.abs(a)
        return jnp.where(wins, b, a)

    return Transform(
        lambda values, leaf, stats: (functools.reduce(larger, _weigh(values, leaf)),)
    )


def combine_agreeing(combine: Combine, normalise: Normalise) -> Transform:
    """What follows an election of signs: the mean, sum or largest of what is left."""
    check_choice("combine", combine, ("mean", "sum", "max"))
    if combine == "mean":
        return disjoint_mean(normalise=normalise)
    return weighted_sum() if combine == "sum" else max_magnitude()


def scale(factor: Any) -> Transform:
    """lambda tau; the factor may be traced (vmap a sweep, take a gradient)."""
    return Transform(
        lambda values, leaf, stats: tuple(
            times(jnp.asarray(factor, v.dtype), v) for v in values
        ),
        scales=True,
    )

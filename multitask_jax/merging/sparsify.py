"""Sparse task vectors beyond trimming: Breadcrumbs (no outliers) and DELLA (by rank).

Legend: tau_t task vector of model t, n entries of a tensor, or of a row.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from multitask_jax.merging.arguments import (
    Shares,
    at_leaf,
    check_choice,
    numbers,
    per_model,
    shares,
)
from multitask_jax.merging.core import (
    Array,
    Leaf,
    Measure,
    Transform,
    Values,
    times,
    unchanged,
)
from multitask_jax.merging.random import path_seed, uniform
from multitask_jax.merging.statistics import magnitude_bits
from multitask_jax.merging.transforms import l1_measure, rescale_l1


def drop_extremes(
    *,
    density: Shares = 0.9,
    gamma: Shares = 0.01,
    rescale: Literal["none", "l1"] = "none",
    at_least: Literal[0, 1] = 1,
) -> Transform:
    """Drops the largest and the smallest |tau_t| of each tensor (Model Breadcrumbs).

    The int(gamma n) largest go, the next int(density n), `at_least` one, stay. If that
    is more than n, fewer large ones go (mergekit). Values that equal the first or the
    last to stay, stay too: a tensor of equal magnitudes is kept whole.

    Args:
      density: share that is kept, one for all or one per model.
      gamma: share of outliers that is dropped, one for all or one per model.
      rescale: "l1" scales what is kept to the L1 norm before, per tensor (mergekit).
      at_least: 0 keeps nothing of a tensor where int(density n) is 0 (mergekit).

    Raises:
      ValueError: density outside (0, 1], gamma outside [0, 1), unknown rescale.
    """
    check_choice("rescale", rescale, ("none", "l1"))
    check_choice("at_least", at_least, (0, 1))
    densities = shares("density", density)
    gammas = numbers(gamma)
    for g in gammas:
        if not 0 <= g < 1:
            raise ValueError(f"gamma: got {g}, expected a number in [0, 1)")

    def ranks(n: int, count: int, earlier: tuple[Any, ...]) -> list[int]:
        first, last = [], []
        pairs = zip(
            per_model(densities, count, "density"),
            per_model(gammas, count, "gamma"),
            strict=True,
        )
        for share, outliers in pairs:
            stay = min(n, max(1, int(share * n)))
            dropped = min(int(outliers * n), n - stay)
            first.append(dropped + 1)
            last.append(dropped + stay)
        return [*first, *last]

    def kept(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        thresholds = stats[0]
        out = []
        for t, tau in enumerate(values):
            size = jnp.abs(tau.astype(jnp.float32))
            high, low = thresholds[t], thresholds[len(values) + t]
            stays = (size <= high) & (size >= low)
            if not at_least:
                stays &= (
                    per_model(densities, len(values), "density")[t] * leaf.size >= 1
                )
            out.append(jnp.where(stays, tau, 0))
        return tuple(out)

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        out = kept(values, leaf, stats)
        return rescale_l1(out, stats[1]) if rescale == "l1" else out

    thresholds = Measure("kth", "tensor", unchanged, ranks)
    measures = (thresholds, l1_measure(kept)) if rescale == "l1" else (thresholds,)
    return Transform(apply, measures, trims=True)


def keep_probabilities(tau: Array, density: float, epsilon: float) -> Array:
    """density - eps + 2 eps rank / (n - 1): large entries of a row are kept more often.

    Ranks go from 0 for the smallest of a row to n - 1; of equals, the first is lower.
    A vector is one row, a row of one entry has the probability `density`.
    """
    return _probabilities(tau, (density, density - epsilon, 2 * epsilon))


def _probabilities(
    tau: Array, line: tuple[Any, Any, Any], ranks: Array | None = None
) -> Array:
    """`keep_probabilities` by the middle, the start and the rise of the line."""
    middle, start, rise = (jnp.asarray(x, jnp.float32) for x in line)
    n = tau.shape[-1] if tau.ndim else 1
    if n == 1:
        return jnp.full(tau.shape, middle)
    if ranks is None:
        ranks = _ranks(jax.lax.stop_gradient(tau).reshape(-1, n)).reshape(tau.shape)
    # Looked up, not computed: no two programs may round a probability differently.
    table = start + times(rise, jnp.asarray(np.arange(n) / (n - 1), jnp.float32))
    return table[ranks.astype(jnp.int32)]


def _ranks(rows: Array) -> Array:
    """Place of each magnitude (in float32) in its row; of equals, the first.

    Sorts integers that hold magnitude and column: four times as fast as an argsort,
    which XLA on a CPU does by comparing pairs.
    """
    keys = magnitude_bits(rows)
    with jax.enable_x64(True):
        column = jax.lax.broadcasted_iota(jnp.int64, rows.shape, 1)
        packed = (keys.astype(jnp.int64) << 32) | column
        packed = jax.lax.sort(packed, dimension=1, is_stable=False)
        order = (packed & 0xFFFFFFFF).astype(jnp.int32)
    places = jnp.arange(rows.shape[1], dtype=jnp.int32)
    return jax.vmap(lambda o: jnp.zeros_like(o).at[o].set(places, unique_indices=True))(
        order
    )


def drop_by_rank(
    *,
    density: Shares | Mapping[str, Shares] = 0.5,
    epsilon: Shares | Mapping[str, Shares] = 0.15,
    rescale: Literal["probability", "l1", "none"] = "probability",
    seed: int = 0,
) -> Transform:
    """Keeps entries at random, the large ones of a row more often (DELLA's MagPrune).

    Args:
      density: mean probability to keep, one for all or one per model; or by leaf path.
      epsilon: the probability goes from density - epsilon to density + epsilon;
        likewise.
      rescale: "probability" divides each kept entry by its probability (the paper),
        "l1" scales a tensor to the L1 norm before (mergekit), "none" leaves as is.
      seed: same seed, same mask, whatever the sharding or the order of tensors.

    Raises:
      ValueError: density outside (0, 1], probabilities outside (0, 1], unknown rescale.
    """
    check_choice("rescale", rescale, ("probability", "l1", "none"))

    def lines(path: str) -> tuple[tuple[float, float, float], ...]:
        d, e = at_leaf("density", density, path), at_leaf("epsilon", epsilon, path)
        return _lines(shares("density", d), numbers(e))

    by_path = {p for x in (density, epsilon) if isinstance(x, Mapping) for p in x}
    for path in by_path or {""}:
        lines(path)  # refuses now rather than when merging

    def masked(
        values: Values, leaf: Leaf, stats: tuple[Any, ...], divide: bool = False
    ) -> Values:
        out = []
        salt, leaf_lines = leaf.setting
        keep = per_model(leaf_lines, len(values), "density, epsilon")
        for t, (tau, line) in enumerate(zip(values, keep, strict=True)):
            p = _probabilities(tau, line, leaf.ranks[t] if leaf.ranks else None)
            u = uniform(tau.shape, seed=salt, model=t, offset=leaf.offset)
            scaled = times(1 / p.astype(tau.dtype), tau) if divide else tau
            out.append(jnp.where(u < p, scaled, 0))
        return tuple(out)

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        out = masked(values, leaf, stats, divide=rescale == "probability")
        return rescale_l1(out, stats[0]) if rescale == "l1" else out

    return Transform(
        apply,
        measures=(l1_measure(masked),) if rescale == "l1" else (),
        settings=lambda paths: {p: (path_seed(p, seed), lines(p)) for p in paths},
        needs="row",
        ranks=True,
    )


def _lines(
    densities: tuple[float, ...], epsilons: tuple[float, ...]
) -> tuple[tuple[float, float, float], ...]:
    """Of each model: the mean probability, the lowest, and how far it rises."""
    out = []
    most = max(len(densities), len(epsilons))
    for d, e in zip(
        per_model(densities, most, "density"),
        per_model(epsilons, most, "epsilon"),
        strict=True,
    ):
        if e < 0 or d - e <= 0 or d + e > 1:
            raise ValueError(
                f"epsilon: got {e} with density {d}, expected 0 <= epsilon < density"
                " and density + epsilon <= 1: both ends are probabilities"
            )
        out.append((d, d - e, 2 * e))
    return tuple(out)

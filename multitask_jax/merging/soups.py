"""Rewarded soups: one model for every preference between rewards.

Rame et al. (2023), arXiv 2306.04488. Policies theta_t, each tuned for a reward of its
own from one base, are interpolated: theta_w = theta_0 + sum_t w_t tau_t with w on the
simplex, then perhaps scaled by depth (LiNeS). Scores over many w give a Pareto front.

Legend: N weightings, T models, R rewards.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from multitask_jax.merging.core import merge
from multitask_jax.merging.lines import with_lines
from multitask_jax.merging.recipes import task_arithmetic


def simplex_grid(models: int, steps: int) -> np.ndarray:
    """All weights that are multiples of 1 / steps and add up to 1.

    Before/after: 2 models, 2 steps -> [[0, 1], [.5, .5], [1, 0]].

    Args:
      models: T.
      steps: parts that the unit is cut into.

    Returns:
      float32 [N, T], N = (steps + T - 1 choose T - 1), in lexicographic order.

    Raises:
      ValueError: a number below 1.
    """
    for name, value in (("models", models), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    # Stars and bars: T - 1 bars among steps + T - 1 places cut the steps in T parts.
    places = steps + models - 1
    bars = np.array(list(itertools.combinations(range(places), models - 1)), int)
    ends = np.ones((math.comb(places, models - 1), 1), int)
    cuts = np.concatenate([-ends, bars, places * ends], axis=1)
    return ((np.diff(cuts, axis=1) - 1) / steps).astype(np.float32)


def rewarded_soup(
    base: Any,
    models: Sequence[Any],
    weights: Any,
    *,
    lines: tuple[Any, Any] | None = None,
    block_pattern: str | None = None,
) -> Any:
    """theta_0 + sum_t w_t tau_t for each row of weights, in one compiled call.

    Args:
      base: theta_0, a pytree of arrays.
      models: T pytrees alike, each tuned for a reward.
      weights: [N, T]; `simplex_grid` makes evenly spaced ones.
      lines: (alpha, beta) of LiNeS, alpha a number or "norm"; None leaves it out.
      block_pattern: as for `scale_by_depth`.

    Returns:
      A pytree like the base, each leaf with a first axis of N: score it by `vmap`.
      All N are in memory at once; pass a few rows at a time where they do not fit.

    Raises:
      ValueError: weights of another shape, or what `merge` raises.
    """
    if np.ndim(weights) != 2 or np.shape(weights)[1] != len(models):
        raise ValueError(
            f"weights: got shape {np.shape(weights)}, expected [N, {len(models)}], a"
            " row for each soup"
        )
    method = task_arithmetic()
    if lines is not None:
        alpha, beta = lines
        method = with_lines(method, alpha=alpha, beta=beta, block_pattern=block_pattern)

    @jax.jit
    def soups(base: Any, models: Sequence[Any], weights: Any) -> Any:
        return jax.vmap(lambda w: merge(method, base, models, weights=w))(weights)

    return soups(base, list(models), jnp.asarray(weights, jnp.float32))


def pareto_front(scores: Any) -> np.ndarray:
    """Which candidates no other one beats: as good in every reward, better in one.

    Args:
      scores: [N, R], higher is better.

    Returns:
      bool [N]; equal candidates are all on the front, or none is.

    Raises:
      ValueError: another shape, or a score is NaN.
    """
    x = np.asarray(scores, np.float64)
    if x.ndim != 2:
        raise ValueError(f"scores: got shape {x.shape}, expected [N, R]")
    if np.isnan(x).any():
        raise ValueError(f"scores: NaN in row {int(np.isnan(x).any(1).argmax())}")
    return np.array(
        [not np.any(np.all(x >= row, axis=1) & np.any(x > row, axis=1)) for row in x],
        bool,
    )

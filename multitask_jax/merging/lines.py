"""LiNeS: layer-increasing network scaling of a merged task vector.

Wang et al. (2025), arXiv 2410.17146. lambda(l) = alpha + beta l / (L - 1) for block
l = 0..L-1 of a stack of L; every tensor outside the blocks gets alpha. Shallow layers,
which are general, move less.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from multitask_jax import tree
from multitask_jax.merging import statistics
from multitask_jax.merging.agreement import inputs_beside
from multitask_jax.merging.core import (
    SUBTRACT_BASE,
    Array,
    Leaf,
    Measure,
    Method,
    Space,
    Transform,
    Values,
    add_up,
    chain,
    split_scales,
    times,
)


def relative_depths(
    paths: Sequence[str], block_pattern: str | None = None
) -> Mapping[str, float]:
    """l / (L - 1) for each leaf path; 0 outside the blocks and for L = 1.

    Raises:
      ValueError: no blocks can be told from the paths; shows some of them.
    """
    depths = tree.block_depths(list(paths), block_pattern=block_pattern)
    return {
        p: 0.0 if d is None else d.index / max(1, d.count - 1)
        for p, d in depths.items()
    }


def _factor(alpha: Any, beta: Any, leaf: Leaf) -> Array:
    """lambda(l) = alpha + beta l / (L - 1) of the tensor's block."""
    a, b, depth = (jnp.asarray(x, leaf.base.dtype) for x in (alpha, beta, leaf.setting))
    return a + times(b, depth)


def scale_by_depth(
    *, alpha: Any = 0.0, beta: Any = 1.0, block_pattern: str | None = None
) -> Transform:
    """Scales a task vector by lambda(l) = alpha + beta l / (L - 1).

    Args:
      alpha: factor of the first block and of everything outside the blocks.
      beta: how much more the last block gets; single task against forgetting:
        1 - alpha. Both may be traced.
      block_pattern: regex with one group, the block's number, where names are unusual.
    """

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        factor = _factor(alpha, beta, leaf)
        return tuple(times(factor, v) for v in values)

    return Transform(
        apply,
        settings=lambda paths: relative_depths(paths, block_pattern),
        scales=True,
    )


def norm_rule(total: Any, merged: Any, models: int) -> Array:
    """The paper's alpha for many tasks: (|sum_t tau_t|_1 / |tau|_1) / T.

    Args:
      total: the sum of the task vectors as they are, a pytree.
      merged: the merged task vector tau before its scale lambda, alike.
      models: T.

    Returns:
      A scalar; 0 where tau is 0, which any alpha leaves so.
    """
    sums = (
        statistics.total([jnp.abs(x) for x in jax.tree.leaves(t)])
        for t in (total, merged)
    )
    return _ratio(*sums, models)


def _ratio(total: Array, size: Array, models: int) -> Array:
    return jnp.where(size > 0, total / jnp.where(size > 0, size, 1), 0) / models


def _scale_by_depth_and_norm(
    *, beta: Any, start: Space, block_pattern: str | None
) -> Transform:
    """After `inputs_beside`: LiNeS of the last value, its alpha by the norm rule."""

    def l1(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        *taus, merged = values
        if start == "parameters":
            taus = [theta - leaf.base for theta in taus]
        return jnp.abs(add_up(taus)), jnp.abs(merged)

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        *taus, merged = values
        sums = (jnp.asarray(x, merged.dtype) for x in stats[0])
        alpha = _ratio(*sums, len(taus))  # `norm_rule`
        return (times(_factor(alpha, beta, leaf), merged),)

    def says(sums: tuple[Any, ...], models: int) -> str:
        return f"LiNeS: alpha = {float(_ratio(*sums, models)):.4g} by the norm rule."

    return Transform(
        apply,
        (Measure("sum", "model", l1, says=says),),
        settings=lambda paths: relative_depths(paths, block_pattern),
    )


def with_lines(
    method: Method, *, alpha: Any, beta: Any, block_pattern: str | None = None
) -> Method:
    """Any method, followed by LiNeS on its merged task vector.

    Args:
      method: a chain or recipe.
      alpha: a number, which may be traced; or "norm", the paper's rule for multi-task
        merging (`norm_rule`), with the task vectors as they are (untrimmed, without
        weights) and the merged one before its scale lambda. It brings that to the size
        of the average, and leaves beta alone to be tuned (the paper: .1 to 1, for TIES
        to 1.5).
      beta: how much more the last block gets; may be traced.
      block_pattern: as for `scale_by_depth`.

    Raises:
      ValueError: alpha is another word than "norm", or the method writes files beside
        its result (EMR), which are of the result as it is.
    """
    if method.aside is not None:
        raise ValueError(
            "LiNeS would change the vector that EMR's files of the tasks belong to;"
            " leave --lines_alpha and --lines_beta, or choose another method"
        )
    if not isinstance(alpha, str):
        lines = scale_by_depth(alpha=alpha, beta=beta, block_pattern=block_pattern)
        return chain(method, lines)
    if alpha != "norm":
        raise ValueError(f"alpha: got {alpha!r}, expected a number or 'norm'")
    if method.end == "parameters":  # no lambda; the task vector they make is measured
        steps = (*method.transforms, SUBTRACT_BASE)
        head, scales = method._replace(transforms=steps, end="task_vectors"), ()
    else:
        head, scales = split_scales(method)
    lines = _scale_by_depth_and_norm(
        beta=beta, start=method.start, block_pattern=block_pattern
    )
    return head._replace(transforms=(inputs_beside(head), lines, *scales))

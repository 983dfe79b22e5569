"""LiNeS: layer-increasing network scaling of a merged task vector.

lambda(l) = alpha + beta l / (L - 1) for block l = 0..L-1 of a stack of L; every tensor
outside the blocks gets alpha. Shallow layers, which are general, move less.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from multitask_jax import tree
from multitask_jax.merging.core import Leaf, Method, Transform, Values, chain, times


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
        a, b, depth = (
            jnp.asarray(x, leaf.base.dtype) for x in (alpha, beta, leaf.setting)
        )
        factor = a + times(b, depth)
        return tuple(times(factor, v) for v in values)

    return Transform(
        apply, settings=lambda paths: relative_depths(paths, block_pattern)
    )


def with_lines(
    method: Method, *, alpha: Any, beta: Any, block_pattern: str | None = None
) -> Method:
    """Any method, followed by LiNeS on its merged task vector."""
    lines = scale_by_depth(alpha=alpha, beta=beta, block_pattern=block_pattern)
    return chain(method, lines)

"""How far tasks' gradients agree: cosines, norms, conflicts, of all leaves or by depth.

A negative cosine is a conflict: a step along one task's gradient raises the other's
loss, to first order (Yu et al. 2020, arXiv 2001.06782, definition 1).

Legend: T tasks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from multitask_jax import tree as trees


class Agreement(NamedTuple):
    """Of the gradients of T tasks."""

    cosines: jax.Array  # [T, T]; 0 where a gradient is 0
    norms: jax.Array  # [T]
    conflict: jax.Array  # []: share of the T (T - 1) / 2 pairs with a negative cosine


def task_gradients(
    losses: Sequence[Callable[[Any], jax.Array]], params: Any
) -> list[Any]:
    """The gradient of each task's loss (params -> []), each like `params`."""
    return [jax.grad(loss)(params) for loss in losses]


def gradient_cosines(
    losses: Sequence[Callable[[Any], jax.Array]], params: Any
) -> Agreement:
    """How far tasks agree at `params`: `agreement` of `task_gradients`; jit it."""
    return agreement(task_gradients(losses, params))


def agreement(gradients: Sequence[Any]) -> Agreement:
    """Cosines of trees of one structure, summed over all their leaves in float32.

    Raises:
      ValueError: fewer than two trees, or no leaves.
    """
    if len(gradients) < 2 or not jax.tree.leaves(gradients[0]):
        raise ValueError(
            f"got {len(gradients)} gradients, expected trees with leaves, of two tasks"
            " or more"
        )
    gradients = [optax.tree.cast(g, jnp.float32) for g in gradients]
    gram = jnp.stack(
        [jnp.stack([optax.tree.vdot(a, b) for b in gradients]) for a in gradients]
    )
    norms = jnp.sqrt(jnp.diagonal(gram))
    scale = norms[:, None] * norms[None, :]
    cosines = jnp.where(scale > 0, gram / jnp.where(scale > 0, scale, 1), 0)
    pairs = jnp.triu_indices(len(gradients), 1)
    conflict = jnp.mean((cosines[pairs] < 0).astype(jnp.float32))
    return Agreement(cosines, norms, conflict)


def agreement_by_group(
    gradients: Sequence[Any], group_of: Callable[[Sequence[str]], Mapping[str, str]]
) -> dict[str, Agreement]:
    """The same for each group of leaves, in the order of their first leaf.

    Args:
      gradients: one tree a task.
      group_of: all paths -> the group of each, such as `by_depth`.

    Raises:
      ValueError: fewer than two trees, or no leaves.
    """
    flat = [trees.flatten(g) for g in gradients]
    groups: dict[str, list[str]] = {}
    for path, group in group_of(list(flat[0]) if flat else []).items():
        groups.setdefault(group, []).append(path)
    return {
        group: agreement([{path: g[path] for path in paths} for g in flat])
        for group, paths in groups.items()
    }


def by_depth(
    paths: Sequence[str], *, block_pattern: str | None = None
) -> dict[str, str]:
    """A group for each block, before/after: "layers_3/mlp/kernel" -> "layers_/3".

    Leaves outside blocks are grouped by the first part of their path ("embed").

    Raises:
      ValueError: no block found; `tree.block_depths` says what to pass.
    """
    depths = trees.block_depths(paths, block_pattern=block_pattern)
    return {
        path: path.split("/")[0] if depth is None else f"{depth.stack}/{depth.index}"
        for path, depth in depths.items()
    }

"""EMR: one unified task vector, and a mask and a factor that fit it to each task.

Huang et al. (2024). gamma = sgn(sum_t tau_t), tau_u the largest |tau_t| that agrees,
with that sign; a task's model is theta_0 + lambda_t m_t tau_u, with its mask
m_t = [sgn(tau_t) = sgn(tau_u)] and its factor lambda_t = |tau_t|_1 / |m_t tau_u|_1.
A mask costs one bit a parameter, 1/16 of a bfloat16 model.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from multitask_jax import tree
from multitask_jax.merging import core
from multitask_jax.merging import transforms as tf


class EmrTask(NamedTuple):
    """What fits the unified task vector to one task."""

    mask: Mapping[str, jax.Array]  # m_t by leaf path, bool, the leaf's shape
    rescale: jax.Array  # lambda_t


def unify() -> core.Method:
    """tau_u: elect signs (a zero sum is negative), keep the largest that agrees."""
    return core.chain(tf.elect_sign(zero_sign="negative"), tf.max_magnitude())._replace(
        weighted=False
    )


def emr_tasks(
    base: Any,
    models: Sequence[Any],
    *,
    include: str | None = None,
    exclude: str | None = None,
) -> list[EmrTask]:
    """The masks and factors of all tasks, for `specialise`.

    Norms are sums over leaves of mean magnitudes, as in the authors' code: a small
    tensor counts as much as a large one.

    Args:
      base, models, include, exclude: as for `merge`.
    """
    unified = tree.flatten(
        core.merge(
            unify()._replace(end="parameters"),
            _widened(base),
            list(map(_widened, models)),
            include=include,
            exclude=exclude,
        )
    )
    bases = tree.flatten(base)
    chosen = tree.select(list(bases), include=include, exclude=exclude)
    paths = [
        p
        for p, keep in zip(bases, chosen, strict=True)
        if keep and core.is_float(jnp.result_type(bases[p])) and jnp.size(bases[p])
    ]
    tasks = []
    for model in map(tree.flatten, models):
        mask, own, kept = {}, [], []
        for p in paths:
            tau = _widen(model[p]) - _widen(bases[p])
            mask[p] = (tau != 0) & (jnp.sign(tau) == jnp.sign(unified[p]))
            own.append(jnp.mean(jnp.abs(tau)))
            kept.append(jnp.mean(jnp.where(mask[p], jnp.abs(unified[p]), 0)))
        tasks.append(EmrTask(mask, _ratio(core.add_up(own), core.add_up(kept))))
    return tasks


def specialise(merged: Any, task: EmrTask, *, base: Any | None) -> Any:
    """The parameters for one task: theta_0 + lambda_t m_t (merged - theta_0).

    Args:
      merged: what `merge(METHODS["emr"](), base, models)` returns.
      task: one of `emr_tasks`, or from `load_task`.
      base: theta_0. None: `merged` is the unified task vector itself, and the result
        the task's task vector.

    Returns:
      A pytree like `merged`; leaves without a mask are merged's.

    Raises:
      ValueError: a mask of another shape than its leaf, or of no leaf.
    """
    out = tree.flatten(merged)
    bases = None if base is None else tree.flatten(base)
    for p, mask in task.mask.items():
        if p not in out or jnp.shape(out[p]) != jnp.shape(mask):
            got = f"shape {jnp.shape(out[p])}" if p in out else "no such leaf"
            raise ValueError(
                f"{p}: the task's mask has shape {jnp.shape(mask)}, the merged model"
                f" {got}; pass the model that this task was merged into"
            )
        dtype = jnp.result_type(out[p])
        theta = jnp.zeros(mask.shape) if bases is None else _widen(bases[p])
        tau = jnp.where(mask, _widen(out[p]) - theta, 0)
        factor = jnp.asarray(task.rescale, tau.dtype)
        out[p] = (theta + core.times(factor, tau)).astype(dtype)
    return tree.unflatten(merged, out)


def _widen(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(core.compute_dtype(x.dtype)) if core.is_float(x.dtype) else x


def _widened(params: Any) -> Any:
    return jax.tree.map(_widen, params)


def _ratio(a: Any, b: Any) -> jax.Array:
    """a / b; 1 for a task that changed nothing."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 1)

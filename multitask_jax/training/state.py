"""What training carries from step to step, and how it is split when some is frozen.

A frozen leaf lies in `frozen`, and `params` has None in its place: None is no leaf to
JAX, so that gradients, optimiser state and the best parameters kept do not hold it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from multitask_jax import tree as trees


class TrainState(NamedTuple):
    """A pytree; every array of it but `frozen` is donated to each step."""

    step: jax.Array  # [] int32: steps done
    params: Any  # what is trained; None where a leaf is frozen
    opt_state: Any
    key: jax.Array  # of the run, never changed: a step folds its number in
    frozen: Any = None  # the other leaves, None where trained; None: all are trained


def split(
    params: Any, *, include: str | None = None, exclude: str | None = None
) -> tuple[Any, Any]:
    """Cuts a tree in two of its structure, by regexes on leaf paths.

    Before/after, include="lora": {"lora": x, "kernel": y} ->
    {"lora": x, "kernel": None}, {"lora": None, "kernel": y}. `join` is the inverse.

    Raises:
      ValueError: a regex finds no path, or together they leave nothing to train.
    """
    leaves = trees.flatten(params)
    chosen = trees.select(list(leaves), include=include, exclude=exclude)
    if not any(chosen):
        raise ValueError(
            f"include={include!r}, exclude={exclude!r} freeze all {len(leaves)} leaves"
        )
    keep = dict(zip(leaves, chosen, strict=True))
    trained = {path: x if keep[path] else None for path, x in leaves.items()}
    frozen = {path: None if keep[path] else x for path, x in leaves.items()}
    return trees.unflatten(params, trained), trees.unflatten(params, frozen)


def join(params: Any, frozen: Any) -> Any:
    """The whole tree of two that `split` made; `frozen=None` stands for none at all.

    Raises:
      ValueError: the trees have different structures.
    """
    if frozen is None:
        return params
    return jax.tree.map(
        lambda x, y: y if x is None else x, params, frozen, is_leaf=lambda x: x is None
    )


def whole(state: TrainState) -> Any:
    """The state's parameters, trained and frozen, in the model's structure."""
    return join(state.params, state.frozen)


def init_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    include: str | None = None,
    exclude: str | None = None,
) -> TrainState:
    """The state before the first step.

    Trained leaves and the key are copied, since steps give their memory away; frozen
    leaves are shared with `params`, as many experts may share one base.

    Args:
      params: a pytree of arrays, on a mesh or not.
      optimizer: from optax.
      key: what all randomness of the run follows from.
      include, exclude: regexes on leaf paths: what is trained (by default everything).

    Raises:
      ValueError: a trained leaf is not of floats, or the regexes choose nothing.
    """
    frozen = None
    if include or exclude:
        params, frozen = split(params, include=include, exclude=exclude)
    for path, leaf in trees.flatten(params).items():
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"{path}: can't train {jnp.result_type(leaf)}; expected floats: freeze"
                f" it by exclude={path!r}"
            )
    # Weak types would become strong in the first step, and the second be traced anew.
    params = jax.tree.map(
        lambda x: jnp.array(x, dtype=jnp.result_type(x), copy=True), params
    )
    opt_state = optimizer.init(params)
    return TrainState(jnp.int32(0), params, opt_state, jnp.copy(key), frozen)

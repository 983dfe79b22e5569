"""WEMoE (Tang et al. 2024): task vectors of the MLPs, mixed anew for each example.

All but the MLPs is merged by task arithmetic, theta = theta_0 + lambda sum_t tau_t. An
MLP keeps theta_0 and its task vectors; a router looks at the MLP's inputs h [L, D] (L
tokens) and makes, for one example,

    w = mean_l r(h_l),  r(h) = W_2 relu(W_1 h + b_1) + b_2
    theta = theta_0 + sum_t w_t tau_t

Routers start at w = lambda for every task (b_2 = lambda, small W) and are fitted to the
entropy of predictions on unlabelled inputs. Model-agnostic: which tensor is an MLP's
input is seen while the function runs, at its first product with a leaf of that MLP. The
paper has vision transformers; what is reconstructed: W is normal with deviation .01,
and D hidden units.

Legend: B batch, T tasks, D width of an MLP's inputs.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from multitask_jax import tree
from multitask_jax.merging.core import Array, add_up, is_float
from multitask_jax.merging.fitted import capture
from multitask_jax.merging.fitted.adamerging import (
    ApplyFns,
    add_task_vectors,
    task_vectors,
)
from multitask_jax.merging.fitted.batching import check_batches
from multitask_jax.merging.fitted.entropy import (
    ApplyFn,
    Data,
    Progress,
    entropy_gradient,
    minimise_entropy,
    one_each,
)

if TYPE_CHECKING:  # imported on use: merging without data does without it
    import optax

Router = tuple[tuple[Array, Array], ...]  # (W [in, out], b [out]) of each layer


class Wemoe(NamedTuple):
    """A merged model with routed MLPs; a pytree."""

    shared: Any  # like the base: merged leaves, and theta_0 of the MLPs'
    task_vectors: dict[str, dict[str, tuple[Array, ...]]]  # by MLP and leaf path: T
    routers: dict[str, Router]  # by MLP


def wemoe_init(
    key: Array,
    apply_fn: ApplyFns,
    base: Any,
    models: Sequence[Any],
    inputs: Any,
    *,
    mlp_pattern: str,
    init: float = 0.3,
    router_layers: Literal[1, 2] = 2,
) -> Wemoe:
    r"""Splits models into what is merged and what is routed.

        moe = merging.wemoe_init(key, apply_fn, base, models, images,
                                 mlp_pattern=r"block_\d+/mlp/")
        moe, entropy = merging.wemoe_fit(apply_fn, moe, [[images_a], [images_b]])
        logits = merging.wemoe_apply(apply_fn, moe, images)

    Args:
      key: for the routers' weights.
      apply_fn: (params, inputs) -> logits; one, or one a task.
      base, models: parameter pytrees.
      inputs: some, for their shapes.
      mlp_pattern: regex on leaf paths. Leaves that it finds are routed; those whose
        path is the same up to the end of the match are one MLP with one router, so it
        must end before the MLP's own layers: "block_3/mlp/" of "block_3/mlp/up/kernel".
      init: lambda of task arithmetic, and of the routers at the start.
      router_layers: 2, or 1 (linear).

    Raises:
      ValueError: the pattern finds nothing, or leaves that are used before the first
        product of their MLP, or within a scan.
    """
    count = len(models)
    if router_layers not in (1, 2):
        raise ValueError(f"router_layers: got {router_layers}, expected 1 or 2")
    base = jax.tree.map(jnp.asarray, base)
    leaves = tree.flatten(base)
    tree.select(list(leaves), include=mlp_pattern)  # an error names a bad pattern
    taus = task_vectors(base, models)
    routed: dict[str, dict[str, tuple[Array, ...]]] = {}
    for path, theta in leaves.items():
        found = re.search(mlp_pattern, path)
        if found and is_float(theta.dtype):
            changes = tuple(tree.flatten(tau)[path] for tau in taus)
            routed.setdefault(path[: found.end()], {})[path] = changes
    apart = {path for group in routed.values() for path in group}
    shared = add_task_vectors(
        base, taus, lambda path: jnp.full(count, 0.0 if path in apart else init)
    )
    widths: dict[str, int] = {}

    def look(shared: Any, inputs: Any) -> None:
        def route(group: str, h: Array) -> Array:
            widths[group] = h.shape[-1]
            return jnp.zeros(count)

        _evaluate(one_each(apply_fn, count)[0], shared, routed, route, _first(inputs))

    jax.eval_shape(look, shared, inputs)
    idle = [group for group in routed if group not in widths]
    if idle:
        raise ValueError(
            f"apply_fn has no product with the leaves of {idle[:5]}; check mlp_pattern"
        )
    keys = jax.random.split(key, len(routed))
    routers = {
        group: _router(k, widths[group], count, router_layers, init)
        for group, k in zip(routed, keys, strict=True)
    }
    return Wemoe(shared, routed, routers)


def _router(key: Array, width: int, count: int, layers: int, init: float) -> Router:
    first, last = jax.random.split(key)
    w = 0.01 * jax.random.normal(last, (width, count))
    out = (w, jnp.full(count, init))
    if layers == 1:
        return (out,)
    hidden = 0.01 * jax.random.normal(first, (width, width))
    return ((hidden, jnp.zeros(width)), out)


def _weights(router: Router, h: Array) -> Array:
    """w [T] of one example's h [L, D]."""
    *hidden, (w, b) = router
    h = h.astype(jnp.float32)
    for w_1, b_1 in hidden:
        h = jax.nn.relu(h @ w_1 + b_1[None])
    return jnp.mean(h @ w + b[None], axis=0)


def _first(inputs: Any) -> Any:
    return jax.tree.map(lambda x: x[:1], inputs)


def _evaluate(
    apply_fn: ApplyFn,
    shared: Any,
    routed: dict[str, dict[str, tuple[Array, ...]]],
    route: Callable[[str, Array], Array],
    inputs: Any,
) -> tuple[Any, dict[str, Array]]:
    """apply_fn on a batch of one, and what `route(MLP, h [L, D])` made of it."""
    group_of = {path: group for group, leaves in routed.items() for path in leaves}
    leaves = tree.flatten(shared)
    weights: dict[str, Array] = {}

    def resolve(view: capture.View) -> Array:
        theta = leaves[view.path]
        group = group_of.get(view.path)
        if group is None:
            return theta
        w, taus = weights[group], routed[group][view.path]
        moved = theta + add_up([w[t] * tau for t, tau in enumerate(taus)])
        return moved.astype(theta.dtype)

    def product(p: capture.Product) -> None:
        group = group_of.get(p.view.path)
        if group is None or group in weights:
            return
        found = capture.layout(p)
        if found is None or found.batch:
            raise ValueError(
                f"{p.view.path}: an MLP's first product is with a stack or part of a"
                " leaf, expected one matrix"
            )
        weights[group] = route(group, capture.inputs_of(p))

    def other(view: capture.View, use: str) -> None:
        group = group_of.get(view.path)
        if group is not None and group not in weights:
            raise ValueError(
                f"{view.path} is used by {use} before the first product of {group!r},"
                " whose inputs the router needs; have mlp_pattern find dense layers"
                " only, outside of scans"
            )

    outputs = capture.evaluate(
        lambda by_path, x: apply_fn(tree.unflatten(shared, by_path), x),
        leaves,
        (inputs,),
        capture.Hooks(resolve, product, other),
    )
    return outputs, weights


def _apply_one(
    apply_fn: ApplyFn, moe: Wemoe, example: Any
) -> tuple[Array, dict[str, Array]]:
    outputs, weights = _evaluate(
        apply_fn,
        moe.shared,
        moe.task_vectors,
        lambda group, h: _weights(moe.routers[group], h),
        jax.tree.map(lambda x: x[None], example),
    )
    return outputs[0], weights


def wemoe_apply(apply_fn: ApplyFn, moe: Wemoe, inputs: Any) -> Array:
    """Outputs of the routed model, example by example (vmap); jit it.

    Each example has MLPs of its own, so memory takes a batch of them.

    Args:
      apply_fn: (params, inputs) -> outputs with a leading axis of examples.
      moe: from `wemoe_init` or `wemoe_fit`.
      inputs: arrays or a pytree with a leading axis of examples.
    """
    return jax.vmap(lambda x: _apply_one(apply_fn, moe, x)[0])(inputs)


def wemoe_routing(apply_fn: ApplyFn, moe: Wemoe, inputs: Any) -> dict[str, Array]:
    """The weights of task vectors, [B, T] by MLP."""
    return jax.vmap(lambda x: _apply_one(apply_fn, moe, x)[1])(inputs)


def wemoe_fit(
    apply_fn: ApplyFns,
    moe: Wemoe,
    batches: Sequence[Iterable[Any]],
    *,
    steps: int = 1000,
    optimiser: "optax.GradientTransformation | None" = None,
    progress: Progress | None = None,
) -> tuple[Wemoe, Array]:
    """Fits the routers to the entropy of predictions on unlabelled batches.

    Args:
      apply_fn: one for all tasks, or one a task (heads that differ).
      moe: from `wemoe_init`.
      batches: T lists (or re-iterables) of inputs with a leading axis of examples.
      steps: of the optimiser, on one batch a task.
      optimiser: Adam, learning rate 1e-4, by default.
      progress: called with a step's number and its entropy.

    Returns:
      The model with fitted routers, and the entropy before each step, [steps].

    Raises:
      ValueError: no batches, iterators, numbers of tasks that differ, steps below 0.
    """
    count = len(next(iter(next(iter(moe.task_vectors.values())).values())))
    functions = one_each(apply_fn, count)
    check_batches(batches, count)

    fixed = moe._replace(routers={})

    def gradient(routers: dict[str, Router], data: Data) -> tuple[Array, Any]:
        return entropy_gradient(_predict, functions, routers, fixed, data)

    routers, entropy = minimise_entropy(
        gradient,
        moe.routers,
        batches,
        steps=steps,
        learning_rate=1e-4,
        optimiser=optimiser,
        progress=progress,
    )
    return moe._replace(routers=routers), entropy


def _predict(
    apply_fn: ApplyFn, routers: dict[str, Router], fixed: Wemoe, inputs: Any
) -> Array:
    return wemoe_apply(apply_fn, fixed._replace(routers=routers), inputs)

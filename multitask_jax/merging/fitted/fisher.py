"""Fisher merging (Matena & Raffel 2022): weigh each parameter by what a task knows.

F_t is the diagonal Fisher information of model t, c_t a factor for the whole model:
theta = sum_t w_t c_t (F_t + eps) theta_t / sum_t w_t c_t (F_t + eps).

Legend: B batch, C classes, T models.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from multitask_jax import tree
from multitask_jax.merging.arguments import check_choice
from multitask_jax.merging.core import (
    Leaf,
    Measure,
    Method,
    Transform,
    Values,
    add_up,
    times,
)
from multitask_jax.merging.fitted.batching import batch_size, padded
from multitask_jax.merging.geometry import norm_of

ApplyFn = Callable[[Any, Any], jax.Array]


def fisher_diagonal(
    apply_fn: ApplyFn,
    params: Any,
    batches: Iterable[Any],
    *,
    labels: Literal["expected", "given"] = "expected",
    examples_at_once: int | None = None,
) -> Any:
    """The diagonal of the Fisher information, a mean over examples.

    expected: F = mean_x sum_y p(y|x) (d log p(y|x) / d theta)^2 (equation 5 of the
    paper; what MergeLM and FusionBench compute). given: the "empirical" Fisher, with
    the label y of each example in the place of the sum.

        fisher = [fisher_diagonal(apply_fn, p, b) for p, b in zip(models, data)]
        merged = merging.merge(merging.fisher(), base, models, statistics=fisher)

    Args:
      apply_fn: (params, inputs) -> logits [B, C].
      params: any pytree; float leaves get a Fisher, others (integers) zeros.
      batches: arrays or pytrees with a leading axis of examples; with labels="given"
        pairs (inputs, labels [B]). The last batch may be smaller. The paper takes 256
        examples or more.
      labels: "expected" over the model's own predictions, or "given".
      examples_at_once: how many examples' gradients are in memory at a time, at least
        1; all of a batch by default. Each takes as much as `params` (times C, if
        expected).

    Returns:
      A pytree like `params`, float32.

    Raises:
      ValueError: logits that are not [B, C] or not finite; labels that are missing, no
        integers [B], or of no class; no batches; an option that is not as above.
    """
    check_choice("labels", labels, ("expected", "given"))
    if examples_at_once is not None and examples_at_once < 1:
        raise ValueError(
            f"examples_at_once: got {examples_at_once}, expected 1 or more"
        )
    params = jax.tree.map(jnp.asarray, params)
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    count = 0
    for batch, mask in padded(batches):
        if labels == "given":
            _check_labels(batch)
        total = _add_batch(
            apply_fn, labels, examples_at_once, total, params, batch, mask
        )
        count += int(mask.sum())
    fisher = jax.tree.map(lambda x: x / count, total)
    for path, f in tree.flatten(fisher).items():
        if not jnp.isfinite(f).all():
            raise ValueError(
                f"{path}: the Fisher information is not finite: apply_fn makes NaN or"
                " infinity, or a label is not one of its classes"
            )
    return fisher


def _check_labels(batch: Any) -> None:
    """Raises ValueError for what is not (inputs, integer labels [B])."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(
            f'labels="given": got a batch that is a {type(batch).__name__}, expected'
            ' pairs (inputs, labels [B]); labels="expected" takes inputs alone'
        )
    label = jax.eval_shape(jnp.asarray, batch[1])
    if label.ndim != 1 or not jnp.issubdtype(label.dtype, jnp.integer):
        raise ValueError(
            f"labels: got {label.dtype} {label.shape}, expected integers [B], the"
            " number of each example's class (of one-hot labels: their argmax)"
        )


# One compilation serves all models of a function.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _add_batch(
    apply_fn: ApplyFn,
    labels: str,
    at_once: int | None,
    total: Any,
    params: Any,
    batch: Any,
    mask: jax.Array,
) -> Any:
    """total + sum over the examples of a batch that the mask counts."""
    size = batch_size(batch)
    step = min(at_once or size, size)
    rest = -size % step  # examples repeated, not counted, to fill the last part
    batch, mask = jax.tree.map(
        lambda x: jnp.concatenate([x, x[:1].repeat(rest, axis=0)]).reshape(
            -1, step, *x.shape[1:]
        ),
        (batch, mask * 1.0),
    )
    mask = mask.reshape(-1).at[size:].set(0).reshape(mask.shape)
    squares = jax.vmap(functools.partial(_squares, apply_fn, labels), in_axes=(None, 0))

    def add(total: Any, part: Any) -> tuple[Any, None]:
        examples, counts = part
        return jax.tree.map(
            lambda t, s: t + jnp.tensordot(counts, s, axes=1),
            total,
            squares(params, examples),
        ), None

    return jax.lax.scan(add, total, (batch, mask))[0]


def _squares(apply_fn: ApplyFn, labels: str, params: Any, example: Any) -> Any:
    """sum_y p(y|x) (d log p(y|x) / d theta)^2 of one example, in float32."""
    inputs, label = example if labels == "given" else (example, None)
    inputs = jax.tree.map(lambda x: x[None], inputs)
    floats, rest = _split(params)

    def logits_of(floats: Any) -> jax.Array:
        logits = apply_fn(_join(floats, rest), inputs)
        if logits.ndim != 2:
            raise ValueError(
                f"apply_fn: got logits {logits.shape} for one example, expected"
                " [1, classes]; for sequences, let it pick one position or treat each"
                " as an example"
            )
        return logits[0]

    logits, pull_back = jax.vjp(logits_of, floats)
    p = jax.nn.softmax(logits.astype(jnp.float32))
    # d log p_y / d logits = e_y - p, weighted by sqrt p_y; or that of the label alone.
    u = jnp.eye(p.size) - p[None, :]
    if labels == "given":
        known = (label >= 0) & (label < p.size)
        u = jnp.where(known, u[label], jnp.nan)[None]
    else:
        u = jnp.sqrt(p)[:, None] * u
    (gradients,) = jax.vmap(pull_back)(u.astype(logits.dtype))
    squared = [jnp.sum(g.astype(jnp.float32) ** 2, axis=0) for g in gradients]
    zeros = [r if r is None else jnp.zeros(r.shape, jnp.float32) for r in rest[0]]
    return _join(squared, (zeros, rest[1]))


def _split(params: Any) -> tuple[list[Any], tuple[list[Any], Any]]:
    """The float leaves, and what `_join` needs besides."""
    leaves, structure = jax.tree.flatten(params)
    floats = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
    rest = [None if f else x for x, f in zip(leaves, floats, strict=True)]
    return [x for x, f in zip(leaves, floats, strict=True) if f], (rest, structure)


def _join(floats: list[Any], rest: tuple[list[Any], Any]) -> Any:
    """Undoes `_split`."""
    left = iter(floats)
    leaves = [next(left) if r is None else r for r in rest[0]]
    return jax.tree.unflatten(rest[1], leaves)


def average_by_fisher(*, floor: Any = 1e-6, normalise: bool = True) -> Transform:
    """sum w_t c_t (F_t + floor) v_t / sum w_t c_t (F_t + floor), v_t parameters.

    Args:
      floor: added to every F, so that unused parameters are averaged.
      normalise: c_t = 1 / ||F_t||_2 over the whole model, made to sum to 1, so that
        no model outweighs others by the scale of its gradients; else c_t = 1. A model
        whose F is all 0 has c_t = 0, unless all are. Takes two more readings of F.
    """

    def sizes(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        zeros = tuple(jnp.zeros_like(v) for v in values)
        return tuple(jnp.abs(f) for f in leaf.statistics or zeros)

    def squares(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        # Shares of |F|_1: F^2 itself, of squared gradients, is below float32's range.
        fs = zip(sizes(values, leaf, stats), stats[0], strict=True)
        shares = (f / jnp.where(total > 0, total, 1).astype(f.dtype) for f, total in fs)
        return tuple(x * x for x in shares)

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        if not leaf.statistics:
            return (average(values, leaf),)
        c = _factors(*stats) if normalise else (1.0,) * len(values)
        fs = [
            times(w * jnp.asarray(c_t, f.dtype), f + jnp.asarray(floor, f.dtype))
            for w, c_t, f in zip(leaf.weights, c, leaf.statistics, strict=True)
        ]
        return (weighted_mean(fs, values),)

    measures = (Measure("sum", "model", sizes), Measure("sum", "model", squares))
    return Transform(apply, measures if normalise else (), statistics="fisher")


def _factors(sizes: Values, squares: Values) -> Values:
    """c_t = 1 / ||F_t||, divided by their sum, from |F|_1 and sum (F / |F|_1)^2."""
    norms = [size * norm_of(s) for size, s in zip(sizes, squares, strict=True)]
    known = [jnp.where(n > 0, n, jnp.inf) for n in norms]
    least = functools.reduce(jnp.minimum, known)
    some = least < jnp.inf
    # By the least norm first: 1 / ||F|| may be beyond float32.
    inverse = [jnp.where(some, least, 1) / jnp.where(some, n, 1) for n in known]
    return tuple(i / add_up(inverse) for i in inverse)


def average(values: Values, leaf: Leaf) -> jax.Array:
    """sum w v / sum w, for tensors without statistics."""
    return weighted_mean([jnp.full_like(values[0], w) for w in leaf.weights], values)


def weighted_mean(weights: Sequence[jax.Array], values: Values) -> jax.Array:
    """sum w v / sum w, as v_0 + sum w (v - v_0) / sum w: exact where all v are equal.

    v_0 where the weights add up to 0.
    """
    divisor = add_up(weights)
    some = divisor != 0
    first = values[0]
    steps = [times(w, v - first) for w, v in zip(weights, values, strict=True)]
    return first + jnp.where(some, add_up(steps) / jnp.where(some, divisor, 1), 0)


def fisher(*, fisher_floor: Any = 1e-6, normalise: bool = True) -> Method:
    """Fisher merging: parameters averaged by their Fisher information (--statistics).

    Leaves without statistics are averaged. Needs no base.
    """
    return Method(
        (average_by_fisher(floor=fisher_floor, normalise=normalise),),
        start="parameters",
        end="parameters",
    )

"""Test-time adaptation by entropy: sure predictions on unlabelled examples.

AdaMerging and WEMoE fit a few variables so that the merged model is sure of what it
predicts on each task's inputs; no labels are needed.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from multitask_jax.merging.core import compute_dtype
from multitask_jax.merging.fitted.batching import padded

if TYPE_CHECKING:  # imported on use: merging without data does without it
    import optax

ApplyFn = Callable[[Any, Any], jax.Array]
Predict = Callable[[ApplyFn, Any, Any, Any], jax.Array]
Data = Sequence[tuple[Any, Any]]  # inputs and mask [B] of each task
Progress = Callable[[int, jax.Array], None]


def prediction_entropy(logits: jax.Array) -> jax.Array:
    """H = -sum_y p(y|x) log p(y|x) in nats, over the last axis."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def one_each(apply_fn: Any, count: int) -> tuple[Callable[..., Any], ...]:
    """A function for each task: one for all, or a list of them (heads that differ).

    Raises:
      ValueError: another number of functions, or one that has no hash.
    """
    functions = (apply_fn,) * count if callable(apply_fn) else tuple(apply_fn)
    if len(functions) != count:
        raise ValueError(f"got {len(functions)} functions for {count} models")
    for f in functions:
        try:
            hash(f)
        except TypeError as e:
            raise ValueError(
                f"apply_fn: got {type(f).__name__} without a hash ({e}); wrap it:"
                " lambda params, inputs: apply_fn(params, inputs)"
            ) from None
    return functions


@functools.partial(jax.jit, static_argnums=(0, 1))
def _task_gradient(
    predict: Predict,
    apply_fn: ApplyFn,
    variables: Any,
    constants: Any,
    inputs: Any,
    mask: jax.Array,
) -> tuple[jax.Array, Any]:
    """mean_x H of one task's inputs, and its gradient by the variables."""

    def loss(variables: Any) -> jax.Array:
        h = prediction_entropy(predict(apply_fn, variables, constants, inputs))
        h = h.reshape(h.shape[0], -1).mean(axis=1)  # of sequences: over positions
        return jnp.sum(h * mask) / jnp.sum(mask)

    value, slopes = jax.value_and_grad(loss)(variables)
    # Sums over tasks are not to be rounded to the parameters' type.
    return value, jax.tree.map(lambda g: g.astype(compute_dtype(g.dtype)), slopes)


_add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)


def entropy_gradient(
    predict: Predict,
    functions: Sequence[ApplyFn],
    variables: Any,
    constants: Any,
    data: Data,
) -> tuple[jax.Array, Any]:
    """sum_t mean_x H(predict(f_t, variables, constants, x)), and its gradient.

    A task after another, so that activations are held of one only, and tasks that share
    a function and the shape of their inputs share one compiled program.

    Args:
      predict: (apply_fn, variables, constants, inputs) -> logits; a function of a
        module, not a closure, which would be compiled at each call.
      functions: apply_fn of each task. Programs are kept by function: give the same
        one each time, and heads that differ with the inputs.
      variables: pytree of floats that the gradient is by.
      constants: pytree that it is not.
      data: inputs and mask of each task.

    Returns:
      The entropy, and the gradient in float32 (float64 of such variables).
    """
    each = (
        _task_gradient(predict, f, variables, constants, *inputs_and_mask)
        for f, inputs_and_mask in zip(functions, data, strict=True)
    )
    return functools.reduce(_add, each)


def minimise_entropy(
    gradient: Callable[[Any, Data], tuple[jax.Array, Any]],
    variables: Any,
    batches: Sequence[Iterable[Any]],
    *,
    steps: int,
    learning_rate: float,
    optimiser: "optax.GradientTransformation | None" = None,
    project: Callable[[Any], Any] = lambda v: v,
    progress: Progress | None = None,
) -> tuple[Any, jax.Array]:
    """Minimises the entropy of predictions over `variables`.

    Args:
      gradient: (variables, data) -> entropy and its gradient (see `entropy_gradient`).
      variables: pytree that is fitted.
      batches: for each task something to iterate over, again and again (see
        `check_batches`); the last batch of a round may be smaller.
      steps: optimiser steps, on one batch of each task.
      learning_rate: of Adam.
      optimiser: of optax, in the place of Adam.
      project: applied to the variables after each step.
      progress: called with the step's number and its entropy (still on the device).

    Returns:
      The variables and the entropy before each step, [steps].

    Raises:
      ValueError: steps below 0, no batches.
    """
    import optax

    if steps < 0:
        raise ValueError(f"steps: got {steps}, expected 0 or more")

    optimiser = optimiser or optax.adam(learning_rate)

    @jax.jit
    def update(variables: Any, state: Any, slopes: Any) -> tuple[Any, Any]:
        updates, state = optimiser.update(slopes, state, variables)
        return project(optax.apply_updates(variables, updates)), state

    state = optimiser.init(variables)
    streams = [_forever(b) for b in batches]
    history = []
    for i in range(steps):
        value, slopes = gradient(variables, [next(s) for s in streams])
        variables, state = update(variables, state, slopes)
        history.append(value)
        if progress is not None:
            progress(i, value)
    return variables, jnp.stack(history) if history else jnp.zeros(0)


def _forever(batches: Iterable[Any]) -> Iterator[tuple[Any, np.ndarray]]:
    while True:
        yield from padded(batches)

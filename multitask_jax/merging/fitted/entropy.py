"""Test-time adaptation by entropy: sure predictions on unlabelled examples.

AdaMerging and WEMoE fit a few variables so that the merged model is sure of what it
predicts on each task's inputs; no labels are needed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from multitask_jax.merging.core import add_up
from multitask_jax.merging.fitted.batching import padded

if TYPE_CHECKING:  # imported on use: merging without data does without it
    import optax

Progress = Callable[[int, jax.Array], None]


def prediction_entropy(logits: jax.Array) -> jax.Array:
    """H = -sum_y p(y|x) log p(y|x) in nats, over the last axis."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def one_each(apply_fn: Any, count: int) -> tuple[Callable[..., Any], ...]:
    """A function for each task: one for all, or a list of them (heads that differ).

    Raises:
      ValueError: another number of functions.
    """
    if callable(apply_fn):
        return (apply_fn,) * count
    if len(apply_fn) != count:
        raise ValueError(f"got {len(apply_fn)} functions for {count} models")
    return tuple(apply_fn)


def minimise_entropy(
    predict: Callable[[Any, Any, int, Any], jax.Array],
    variables: Any,
    constants: Any,
    batches: Sequence[Iterable[Any]],
    *,
    steps: int,
    learning_rate: float,
    optimiser: "optax.GradientTransformation | None" = None,
    project: Callable[[Any], Any] = lambda v: v,
    progress: Progress | None = None,
) -> tuple[Any, jax.Array]:
    """Minimises sum_t mean_x H(predict(variables, constants, t, x)).

    Args:
      predict: logits of task t's inputs.
      variables: pytree that is fitted.
      constants: pytree that is not (an argument, so that it is not compiled in).
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

    def loss(variables: Any, constants: Any, data: Sequence[Any]) -> jax.Array:
        terms = []
        for t, (inputs, mask) in enumerate(data):
            h = prediction_entropy(predict(variables, constants, t, inputs))
            h = h.reshape(h.shape[0], -1).mean(axis=1)  # of sequences: over positions
            terms.append(jnp.sum(h * mask) / jnp.sum(mask))
        return add_up(terms)

    @jax.jit
    def step(variables: Any, state: Any, constants: Any, data: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(variables, constants, data)
        updates, state = optimiser.update(gradient, state, variables)
        return project(optax.apply_updates(variables, updates)), state, value

    state = optimiser.init(variables)
    streams = [_forever(b) for b in batches]
    history = []
    for i in range(steps):
        data = [next(s) for s in streams]
        variables, state, value = step(variables, state, constants, data)
        history.append(value)
        if progress is not None:
            progress(i, value)
    return variables, jnp.stack(history) if history else jnp.zeros(0)


def _forever(batches: Iterable[Any]) -> Iterator[tuple[Any, np.ndarray]]:
    while True:
        yield from padded(batches)

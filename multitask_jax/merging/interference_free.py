"""WUDI: a merged task vector that does not disturb the tasks' own inputs, without data.

Cheng et al. (2025). tau_i [out, in] of task i, m the merged one. A task vector's rows
lie in the span of the inputs it was trained on, so they stand in for those inputs.
"""

from typing import Any

import jax
import jax.numpy as jnp

from multitask_jax.merging.core import Array, Leaf, Transform, Values, add_up
from multitask_jax.merging.subspace import InputAxis, on_matrices


def minimise_interference(
    *,
    iterations: int = 400,
    learning_rate: Any = 1e-5,
    input_axis: InputAxis = "last",
) -> Transform:
    """min_m sum_i |(m - tau_i) tau_i^T|^2 / |tau_i|^2 by Adam, from m = sum_i tau_i.

    Equation 11. What is not a matrix is averaged.

    Args:
      iterations: steps of Adam; few of them stay near the sum.
      learning_rate: of Adam, in units of the weights.
      input_axis: the inputs of a matrix: "last" (torch), "first" (flax kernels).

    Raises:
      ValueError: a negative number of iterations, an unknown axis.
    """
    import optax  # a second to import, and for this method alone

    if iterations < 0:
        raise ValueError(f"iterations: got {iterations}, expected 0 or more")

    def merge(values: Values, leaf: Leaf) -> Array:
        # |(m - tau) tau^T|^2 = tr (m - tau) tau^T tau (m - tau)^T: with
        # A = sum tau^T tau / |tau|^2 and B = sum tau tau^T tau / |tau|^2 the gradient
        # is 2 (m A - B), one product a step whatever the number of tasks.
        grams = [_normalised_gram(tau) for tau in values]
        a = add_up(grams)
        b = add_up([tau @ g for tau, g in zip(values, grams, strict=True)])
        # eps_root is far below eps; it keeps gradients finite where a step is 0.
        adam = optax.adam(learning_rate, eps_root=1e-30)
        m = add_up(values)

        def step(_: Any, carry: tuple[Array, Any]) -> tuple[Array, Any]:
            m, state = carry
            updates, state = adam.update(2 * (m @ a - b), state)
            return optax.apply_updates(m, updates), state

        # scan, not fori_loop with a traced count: reverse-mode gradients.
        (m, _), _ = jax.lax.scan(
            lambda carry, i: (step(i, carry), None),
            (m, adam.init(m)),
            length=iterations,
        )
        return m

    return on_matrices(merge, input_axis)


def _normalised_gram(tau: Array) -> Array:
    """tau^T tau / |tau|^2; 0 for a task that did not change the matrix."""
    square = jnp.sum(tau * tau)
    some = square > 0
    return tau.T @ tau * jnp.where(some, 1 / jnp.where(some, square, 1), 0)

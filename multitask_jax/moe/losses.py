"""What keeps experts busy, and numbers that tell whether they are.

Legend: N tokens, E routed experts, K slots of a token, T tasks.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from multitask_jax.moe.gates import Routing

Array = jax.Array


def load(routing: Routing) -> Array:
    """f [E]: the share of filled slots of routed experts that each expert has."""
    e = routing.probabilities.shape[1]
    chosen = jnp.sum(jax.nn.one_hot(routing.experts, e), axis=(0, 1))
    return chosen / jnp.maximum(jnp.sum(chosen), 1)


def load_balance(routing: Routing) -> Array:
    """E sum_e f_e P_e, P_e the mean probability; 1 when balanced.

    Fedus et al. 2021 (arXiv 2101.03961), equations 4 to 6; f has no gradient.
    """
    e = routing.probabilities.shape[1]
    f = jax.lax.stop_gradient(load(routing))
    return e * jnp.sum(f * jnp.mean(routing.probabilities, axis=0))


def router_z(routing: Routing) -> Array:
    """Mean of log(sum_e exp(logit_e))^2, which keeps logits small.

    Zoph et al. 2022 (arXiv 2202.08906), equation 5.
    """
    return jnp.mean(jax.nn.logsumexp(routing.logits, axis=1) ** 2)


def importance(routing: Routing) -> Array:
    """Squared coefficient of variation of the experts' summed weights.

    Shazeer et al. 2017 (arXiv 1701.06538), equations 6 and 7.
    """
    e = routing.probabilities.shape[1]
    slots = jax.nn.one_hot(routing.experts, e) * routing.weights[..., None]
    total = jnp.sum(slots, axis=(0, 1))
    return jnp.var(total) / jnp.maximum(jnp.mean(total) ** 2, 1e-10)


def entropy(p: Array) -> Array:
    """-sum p log p over the last axis, in nats: [..., E] -> [...]."""
    return -jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1)


def mutual_information(routing: Routing, tasks: Array, *, count: int) -> Array:
    """I(task; expert) in nats: 0 if all tasks use experts alike, at most log T.

    sum_te p(t, e) log(p(t, e) / (p(t) p(e))), p(t, e) the share of filled slots.

    Args:
      routing: of N tokens.
      tasks: [N] ids.
      count: T.
    """
    e = routing.probabilities.shape[1]
    slots = jnp.sum(jax.nn.one_hot(routing.experts, e), axis=1)  # [N, E]
    p = jax.nn.one_hot(tasks, count).T @ slots
    p = p / jnp.maximum(jnp.sum(p), 1)
    apart = jnp.sum(p, axis=1, keepdims=True) * jnp.sum(p, axis=0, keepdims=True)
    return jnp.sum(jax.scipy.special.xlogy(p, p / jnp.where(apart > 0, apart, 1)))


def statistics(
    routing: Routing,
    kept: Array | None = None,
    *,
    tasks: Array | None = None,
    task_count: int | None = None,
) -> Mapping[str, Array]:
    """Scalars to log, by name.

    Args:
      routing: from `route`.
      kept: [N, K] of `Served`, for the share that was dropped.
      tasks: [N] ids, for the specialisation by task.
      task_count: T; needed with tasks.

    Returns:
      load/0, ..., load/E-1 and load/max (times E: 1 is balanced), dropped (share of
      filled slots), entropy/token and entropy/mean (of the gate, over log E: how
      undecided it is for a token, and how evenly it uses experts), specialisation
      (I(task; expert) / log T).

    Raises:
      ValueError: tasks without their number.
    """
    e = routing.probabilities.shape[1]
    f, p = load(routing), routing.probabilities
    top = jnp.log(float(e)) if e > 1 else 1.0
    out = {f"load/{i}": f[i] for i in range(e)}
    out |= {
        "load/max": e * jnp.max(f),
        "entropy/token": jnp.mean(entropy(p)) / top,
        "entropy/mean": entropy(jnp.mean(p, axis=0)) / top,
    }
    if kept is not None:
        # A slot that nobody serves has weight 0 and is not dropped.
        filled = routing.weights > 0
        lost = jnp.sum(filled & ~kept)
        out["dropped"] = lost / jnp.maximum(jnp.sum(filled), 1)
    if tasks is not None:
        if task_count is None:
            raise ValueError("tasks: needs task_count, the number of tasks")
        found = mutual_information(routing, tasks, count=task_count)
        out["specialisation"] = found / jnp.log(max(task_count, 2))
    return out

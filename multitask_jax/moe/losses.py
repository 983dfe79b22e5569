"""What keeps experts busy, and numbers that tell whether they are.

Legend: N tokens, E routed experts, K slots of a token, T tasks.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from multitask_jax.moe.gates import Routing, refuse_unknown

Array = jax.Array


def load(routing: Routing, *, weighted: bool = False) -> Array:
    """f [E]: the share of filled slots of routed experts that each expert has.

    Args:
      routing: of N tokens.
      weighted: slots count with their weights. Soft gates fill all slots of all tokens,
        and only weights tell what they choose.
    """
    return _shares(jnp.sum(_slots(routing, weighted), axis=0))


def _slots(routing: Routing, weighted: bool) -> Array:
    """How often (or how much) each token is an expert's, [N, E]."""
    each = jax.nn.one_hot(routing.experts, routing.probabilities.shape[1])
    if weighted:
        each *= routing.weights[..., None]
    return jnp.sum(each, axis=1)


def _shares(x: Array) -> Array:
    """x over its sum; 0 where that is 0."""
    total = jnp.sum(x)
    return x / jnp.where(total > 0, total, 1)


def load_balance(routing: Routing, *, weighted: bool = False) -> Array:
    """E sum_e f_e P_e, P_e the mean probability; 1 when balanced.

    Fedus et al. 2021 (arXiv 2101.03961), equations 4 to 6; f has no gradient.

    Args:
      routing: of N tokens.
      weighted: as for `load`. Without, it is 1 for all soft gates.
    """
    e = routing.probabilities.shape[1]
    f = jax.lax.stop_gradient(load(routing, weighted=weighted))
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


def mutual_information(
    routing: Routing, tasks: Array, *, count: int, weighted: bool = False
) -> Array:
    """I(task; expert) in nats: 0 if all tasks use experts alike, at most log T.

    sum_te p(t, e) log(p(t, e) / (p(t) p(e))), p(t, e) the share of filled slots.

    Args:
      routing: of N tokens.
      tasks: [N] ids; under `jit` tokens whose id is out of range do not count.
      count: T.
      weighted: as for `load`.

    Raises:
      ValueError: ids out of range where they are known.
    """
    refuse_unknown("tasks", tasks, count)
    p = _shares(jax.nn.one_hot(tasks, count).T @ _slots(routing, weighted))
    apart = jnp.sum(p, axis=1, keepdims=True) * jnp.sum(p, axis=0, keepdims=True)
    return jnp.sum(jax.scipy.special.xlogy(p, p / jnp.where(apart > 0, apart, 1)))


def statistics(
    routing: Routing,
    kept: Array | None = None,
    *,
    tasks: Array | None = None,
    task_count: int | None = None,
    weighted: bool = False,
) -> Mapping[str, Array]:
    """Scalars to log, by name.

    Args:
      routing: from `route`.
      kept: [N, K] of `Served`, for the share that was dropped.
      tasks: [N] ids, for the specialisation by task.
      task_count: T; needed with tasks.
      weighted: as for `load`; load and specialisation of soft gates want it.

    Returns:
      load/0, ..., load/E-1 and load/max (times E: 1 is balanced), dropped (share of
      routed experts' filled slots), unserved (share of tokens that no routed expert
      serves: all their slots dropped or empty, as those of a hard id out of range),
      entropy/token and entropy/mean (of the gate, over log E: how undecided it is for a
      token, and how evenly it uses experts), specialisation (I(task; expert) / log T)
      and tasks/unknown (share of tokens of an id out of range, which it leaves out).

    Raises:
      ValueError: tasks without their number, or ids out of range where they are known.
    """
    e = routing.probabilities.shape[1]
    f, p = load(routing, weighted=weighted), routing.probabilities
    top = jnp.log(float(e)) if e > 1 else 1.0
    out = {f"load/{i}": f[i] for i in range(e)}
    out |= {
        "load/max": e * jnp.max(f),
        "entropy/token": jnp.mean(entropy(p)) / top,
        "entropy/mean": entropy(jnp.mean(p, axis=0)) / top,
    }
    filled = (routing.weights > 0) & (routing.experts < e)
    if kept is not None:
        # A slot that nobody serves has weight 0 and is not dropped; shared experts
        # drop nobody.
        lost = jnp.sum(filled & ~kept)
        out["dropped"] = lost / jnp.maximum(jnp.sum(filled), 1)
        filled &= kept
    out["unserved"] = 1 - jnp.mean(jnp.any(filled, axis=1))
    if tasks is not None:
        if task_count is None:
            raise ValueError("tasks: needs task_count, the number of tasks")
        found = mutual_information(routing, tasks, count=task_count, weighted=weighted)
        out["specialisation"] = found / jnp.log(max(task_count, 2))
        out["tasks/unknown"] = jnp.mean((tasks < 0) | (tasks >= task_count))
    return out

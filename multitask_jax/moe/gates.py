"""Gates: which experts serve a token, and with what weights. One `route` for them all.

Legend: N tokens, D width, E routed experts, S shared ones, K slots of a token, C tokens
of an expert. A slot that nobody serves holds the expert E + S, one past the last.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Kind = Literal["top_k", "expert_choice", "soft", "hard"]
Normalize = Literal["before_topk", "after_topk"]

_OPTIONS: dict[str, tuple[str, ...]] = {  # of `route`, by kind
    "top_k": ("k", "normalize", "noise", "key"),
    "expert_choice": ("k", "noise", "key"),
    "soft": ("noise", "key"),
    "hard": (),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Who serves each token; a pytree."""

    experts: Array  # [N, K] int32
    weights: Array  # [N, K] float32, 0 in slots that nobody serves
    logits: Array  # [N, E], with the noise if there is any
    probabilities: Array  # [N, E]: the gate's softmax, whatever was selected
    # S, whose slots are the last: no array, so that dispatchers see it under `jit`.
    shared: int = dataclasses.field(default=0, metadata={"static": True})


def init_gate(
    key: Array,
    width: int,
    experts: int,
    *,
    stddev: float = 0.02,
    bias: bool = False,
) -> Any:
    """A linear gate, {"kernel": [D, E]}; with `bias`, "bias": [E] as well."""
    gate = {"kernel": stddev * jax.random.normal(key, (width, experts))}
    return gate | {"bias": jnp.zeros(experts)} if bias else gate


def gate_logits(gate: Any, x: Array) -> Array:
    """x W (+ b), in float32 whatever the tokens are in: [..., D] -> [..., E].

    Several gates, such as one a task on raw inputs (MMoE: Ma et al. 2018), are one call
    with kernels [T, D, E] under `jax.vmap`.
    """
    # Devices that round float32's factors would choose others of experts nearly tied.
    x, kernel = x.astype(jnp.float32), gate["kernel"].astype(jnp.float32)
    logits = jnp.matmul(x, kernel, precision="highest")
    bias = gate.get("bias")
    if bias is None:
        return logits
    return logits + bias.reshape((1,) * (logits.ndim - 1) + bias.shape)


def route(
    scores: Array,
    *,
    kind: Kind = "top_k",
    k: int | None = None,
    normalize: Normalize | None = None,
    noise: Array | float | None = None,
    key: Array | None = None,
    shared: int = 0,
    experts: int | None = None,
) -> Routing:
    """Chooses experts for tokens.

    - `top_k`: each token takes its k best experts (Shazeer et al. 2017, arXiv
      1701.06538; k = 1: Fedus et al. 2021, arXiv 2101.03961).
    - `expert_choice`: each expert takes its k N / E best tokens, so that all are
      equally busy (Zhou et al. 2022, arXiv 2202.09368). What it takes depends on the
      other tokens: not for a causal model.
    - `soft`: every expert, weighted by the softmax (MMoE: Ma et al. 2018).
    - `hard`: the expert of the token's task or modality, no gate (H-M2oE of MetaBEV).

    Args:
      scores: the gate's logits [N, E]; for `hard`, ids [N] of experts.
      kind: see above.
      k: experts a token, 1 by default (on average, with `expert_choice`); not of `soft`
        and `hard`.
      normalize: of `top_k`. "before_topk", the default: weights are the softmax over
        all experts, so that the gate learns also at k = 1; "after_topk": over the
        chosen ones (they sum to 1; with k = 1 the weight is always 1 and the gate has
        no gradient).
      noise: standard deviation of normal noise on the logits, a number or [N, E]; not
        of `hard`, which has none.
      key: of the noise.
      shared: experts after the routed ones that serve every token with weight 1.
      experts: E; needed by `hard`, otherwise read off the logits.

    Returns:
      Routing; K is k, E or 1 (kinds `top_k`; `expert_choice` and `soft`; `hard`), plus
      `shared`. Under `jit` an id of `hard` out of range is served by nobody, and
      `losses.statistics` tell how many are.

    Raises:
      ValueError: a shape, k or an option that does not fit, or ids out of range where
        they are known.
    """
    _refuse_idle(kind, k=k, normalize=normalize, noise=noise, key=key)
    k = 1 if k is None else k
    if kind == "hard":
        routing = _hard(scores, experts)
    else:
        logits = _noisy(_checked(scores, k, experts), noise, key)
        p = jax.nn.softmax(logits, axis=-1)
        if kind == "top_k":
            chosen, weights = _top_k(logits, p, k, normalize or "before_topk")
        elif kind == "expert_choice":
            chosen, weights = _expert_choice(p, k)
        else:
            chosen, weights = jnp.arange(p.shape[1])[None], p
        # Nobody is E here; with shared experts it moves up, one past the last of them.
        routing = Routing(jnp.broadcast_to(chosen, weights.shape), weights, logits, p)
    return _with_shared(routing, shared)


def refuse_unknown(what: str, ids: Array, count: int) -> None:
    """Ids are 0 to count - 1, as far as can be seen: under `jit` there are no values.

    Raises:
      ValueError: others.
    """
    if isinstance(ids, jax.core.Tracer):
        return
    # By NumPy: within `jit` an operation of JAX on constants has no value either.
    known = np.asarray(ids)
    if known.size and (known.min() < 0 or known.max() >= count):
        raise ValueError(
            f"{what}: got ids from {known.min()} to {known.max()}, expected 0 to"
            f" {count - 1}; number them from 0"
        )


def _refuse_idle(kind: str, **options: Any) -> None:
    if kind not in _OPTIONS:
        raise ValueError(
            f"kind: got {kind!r}, expected top_k, expert_choice, soft or hard"
        )
    given = [name for name, value in options.items() if value is not None]
    if idle := [name for name in given if name not in _OPTIONS[kind]]:
        raise ValueError(
            f"kind={kind!r}: got {', '.join(idle)}, expected"
            f" {', '.join(_OPTIONS[kind]) or 'none of them'}; leave the rest out"
        )


def _checked(logits: Array, k: int, experts: int | None) -> Array:
    if logits.ndim != 2 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            f"scores: got {logits.dtype}{list(logits.shape)}, expected logits [N, E]"
            " (flatten the tokens; ids [N] are for kind='hard')"
        )
    count = logits.shape[1]
    if experts not in (None, count) or not 1 <= k <= count:
        raise ValueError(
            f"got k={k}, experts={experts} for logits of {count} experts; expected k"
            f" from 1 to {count}"
        )
    return logits.astype(jnp.float32)


def _noisy(logits: Array, noise: Array | float | None, key: Array | None) -> Array:
    if noise is None:
        return logits
    if key is None:
        raise ValueError("noise: needs a key as well")
    return logits + noise * jax.random.normal(key, logits.shape)


def _top_k(logits: Array, p: Array, k: int, normalize: str) -> tuple[Array, Array]:
    chosen = _best(jax.lax.stop_gradient(logits), k)
    if normalize == "before_topk":
        return chosen, jnp.take_along_axis(p, chosen, axis=1)
    if normalize == "after_topk":
        return chosen, jax.nn.softmax(jnp.take_along_axis(logits, chosen, 1), axis=1)
    raise ValueError(
        f"normalize: got {normalize!r}, expected before_topk or after_topk"
    )


def _best(logits: Array, k: int) -> Array:
    """The k best of each row, best first; of equal ones the first, as `lax.top_k`.

    k rounds of argmax: where tokens are sharded, each device looks at its own, while
    XLA gathers all logits for `lax.top_k`.
    """
    left = jnp.maximum(logits, jnp.finfo(logits.dtype).min)  # -inf: taken already
    places = jnp.arange(logits.shape[1])[None]
    chosen = []
    for _ in range(k):
        chosen.append(jnp.argmax(left, axis=1).astype(jnp.int32))
        left = jnp.where(places == chosen[-1][:, None], -jnp.inf, left)
    return jnp.stack(chosen, axis=1)


def _expert_choice(p: Array, k: int) -> tuple[Array, Array]:
    n, e = p.shape
    size = min(n, -(-k * n // e))
    tokens = jax.lax.top_k(jax.lax.stop_gradient(p).T, size)[1]  # [E, C]
    taken = jnp.zeros((e, n), bool).at[jnp.arange(e)[:, None], tokens].set(True).T
    return jnp.where(taken, jnp.arange(e)[None], e), jnp.where(taken, p, 0)


def _hard(ids: Array, experts: int | None) -> Routing:
    if experts is None or ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"kind='hard': got {ids.dtype}{list(ids.shape)}, experts={experts};"
            " expected integer ids [N] and the number of experts"
        )
    refuse_unknown("kind='hard'", ids, experts)
    here = (ids >= 0) & (ids < experts)
    chosen = jnp.where(here, ids, experts).astype(jnp.int32)[:, None]
    one_hot = jax.nn.one_hot(chosen[:, 0], experts)
    logits = jnp.where(one_hot > 0, 0.0, -jnp.inf)
    return Routing(chosen, here.astype(jnp.float32)[:, None], logits, one_hot)


def _with_shared(routing: Routing, shared: int) -> Routing:
    if not shared:
        return routing
    n, e = routing.probabilities.shape
    always = jnp.broadcast_to(jnp.arange(e, e + shared)[None], (n, shared))
    nobody = routing.experts == e
    return dataclasses.replace(
        routing,
        experts=jnp.concatenate(
            [jnp.where(nobody, e + shared, routing.experts), always], axis=1
        ),
        weights=jnp.concatenate([routing.weights, jnp.ones((n, shared))], axis=1),
        shared=shared,
    )

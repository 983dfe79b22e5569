"""Dispatch and combine: y_n = sum_k weights_nk expert_(experts_nk)(x_n), four ways.

    everyone   every expert on every token; the reference
    capacity   each expert has room for C tokens; what does not fit is dropped, counted
    dropless   the smallest of some rooms that nothing is dropped in
    grouped    tokens sorted by expert, one grouped product (`lax.ragged_dot`)

All agree where nothing is dropped. Rows move by gathers alone, forward and backward:
there is neither a scatter of rows nor a [tokens, experts, capacity] mask.

Legend: N tokens, D width, E experts (shared ones included), K slots of a token, A = N K
slots in all, C tokens an expert has room for, R rows of a buffer.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from multitask_jax.moe import experts as networks
from multitask_jax.moe.experts import Expert
from multitask_jax.moe.gates import Routing

Array = jax.Array
Priority = Literal["position", "weight"]


class Served(NamedTuple):
    """What experts made of the tokens."""

    y: Array  # [N, D]
    kept: Array  # [N, K] bool: slots that were served; dropped and empty ones were not


def everyone(expert: Expert, params: Any, x: Array, routing: Routing) -> Served:
    """The reference: every expert serves every token, weights choose."""
    count = count_of(params, routing)[0]
    y = expert(params, x[None], batched)  # [E, N, D]
    slots = jax.nn.one_hot(routing.experts, count) * routing.weights[..., None]
    w = jnp.sum(slots, axis=1)  # [N, E]
    y = jnp.einsum("ne,end->nd", w.astype(y.dtype), y)
    return Served(y, routing.experts < count)


def capacity(
    expert: Expert,
    params: Any,
    x: Array,
    routing: Routing,
    *,
    room: int | None = None,
    factor: float = 1.25,
    priority: Priority = "position",
    one_by_one: bool = False,
) -> Served:
    """Experts with room for C tokens each; the rest is dropped: it gets nothing.

    Shared experts serve every token, whatever the room.

    Args:
      expert: from `experts`, or alike.
      params: of E experts.
      x: [N, D].
      routing: from `route`.
      room: C; by default `factor` times an equal share, N K / E, of routed experts
        and slots. With `expert_choice`, whose slots are mostly empty, the experts take
        ceil(k N / E) each: pass that.
      factor: see room.
      priority: who is dropped last. "position": first choices before second ones,
        earlier tokens before later ones (GShard: Lepikhin et al. 2020, arXiv
        2006.16668); "weight": the heaviest (Riquelme et al. 2021, arXiv 2106.05974),
        which looks at the whole batch.
      one_by_one: a product for each expert, not one for all. Faster on a CPU, but
        programs grow with E; not for experts on several devices.
    """
    count, shared = count_of(params, routing)
    if shared:
        serve = functools.partial(
            capacity, expert, room=room, factor=factor, priority=priority,
            one_by_one=one_by_one,
        )  # fmt: skip
        return beside_shared(serve, expert, params, x, routing, shared)
    if room is None:
        room = capacity_of(routing, count, factor)
    plan = plan_buffers(routing, count, room, priority=priority)
    rows = to_buffers(x, plan)
    if one_by_one:
        each = _unstacked((params, rows))
        y = jnp.concatenate([expert(p, r, _plain) for p, r in each])
    else:
        y = expert(params, rows, batched)
    return Served(from_buffers(y, plan, routing.weights), plan.kept)


def count_of(params: Any, routing: Routing) -> tuple[int, int]:
    """E, and how many of them are shared: what the gate has no logit for.

    Raises:
      ValueError: fewer experts than the gate and the routing's shared ones, or more.
    """
    count, e = networks.count(params), routing.probabilities.shape[1]
    if count < e:
        raise ValueError(f"got {count} experts for a gate of {e}")
    if count - e != routing.shared:
        raise ValueError(
            f"got {count} experts for a gate of {e} and {routing.shared} shared ones:"
            f" route with shared={count - e}"
        )
    return count, routing.shared


def beside_shared(
    serve: Callable[..., Served],
    expert: Expert,
    params: Any,
    x: Array,
    routing: Routing,
    shared: int,
) -> Served:
    """The last `shared` experts meet every token; the others serve by `serve`.

    Args:
      serve: (params, x, routing) of routed experts alone -> Served.
      expert, params, x, routing: as for `capacity`, shared experts included.
      shared: how many they are.
    """
    e = routing.probabilities.shape[1]
    first, last = (
        jax.tree.map(lambda p, rows=rows: p[rows], params)
        for rows in (slice(e), slice(e, None))
    )
    weights, always = routing.weights[:, :-shared], routing.weights[:, -shared:]
    nobody_is_last = jnp.minimum(routing.experts[:, :-shared], e)
    own = dataclasses.replace(
        routing, experts=nobody_is_last, weights=weights, shared=0
    )
    served = serve(first, x, own)
    ys = expert(last, x[None], batched)  # [S, N, D]
    y = served.y + jnp.einsum("ns,snd->nd", always.astype(ys.dtype), ys)
    return Served(
        y, jnp.concatenate([served.kept, jnp.ones(always.shape, bool)], axis=1)
    )


def capacity_of(routing: Routing, experts: int, factor: float = 1.25) -> int:
    """C = ceil(factor N K / E), at most N: an expert meets a token once."""
    n, k = routing.experts.shape
    return max(1, math.ceil(min(n, factor * n * k / experts)))


def dropless(
    expert: Expert,
    params: Any,
    x: Array,
    routing: Routing,
    *,
    factors: Sequence[float] = (1.0625, 1.25, 1.5, 2.0),
    one_by_one: bool = False,
) -> Served:
    """`capacity` with the smallest room that all fit in, chosen while it runs.

    A program is compiled for each room, and only one of them runs (all of them under
    `jax.vmap`). The more evenly the gate spreads tokens, the less is padded. The
    backward pass computes the experts again: what it needs would have to be kept in the
    sizes of all rooms, since which of them runs is not known when it is compiled.

    Args:
      expert: from `experts`, or alike.
      params: of E experts.
      x: [N, D].
      routing: from `route`.
      factors: rooms over an equal share; N is tried last, and always enough.
      one_by_one: as for `capacity`.
    """
    count, shared = count_of(params, routing)
    if shared:
        serve_own = functools.partial(
            dropless, expert, factors=factors, one_by_one=one_by_one
        )
        return beside_shared(serve_own, expert, params, x, routing, shared)
    rooms = sorted({capacity_of(routing, count, f) for f in (*factors, math.inf)})
    taken = jnp.sum(jax.nn.one_hot(routing.experts, count, dtype=int), axis=(0, 1))
    serve = [
        jax.checkpoint(
            functools.partial(capacity, expert, room=room, one_by_one=one_by_one)
        )
        for room in rooms
    ]
    too_small = jnp.sum(jnp.max(taken) > jnp.array(rooms[:-1], int))
    return jax.lax.switch(too_small, serve, params, x, routing)


def grouped(expert: Expert, params: Any, x: Array, routing: Routing) -> Served:
    """Rows sorted by expert meet their expert's weights in one grouped product.

    Nothing is dropped or padded. For accelerators: on a CPU `lax.ragged_dot` multiplies
    every row with every expert, and `dropless` is many times faster.
    """
    count = count_of(params, routing)[0]
    plan, sizes = plan_groups(routing, count)
    rows = to_buffers(x, plan)
    owner = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side="right")

    def linear(x: Array, layer: Any) -> Array:
        y = jax.lax.ragged_dot(x, layer["kernel"].astype(x.dtype), sizes)
        if "bias" not in layer:
            return y
        return y + _take(layer["bias"], owner).astype(y.dtype)

    y = expert(params, rows, linear)
    return Served(from_buffers(y, plan, routing.weights), plan.kept)


class Plan(NamedTuple):
    """Where rows go. `slots` and `places` are inverse where both are in range."""

    slots: Array  # [...]: the slot (k N + n) in each row of the buffers; A: empty
    places: Array  # [N, K]: the row of each slot, counted through; R or more: none
    kept: Array  # [N, K] bool


def plan_buffers(
    routing: Routing, experts: int, room: int, *, priority: Priority = "position"
) -> Plan:
    """Rows [E, C] of equal room; slots [E, C]."""
    order, starts, rank = _sorted(routing, experts, priority)
    c = jnp.arange(room)[None]
    filled = c < (starts[1:] - starts[:-1])[:, None]
    at = jnp.minimum(starts[:-1, None] + c, len(order) - 1)
    slots = jnp.where(filled, order[at], len(order))
    kept = (routing.experts < experts) & (rank < room)
    places = jnp.where(kept, routing.experts * room + rank, experts * room)
    return Plan(slots, places, kept)


def plan_groups(routing: Routing, experts: int) -> tuple[Plan, Array]:
    """Rows [A] by expert, slots that nobody serves last; sizes [E] of the groups."""
    order, starts, rank = _sorted(routing, experts, "position")
    sizes = starts[1:] - starts[:-1]
    slots = jnp.where(jnp.arange(len(order)) < starts[-1], order, len(order))
    kept = routing.experts < experts
    own = jnp.minimum(routing.experts, experts - 1)
    places = jnp.where(kept, starts[own] + rank, len(order))
    return Plan(slots, places, kept), sizes


def _sorted(
    routing: Routing, experts: int, priority: str
) -> tuple[Array, Array, Array]:
    """Slots by expert, where each expert's begin [E + 1], and each slot's rank [N, K].

    Slots are numbered k N + n, so that a stable sort puts first choices first.
    """
    n, k = routing.experts.shape
    by = routing.experts.T.reshape(-1)
    slot = jnp.arange(n * k)
    if priority == "position":
        by, order = jax.lax.sort((by, slot), num_keys=1, is_stable=True)
    elif priority == "weight":
        heavy = -jax.lax.stop_gradient(routing.weights).T.reshape(-1)
        by, _, order = jax.lax.sort((by, heavy, slot), num_keys=2, is_stable=True)
    else:
        raise ValueError(f"priority: got {priority!r}, expected position or weight")
    starts = jnp.searchsorted(by, jnp.arange(experts + 1))
    begin = starts[jnp.minimum(by, experts)]
    rank = jnp.zeros(n * k, jnp.int32).at[order].set(slot - begin)
    return order, starts, rank.reshape(k, n).T


def to_buffers(x: Array, plan: Plan) -> Array:
    """Tokens [N, D] to rows [..., D]; zeros where a row is empty."""
    rows = _spread(x, _tokens(plan), plan.places)
    return rows.reshape(*plan.slots.shape, x.shape[1])


def from_buffers(y: Array, plan: Plan, weights: Array) -> Array:
    """Rows [..., D] to tokens [N, D]: the weighted sum over each token's slots."""
    flat = plan.slots.reshape(-1)
    by_row = _take(weights.T.reshape(-1), flat).astype(y.dtype)
    rows = y.reshape(-1, y.shape[-1]) * by_row[:, None]
    return _collect(rows, _tokens(plan), plan.places)


def _tokens(plan: Plan) -> Array:
    """The token of each row, N where it is empty."""
    n, k = plan.places.shape
    flat = plan.slots.reshape(-1)
    return jnp.where(flat < n * k, flat % n, n)


# Spreading tokens over rows and collecting rows by token are each other's transposes,
# and both are gathers: JAX's own derivative of either would be a scatter.


@jax.custom_vjp
def _spread(x: Array, tokens: Array, places: Array) -> Array:
    """row_r = x_(tokens_r): [N, D] -> [R, D]."""
    return _take(x, tokens)


@jax.custom_vjp
def _collect(rows: Array, tokens: Array, places: Array) -> Array:
    """y_n = sum_k row_(places_nk): [R, D] -> [N, D]."""
    return functools.reduce(jnp.add, [_take(rows, p) for p in places.T])


def _take(x: Array, at: Array) -> Array:
    return x.at[at].get(mode="fill", fill_value=0)


_spread.defvjp(
    lambda x, tokens, places: (_spread(x, tokens, places), (tokens, places)),
    lambda at, d: (_collect(d, *at), None, None),
)
_collect.defvjp(
    lambda rows, tokens, places: (_collect(rows, tokens, places), (tokens, places)),
    lambda at, d: (_spread(d, *at), None, None),
)


def batched(x: Array, layer: Any) -> Array:
    """Rows [E or 1, C, D], expert e's weights for x_e."""
    kernel = layer["kernel"]
    x = jnp.broadcast_to(x, (len(kernel), *x.shape[1:]))
    y = jnp.einsum("ecd,edh->ech", x, kernel.astype(x.dtype))
    if "bias" not in layer:
        return y
    return y + layer["bias"][:, None].astype(y.dtype)


def _unstacked(experts: Any) -> list[Any]:
    """Trees of one expert each.

    The transpose is one stack; that of p[e] is a sum of E gradients, each padded.
    """
    leaves, structure = jax.tree.flatten(experts)
    each = zip(*map(jnp.unstack, leaves), strict=True)
    return [structure.unflatten(own) for own in each]


def _plain(x: Array, layer: Any) -> Array:
    """Rows [C, D], one expert's weights."""
    y = x @ layer["kernel"].astype(x.dtype)
    return y + layer["bias"][None].astype(y.dtype) if "bias" in layer else y

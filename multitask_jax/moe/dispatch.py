"""Dispatch and combine: y_n = sum_k weights_nk expert_(experts_nk)(x_n), three ways.

    everyone   every expert on every token; the reference
    capacity   each expert has room for C tokens; what does not fit is dropped, counted
    grouped    tokens sorted by expert, one grouped product; nothing is dropped

All agree where nothing is dropped. Rows move by gathers alone, forward and backward:
there is neither a scatter of rows nor a [tokens, experts, capacity] mask.

Legend: N tokens, D width, E experts (shared ones included), K slots of a token, A = N K
slots in all, C tokens an expert has room for, R rows of a buffer, B rows of a block.
"""

import functools
import math
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
    count = networks.count(params)
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
) -> Served:
    """Experts with room for C tokens each; the rest is dropped: it gets nothing.

    Args:
      expert: from `experts`, or alike.
      params: of E experts.
      x: [N, D].
      routing: from `route`.
      room: C; by default `factor` times an equal share, N K / E.
      factor: see room.
      priority: who is dropped last. "position": first choices before second ones,
        earlier tokens before later ones (GShard: Lepikhin et al. 2020, arXiv
        2006.16668); "weight": the heaviest (Riquelme et al. 2021, arXiv 2106.05974),
        which looks at the whole batch.
    """
    count = networks.count(params)
    if room is None:
        room = capacity_of(routing, count, factor)
    plan = plan_buffers(routing, count, room, priority=priority)
    y = expert(params, to_buffers(x, plan), batched)
    return Served(from_buffers(y, plan, routing.weights), plan.kept)


def capacity_of(routing: Routing, experts: int, factor: float = 1.25) -> int:
    """C = ceil(factor N K / E), at most N: an expert meets a token once."""
    n, k = routing.experts.shape
    return max(1, min(n, math.ceil(factor * n * k / experts)))


def grouped(
    expert: Expert,
    params: Any,
    x: Array,
    routing: Routing,
    *,
    block: int | None = None,
) -> Served:
    """Dropless: rows sorted by expert meet their expert's weights in one product.

    Args:
      expert: from `experts`, or alike.
      params: of E experts.
      x: [N, D].
      routing: from `route`.
      block: None multiplies by `jax.lax.ragged_dot`. A number B starts each group at a
        multiple of B rows and multiplies block by block, as MegaBlocks does (Gale et
        al. 2022, arXiv 2211.15841): on a CPU, where ragged_dot multiplies every row
        with every expert, this is many times faster.
    """
    count = networks.count(params)
    plan, sizes = plan_groups(routing, count, block or 1)
    rows = to_buffers(x, plan)
    owner = jnp.repeat(
        jnp.arange(count + 1),
        jnp.append(sizes, len(rows) - jnp.sum(sizes)),
        total_repeat_length=len(rows),
    )
    if block is None:
        linear = functools.partial(_ragged, sizes=sizes, owner=owner)
    else:
        linear = functools.partial(_by_block, owner=owner, block=block)
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


def plan_groups(routing: Routing, experts: int, block: int = 1) -> tuple[Plan, Array]:
    """Rows [R] by expert, each group from a multiple of `block`; sizes [E] so padded.

    R is what the worst case needs: A + E (B - 1), rounded up to blocks.
    """
    order, starts, rank = _sorted(routing, experts, "position")
    count = starts[1:] - starts[:-1]
    sizes = -(-count // block) * block
    begins = jnp.cumsum(sizes) - sizes
    total = -(-(len(order) + experts * (block - 1)) // block) * block
    # The expert of each row, by the last group that begins at or before it.
    row = jnp.arange(total)
    owner = jnp.searchsorted(jnp.cumsum(sizes), row, side="right")
    own = jnp.minimum(owner, experts - 1)
    c = row - begins[own]
    filled = (owner < experts) & (c < count[own])
    at = jnp.minimum(starts[own] + c, len(order) - 1)
    slots = jnp.where(filled, order[at], len(order))
    kept = routing.experts < experts
    own = jnp.minimum(routing.experts, experts - 1)
    places = jnp.where(kept, begins[own] + rank, total)
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


def _ragged(x: Array, layer: Any, *, sizes: Array, owner: Array) -> Array:
    """Rows [R, D] by groups."""
    y = jax.lax.ragged_dot(x, layer["kernel"].astype(x.dtype), sizes)
    if "bias" not in layer:
        return y
    return y + _take(layer["bias"], owner).astype(y.dtype)


def _by_block(x: Array, layer: Any, *, owner: Array, block: int) -> Array:
    """Rows [R, D] whose groups begin at multiples of the block."""
    kernel = layer["kernel"].astype(x.dtype)
    # Blocks past the last group are empty; any weights will do.
    which = jnp.minimum(owner[::block], len(kernel) - 1)
    y = block_dot(x, kernel, which)
    if "bias" not in layer:
        return y
    bias = layer["bias"][which].astype(y.dtype)
    rows = y.reshape(len(which), block, -1) + bias[:, None]
    return rows.reshape(y.shape)


@jax.custom_vjp
def block_dot(x: Array, kernel: Array, which: Array) -> Array:
    """Blocks of rows [R, D], the b-th times kernel_(which_b) of [E, D, H] -> [R, H]."""

    def product(_: None, block: tuple[Array, Array]) -> tuple[None, Array]:
        rows, e = block
        return None, rows @ jax.lax.dynamic_index_in_dim(kernel, e, keepdims=False)

    blocks = x.reshape(len(which), -1, x.shape[1])
    return jax.lax.scan(product, None, (blocks, which))[1].reshape(len(x), -1)


def _block_dot_forward(x: Array, kernel: Array, which: Array) -> Any:
    return block_dot(x, kernel, which), (x, kernel, which)


def _block_dot_backward(saved: Any, d: Array) -> tuple[Array, Array, None]:
    x, kernel, which = saved

    def product(dk: Array, block: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        rows, drows, e = block
        w = jax.lax.dynamic_index_in_dim(kernel, e, keepdims=False)
        old = jax.lax.dynamic_index_in_dim(dk, e, keepdims=False)
        dk = jax.lax.dynamic_update_index_in_dim(dk, old + rows.T @ drows, e, 0)
        return dk, drows @ w.T

    blocks = [z.reshape(len(which), -1, z.shape[1]) for z in (x, d)]
    dk, dx = jax.lax.scan(product, jnp.zeros_like(kernel), (*blocks, which))
    return dx.reshape(x.shape), dk, None


block_dot.defvjp(_block_dot_forward, _block_dot_backward)

"""Expert parallelism: experts live on different devices, tokens travel to them.

Each device holds N / P tokens and E / P experts. It fills buffers for all E experts,
an all_to_all takes them where the experts are, another brings the results back (GShard:
Lepikhin et al. 2020, arXiv 2006.16668). Other axes of the mesh cut tokens further, and
there the experts are copies. Shared experts serve each device's own tokens.

Legend: N tokens, D width, E experts, K slots of a token, P devices of the expert axis,
C tokens of one device that an expert has room for.
"""

import functools
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from multitask_jax.moe import dispatch
from multitask_jax.moe.dispatch import Priority, Served
from multitask_jax.moe.experts import Expert
from multitask_jax.moe.gates import Routing

Array = jax.Array


def expert_parallel(
    expert: Expert,
    params: Any,
    x: Array,
    routing: Routing,
    *,
    mesh: Mesh,
    axis: str = "expert",
    room: int | None = None,
    factor: float = 1.25,
    priority: Priority = "position",
) -> Served:
    """`dispatch.capacity` over a mesh; call it under `jax.jit`.

    Args:
      expert: from `experts`, or alike.
      params: of E experts, cut along their leading axis over `axis`. With S shared ones
        after them leave all whole, for cut through E + S the parts of routed experts
        are not where their tokens go; or keep shared experts apart, as
        `layers.moe.MoE` does.
      x: [N, D], cut along N over all axes of the mesh.
      routing: from `route`, cut likewise.
      mesh: from `sharding.make_mesh`.
      axis: the mesh's axis of experts.
      room: C, of each expert for each device's tokens; by default `factor` times an
        equal share.
      factor: see room.
      priority: as for `dispatch.capacity`, among one device's tokens.

    Raises:
      ValueError: the mesh lacks the axis, or divides tokens or experts with a rest, or
        there are fewer experts than the gate has.
    """
    e = routing.probabilities.shape[1]
    if shared := dispatch.count_of(params, routing)[1]:
        serve = functools.partial(
            expert_parallel, expert, mesh=mesh, axis=axis, room=room, factor=factor,
            priority=priority,
        )  # fmt: skip
        return dispatch.beside_shared(serve, expert, params, x, routing, shared)
    if axis not in mesh.shape:
        raise ValueError(f"axis: got {axis!r}, the mesh has {', '.join(mesh.shape)}")
    for what, size, parts in (
        ("experts", e, mesh.shape[axis]),
        ("tokens", len(x), mesh.size),
    ):
        if size % parts:
            raise ValueError(f"got {size} {what}, expected a multiple of {parts}")

    def local(params: Any, x: Array, routing: Routing) -> Served:
        c = dispatch.capacity_of(routing, e, factor) if room is None else room
        plan = dispatch.plan_buffers(routing, e, c, priority=priority)
        rows = dispatch.to_buffers(x, plan)  # [E, C, D], for everyone's experts
        rows = jax.lax.all_to_all(rows, axis, 0, 1, tiled=True)  # [E / P, P C, D]
        y = expert(params, rows, dispatch.batched)
        y = jax.lax.all_to_all(y, axis, 1, 0, tiled=True)  # [E, C, D]
        return Served(dispatch.from_buffers(y, plan, routing.weights), plan.kept)

    tokens = Spec(tuple(mesh.axis_names))
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(Spec(axis), tokens, tokens),
        out_specs=tokens,
    )(params, x, routing)

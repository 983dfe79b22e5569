"""Mixture-of-experts routing, as pure functions over trees with an expert axis.

    gate = moe.init_gate(key, width, experts=8)
    routing = moe.route(moe.gate_logits(gate, x), k=2)  # x [N, D]
    y, kept = moe.dropless(moe.EXPERTS["swiglu"], params, x, routing)
    loss += 0.01 * moe.losses.load_balance(routing)

`layers.moe.MoE` wraps it as a Linen layer; `moe.upcycling` makes experts of models.
"""

from multitask_jax.moe import experts, losses, upcycling
from multitask_jax.moe.dispatch import (
    Served,
    capacity,
    dropless,
    everyone,
    grouped,
)
from multitask_jax.moe.experts import EXPERTS
from multitask_jax.moe.gates import Routing, gate_logits, init_gate, route
from multitask_jax.moe.parallel import expert_parallel

__all__ = [
    "EXPERTS",
    "Routing",
    "Served",
    "capacity",
    "dropless",
    "everyone",
    "expert_parallel",
    "experts",
    "gate_logits",
    "grouped",
    "init_gate",
    "losses",
    "route",
    "upcycling",
]

"""Mixtures of experts as Linen layers around the functions of `multitask_jax.moe`.

    y, sown = MoE(experts=8, k=2, hidden=1024).apply(variables, x, mutable="moe")
    loss += sum_of(sown, "load_balance") * 0.01

Legend: D width, E routed experts, K experts a token, N tokens, T tasks.
"""

import functools
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from multitask_jax import moe
from multitask_jax import tree as trees
from multitask_jax.moe.dispatch import batched
from multitask_jax.moe.gates import Kind, Normalize

Array = jax.Array
Dispatch = Literal["everyone", "capacity", "dropless", "grouped", "expert_parallel"]
# Up to so many experts get a product each on a CPU. It is a tenth faster, but programs
# grow with the number, and those of `dropless` by each of its rooms: 16 experts compile
# in half a minute, 32 in more than one, and with one product for all in some seconds.
ONE_BY_ONE = 16


class MoE(nn.Module):
    """Tokens [..., D] -> [..., D]; sows losses and statistics into "moe".

    ScaleZero's layer is experts=8, k=1, kind="swiglu", shared_hidden=4 D. R-M2oE of
    MetaBEV routes tokens, H-M2oE has route="hard" and gets ids: nothing is dropped
    there, however many tokens are of one task. With experts that are copies of a dense
    layer normalize="after_topk" gives its output.
    """

    experts: int
    hidden: int
    k: int | None = None  # this and normalize as in `moe.route`, where it has them
    route: Kind = "top_k"
    kind: str = "mlp"  # of the experts, one of moe.EXPERTS
    normalize: Normalize | None = None
    shared_hidden: int = 0  # of an expert beside them that serves every token
    dispatch: Dispatch = "capacity"
    factor: float = 1.25  # of capacity and expert_parallel
    mesh: Mesh | None = None  # of expert_parallel, with an axis named "expert"
    tasks: int = 0  # that ids tell, for the statistic "specialisation"
    noise: float = 0.0  # on the gate's logits, where there is a key named "gate"
    bias: bool = True  # of experts
    gate_bias: bool = False  # as gates made from data have it

    @nn.compact
    def __call__(self, x: Array, ids: Array | None = None) -> Array:
        """`ids`: of tasks or modalities, the experts of route="hard".

        As many axes as x without its last, of its sizes or 1: [B, L], [B, 1] of [B, L,
        D].

        With `tasks`, any gate is told by its statistics how far it goes by them.
        """
        tokens = x.reshape(-1, x.shape[-1])
        width = tokens.shape[1]
        params = self.param("experts", _init_experts(self), width)
        flat = None
        if self.tasks and ids is None:
            raise ValueError(f"tasks={self.tasks} needs ids, the task of each token")
        if ids is not None:
            if ids.ndim != x.ndim - 1:
                raise ValueError(
                    f"ids: got {list(ids.shape)} for tokens {list(x.shape)}; expected"
                    " as many axes as there are before the last, such as [B, 1]"
                )
            flat = jnp.broadcast_to(ids, x.shape[:-1]).reshape(-1)
        if self.route == "hard":
            if flat is None:
                raise ValueError("route='hard' needs ids, the expert of each token")
            scores = flat
        else:
            init_gate = functools.partial(moe.init_gate, bias=self.gate_bias)
            gate = self.param("gate", init_gate, width, self.experts)
            scores = moe.gate_logits(gate, tokens)
        # Of ids there is no noise, which `route` is to say whether or not it has a key.
        noisy = self.noise > 0 and (self.has_rng("gate") or self.route == "hard")
        routing = moe.route(
            scores,
            kind=self.route,
            k=self.k,
            normalize=self.normalize,
            noise=self.noise if noisy else None,
            key=self.make_rng("gate") if noisy and self.has_rng("gate") else None,
            experts=self.experts,
        )
        served = self._dispatched(moe.experts.named(self.kind), params, tokens, routing)
        self._sow(routing, served.kept, flat if self.tasks else None)
        y = served.y.reshape(x.shape)
        if self.shared_hidden:
            dense = functools.partial(nn.Dense, use_bias=self.bias, dtype=x.dtype)
            up = dense(self.shared_hidden, name="shared_up")(x)
            y += dense(width, name="shared_down")(nn.gelu(up))
        return y

    def _dispatched(self, *args: Any) -> moe.Served:
        known = typing.get_args(Dispatch)
        if self.dispatch not in known:
            raise ValueError(
                f"dispatch: got {self.dispatch!r}, expected {', '.join(known)}"
            )
        if self.is_initializing():
            return moe.everyone(*args)  # of an example, which no mesh need cut
        tokens, room, dispatch = len(args[2]), None, self.dispatch
        if self.route == "hard":  # all of a batch may be of one task
            if dispatch == "capacity":
                dispatch = "dropless"
            if self.mesh is not None:
                room = tokens // self.mesh.size
        if self.route == "expert_choice":  # each expert takes as many
            room = min(tokens, -(-(self.k or 1) * tokens // self.experts))
            if self.dispatch in ("capacity", "dropless"):
                return moe.capacity(*args, room=room)
            if self.mesh is not None:  # perhaps all of them from one device
                room = min(room, tokens // self.mesh.size)
        few = self.experts <= ONE_BY_ONE and jax.default_backend() == "cpu"
        by_name = {
            "everyone": moe.everyone,
            "capacity": functools.partial(
                moe.capacity, factor=self.factor, one_by_one=few
            ),
            "dropless": functools.partial(moe.dropless, one_by_one=few),
            "grouped": moe.grouped,
            "expert_parallel": functools.partial(
                moe.expert_parallel, mesh=self.mesh, factor=self.factor, room=room
            ),
        }
        if self.dispatch == "expert_parallel" and self.mesh is None:
            raise ValueError(
                "dispatch='expert_parallel' needs mesh=, with an axis named 'expert'"
            )
        return by_name[dispatch](*args)

    def _sow(self, routing: moe.Routing, kept: Array, tasks: Array | None) -> None:
        found = dict(
            moe.losses.statistics(
                routing,
                kept,
                tasks=tasks,
                task_count=self.tasks,
                weighted=self.route == "soft",
            )
        )
        if self.route != "hard":  # no gate that a loss could teach
            found["load_balance"] = moe.losses.load_balance(
                routing, weighted=self.route == "soft"
            )
            found["importance"] = moe.losses.importance(routing)
            found["router_z"] = moe.losses.router_z(routing)
        _sow_all(self, found)


class MMoE(nn.Module):
    """Tokens [..., D] -> [T, ..., D]: a soft gate a task on the same experts.

    Ma et al. 2018. Sows load, entropy, specialisation by task and, over all tasks, the
    load balance into "moe".
    """

    tasks: int
    experts: int
    hidden: int
    kind: str = "mlp"  # of the experts, one of moe.EXPERTS
    bias: bool = True  # of experts
    gate_bias: bool = False  # of gates

    @nn.compact
    def __call__(self, x: Array, gate_inputs: Array | None = None) -> Array:
        """`gate_inputs` [..., G]: what gates read, such as raw features; else x."""
        tokens = x.reshape(-1, x.shape[-1])
        width = tokens.shape[1]
        params = self.param("experts", _init_experts(self), width)
        read = tokens
        if gate_inputs is not None:
            if gate_inputs.shape[:-1] != x.shape[:-1]:
                raise ValueError(
                    f"gate_inputs: got {list(gate_inputs.shape)} for tokens"
                    f" {list(x.shape)}; expected the same axes before the last"
                )
            read = gate_inputs.reshape(-1, gate_inputs.shape[-1])
        shape = self.tasks, read.shape[1], self.experts
        gates = {"kernel": self.param("gates", nn.initializers.normal(0.02), shape)}
        if self.gate_bias:
            zeros = nn.initializers.zeros
            gates["bias"] = self.param("gates_bias", zeros, (self.tasks, self.experts))
        routing = jax.vmap(
            lambda gate: moe.route(moe.gate_logits(gate, read), kind="soft")
        )(gates)
        # Experts see each token once, whatever the number of tasks.
        expert = moe.experts.named(self.kind)
        served = expert(params, tokens[None], batched)  # [E, N, D]
        weights = routing.weights.astype(served.dtype)  # [T, N, E]
        both = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), routing)
        tasks = jnp.repeat(jnp.arange(self.tasks), len(tokens))
        found = moe.losses.statistics(
            both, tasks=tasks, task_count=self.tasks, weighted=True
        )
        balance = moe.losses.load_balance(both, weighted=True)
        _sow_all(self, {**found, "load_balance": balance})
        y = jnp.einsum("tne,end->tnd", weights, served)
        return y.reshape(self.tasks, *x.shape)


def _init_experts(layer: MoE | MMoE) -> Callable[[Array, int], Any]:
    """(key, D) -> parameters of the layer's experts."""

    def init(key: Array, width: int) -> Any:
        return moe.experts.init(
            key,
            layer.kind,
            experts=layer.experts,
            width=width,
            hidden=layer.hidden,
            bias=layer.bias,
        )

    return init


def _sow_all(layer: nn.Module, found: Mapping[str, Array]) -> None:
    """Sows by name into "moe"; `init` would keep them, and `apply` add to them."""
    if not layer.is_initializing():
        for name, value in found.items():
            layer.sow("moe", name, value)


def sum_of(sown: Any, name: str) -> Array:
    """The sum over layers of what they sowed: a loss, by its name.

    Raises:
      ValueError: no layer sowed it, as without mutable="moe", or where all routes are
        hard and it is of gates.
    """
    values = [x for p, x in trees.flatten(sown).items() if f"/{name}/" in f"/{p}"]
    if not values:
        raise ValueError(
            f"no layer sowed {name!r}; apply the model with mutable='moe' and pass what"
            " that returns (hard routes have no gate, and no losses of one)"
        )
    return jnp.sum(jnp.stack(values))

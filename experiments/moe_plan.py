"""What an expert-parallel layer costs each device of a mesh that you do not have.

    python -m experiments.moe_plan --mesh=data=16,expert=16

Compiles forward and backward of one mixture-of-experts layer for simulated devices,
without any arrays, and reads bytes, FLOPs and collectives of one device off the
program. By default 128 experts of Mixtral-8x7B's size on 256 devices.

*As compiled for a CPU*: an accelerator's compiler fuses differently, and a CPU's widens
bfloat16, so that what is exchanged is also told by shapes alone.
"""

import dataclasses
import functools
import json
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from experiments import compiled, flags, report_file
from experiments.flags import flag
from multitask_jax import moe, sharding
from multitask_jax.merging.report import table


@dataclasses.dataclass(frozen=True)
class Config:
    """The layer and the mesh."""

    mesh: str = flag("Axes, one of them called expert.", "data=16,expert=16")
    tokens: int = flag("Tokens of each device.", 4096)
    width: int = flag("Width of a token.", 4096)
    hidden: int = flag("Hidden width of an expert.", 14336)
    experts: int = flag("Experts.", 128)
    k: int = flag("Experts a token.", 2)
    kind: Literal["mlp", "gelu", "relu", "swiglu"] = flag("Of the experts.", "swiglu")
    factor: float = flag("Of capacity: room over an equal share.", 1.25)
    dtype: Literal["bfloat16", "float32"] = flag("Of all arrays.", "bfloat16")
    output_dir: str = flag("Folder for report.md and plan.json.", ".cache/moe_plan")


class Plan(NamedTuple):
    """Of one device, forward and backward of one layer."""

    devices: int
    parameters: float  # bytes of experts and gate
    inputs: float  # bytes of tokens
    temporaries: float  # bytes at the peak, beside arguments and results
    outputs: float  # bytes of gradients
    flops: float  # as the compiler counts them
    useful: float  # FLOPs of the products that tokens ask for: 6 N K weights of one
    exchanged: dict[str, tuple[int, float]]  # collective -> times, bytes
    asked: float  # bytes of all-to-alls by their shapes, in the dtype of the config


def make(config: Config) -> Plan:
    """Compiles the layer; needs no weights and no devices.

    Raises:
      ValueError: the mesh has no expert axis, or does not divide the sizes.
    """
    axes = sharding.parse_axes(config.mesh)
    if "expert" not in axes:
        raise ValueError(f"--mesh: got {config.mesh!r}, expected an axis called expert")
    mesh = sharding.host_mesh(axes, simulate=True)
    e, d, n = config.experts, config.width, config.tokens * mesh.size
    dtype = jnp.dtype(config.dtype)
    expert = moe.EXPERTS[config.kind]

    def init(key: jax.Array) -> Any:
        experts = moe.experts.init(
            key, config.kind, experts=e, width=d, hidden=config.hidden, bias=False
        )
        params = {"gate": moe.init_gate(key, d, e), "experts": experts}
        return jax.tree.map(lambda x: x.astype(dtype), params)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        routing = moe.route(moe.gate_logits(params["gate"], x), k=config.k)
        served = moe.expert_parallel(
            expert, params["experts"], x, routing, mesh=mesh, factor=config.factor
        )
        balance = moe.losses.load_balance(routing)
        return jnp.mean(served.y.astype(jnp.float32) ** 2) + 0.01 * balance

    on = functools.partial(NamedSharding, mesh)
    shapes = jax.eval_shape(init, jax.random.key(0))
    where = {
        "gate": jax.tree.map(lambda _: on(Spec()), shapes["gate"]),
        "experts": jax.tree.map(lambda _: on(Spec("expert")), shapes["experts"]),
    }
    params = compiled.placed(shapes, where)
    tokens = on(Spec(tuple(axes)))
    x = jax.ShapeDtypeStruct((n, d), dtype, sharding=tokens)
    step = jax.jit(jax.grad(loss, (0, 1)), out_shardings=(where, tokens))
    program = step.lower(params, x).compile()
    # Rows [E, C, D] go and come back, forward and backward.
    logits = jax.ShapeDtypeStruct((config.tokens, e), jnp.float32)
    routing = jax.eval_shape(functools.partial(moe.route, k=config.k), logits)
    room = moe.dispatch.capacity_of(routing, e, config.factor)
    memory = program.memory_analysis()
    weights = sum(s.size for s in jax.tree.leaves(shapes["experts"])) / e
    return Plan(
        mesh.size,
        compiled.device_bytes(params),
        config.tokens * d * dtype.itemsize,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes,
        program.cost_analysis().get("flops", math.nan),
        6 * config.tokens * config.k * weights,
        compiled.collectives(program.as_text()),
        4 * e * room * d * dtype.itemsize,
    )


def run(config: Config) -> Plan:
    """Prints the table and writes it to report.md; the numbers to plan.json."""
    plan = make(config)
    rows = [
        ["parameters", f"{plan.parameters / 1e6:,.0f} MB"],
        ["tokens", f"{plan.inputs / 1e6:,.0f} MB"],
        ["gradients", f"{plan.outputs / 1e6:,.0f} MB"],
        ["temporaries", f"{plan.temporaries / 1e6:,.0f} MB"],
        ["FLOPs, as the compiler counts", f"{plan.flops / 1e12:,.2f} T"],
        [
            "FLOPs of the experts' products, nothing padded",
            f"{plan.useful / 1e12:,.2f} T",
        ],
        *(
            [f"{kind}, {times} times", f"{size / 1e6:,.1f} MB"]
            for kind, (times, size) in plan.exchanged.items()
        ),
        [
            f"all-to-all by shapes in {config.dtype}, 4 times",
            f"{plan.asked / 1e6:,.1f} MB",
        ],
    ]
    text = (
        f"{config.experts} experts ({config.kind}, {config.width} x {config.hidden}),"
        f" top-{config.k}, {config.tokens} tokens a device, {config.dtype}, mesh"
        f" {config.mesh}; forward and backward of one layer, as compiled for a CPU:\n\n"
        + table([f"of one device of {plan.devices}", ""], rows)
        + "\n"
    )
    folder = report_file.write(config.output_dir, "An expert-parallel layer", text)
    (folder / "plan.json").write_text(json.dumps(plan._asdict(), indent=2) + "\n")
    return plan


if __name__ == "__main__":
    flags.main(Config, flags.plain_errors(run))

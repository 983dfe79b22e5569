r"""What a training step of EgoM2P costs each device of a mesh that you do not have.

    python -m experiments.egom2p_plan \
        --flagfile=experiments/flagfiles/egom2p/v5e_256.flags

Compiles the whole step (masks, forward, backward, AdamW) of the paper's base size for
simulated devices, without any arrays, and reads bytes and collectives of one device off
the program. FLOPs are those of the matrix products, by formula (the compiler counts a
loop's body once); days follow from them and a throughput that you state.

*As compiled for a CPU*: an accelerator's compiler fuses differently.

Legend: B clips a step, I tokens shown, O asked, D width, V ids.
"""

import dataclasses
import json
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from experiments import compiled, flags, report_file
from experiments import egom2p_training as runs
from experiments.egom2p_tokens import Tokens
from experiments.flags import flag
from multitask_jax import sharding, training
from multitask_jax.masked.modalities import Modalities, Modality, lengths
from multitask_jax.merging.report import table
from multitask_jax.models import egom2p

# EgoM2P's: 16 x 256 x 256 video at 4 x 8 x 8, trajectories of 60 samples.
PAPER = (
    Modality("rgb", (5, 32, 32), 64_000),
    Modality("depth", (5, 32, 32), 64_000),
    Modality("camera", (30,), 256),
    Modality("gaze", (30,), 256),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The step, the mesh, and what a device is said to do."""

    mesh: str = flag("Axes: some of data, fsdp and tensor.", "data=32,fsdp=8")
    size: Literal["tiny", "small", "base"] = flag("Of the transformer.", "base")
    batch: int = flag("Clips a step, on all devices.", 2048)
    inputs: int = flag("Tokens shown of a clip.", 2048)
    targets: int = flag("Tokens asked of a clip.", 2048)
    tokens: float = flag("Tokens of the whole run, shown and asked.", 500e9)
    peak_tflops: float = flag("Of a device, bf16 (TPU v5e: 197).", 197.0)
    utilisation: float = flag("Share of it that a step reaches (assumed).", 0.35)
    output_dir: str = flag("Folder for report.md and plan.json.", ".cache/egom2p_plan")


class Plan(NamedTuple):
    """Of one device, one step."""

    devices: int
    parameters: float  # of the model, a count
    state: float  # bytes of parameters and AdamW's moments
    batch: float  # bytes of tokens
    temporaries: float  # bytes at the peak, beside arguments
    flops: float  # of products, forward, again, and backward
    exchanged: dict[str, tuple[int, float]]  # collective -> times, bytes
    steps: float
    days: float


def make(config: Config) -> Plan:
    """Compiles the step; needs no weights and no devices.

    Raises:
      ValueError: the mesh does not divide the batch or a parameter.
    """
    mesh = sharding.host_mesh(sharding.parse_axes(config.mesh), simulate=True)
    shape = egom2p.SHAPES[config.size]
    settings = runs.Settings(inputs=config.inputs, targets=config.targets)
    loss = runs.loss_fn(PAPER, shape, settings, mesh)
    optimizer = training.adamw(1e-4, steps=1000, weight_decay=0.05, clip=1.0, b2=0.95)
    layout = runs.mesh_layout(mesh)
    step = training.make_step(loss, optimizer, mesh=mesh, **layout)

    def start(key: jax.Array) -> Any:
        params = egom2p.init(key, PAPER, shape)
        return training.init_state(params, optimizer, key)

    abstract = jax.eval_shape(start, jax.random.key(0))
    where = sharding.tree_shardings(abstract, mesh, layout["rules"])
    state = compiled.placed(abstract, where)
    cut = NamedSharding(mesh, Spec(layout["batch_axis"]))
    long = int(lengths(PAPER).sum())
    batch = Tokens(
        jax.ShapeDtypeStruct((config.batch, long), jnp.int32, sharding=cut),
        jax.ShapeDtypeStruct((config.batch, len(PAPER)), bool, sharding=cut),
        jax.ShapeDtypeStruct((config.batch, long), bool, sharding=cut),
    )
    program = step.run.lower(state, None, batch).compile()
    flops = step_flops(shape, config.inputs, config.targets) * config.batch / mesh.size
    steps = config.tokens / (config.batch * (config.inputs + config.targets))
    seconds = flops / (config.peak_tflops * 1e12 * config.utilisation)
    return Plan(
        mesh.size,
        sum(x.size for x in jax.tree.leaves(abstract.params)),
        compiled.device_bytes(state),
        config.batch * (long * 5 + len(PAPER)) / runs.batch_parts(mesh),
        program.memory_analysis().temp_size_in_bytes,
        flops,
        compiled.collectives(program.as_text()),
        steps,
        steps * seconds / 86400,
    )


def step_flops(
    shape: egom2p.Shape, inputs: int, targets: int, modalities: Modalities = PAPER
) -> float:
    """Of a clip's matrix products: 2 a weight and token, attention's scores and sums.

    Going back costs twice as much; blocks that are computed again, once more, as are
    the logits of chunks.
    """
    d, hidden = shape.width, shape.hidden
    ids = sum(m.vocabulary for m in modalities)
    mlp = 3 * d * hidden
    encoder = inputs * 2 * (4 * d**2 + mlp) + 4 * inputs**2 * d
    own = targets * 2 * 4 * d**2 + 4 * targets**2 * d
    cross = 2 * (2 * targets + 2 * inputs) * d**2 + 4 * targets * inputs * d
    decoder = own + cross + targets * 2 * mlp
    blocks = shape.encoder_depth * encoder + shape.decoder_depth * decoder
    head = targets * 2 * d * ids
    return blocks * (4 if shape.remat else 3) + head * (4 if shape.chunk else 3)


def run(config: Config) -> Plan:
    """Prints the table and writes it to report.md; the numbers to plan.json."""
    if not 0 < config.utilisation <= 1:
        raise ValueError(f"--utilisation: got {config.utilisation}, expected 0 to 1")
    plan = make(config)
    rows = [
        ["parameters and AdamW's moments", f"{plan.state / 1e6:,.0f} MB"],
        ["tokens", f"{plan.batch / 1e6:,.1f} MB"],
        ["temporaries", f"{plan.temporaries / 1e6:,.0f} MB"],
        ["FLOPs of products, by formula", f"{plan.flops / 1e12:,.1f} T"],
        *(
            [f"{kind}, {times} in the program", f"{size / 1e6:,.1f} MB"]
            for kind, (times, size) in plan.exchanged.items()
        ),
    ]
    text = (
        f"{plan.parameters / 1e6:,.0f} M parameters ({config.size}), {config.batch}"
        f" clips of {config.inputs} + {config.targets} tokens a step, mesh"
        f" {config.mesh}, as compiled for a CPU:\n\n"
        + table([f"of one device of {plan.devices}", "one step"], rows)
        + f"\n\n{config.tokens / 1e9:,.0f} G tokens are {plan.steps:,.0f} steps:"
        f" {plan.days:.1f} days, *if* a device reaches {100 * config.utilisation:.0f} %"
        f" of {config.peak_tflops:g} TFLOP/s (an assumption, not a measurement).\n"
    )
    folder = report_file.write(config.output_dir, "A training step of EgoM2P", text)
    (folder / "plan.json").write_text(json.dumps(plan._asdict(), indent=2) + "\n")
    return plan


if __name__ == "__main__":
    flags.main(Config, flags.plain_errors(run))

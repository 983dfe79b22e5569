"""When tasks pull a trunk apart, what do experts change? A controlled regression.

Two tasks read the same inputs (*synthetic*, after Ma et al. 2018, section 3.1):

    y_t = w_t x + sum_i sin(a_i w_t x + b_i),  the angle between w_1 and w_2 is dialled

The network is told the task (its number is part of the input) and has one head for
both, so that at 180 degrees they ask for opposite things of the same inputs. The trunk
is shared in four ways at equal active parameters: one network for both tasks
(shared bottom), MMoE, the top-1 of several experts beside a shared one (ScaleZero), and
one expert a task without a gate (H-M2oE). At each angle: the cosine of the two tasks'
gradients at the trunk (Yu et al. 2020, arXiv 2001.06782), the share of dormant units
(Sokar et al. 2023, arXiv 2302.12902), the loss on new data, and who uses which expert.

    python -m experiments.gradient_conflict

About 2 minutes on 2 cores. Writes config.json, metrics.jsonl (a line a structure, angle
and seed), report.md and gradient_conflict.png to --workdir. What is there is not done
again: a killed run goes on, more angles or seeds are added.

Legend: B inputs of a batch, I width of an input, H active hidden units, F features,
T = 2 tasks, R runs (angles x seeds), E experts.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments import flags, study_store
from experiments import gradient_conflict_report as reports
from experiments.flags import flag
from experiments.gradient_conflict_report import Result
from experiments.parsing import at_least, numbers
from multitask_jax import moe
from multitask_jax.training import gradients

TASKS = 2
WAVES = 4  # terms of the sum of sines
DORMANT = 0.025  # of the mean activation of the units: Sokar et al., their tau
STRETCHES = 20  # the run is measured after each of them
EXPERTS = {  # measures of their use, in `moe.losses.statistics`
    "specialisation": "specialisation",
    "entropy": "entropy/token",
    "busiest": "load/max",
}
FREE = ("workdir", "angles", "seeds")  # may differ from an earlier run in the folder


class Variant(NamedTuple):
    """How the trunk is shared: experts of `width`, routed as `moe.route` is told."""

    experts: int
    width: float  # hidden units of an expert, as a share of H
    route: Mapping[str, Any]
    balance: float = 0.0  # weight of the load-balance loss


VARIANTS = {
    "shared bottom": Variant(1, 1.0, {"kind": "soft"}),
    "MMoE": Variant(4, 0.25, {"kind": "soft"}),
    "top-1 + shared": Variant(4, 0.5, {"k": 1, "shared": 1}, balance=0.01),
    "expert a task": Variant(TASKS, 1.0, {"kind": "hard", "experts": TASKS}),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run depends on."""

    workdir: str = flag("Where everything is written.", ".cache/gradient_conflict")
    angles: str = flag("Comma list of degrees between tasks.", "0,45,90,135,180")
    seeds: int = flag("Runs at each angle.", 5)
    steps: int = flag("Steps of Adam.", 3000)
    batch_size: int = flag("New inputs a step.", 128)
    rate: float = flag("Learning rate.", 3e-3)
    inputs: int = flag("Width of an input.", 32)
    hidden: int = flag("Active hidden units of the trunk; a multiple of 4.", 16)
    features: int = flag("What the trunk gives the linear head.", 8)


class World(NamedTuple):
    """What is to be learned."""

    directions: jax.Array  # [T, I]
    frequency: jax.Array  # [WAVES]
    phase: jax.Array  # [WAVES]


def make_world(key: jax.Array, angle: jax.Array, width: int) -> World:
    """Two directions at an angle (radians), and the waves both tasks share."""
    a, b, c = jax.random.split(key, 3)
    u, v = jnp.linalg.qr(jax.random.normal(a, (width, 2)))[0].T
    directions = jnp.stack([u, jnp.cos(angle) * u + jnp.sin(angle) * v])
    phase = jax.random.uniform(c, (WAVES,), maxval=2 * jnp.pi)
    return World(directions, 1 + jax.random.uniform(b, (WAVES,)), phase)


def targets(world: World, x: jax.Array) -> jax.Array:
    """[B, I] -> [T, B]."""
    z = world.directions @ x.T
    wave = z[..., None] * world.frequency[None, None] + world.phase[None, None]
    return z + jnp.sum(jnp.sin(wave), axis=-1)


def init(key: jax.Array, variant: Variant, config: Config) -> dict[str, Any]:
    """The trunk's experts, a gate for each task, one head."""
    a, b, c = jax.random.split(key, 3)
    i, f = config.inputs, config.features
    count = variant.experts + variant.route.get("shared", 0)
    hidden = round(variant.width * config.hidden)
    up, down = jax.random.split(a)
    return {
        "trunk": {
            "up": _dense(up, count, i + TASKS, hidden),
            "down": _dense(down, count, hidden, f),
        },
        "gate": {
            "kernel": 0.1 * jax.random.normal(b, (TASKS, i, variant.experts)),
            # Without it no expert could get more than half of a task's inputs: for
            # each x there is a -x, whose favourite is the least of x.
            "bias": jnp.zeros((TASKS, variant.experts)),
        },
        "head": _dense(c, 1, f, 1),
    }


def _dense(key: jax.Array, count: int, rows: int, columns: int) -> dict[str, Any]:
    kernel = jax.random.normal(key, (count, rows, columns)) * rows**-0.5
    return {"kernel": kernel, "bias": jnp.zeros((count, columns))}


def inputs_of(x: jax.Array, task: int) -> jax.Array:
    """[B, I] -> [B, I + T]: the task's number at the end."""
    told = jnp.zeros((len(x), TASKS)).at[:, task].set(1.0)
    return jnp.concatenate([x, told], axis=1)


def routings(params: Any, x: jax.Array, variant: Variant) -> list[moe.Routing]:
    """A routing of the inputs for each task."""
    if variant.route.get("kind") == "hard":
        scores = [jnp.full(len(x), t) for t in range(TASKS)]
    else:
        gates = [
            jax.tree.map(lambda p, t=t: p[t], params["gate"]) for t in range(TASKS)
        ]
        scores = [moe.gate_logits(gate, x) for gate in gates]
    return [moe.route(s, **variant.route) for s in scores]


def losses(
    params: Any, world: World, x: jax.Array, variant: Variant
) -> tuple[jax.Array, list[moe.Routing]]:
    """Mean squared errors [T], and who served whom."""
    served = routings(params, x, variant)
    relu, trunk, head = moe.EXPERTS["relu"], params["trunk"], params["head"]
    features = jnp.stack(
        [moe.everyone(relu, trunk, inputs_of(x, t), r).y for t, r in enumerate(served)]
    )
    y = features @ head["kernel"][0] + head["bias"][None]
    return jnp.mean((y[..., 0] - targets(world, x)) ** 2, axis=1), served


def dormant(params: Any, x: jax.Array, variant: Variant) -> jax.Array:
    """Share of the trunk's hidden units whose activation is next to nothing.

    An activation counts with the share of tokens and tasks that its expert serves.
    """
    up = params["trunk"]["up"]
    count, each = len(up["kernel"]), []
    for t, r in enumerate(routings(params, x, variant)):
        h = jnp.einsum("bi,eih->ebh", inputs_of(x, t), up["kernel"])
        used = jnp.any(r.experts[..., None] == jnp.arange(count)[None, None], axis=1)
        h = jax.nn.relu(h + up["bias"][:, None]) * used.T[..., None]
        each.append(jnp.mean(h, axis=1))
    activation = jnp.mean(jnp.stack(each), axis=0)  # [E, hidden]
    return jnp.mean(activation <= DORMANT * jnp.mean(activation))


def cosine(params: Any, world: World, x: jax.Array, variant: Variant) -> jax.Array:
    """Of the two tasks' gradients with respect to the trunk."""

    def loss(t: int) -> Any:
        return lambda trunk: losses(params | {"trunk": trunk}, world, x, variant)[0][t]

    found = gradients.gradient_cosines([loss(0), loss(1)], params["trunk"])
    return found.cosines[0, 1]


def use_of_experts(params: Any, x: jax.Array, variant: Variant) -> dict[str, jax.Array]:
    """How far experts are chosen by the task, how surely, and how evenly."""
    both = jax.tree.map(lambda *xs: jnp.concatenate(xs), *routings(params, x, variant))
    tasks = jnp.repeat(jnp.arange(TASKS), len(x))
    found = moe.losses.statistics(both, tasks=tasks, task_count=TASKS, weighted=True)
    return {name: found[of] for name, of in EXPERTS.items()}


def make_stretch(variant: Variant, config: Config, steps: int) -> Any:
    """Some steps of all runs, then a measurement; one compiled program."""
    optimizer = optax.adam(config.rate)

    def total(params: Any, world: World, x: jax.Array) -> jax.Array:
        errors, served = losses(params, world, x, variant)
        if not variant.balance:
            return jnp.mean(errors)
        both = jax.tree.map(lambda *xs: jnp.concatenate(xs), *served)
        return jnp.mean(errors) + variant.balance * moe.losses.load_balance(both)

    def one(state: Any, world: World, key: jax.Array) -> Any:
        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, opt_state = carry
            x = jax.random.normal(key, (config.batch_size, config.inputs))
            gradient = jax.grad(total)(params, world, x)
            updates, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        train, test = jax.random.split(key)
        state, _ = jax.lax.scan(step, state, jax.random.split(train, steps))
        x = jax.random.normal(test, (2048, config.inputs))
        y = targets(world, x)
        error = losses(state[0], world, x, variant)[0] / jnp.var(y, axis=1)
        found = {
            "loss": jnp.mean(error),
            "cosine": cosine(state[0], world, x, variant),
            "dormant": dormant(state[0], x, variant),
            **use_of_experts(state[0], x, variant),
        }
        return state, found

    def start(key: jax.Array) -> Any:
        params = init(key, variant, config)
        return params, optimizer.init(params)

    return jax.jit(jax.vmap(start)), jax.jit(jax.vmap(one), donate_argnums=0)


def active(variant: Variant, config: Config) -> int:
    """Parameters of the trunk that serve one input of one task, gates aside."""
    params = jax.eval_shape(lambda: init(jax.random.key(0), variant, config))
    r = variant.route
    used = {"soft": variant.experts, "hard": 1}.get(r.get("kind", ""), r.get("k", 1))
    each = sum(x.size // x.shape[0] for x in jax.tree.leaves(params["trunk"]))
    return each * (used + r.get("shared", 0))


def train(
    variant: Variant,
    config: Config,
    runs: Sequence[tuple[float, int]],
    advance: Callable[[], Any],
) -> list[dict[str, list[float]]]:
    """Trains a variant at R (angle, seed), all at once.

    Args:
      variant: the structure.
      config: sizes and steps.
      runs: degrees and seed of each.
      advance: called after each stretch.

    Returns:
      What was measured in each run, a value a stretch.
    """
    angles, seeds = map(jnp.array, zip(*runs, strict=True))
    keys = jax.vmap(jax.random.key)(seeds)
    worlds = jax.vmap(functools.partial(make_world, width=config.inputs))(
        keys, jnp.deg2rad(angles)
    )
    start, stretch = make_stretch(variant, config, config.steps // STRETCHES)
    state = start(jax.vmap(lambda k: jax.random.fold_in(k, 1))(keys))
    history = []
    for i in range(STRETCHES):
        fresh = jax.vmap(lambda k, i=i: jax.random.fold_in(k, 2 + i))(keys)
        state, measured = stretch(state, worlds, fresh)
        history.append(jax.device_get(measured))
        advance()
    return [
        {k: [float(h[k][r]) for h in history] for k in history[0]}
        for r in range(len(runs))
    ]


def run(config: Config) -> Result:
    """Trains all variants at all angles; writes the report and the figure.

    Raises:
      ValueError: a flag is out of range, or the folder has results of other settings.
      FloatingPointError: training diverged; nothing of that structure is stored.
    """
    angles = numbers("angles", config.angles)
    if config.hidden % 4 or config.hidden < 4:
        raise ValueError(f"--hidden: got {config.hidden}, expected a multiple of 4")
    if config.steps % STRETCHES or config.steps < STRETCHES:
        raise ValueError(
            f"--steps: got {config.steps}, expected a multiple of {STRETCHES}, as often"
            " as the run is measured"
        )
    at_least(config, seeds=1, batch_size=1, inputs=2, features=1)
    if not 0 < config.rate < math.inf:
        raise ValueError(f"--rate: got {config.rate}, expected more than 0")
    workdir = Path(config.workdir)
    study_store.remember(config, workdir, FREE, gates="with biases")
    store = study_store.Store(workdir)
    grid = [(a, s) for a in angles for s in range(config.seeds)]
    left = {
        name: [
            (a, s)
            for a, s in grid
            if not set(EXPERTS) <= store.records.get((name, str(a), s), {}).keys()
        ]
        for name in VARIANTS
    }
    total = STRETCHES * sum(map(bool, left.values()))
    with tqdm(total=total, unit="stretch", disable=None) as bar:
        for name, runs in left.items():
            if not runs:
                continue
            bar.set_description(name)
            found = train(VARIANTS[name], config, runs, bar.update)
            for (angle, seed), made in zip(runs, found, strict=True):
                if not np.isfinite(made["loss"]).all():
                    raise FloatingPointError(
                        f"{name}, {angle:g} degrees, seed {seed}: the loss was not"
                        " finite: training diverged; lower --rate"
                    )
            for (angle, seed), made in zip(runs, found, strict=True):
                store.add(name, str(angle), seed, made)

    def measured(what: str) -> dict[str, np.ndarray]:  # [angles, seeds, stretches]
        shape = len(angles), config.seeds, STRETCHES
        return {
            name: np.reshape(
                [store.records[name, str(a), s][what] for a, s in grid], shape
            )
            for name in VARIANTS
        }

    result = Result(
        {n: x.mean(axis=-1) for n, x in measured("cosine").items()},
        {n: x[..., -1] for n, x in measured("dormant").items()},
        {n: x[..., -1] for n, x in measured("loss").items()},
        {n: (x < 0).mean(axis=-1) for n, x in measured("cosine").items()},
        {m: {n: x[..., -1] for n, x in measured(m).items()} for m in EXPERTS},
        {name: active(v, config) for name, v in VARIANTS.items()},
    )
    result = result._replace(report=reports.text(result, angles, config.steps))
    (workdir / "report.md").write_text(result.report)
    reports.draw(result, angles).savefig(workdir / "gradient_conflict.png", dpi=120)
    print(result.report)
    return result


if __name__ == "__main__":
    flags.main(Config, flags.plain_errors(run, "the same command goes on from there"))

"""Speed of the mixture-of-experts layer, forward and backward, on this machine.

    python -m experiments.benchmark_moe --torch_python=/path/to/python

Each dispatcher against a dense feed-forward layer of the same active FLOPs (hidden
width k H), and against a plain PyTorch mixture (a loop over experts with index_select)
and PyTorch's dense layer, if an interpreter with torch is named. Same sizes, float32,
same threads; all take turns in one run after a warm-up, and medians count.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import flags, report_file, torch_side
from experiments.flags import flag
from multitask_jax import moe
from multitask_jax.merging.report import table


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and repeats."""

    torch_python: str = flag("Interpreter with torch.", "")
    tokens: int = flag("Tokens.", 8192)
    width: int = flag("Width of a token.", 512)
    hidden: int = flag("Hidden width of an expert.", 1024)
    experts: int = flag("Experts.", 8)
    k: int = flag("Experts a token.", 2)
    factor: float = flag("Of capacity: room over an equal share.", 1.25)
    tight: float = flag("The same, as tight as a balanced gate allows.", 1.0625)
    ragged: bool = flag("Also by lax.ragged_dot (slow on a CPU).", True)
    threads: int = flag("Threads of either side.", 2)
    repeats: int = flag("Turns; the median counts.", 7)
    keep_memory: bool = flag(torch_side.KEEP_MEMORY, True)
    output_dir: str = flag("Folder for report.md.", ".cache/benchmark_moe")


class Inputs(NamedTuple):
    """What all sides of this library compute on."""

    x: jax.Array  # [tokens, width]
    params: dict[str, Any]  # of the mixture: gate and experts
    ffn: Any  # of the dense layer


def inputs(config: Config) -> Inputs:
    """Random tokens and parameters."""
    keys = jax.random.split(jax.random.key(0), 4)
    d, h, e = config.width, config.hidden, config.experts
    params = {
        "gate": moe.init_gate(keys[1], d, e),
        "experts": moe.experts.init(keys[2], "mlp", experts=e, width=d, hidden=h),
    }
    ffn = moe.experts.init(keys[3], "mlp", experts=1, width=d, hidden=config.k * h)
    return Inputs(jax.random.normal(keys[0], (config.tokens, d)), params, ffn)


def busiest(config: Config, given: Inputs) -> float:
    """Tokens of the busiest expert over an equal share: what a room must be for all."""
    routing = moe.route(moe.gate_logits(given.params["gate"], given.x), k=config.k)
    return float(config.experts * jnp.max(moe.losses.load(routing)))


def ours(config: Config, given: Inputs) -> dict[str, Callable[[], Any]]:
    """Compiled steps by name: gradients of all parameters and tokens."""
    x, params, ffn = given
    expert = moe.EXPERTS["mlp"]

    def dense(params: Any, x: jax.Array) -> jax.Array:
        flat = jax.tree.map(lambda p: p[0], params)
        return expert(
            flat, x, lambda x, layer: x @ layer["kernel"] + layer["bias"][None]
        )

    def mixture(serve: Any, params: Any, x: jax.Array) -> jax.Array:
        routing = moe.route(moe.gate_logits(params["gate"], x), k=config.k)
        return serve(expert, params["experts"], x, routing).y

    # One expert after the other, as `layers.moe.MoE` has them on a CPU.
    serves = {
        f"capacity {room:g}": functools.partial(
            moe.capacity, factor=room, one_by_one=True
        )
        for room in (config.factor, config.tight)
    }
    serves["dropless"] = functools.partial(moe.dropless, one_by_one=True)
    if config.ragged:
        serves["grouped, ragged_dot"] = moe.grouped
    sides: dict[str, Any] = {"dense": (dense, ffn)}
    sides |= {n: (functools.partial(mixture, s), params) for n, s in serves.items()}

    def step(f: Any, params: Any) -> Callable[[], Any]:
        graded = jax.jit(jax.grad(lambda p, x: jnp.mean(f(p, x) ** 2), (0, 1)))
        return lambda: jax.block_until_ready(graded(params, x))

    return {name: step(*side) for name, side in sides.items()}


def run(config: Config) -> dict[str, float]:
    """Times all, prints the table and writes it to report.md; milliseconds by name.

    Raises:
      ValueError: sizes below 1, or the other side ended.
    """
    if min(config.tokens, config.repeats, config.experts, config.k) < 1:
        raise ValueError(f"got {config}, expected sizes and repeats of at least 1")
    torch_side.prepare(config.threads, keep_memory=config.keep_memory)
    given = inputs(config)
    steps, process = ours(config, given), None

    timers = {name: torch_side.timed(step) for name, step in steps.items()}
    try:
        if config.torch_python:
            there, process = torch_side.start(
                "moe_in_torch.py",
                dataclasses.asdict(config),
                python=config.torch_python,
                threads=config.threads,
                keep_memory=config.keep_memory,
                needs="torch",
            )
            timers["PyTorch, dense"] = lambda: there("dense", 1)
            timers["PyTorch, loop over experts"] = lambda: there("mixture", 1)
        found = torch_side.medians(timers, config.repeats)
    finally:
        if process is not None:
            process.communicate()
    rows = [
        [
            name,
            f"{ms:.0f}",
            f"{ms / found['dense']:.2f}",
            f"{found[loop] / ms:.2f}"
            if (loop := "PyTorch, loop over experts") in found
            else "",
        ]
        for name, ms in found.items()
    ]
    head = ["", "ms", "time / dense FFN", "PyTorch's loop / time"]
    text = (
        f"{config.experts} experts, top-{config.k}, {config.tokens} x {config.width}"
        f" tokens, hidden {config.hidden}; forward and backward, {config.threads}"
        f" threads, median of {config.repeats}. The busiest expert has"
        f" {busiest(config, given):.3f} times an equal share: rooms from there on drop"
        f" nothing.\n\n{table(head, rows)}\n"
    )
    report_file.write(config.output_dir, "Speed of a mixture of experts", text)
    return found


if __name__ == "__main__":
    flags.main(Config, flags.plain_errors(run))

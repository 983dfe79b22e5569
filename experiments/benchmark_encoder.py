"""Speed of the sentence encoder against transformers' on a CPU, in sentences a second.

    python -m experiments.benchmark_encoder --torch_python=/path/to/python

`--torch_python` is an interpreter with torch and transformers (another environment's,
or this one's with `pip install multitask-jax[torch]`); without it only ours is timed.
Both have the sizes of all-MiniLM-L6-v2 with random weights (time does not depend on
them), batches of full length, threads, clipping and AdamW, in float32;
--products=bfloat16 rounds the factors of products, on their side by PyTorch's autocast,
which rounds the results too. Training is `training.make_step`, as in the merging study.
They take turns in one run, so that both meet the same load, after a warm-up; the median
of the repeats counts. A third side makes the products of inference with matrices of
weights, and nothing else: what is left to gain.
"""

import dataclasses
import functools
import statistics
import subprocess
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import flags, parsing, report_file, torch_side
from experiments.flags import flag
from experiments.torch_side import Timer
from multitask_jax import training
from multitask_jax.layers import products as layer_products
from multitask_jax.merging.report import table
from multitask_jax.models import bert

SIZES = bert.Shape(
    vocab_size=30522, width=384, depth=6, heads=12, mlp_width=1536, positions=512
)
KINDS = ("training", "inference")
PRODUCTS = "its matrix products alone"


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and repeats."""

    torch_python: str = flag("Interpreter with torch and transformers.", "")
    products: str = flag("Factors of products: float32 or bfloat16.", "float32")
    batch: int = flag("Sentences a step.", 32)
    length: int = flag("Tokens a sentence.", 32)
    threads: int = flag("Threads of either side (cores, where the OS lets us).", 2)
    steps: int = flag("Steps of either side before the other's turn.", 5)
    repeats: int = flag("Turns; the median counts.", 7)
    keep_memory: bool = flag(torch_side.KEEP_MEMORY, True)
    output_dir: str = flag("Folder for report.md.", ".cache/benchmark_encoder")


def ours(config: Config, shape: bert.Shape = SIZES) -> Timer:
    """Steps of this library's encoder, as the study fine-tunes; compiles them."""
    size = (config.batch, config.length)
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, size, np.int32)
    mask = np.ones(size, np.int32)
    batch = {"ids": ids, "mask": mask, "labels": np.arange(config.batch) % 2}
    head = jnp.zeros((shape.width, 2)), jnp.zeros((2,))
    params = {"bert": bert.init(jax.random.key(0), shape), "head": head}
    shape = shape._replace(products=config.products)
    inference = jax.jit(functools.partial(bert.embed, shape=shape))
    rounded = jax.jit(functools.partial(bert.rounded, shape=shape))

    def loss(params: Any, batch: Any, key: Any) -> tuple[jax.Array, Any]:
        kernel, bias = params["head"]
        x = bert.embed(params["bert"], batch["ids"], batch["mask"], shape=shape)
        each = optax.softmax_cross_entropy_with_integer_labels(
            x @ kernel + bias[None], batch["labels"]
        )
        return jnp.mean(each), {}

    optimizer = training.adamw(2e-5, steps=1000, clip=1.0)
    step = training.make_step(loss, optimizer)
    state = training.init_state(params, optimizer, jax.random.key(0))

    def seconds(kind: str, steps: int) -> float:
        nonlocal state
        start = time.perf_counter()
        if kind == "inference":  # weights are rounded once for many batches, as theirs
            weights = rounded(state.params["bert"])
        for _ in range(steps):
            if kind == "training":
                state, metrics = step(state, batch)
                jax.block_until_ready((state.params, metrics))
            else:
                jax.block_until_ready(inference(weights, ids, mask))
        return time.perf_counter() - start

    return seconds


def products(config: Config, shape: bert.Shape = SIZES) -> Timer:
    """Steps that only multiply, as inference does, by every layer's matrices."""
    d, h = shape.width, shape.mlp_width
    sizes = [(d, d)] * 4 + [(d, h), (h, d)]
    layers = [
        [jnp.ones(s, config.products) / s[0] for s in sizes] for _ in range(shape.depth)
    ]
    x = jnp.ones((config.batch * config.length, d))
    dot = layer_products.dot_general(config.products)

    def times(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return dot(x, kernel.astype(x.dtype), layer_products.DENSE)

    @jax.jit
    def inference(layers: Any, x: jax.Array) -> jax.Array:
        for query, key, value, *rest in layers:
            x = times(x, query) + times(x, key) + times(x, value)
            for kernel in rest:
                x = times(x, kernel)
        return x

    def seconds(kind: str, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            jax.block_until_ready(inference(layers, x))
        return time.perf_counter() - start

    return seconds


def theirs(config: Config, shape: bert.Shape = SIZES) -> tuple[Timer, subprocess.Popen]:
    """Steps of transformers' encoder, in a process that the caller ends.

    Raises:
      FileNotFoundError: no such interpreter.
    """
    settings = {
        "threads": config.threads,
        "batch": config.batch,
        "length": config.length,
        "products": config.products,
        "config": {
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.width,
            "num_hidden_layers": shape.depth,
            "num_attention_heads": shape.heads,
            "intermediate_size": shape.mlp_width,
            "max_position_embeddings": shape.positions,
        },
    }
    return torch_side.start(
        "encoder_in_torch.py",
        settings,
        python=config.torch_python,
        threads=config.threads,
        keep_memory=config.keep_memory,
    )


def measure(config: Config, sides: dict[str, Timer]) -> dict[tuple[str, str], float]:
    """Sentences a second by (side, kind): medians over turns."""
    rates: dict[tuple[str, str], float] = {}
    for kind in KINDS:
        own = {n: s for n, s in sides.items() if n != PRODUCTS or kind == "inference"}
        for seconds in own.values():
            seconds(kind, 2)
        turns = [
            {name: seconds(kind, config.steps) for name, seconds in own.items()}
            for _ in range(config.repeats)
        ]
        for name in own:
            median = statistics.median(turn[name] for turn in turns)
            rates[name, kind] = config.batch * config.steps / median
    return rates


def run(config: Config) -> dict[tuple[str, str], float]:
    """Times both sides, prints the table and writes it to report.md."""
    if min(config.batch, config.length, config.steps, config.repeats) < 1:
        raise ValueError(f"got {config}, expected sizes and repeats of at least 1")
    parsing.one_of("products", config.products, layer_products.NAMES)
    torch_side.prepare(config.threads, keep_memory=config.keep_memory)
    process = None
    sides = {}
    try:
        if config.torch_python:
            sides["transformers"], process = theirs(config)
        sides["ours"] = ours(config)
        sides[PRODUCTS] = products(config)
        rates = measure(config, sides)
    finally:
        if process is not None:
            process.communicate()  # closes its input, which ends it
    rows = []
    for name in sides:
        line = [name]
        for kind in KINDS:
            rate, other = rates.get((name, kind)), rates.get(("transformers", kind))
            times = f" ({rate / other:.2f} x)" if rate and other else ""
            line.append(f"{rate:.0f}{times}" if rate else "")
        rows.append(line)
    title = (
        f"Sentences a second, batches of {config.batch} x {config.length} tokens,"
        f" {config.products}, {config.threads} threads"
    )
    text = f"{title}:\n\n{table(['', *KINDS], rows)}\n"
    report_file.write(config.output_dir, "Speed of the sentence encoder", text)
    return rates


if __name__ == "__main__":
    flags.main(Config, flags.plain_errors(run))

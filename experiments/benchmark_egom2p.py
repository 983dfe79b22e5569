"""Seconds of a training step of EgoM2P, here and in plain PyTorch, in one run.

    python -m experiments.benchmark_egom2p --torch_python=/path/with/torch/bin/python

Same architecture, shapes, masks and optimiser, float32 (--dtype=bfloat16: products,
PyTorch's by its autocast); forward, backward, clipping and AdamW, turns taken. Also
what of our step is for drawing masks and budgets, and what making a batch takes, which
is the most that a step can wait for it.
"""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import egom2p_training as runs
from experiments import flags, parsing, report_file, torch_side
from experiments.egom2p_tokens import Tokens
from experiments.flags import flag
from multitask_jax import training
from multitask_jax.layers import products
from multitask_jax.masked.modalities import (
    Modality,
    first_ids,
    lengths,
    modality_of,
)
from multitask_jax.merging.report import table
from multitask_jax.models import egom2p

MODALITIES = (
    Modality("rgb", (4, 8, 8), 1024),
    Modality("depth", (4, 8, 8), 1024),
    Modality("camera", (32,), 256),
    Modality("gaze", (32,), 256),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and repeats."""

    torch_python: str = flag("Interpreter with torch; without it only ours.", "")
    sizes: str = flag("Comma list of the transformer's sizes.", "tiny,small")
    dtype: str = flag("Of products: float32 or bfloat16.", "float32")
    batch: int = flag("Clips a step.", 16)
    inputs: int = flag("Tokens shown.", 192)
    targets: int = flag("Tokens asked.", 96)
    threads: int = flag("Threads of either side (cores, where the OS lets us).", 2)
    repeats: int = flag("Turns; the median counts.", 7)
    keep_memory: bool = flag(torch_side.KEEP_MEMORY, True)
    output_dir: str = flag("Folder for report.md.", ".cache/benchmark_egom2p")


def clips(count: int) -> Tokens:
    """Random tokens (*synthetic*): time does not depend on what they are."""
    rng = np.random.default_rng(0)
    of = modality_of(MODALITIES)
    sizes = np.array([m.vocabulary for m in MODALITIES])
    ids = rng.integers(0, sizes[of], (count, len(of))) + first_ids(MODALITIES)[of]
    present = np.ones((count, len(MODALITIES)), bool)
    return Tokens(ids.astype(np.int32), present, np.ones(ids.shape, bool))


def shape_of(config: Config, name: str) -> egom2p.Shape:
    """The size of that name, with products as they are to be."""
    return egom2p.SHAPES[name]._replace(dtype=config.dtype)


def ours(config: Config, name: str) -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    """Masks of a batch, a step that is given them, and one that draws its own."""
    shape = shape_of(config, name)
    settings = runs.Settings(
        batch=config.batch, inputs=config.inputs, targets=config.targets
    )
    tokens = clips(config.batch)
    draw = functools.partial(runs.draw_masks, modalities=MODALITIES, settings=settings)
    masks = jax.jit(draw)(jax.random.key(0), tokens.present)
    optimizer = training.adamw(1e-4, steps=1000, weight_decay=0.05, clip=1.0, b2=0.95)

    def given(params: Any, batch: Any, key: Any) -> Any:
        ids, masks = batch
        return egom2p.loss(params, ids, masks, modalities=MODALITIES, shape=shape)

    drawn = runs.loss_fn(MODALITIES, shape, settings)
    init = jax.jit(functools.partial(egom2p.init, modalities=MODALITIES, shape=shape))
    params = init(jax.random.key(0))

    def stepper(loss: Any, batch: Any) -> Callable[[], Any]:
        step = training.make_step(loss, optimizer)
        state = training.init_state(params, optimizer, jax.random.key(0))

        def run() -> None:
            nonlocal state
            state, metrics = step(state, batch)
            jax.block_until_ready((state.params, metrics))

        return run

    return masks, stepper(given, (tokens.ids, masks)), stepper(drawn, tokens)


def masks_alone(config: Config) -> Callable[[], Any]:
    """Drawing the masks of a batch, as a program of its own."""
    settings = runs.Settings(inputs=config.inputs, targets=config.targets)
    draw = functools.partial(runs.draw_masks, modalities=MODALITIES, settings=settings)
    draw, present = jax.jit(draw), clips(config.batch).present
    return lambda: jax.block_until_ready(draw(jax.random.key(0), present))


def batch_alone(config: Config) -> Callable[[], Any]:
    """Taking a batch from 2,000 clips of tokens, and to the device."""
    at = runs.batches(clips(2000), config.batch, 0)
    step = iter(range(10**9))
    return lambda: jax.block_until_ready(jax.device_put(at(next(step))))


def theirs(config: Config, masks_of: dict[str, Any], folder: Path) -> Any:
    """The same steps in PyTorch, in a process that the caller ends."""
    models = {}
    for name, masks in masks_of.items():
        shape = shape_of(config, name)
        models[name] = {
            **shape._asdict(),
            "hidden": shape.hidden,
            "threads": config.threads,
            "vocabularies": [m.vocabulary for m in MODALITIES],
            "lengths": lengths(MODALITIES).tolist(),
            "ids": clips(config.batch).ids.tolist(),
            "inputs": np.asarray(masks.inputs.position).tolist(),
            "seen": np.asarray(masks.inputs.valid).tolist(),
            "targets": np.asarray(masks.targets.position).tolist(),
            "asked": np.asarray(masks.targets.valid).tolist(),
        }
    file = folder / "models.json"  # too long for an argument
    file.write_text(json.dumps(models))
    return torch_side.start(
        "egom2p_in_torch.py",
        {"file": str(file)},
        python=config.torch_python,
        threads=config.threads,
        keep_memory=config.keep_memory,
        needs="torch",
    )


def run(config: Config) -> dict[str, float]:
    """Times all, prints the table and writes it to report.md; milliseconds by name.

    Raises:
      ValueError: unknown sizes, repeats below 1, or the other side ended.
    """
    sizes = parsing.paths(config.sizes) or []
    for name in sizes:
        parsing.one_of("sizes", name, tuple(egom2p.SHAPES))
    parsing.one_of("dtype", config.dtype, products.NAMES)
    if not sizes or min(config.repeats, config.batch) < 1:
        raise ValueError(f"got {config}, expected sizes, and a repeat at least")
    torch_side.prepare(config.threads, keep_memory=config.keep_memory)
    made = {name: ours(config, name) for name in sizes}

    timers: dict[str, Callable[[], float]] = {}
    for name, (_, given, drawn) in made.items():
        timers[name], timers[f"{name} and masks"] = (
            torch_side.timed(given),
            torch_side.timed(drawn),
        )
    timers["masks"] = torch_side.timed(masks_alone(config))
    timers["batch"] = torch_side.timed(batch_alone(config))
    process = None
    with tempfile.TemporaryDirectory() as folder:
        try:
            if config.torch_python:
                masks = {name: m[0] for name, m in made.items()}
                there, process = theirs(config, masks, Path(folder))
                for name in sizes:
                    timers[f"{name}, PyTorch"] = functools.partial(there, name, 1)
            found = torch_side.medians(timers, config.repeats)
        finally:
            if process is not None:
                process.communicate()
    rows = []
    for name in sizes:
        step, theirs_ms = found[f"{name} and masks"], found.get(f"{name}, PyTorch")
        rows.append(
            [
                name,
                f"{found[name]:.0f}",
                f"{step:.0f}",
                "" if theirs_ms is None else f"{theirs_ms:.0f}",
                "" if theirs_ms is None else f"{theirs_ms / found[name]:.2f}",
                f"{100 * found['masks'] / step:.1f} %",
                f"{100 * found['batch'] / step:.2f} %",
            ]
        )
    head = ["", "step, ms", "with masks drawn", "PyTorch", "PyTorch / ours"]
    head += ["masks alone", "making a batch (at most waited for)"]
    text = (
        f"A training step of {config.batch} clips, {config.inputs} tokens shown and"
        f" {config.targets} asked, {config.dtype}, {config.threads} threads, median of"
        f" {config.repeats} turns; tokens are *synthetic*.\n\n{table(head, rows)}\n"
    )
    report_file.write(config.output_dir, "Speed of EgoM2P", text)
    return found


if __name__ == "__main__":
    flags.main(Config, flags.plain_errors(run))

"""The study's models: heads on the frozen base, a specialist a task, the joint model.

Heads are linear probes of the base and stay frozen, so that the base under them is the
zero-point of every task, and all that is learned lies in the encoder, which is merged.
Checkpoints are Hugging Face directories; one that is complete is not trained again.
"""

import functools
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file, save_file

from experiments import json_files
from experiments.study_tasks import Evaluator, Head, Pool, logits, make_pool, probe
from multitask_jax import checkpoints, training
from multitask_jax.data import tokens
from multitask_jax.data.text_tasks import Rows
from multitask_jax.models import bert

JOINT = "joint"
# Training pads to few lengths: each is a program that takes seconds to compile.
TRAINING_LENGTHS = (16, 32, 48, *tokens.BUCKETS[tokens.BUCKETS.index(64) :])


class Recipe(NamedTuple):
    """How every encoder is fine-tuned."""

    epochs: int
    batch_size: int
    rate: float
    max_length: int


class Data(NamedTuple):
    """What a seed trains on."""

    train: dict[str, Rows]
    encoded: dict[str, tokens.Encoded]  # of the rows in `train`
    validation: Pool  # of all tasks
    own: dict[str, Pool]  # the same rows, a task on its own


def loss_fn(
    params: Any, batch: Any, key: jax.Array, *, shape: bert.Shape
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy under the batch's own head."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits(params, batch, shape), batch["labels"]
    )
    return jnp.mean(losses), {}


@functools.lru_cache
def step_and_optimizer(
    shape: bert.Shape, rate: float, steps: int
) -> tuple[training.Step, optax.GradientTransformation]:
    """One program for all trainings of one length, whatever the task."""
    optimizer = training.adamw(rate, steps=steps, warmup=0.1, clip=1.0)
    loss = functools.partial(loss_fn, shape=shape)
    return training.make_step(loss, optimizer), optimizer


def batch_of(
    encoded: tokens.Encoded, rows: Rows, chosen: np.ndarray, head: Head
) -> dict[str, Any]:
    """The chosen rows of a task, padded, with their labels and their head."""
    padded = tokens.pad(encoded, chosen, buckets=TRAINING_LENGTHS)
    return {
        "ids": padded.ids,
        "mask": padded.mask,
        "labels": rows.labels[chosen],
        **head._asdict(),
    }


def make_heads(
    folder: Path, data: Data, base: Any, evaluator: Evaluator, classes: int
) -> dict[str, Head]:
    """Probes of the base for all tasks; kept in heads.safetensors."""
    path = folder / "heads.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pool = make_pool(data.encoded, data.train)
        x = evaluator.features(base, pool)
        v = evaluator.features(base, data.validation)
        tensors = {}
        for name in data.train:
            labels = data.validation.labels[name]
            head = probe(x[name], pool.labels[name], v[name], labels, classes=classes)
            tensors |= {f"{name}.{k}": a for k, a in head._asdict().items()}
        partial = path.with_suffix(".partial")
        save_file(tensors, partial)
        partial.replace(path)
    stored = load_file(path)
    return {n: Head(stored[f"{n}.kernel"], stored[f"{n}.bias"]) for n in data.train}


def train(
    folder: Path,
    name: str,
    data: Data,
    heads: Mapping[str, Head],
    base: tuple[Any, Mapping[str, Any]],
    evaluator: Evaluator,
    *,
    model_dir: str,
    recipe: Recipe,
    seed: int,
) -> dict[str, Any]:
    """Fine-tunes the base on one task, or (JOINT) on all by turns; writes a directory.

    Args:
      folder: of the seed; the directory is `folder / name`.
      name: a task, or JOINT.
      data: of the seed.
      heads: by task.
      base: parameters and what else the checkpoint holds.
      evaluator: of the base's shape.
      model_dir: whose config and tokenizer go along.
      recipe: how to train.
      seed: of the order of rows.

    Returns:
      A record: seconds, steps, the best validation accuracy and its step.
    """
    out = folder / name
    done = out / "training.json"
    if done.exists():
        return json_files.read(done)
    shutil.rmtree(out, ignore_errors=True)
    names = list(data.train) if name == JOINT else [name]
    size = recipe.batch_size
    sizes = [len(data.train[n].labels) for n in names]
    epoch = sum(tokens.steps_an_epoch(n, size) for n in sizes)
    steps = recipe.epochs * epoch
    step, optimizer = step_and_optimizer(evaluator.shape, recipe.rate, steps)
    pool = data.validation if name == JOINT else data.own[name]

    @functools.cache
    def order(task: int, epoch: int) -> np.ndarray:
        lengths = data.encoded[names[task]].lengths()
        return tokens.shuffled(lengths, size, seed=seed, epoch=epoch)

    def batches(at: int) -> dict[str, Any]:
        task, visit = training.sampling.round_robin(sizes, at)
        at_epoch, place = divmod(visit, tokens.steps_an_epoch(sizes[task], size))
        n = names[task]
        chosen = order(task, at_epoch)[place]
        return batch_of(data.encoded[n], data.train[n], chosen, heads[n])

    def evaluate(params: Any) -> dict[str, float]:
        found = evaluator.accuracies(params, heads, pool)
        return {"accuracy": float(np.mean(list(found.values())))}

    start = time.perf_counter()
    # Joint training is long enough to be resumed on its own.
    working = folder / f"{name}.training"
    result = training.fit(
        step,
        training.init_state(base[0], optimizer, jax.random.key(seed)),
        batches,
        steps=steps,
        workdir=working if name == JOINT else None,
        config={**recipe._asdict(), "seed": seed, "tasks": ",".join(names)},
        eval_fn=evaluate,
        eval_every=epoch,
        checkpoint_every=epoch if name == JOINT else None,
        log_every=max(1, epoch // 4),
        progress=False,
    )
    best = result.best
    spelling = bert.spelling_of(checkpoints.open(model_dir).tensors)
    tensors = bert.to_hugging_face(
        best.params, base[1], shape=evaluator.shape, spelling=spelling
    )
    bert.save(out, tensors, like=model_dir)
    record = {
        "model": name,
        "seed": seed,
        "steps": steps,
        "seconds": round(time.perf_counter() - start, 2),
        "best_step": best.step,
        "validation": best.value,
        "history": result.history,
    }
    # Last of all: a directory without it is trained anew.
    json_files.write(done, record)
    shutil.rmtree(working, ignore_errors=True)
    return record

"""One small transformer, four tasks over real digits, merged: the library's first run.

A vision transformer is pretrained without labels (masked patches), then fine-tuned on
each task of `multitask_jax.data.digits` with that task's head frozen: a ridge
regression on the base's features, the counterpart of CLIP's zero-shot heads. Base and
experts are saved as Hugging Face style safetensors directories and merged through
`experiments.merge`. The table compares, on held-out images: the base, each expert, the
average, task arithmetic (Ilharco et al. 2023, arXiv 2212.04089), TIES (Yadav et al.
2023, arXiv 2306.01708) and TIES + LiNeS (Wang et al. 2025, arXiv 2410.17146).

Scales are chosen on validation images, from as many candidates for each method: lambda
for task arithmetic and TIES, beta for LiNeS, whose alpha follows from the task vectors.

    python -m experiments.digits --flagfile=experiments/flagfiles/digits/demo.flags

Under 3 minutes on 2 cores; a second run reuses the checkpoints. Writes to --workdir:
config.json, metrics.jsonl, report.md, digits.png, checkpoints/ and merged/.

Legend: S seeds, T tasks, N images, D features.
"""

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from experiments import flags, merge
from multitask_jax import checkpoints, merging
from multitask_jax.data import digits
from multitask_jax.models import digits_transformer as vit

SHAPE = vit.Shape()
TASKS = tuple(digits.TASKS)
# Candidates lie evenly between these, which hold the papers' ranges: lambda of task
# arithmetic and of TIES, beta of LiNeS.
RANGES = {
    "task arithmetic": (0.1, 1.5),
    "TIES": (0.2, 3.0),
    "TIES + LiNeS": (0.1, 1.5),
}
MERGES = ("average", *RANGES)
EXPERTS = "experts, own task"
VIEWS = ("digit", "turned", "negative")  # parity's pictures are those of digit


def _flag(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run depends on."""

    workdir: str = _flag(".cache/digits", "Where everything is written and cached.")
    seeds: str = _flag("0,1,2", "Comma list: one base and its experts a seed.")
    split_seed: int = _flag(0, "Seed of the train / validation / test split.")
    pretrain_steps: int = _flag(1500, "Steps on masked patches, without labels.")
    finetune_steps: int = _flag(300, "Steps on each task, its head frozen.")
    batch_size: int = _flag(32, "Images a step.")
    pretrain_rate: float = _flag(4e-3, "Peak learning rate of pretraining.")
    finetune_rate: float = _flag(2e-3, "Peak learning rate of fine-tuning.")
    ridge: float = _flag(1e-3, "Ridge of the heads, in mean variances of a feature.")
    temperature: float = _flag(4.0, "Logits are this times the ridge regression.")
    density: float = _flag(0.2, "Share of each task vector that TIES keeps.")
    candidates: int = _flag(15, "Scales each method tries on validation images.")


class Head(NamedTuple):
    """logits = features @ kernel + bias."""

    kernel: Any  # [D, classes], or [T, D, classes] for all tasks
    bias: Any  # [classes], or [T, classes]


class Result(NamedTuple):
    """Test accuracies [S, T] by row of the table, and what was made of them."""

    accuracy: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]  # the same of the merges, on validation images
    chosen: str  # the merge with the best mean accuracy on validation images
    report: str


# Training: one compiled loop for all bases, one for all experts.


def fit(
    loss: Callable[[vit.Params, jax.Array], jax.Array],
    params: vit.Params,
    key: jax.Array,
    *,
    steps: int,
    rate: float,
) -> tuple[vit.Params, jax.Array]:
    """AdamW with warm-up and cosine decay; returns parameters and losses [steps]."""
    schedule = optax.warmup_cosine_decay_schedule(0, rate, steps // 20, steps)
    optimiser = optax.adamw(schedule)

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, key)
        updates, state = optimiser.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    carry = (params, optimiser.init(params))
    (params, _), losses = jax.lax.scan(step, carry, jax.random.split(key, steps))
    return params, losses


@functools.partial(jax.jit, static_argnames="config")
def pretrain(images: Any, key: jax.Array, *, config: Config) -> Any:
    """A base from images [N, 8, 8] without labels; also its losses [steps]."""
    init_key, fit_key = jax.random.split(key)

    def loss(params: vit.Params, key: jax.Array) -> jax.Array:
        rows_key, mask_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (config.batch_size,), 0, len(images))
        return vit.reconstruction_loss(params, images[rows], mask_key, shape=SHAPE)

    params = vit.init_reconstruction(init_key, SHAPE)
    steps, rate = config.pretrain_steps, config.pretrain_rate
    params, losses = fit(loss, params, fit_key, steps=steps, rate=rate)
    return params["encoder"], losses


@functools.partial(jax.jit, static_argnames="config")
def finetune(
    base: Any, head: Head, images: Any, labels: Any, key: jax.Array, *, config: Config
) -> Any:
    """An expert from images [N, 8, 8] and labels [N]; also its losses [steps]."""

    def loss(params: vit.Params, key: jax.Array) -> jax.Array:
        rows = jax.random.randint(key, (config.batch_size,), 0, len(images))
        logits = vit.apply(params, images[rows], shape=SHAPE) @ head.kernel
        return optax.softmax_cross_entropy_with_integer_labels(
            logits + head.bias[None], labels[rows]
        ).mean()

    steps, rate = config.finetune_steps, config.finetune_rate
    return fit(loss, base, key, steps=steps, rate=rate)


def fit_head(x: np.ndarray, labels: np.ndarray, classes: int, config: Config) -> Head:
    """Ridge regression of one-hot labels [N] on features [N, D], in closed form."""
    x = x.astype(np.float64)
    target = np.eye(classes)[labels]
    centred = x - x.mean(0)
    gram = centred.T @ centred
    ridge = config.ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    kernel = np.linalg.solve(gram + ridge, centred.T @ (target - target.mean(0)))
    bias = target.mean(0) - x.mean(0) @ kernel
    return Head(*((config.temperature * a).astype(np.float32) for a in (kernel, bias)))


def pad(head: Head) -> Head:
    """Adds classes that never win, so that every task runs the same program."""
    extra = digits.CLASSES - len(head.bias)
    return Head(
        np.pad(head.kernel, ((0, 0), (0, extra))),
        np.pad(head.bias, (0, extra), constant_values=-1e9),
    )


@jax.jit
def features(params: Any, images: Any) -> jax.Array:
    """Features [N, D] of images [N, 8, 8]."""
    return vit.apply(params, images, shape=SHAPE)


# Checkpoints: models as Hugging Face lays them out, the heads beside them.


def save_model(path: Path, params: vit.Params) -> None:
    """Writes config.json and model.safetensors."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(vit.config_json(SHAPE), indent=2))
    tensors = vit.to_hugging_face(params, shape=SHAPE)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def read_model(path: Path) -> vit.Params:
    """Reads what `save_model` or a merge wrote."""
    reader = checkpoints.open(path)
    tensors = {
        name: np.array(reader.read(name)).reshape(info.shape)
        for name, info in reader.tensors.items()
    }
    reader.close()
    return vit.from_hugging_face(tensors, shape=SHAPE)


def read_heads(path: Path) -> Head:
    """All tasks' heads, padded and stacked."""
    x = load_file(path)
    heads = [pad(Head(x[f"{t}.weight"].T, x[f"{t}.bias"])) for t in TASKS]
    return Head(*(np.stack(a) for a in zip(*heads, strict=True)))


def train(
    config: Config, seed: int, split: digits.Split, progress: Callable[[str], None]
) -> tuple[Path, list[dict[str, Any]]]:
    """Makes a seed's base, heads and experts, or finds them as an earlier run left them.

    Returns:
      The folder (base/, one folder a task, heads.safetensors), and a record of each
      training: losses, and seconds (those of the first runs include compiling).
    """
    folder = Path(config.workdir) / "checkpoints" / f"seed_{seed}"
    depends = dataclasses.asdict(config) | {
        "seed": seed,
        "tasks": TASKS,
        **SHAPE._asdict(),
    }
    for unrelated in ("workdir", "seeds", "density", "candidates"):
        del depends[unrelated]
    depends = json.loads(json.dumps(depends))  # as it reads back
    done = folder / "training.json"
    if done.exists() and (stored := json.loads(done.read_text()))["config"] == depends:
        return folder, stored["records"]
    shutil.rmtree(folder, ignore_errors=True)
    records = []

    def timed(name: str, call: Callable[[], Any]) -> vit.Params:
        progress(f"seed {seed}: training {name}")
        start = time.perf_counter()
        params, losses = jax.device_get(call())
        every = max(1, len(losses) // 20)
        records.append(
            {
                "seed": seed,
                "model": name,
                "steps": len(losses),
                "seconds": round(time.perf_counter() - start, 3),
                "losses": [
                    float(losses[i : i + every].mean())
                    for i in range(0, len(losses), every)
                ],
            }
        )
        save_model(folder / name, params)
        return params

    base_key, *keys = jax.random.split(jax.random.key(seed), 1 + len(TASKS))
    pictures = np.concatenate([digits.examples(split, t).images for t in VIEWS])
    base = timed("base", lambda: pretrain(pictures, base_key, config=config))
    heads = {}
    for task, key in zip(TASKS, keys, strict=True):
        images, labels = digits.examples(split, task)
        x = np.asarray(features(base, images))
        head = fit_head(x, labels, digits.TASKS[task].classes, config)
        heads |= {f"{task}.weight": head.kernel.T.copy(), f"{task}.bias": head.bias}
        arguments = (base, pad(head), images, labels, key)
        timed(task, functools.partial(finetune, *arguments, config=config))
    save_file(heads, folder / "heads.safetensors")
    # Last of all: a run that was stopped before starts this seed again.
    done.write_text(json.dumps({"config": depends, "records": records}, indent=1))
    return folder, records


# Evaluation, and the choice of scales on validation images.


def all_tasks(split: digits.Split) -> digits.Split:
    """The split as each task shows it: images [T, N, 8, 8], labels [T, N]."""
    parts = [digits.examples(split, task) for task in TASKS]
    return digits.Split(*(np.stack(a) for a in zip(*parts, strict=True)))


@jax.jit
def accuracies(params: Any, heads: Head, data: digits.Split) -> jax.Array:
    """Accuracy [T] of one model on every task, each through its own head."""
    x = vit.apply(params, data.images.reshape(-1, *data.images.shape[2:]), shape=SHAPE)
    x = x.reshape(*data.digits.shape, -1)
    logits = jnp.einsum("tnd,tdc->tnc", x, heads.kernel) + heads.bias[:, None]
    return jnp.mean(jnp.argmax(logits, axis=-1) == data.digits, axis=-1)


@functools.partial(jax.jit, static_argnames=("method", "density"))
def merge_unscaled(
    base: Any, experts: Sequence[Any], *, method: str, density: float
) -> tuple[Any, jax.Array]:
    """The merge at scale 1, and the alpha that LiNeS takes for it.

    alpha = (|sum_t tau_t|_1 / |tau_merged|_1) / T, which brings the merged vector to
    the size of the average.
    """
    total = merging.merge(merging.task_arithmetic(), base, experts)
    merged = total
    if method.startswith("TIES"):
        merged = merging.merge(merging.ties(density=density), base, experts)
    size = lambda tree: optax.tree.norm(optax.tree.sub(tree, base), ord=1)  # noqa: E731
    return merged, size(total) / size(merged) / len(experts)


@jax.jit
def sweep(
    base: Any, merged: Any, alpha: Any, beta: Any, heads: Head, data: digits.Split
) -> jax.Array:
    """Accuracies [candidates, T] of base + (alpha + beta l / (L - 1)) tau_merged."""

    def evaluate(alpha: jax.Array, beta: jax.Array) -> jax.Array:
        lines = merging.with_lines(merging.task_arithmetic(), alpha=alpha, beta=beta)
        return accuracies(merging.merge(lines, base, [merged]), heads, data)

    return jax.vmap(evaluate)(alpha, beta)


def choose_scales(
    method: str,
    base: Any,
    experts: Any,
    heads: Head,
    data: digits.Split,
    config: Config,
) -> dict[str, float]:
    """The flags of `experiments.merge` with the best mean accuracy on `data`."""
    merged, alpha = merge_unscaled(base, experts, method=method, density=config.density)
    grid = np.linspace(*RANGES[method], config.candidates, dtype=np.float32)
    lines = method.endswith("LiNeS")
    alphas, betas = (np.full_like(grid, alpha), grid) if lines else (grid, 0 * grid)
    found = sweep(base, merged, alphas, betas, heads, data).mean(-1)
    best = int(jnp.argmax(found))  # the smallest of equals
    if lines:
        return {"lines_alpha": float(alphas[best]), "lines_beta": float(betas[best])}
    return {"scale": float(alphas[best])}

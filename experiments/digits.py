"""One small transformer, four tasks over real digits, merged: the library's first run.

A vision transformer is pretrained without labels (masked patches), then fine-tuned on
each task of `multitask_jax.data.digits` with that task's head frozen: the classes' mean
features in the base, the counterpart of CLIP's zero-shot heads. Base and experts are
saved as Hugging Face style safetensors directories and merged through
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

import contextlib
import dataclasses
import functools
import io
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
from jax.flatten_util import ravel_pytree
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from experiments import flags, merge, parsing, report_file
from experiments.flags import flag
from multitask_jax import merging
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
STRETCHES = 20  # mean losses a training is recorded by
VIEWS = ("digit", "turned", "negative")  # parity's pictures are those of digit


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run depends on."""

    workdir: str = flag("Where everything is written and cached.", ".cache/digits")
    seeds: str = flag("Comma list: one base and its experts a seed.", "0,1,2")
    split_seed: int = flag("Seed of the train / validation / test split.", 0)
    pretrain_steps: int = flag("Steps on masked patches, without labels.", 4000)
    finetune_steps: int = flag("Steps on each task, its head frozen.", 200)
    batch_size: int = flag("Images a step.", 32)
    pretrain_rate: float = flag("Peak learning rate of pretraining.", 4e-3)
    finetune_rate: float = flag("Peak learning rate of fine-tuning.", 2e-3)
    sharpness: float = flag("Of the frozen heads: their logits' scale.", 20.0)
    density: float = flag("Share of each task vector that TIES keeps.", 0.2)
    candidates: int = flag("Scales each method tries on validation images.", 15)


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
    base: Any,
    head: vit.Head,
    images: Any,
    labels: Any,
    key: jax.Array,
    *,
    config: Config,
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


@jax.jit
def features(params: Any, images: Any) -> jax.Array:
    """Features [N, D] of images [N, 8, 8]."""
    return vit.apply(params, images, shape=SHAPE)


def read_heads(path: Path) -> vit.Head:
    """All tasks' heads, padded and stacked: [T, D, classes], [T, classes]."""
    x = load_file(path)
    heads = [vit.Head(x[f"{t}.weight"].T, x[f"{t}.bias"]) for t in TASKS]
    heads = [vit.pad_head(head, digits.CLASSES) for head in heads]
    return vit.Head(*(np.stack(a) for a in zip(*heads, strict=True)))


def train(
    config: Config, seed: int, split: digits.Split, bar: tqdm
) -> tuple[Path, list[dict[str, Any]]]:
    """Makes a seed's base, heads and experts, unless an earlier run left them.

    They are reused while the config is the same; changed the code? Remove the folder.

    Returns:
      The folder (base/, one folder a task, heads.safetensors), and a record of each
      training: mean losses of its stretches, and seconds (the first with compiling).
    """
    folder = Path(config.workdir) / "checkpoints" / f"seed_{seed}"
    depends = dataclasses.asdict(config) | {"seed": seed, "tasks": list(TASKS)}
    depends |= {"shape": list(SHAPE)}
    for unrelated in ("workdir", "seeds", "density", "candidates"):
        del depends[unrelated]
    done = folder / "training.json"
    if done.exists() and (stored := json.loads(done.read_text()))["config"] == depends:
        bar.update(1 + len(TASKS))
        return folder, stored["records"]
    shutil.rmtree(folder, ignore_errors=True)
    records = []

    def timed(name: str, make: Callable[..., Any], *arguments: Any) -> vit.Params:
        bar.set_description(f"seed {seed}: training {name}")
        start = time.perf_counter()
        params, losses = jax.device_get(make(*arguments, config=config))
        seconds = round(time.perf_counter() - start, 3)
        losses = [float(part.mean()) for part in np.array_split(losses, STRETCHES)]
        record = {"seed": seed, "model": name, "seconds": seconds, "losses": losses}
        records.append(record)
        vit.save(folder / name, params, shape=SHAPE)
        bar.update()
        return params

    base_key, *keys = jax.random.split(jax.random.key(seed), 1 + len(TASKS))
    pictures = np.concatenate([digits.examples(split, t).images for t in VIEWS])
    base = timed("base", pretrain, pictures, base_key)
    heads = {}
    for task, key in zip(TASKS, keys, strict=True):
        images, labels = digits.examples(split, task)
        x = np.asarray(features(base, images))
        head = vit.class_mean_head(x, labels, scale=config.sharpness)
        heads |= {f"{task}.weight": head.kernel.T.copy(), f"{task}.bias": head.bias}
        head = vit.pad_head(head, digits.CLASSES)
        timed(task, finetune, base, head, images, labels, key)
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
def accuracies(params: Any, heads: vit.Head, data: digits.Split) -> jax.Array:
    """Accuracy [T] of one model on every task, each through its own head."""
    x = vit.apply(params, data.images.reshape(-1, *data.images.shape[2:]), shape=SHAPE)
    x = x.reshape(*data.digits.shape, -1)
    logits = jnp.einsum("tnd,tdc->tnc", x, heads.kernel) + heads.bias[:, None]
    return jnp.mean(jnp.argmax(logits, axis=-1) == data.digits, axis=-1)


@functools.partial(jax.jit, static_argnames=("ties", "density"))
def merge_unscaled(
    base: Any, experts: Sequence[Any], *, ties: bool, density: float
) -> tuple[Any, jax.Array]:
    """The merge at scale 1, and the alpha that LiNeS takes for it.

    alpha = (|sum_t tau_t|_1 / |tau_merged|_1) / T, which brings the merged vector to
    the size of the average.
    """
    # As one flat vector: neither method minds, and a single leaf compiles in no time.
    theta, to_tree = ravel_pytree(base)
    models = [ravel_pytree(expert)[0] for expert in experts]
    total = merging.merge(merging.task_arithmetic(), theta, models)
    recipe = merging.ties(density=density) if ties else merging.task_arithmetic()
    merged = merging.merge(recipe, theta, models)
    sizes = [jnp.sum(jnp.abs(x - theta)) for x in (total, merged)]
    return to_tree(merged), sizes[0] / sizes[1] / len(experts)


@jax.jit
def sweep(
    base: Any, merged: Any, alpha: Any, beta: Any, heads: vit.Head, data: digits.Split
) -> jax.Array:
    """Accuracies [candidates, T] of base + (alpha + beta l / (L - 1)) tau_merged."""

    def evaluate(alpha: jax.Array, beta: jax.Array) -> jax.Array:
        lines = merging.with_lines(merging.task_arithmetic(), alpha=alpha, beta=beta)
        return accuracies(merging.merge(lines, base, [merged]), heads, data)

    return jax.vmap(evaluate)(alpha, beta)


def choose(
    method: str,
    base: Any,
    experts: Sequence[Any],
    heads: vit.Head,
    data: digits.Split,
    config: Config,
) -> tuple[dict[str, Any], float | None]:
    """The flags of `experiments.merge` that do best on `data`, and how well they do.

    Returns:
      Flags, and the mean accuracy over tasks (None where there is nothing to choose).
    """
    if method == "average":
        return {"method": "linear"}, None
    ties, lines = method.startswith("TIES"), method.endswith("LiNeS")
    merged, alpha = merge_unscaled(base, experts, ties=ties, density=config.density)
    # Rounded, so that a command line is short; each method has as many candidates.
    grid = np.linspace(*RANGES[method], config.candidates).round(4)
    alpha = np.full_like(grid, round(float(alpha), 4))
    alphas, betas = (alpha, grid) if lines else (grid, 0 * grid)
    found = np.asarray(sweep(base, merged, alphas, betas, heads, data)).mean(-1)
    best = int(np.argmax(found))  # the smallest of equals
    chosen: dict[str, Any] = {"method": "task_arithmetic"}
    if ties:
        chosen = {"method": "ties", "density": str(config.density)}
    if lines:
        chosen |= {"lines_alpha": float(alphas[best]), "lines_beta": float(betas[best])}
    else:
        chosen["scale"] = float(alphas[best])
    return chosen, float(found[best])


# The run, and what it writes.


def check(config: Config) -> list[int]:
    """The seeds; raises ValueError for what would fail only later."""
    seeds = parsing.seeds(config.seeds)
    least = {"batch_size": 1, "candidates": 1}
    least |= {"pretrain_steps": STRETCHES, "finetune_steps": STRETCHES}
    for name, wanted in least.items():
        if (got := getattr(config, name)) < wanted:
            raise ValueError(f"{name}: got {got}, expected at least {wanted}")
    return seeds


def run(config: Config) -> Result:
    """Trains (once), merges, evaluates; prints and writes the table and the figure.

    Raises:
      ValueError: a field is out of range; says which.
    """
    start = time.perf_counter()
    seeds = check(config)
    workdir = Path(config.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(config)) + "\n")
    splits = digits.load(seed=config.split_seed)
    parts = {p: all_tasks(getattr(splits, p)) for p in ("validation", "test")}
    found: dict[str, dict[str, list[Any]]] = {part: {} for part in parts}
    chosen: dict[str, list[merge.Config]] = {method: [] for method in MERGES}
    records: list[dict[str, Any]] = []
    gap = 0.0
    bar = tqdm(total=len(seeds) * (1 + len(TASKS) + len(MERGES)), unit="model")
    for seed in seeds:
        folder, trained = train(config, seed, splits.train, bar)
        records += trained
        heads = read_heads(folder / "heads.safetensors")
        base, *experts = (vit.load(folder / name) for name in ("base", *TASKS))
        models = {"base": base}
        models |= {f"expert: {t}": e for t, e in zip(TASKS, experts, strict=True)}
        for method in MERGES:
            bar.set_description(f"seed {seed}: merging, {method}")
            name = method.lower().replace(" + ", "_").replace(" ", "_")
            given, in_memory = choose(
                method, base, experts, heads, parts["validation"], config
            )
            merge_config = merge.Config(
                base=str(folder / "base"),
                models=",".join(str(folder / task) for task in TASKS),
                output=str(workdir / "merged" / f"seed_{seed}" / name),
                overwrite=True,
                report=seed == seeds[0],
                progress=False,
                **given,
            )
            with contextlib.redirect_stdout(io.StringIO()):  # the bar is enough
                merge.run(merge_config)
            models[method] = vit.load(merge_config.output)
            chosen[method].append(merge_config)
            if in_memory is not None:
                from_disk = accuracies(models[method], heads, parts["validation"])
                gap = max(gap, abs(float(np.mean(from_disk)) - in_memory))
            bar.update()
        for part, data in parts.items():
            for name, params in models.items():
                values = np.asarray(accuracies(params, heads, data))
                found[part].setdefault(name, []).append(values)
            own = np.diag([found[part][f"expert: {task}"][-1] for task in TASKS])
            found[part].setdefault(EXPERTS, []).append(own)
            records += [
                {"seed": seed, "model": name, "split": part, "accuracy": x[-1].tolist()}
                for name, x in found[part].items()
            ]
    bar.close()
    test, validation = (
        {name: np.stack(x) for name, x in found[part].items()}
        for part in ("test", "validation")
    )
    best = choose_method(validation)
    report = write_report(test, validation, chosen, gap, len(parts["test"].digits[0]))
    with (workdir / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    (workdir / "report.md").write_text(report + "\n![accuracies](digits.png)\n")
    draw(test).savefig(workdir / "digits.png", dpi=150)
    print(f"\n{report}\n{time.perf_counter() - start:.0f} s; wrote {workdir}/report.md")
    return Result(test, validation, best, report)


def choose_method(validation: Mapping[str, np.ndarray]) -> str:
    """The merge with the best mean accuracy on validation images."""
    return max(MERGES, key=lambda method: validation[method].mean())


def write_report(
    test: Mapping[str, np.ndarray],
    validation: Mapping[str, np.ndarray],
    chosen: Mapping[str, Sequence[merge.Config]],
    gap: float,
    images: int,
) -> str:
    """The table in Markdown, the scales chosen, and what the numbers say."""

    def spread(x: np.ndarray) -> str:
        return report_file.over_seeds(100 * x)

    best = choose_method(validation)
    order = ["base", *(f"expert: {t}" for t in TASKS), EXPERTS, *MERGES]
    lines = [
        f"Accuracy in % on {images} held-out images a task, mean ± standard deviation"
        f" (seeds: {len(test['base'])}).",
        "",
        f"| model | all tasks | normalised | {' | '.join(TASKS)} |",
        "|---|" + "--:|" * (2 + len(TASKS)),
    ]
    for name in order:
        x = test[name]
        tasks = " | ".join(f"{100 * v:.1f}" for v in x.mean(0))
        label = f"**{name}**" if name == best else name
        share = spread(np.mean(x / test[EXPERTS], axis=1))
        lines.append(f"| {label} | {spread(x.mean(1))} | {share} | {tasks} |")
    mean = {name: 100 * x.mean() for name, x in test.items()}
    lines += [
        "",
        "As it came, no seed or task left out. Normalised: over the accuracy of the"
        f" task's expert. Chosen on validation images: **{best}**, here"
        f" {mean[best] - mean['base']:+.1f} points against the base. The average is at"
        f" {mean['average'] - mean[EXPERTS]:+.1f} points against the experts.",
        "",
    ]
    for method, configs in chosen.items():
        scales = [
            " ".join(
                f"{name} {value:.3g}"
                for name in ("scale", "lines_alpha", "lines_beta")
                if (value := getattr(c, name)) is not None
            )
            for c in configs
        ]
        by_seed = f"; by seed: {', '.join(scales)}" if any(scales) else ""
        on_validation = 100 * validation[method].mean()
        lines.append(f"- {method}: {on_validation:.1f} on validation images{by_seed}")
    around = ("report", "progress", "overwrite")
    command = " \\\n    ".join(merge.flags_of(chosen[best][0], leave_out=around))
    lines += [
        "",
        "Scales were tried in memory; the merges that the command line then wrote are"
        f" within {100 * gap:.2f} points of that on validation images. One of them:",
        "",
        f"    python -m experiments.merge \\\n    {command}",
        "",
    ]
    return "\n".join(lines)


def draw(test: Mapping[str, np.ndarray]) -> Figure:
    """Mean accuracy by task as a bar-wide line, and a dot a seed."""
    rows = ("base", *MERGES, EXPERTS)
    colours = ("#8a8a8a", "#5fa2ce", "#1170aa", "#7b66d2", "#e15c00", "#222222")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / len(rows)
    for i, (name, colour) in enumerate(zip(rows, colours, strict=True)):
        x = 100 * np.concatenate([test[name].mean(1, keepdims=True), test[name]], 1)
        at = np.arange(x.shape[1]) + (i - (len(rows) - 1) / 2) * width
        mean, half = x.mean(0), 0.42 * width
        axes.hlines(mean, at - half, at + half, colour, linewidth=3, label=name)
        axes.plot(at, x.T, "o", color=colour, markersize=4, alpha=0.5, mew=0)
    for place in range(len(TASKS)):
        axes.axvline(place + 0.5, color="0.9", linewidth=1, zorder=0)
    axes.set_xticks(range(1 + len(TASKS)), ["all tasks", *TASKS])
    axes.set_ylabel("accuracy on held-out images, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(rows), frameon=False)
    return figure


if __name__ == "__main__":
    flags.main(Config, run)

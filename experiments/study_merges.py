"""The rows of the study's tables: methods, their candidates, tuning, the final merge.

Every row has the same budget of evaluations on validation rows. Candidates are merged
in memory (`experiments.candidates`); the chosen one is merged once more by the command
line that users run.

Legend: T tasks.
"""

import contextlib
import dataclasses
import functools
import io
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import candidates, merge, study_data_driven
from experiments.benchmark_merge import measure
from multitask_jax import checkpoints, merging
from multitask_jax.models import bert

Coefficients = dict[str, Any]
Tensors = Mapping[str, Any]
Evaluate = Callable[[Tensors], dict[str, float]]  # tensors -> accuracy by task

# Of few models only, or of one task at a time: rows of their own or none.
LEFT_OUT = {
    "slerp": "two models",
    "nuslerp": "two models",
    "nearswap": "one model",
    "arcee_fusion": "one model",
    "passthrough": "one model",
    "emr": "a model a task",
    "tall_masks": "a model a task",
}
# lambda of methods that add up T task vectors, and of those that average or choose.
SUMS = ("task_arithmetic", "magnitude_prune", "dare", "della", "breadcrumbs")
SCALES = {True: (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)}
SCALES[False] = (0.3, 0.5, 0.8, 1.0, 1.3, 1.6, 2.0, 3.0)
BETAS = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5)
# A second coefficient: two values, each with half of the scales.
SECOND: dict[str, tuple[str, tuple[Any, ...]]] = {
    "ties": ("density", ("0.2", "0.5")),
    "magnitude_prune": ("density", ("0.2", "0.5")),
    "dare": ("density", ("0.2", "0.5")),
    "dare_ties": ("density", ("0.2", "0.5")),
    "della": ("density", ("0.3", "0.6")),
    "della_ties": ("density", ("0.3", "0.6")),
    "breadcrumbs": ("density", ("0.5", "0.9")),
    "breadcrumbs_ties": ("density", ("0.5", "0.9")),
    "pcb": ("density", ("0.05", "0.2")),
    "sce": ("topk", (0.1, 1.0)),
    "consensus": ("tall_lambda", ("0.2", "0.4")),
    "regmean": ("off_diagonal", (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)),
}


class Entry(NamedTuple):
    """A row: fixed flags of `experiments.merge`, and the candidates for others."""

    label: str
    flags: Coefficients
    grid: tuple[Coefficients, ...]
    # Changes the models first (ablations that no flag has).
    prepare: Callable[[candidates.Inputs], candidates.Inputs] | None = None


class Tuned(NamedTuple):
    """What validation chose."""

    coefficients: Coefficients
    scores: list[float]  # of all candidates, in the grid's order
    tensors: dict[str, np.ndarray]  # the best merge
    seconds: float


def spread(values: Sequence[Any], count: int) -> list[Any]:
    """`count` of the values, first and last among them, or all if they are fewer."""
    if count == 1:
        return [values[len(values) // 2]]
    places = np.linspace(0, len(values) - 1, min(count, len(values))).round()
    return [values[int(i)] for i in places]


def grid(method: str, *, lines: bool, budget: int) -> tuple[Coefficients, ...]:
    """At most `budget` candidates of a method."""
    takes = candidates.takes(method)
    name, values = SECOND.get(method, ("", ()))
    if lines:
        axis, along = "lines_beta", BETAS
    elif "scale" in takes:
        axis, along = "scale", SCALES[method in SUMS]
    else:
        return tuple({name: v} for v in spread(values, budget)) if name else ({},)
    if not name:
        return tuple({axis: x} for x in spread(along, budget))
    # With LiNeS, what has no scale keeps its second coefficient's default.
    if "scale" not in takes or budget < 4:
        return tuple({axis: x} for x in spread(along, budget))
    half = spread(along, budget // len(values))
    return tuple({name: v, axis: x} for v in values for x in half)


def entries(budget: int) -> list[Entry]:
    """Every method that merges T models into one, without and with LiNeS."""
    out = []
    for method in merging.METHODS:
        if method in LEFT_OUT:
            continue
        flags = {"method": method}
        out.append(Entry(method, flags, grid(method, lines=False, budget=budget)))
        flags = {"method": method, "lines_alpha": "norm"}
        label = f"{method} + LiNeS"
        out.append(Entry(label, flags, grid(method, lines=True, budget=budget)))
    return out


@functools.lru_cache(maxsize=1)
def _read(config: merge.Config) -> candidates.Inputs:
    return candidates.read_inputs(config, merge.build_method(config))


def inputs_of(config: merge.Config) -> candidates.Inputs:
    """Base and models in memory; the same object while they are the same."""
    plain = "task_arithmetic" if config.statistics is None else config.method
    few = {"base": config.base, "models": config.models}
    return _read(merge.Config(**few, method=plain, statistics=config.statistics))


def tune(
    entry: Entry, config: merge.Config, evaluate: Evaluate, known: Coefficients | None
) -> Tuned:
    """The candidate of the best mean accuracy over tasks; the first of equals.

    Args:
      entry: the row.
      config: base, models and statistics.
      evaluate: on validation rows.
      known: coefficients chosen before: nothing is evaluated then.
    """
    start = time.perf_counter()
    config = dataclasses.replace(config, **entry.flags)
    inputs = inputs_of(config)
    if entry.prepare is not None:
        inputs = entry.prepare(inputs)
    merges = candidates.Candidates(config, inputs, lambda params: 0.0)
    best: Coefficients = entry.grid[0] if known is None else known
    scores: list[float] = []
    if known is None and len(entry.grid) > 1:
        for coefficients in entry.grid:
            found = evaluate(merges.params(coefficients))
            scores.append(float(np.mean(list(found.values()))))
        best = entry.grid[int(np.argmax(scores))]
    tensors = {k: np.asarray(x) for k, x in merges.params(best).items()}
    return Tuned(best, scores, tensors, time.perf_counter() - start)


def command_line(config: merge.Config) -> list[str]:
    """The command that merges as `config` says."""
    flags = []
    for name, value in merge.recipe_of(config).items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no{name}")
        else:
            flags.append(f"--{name}={value}")
    return [sys.executable, "-m", "experiments.merge", *flags]


def quietly(config: merge.Config) -> None:
    """`experiments.merge` without its line of success."""
    with contextlib.redirect_stdout(io.StringIO()):
        merge.run(config)


class Final(NamedTuple):
    """A merge by the command line."""

    tensors: dict[str, np.ndarray]
    command: list[str]
    seconds: float
    megabytes: float | None  # of a process of its own; None inside this one


def merge_on_disk(
    config: merge.Config, coefficients: Coefficients, output: Path, *, measured: bool
) -> Final:
    """Runs `experiments.merge`, as a process of its own if it is to be measured."""
    config = dataclasses.replace(
        candidates.config_at(config, coefficients),
        output=str(output),
        progress=False,
        report=False,
        overwrite=True,
    )
    command = command_line(config)
    if measured:
        seconds, megabytes = measure(command)
    else:
        start, megabytes = time.perf_counter(), None
        quietly(config)
        seconds = time.perf_counter() - start
    return Final(bert.read_tensors(output), command, seconds, megabytes)


def difference(a: Tensors, b: Tensors) -> float:
    """The largest difference of any entry; 0 where all bytes are equal.

    Raises:
      ValueError: different tensors.
    """
    if set(a) != set(b):
        raise ValueError(f"tensors differ: {sorted(set(a) ^ set(b))[:5]}")
    largest = 0.0
    for name, x in a.items():
        x, y = np.asarray(x), np.asarray(b[name])
        if x.tobytes() != y.tobytes():
            wide = x.astype(np.float64) - y.astype(np.float64)
            # Equal values of different bytes (-0) are a difference, too.
            largest = max(
                largest, float(np.max(np.abs(wide))), np.finfo(np.float32).tiny
            )
    return largest


def emr_models(
    config: merge.Config, output: Path, tasks: Sequence[str], *, measured: bool
) -> tuple[dict[str, Tensors], Final]:
    """EMR's model of each task, from the files that the command line writes."""
    config = dataclasses.replace(config, method="emr")
    final = merge_on_disk(config, {}, output, measured=measured)
    reader = checkpoints.open(output)
    base = bert.read_tensors(config.base)
    models = {}
    for task in tasks:
        known = merging.load_task(
            output / "tasks" / f"{task}.safetensors", reader.tensors
        )
        models[task] = merging.specialise(final.tensors, known, base=base)
    reader.close()
    return models, final


def redundancy(
    config: merge.Config, densities: Sequence[float], evaluate: Evaluate
) -> dict[float, dict[str, float]]:
    """Accuracy of one model trimmed to its largest changes over the whole model."""
    config = dataclasses.replace(
        config, method="magnitude_prune", trim_scope="model", scale=1.0
    )
    merges = candidates.Candidates(config, inputs_of(config), lambda params: 0.0)
    return {d: evaluate(merges.params({"density": str(d)})) for d in densities}


def along_alpha(config: merge.Config) -> dict[str, Callable[[float], Tensors]]:
    """One model at alpha: LiNeS (beta = 1 - alpha), and WiSE-FT (all by alpha)."""
    config = dataclasses.replace(config, method="task_arithmetic")
    merges = candidates.Candidates(config, inputs_of(config), lambda params: 0.0)
    return {
        "LiNeS": lambda a: merges.params({"lines_alpha": a, "lines_beta": 1.0 - a}),
        "WiSE-FT": lambda a: merges.params({"scale": a}),
    }


def tall_models(
    config: merge.Config, tasks: Sequence[str], tall_lambda: float
) -> dict[str, Tensors]:
    """TALL masks' model of each task, in memory."""
    config = dataclasses.replace(config, method="tall_masks")
    inputs = inputs_of(config)
    merges = candidates.Candidates(config, inputs, lambda params: 0.0)
    return {
        task: merges.params({"task": t, "tall_lambda": str(tall_lambda)})
        for t, task in enumerate(tasks)
    }


def ablations(budget: int, joint: Tensors) -> list[Entry]:
    """TIES without one of its steps, or with other settings; scales tuned for each.

    "Oracle signs" are those of the joint model's change of the base.
    """
    scales = tuple({"scale": x} for x in spread(SCALES[False], budget))
    ties = {"method": "ties", "density": "0.2"}
    mean = {"method": "ram", "epsilon": 0.0}
    variants = {
        "TIES": ties,
        "no trim": ties | {"density": "1.0"},
        "trim per tensor": ties | {"trim_scope": "tensor"},
        "sum of agreeing": ties | {"combine": "sum"},
        **{
            f"density {d}": ties | {"density": d} for d in ("0.05", "0.1", "0.5", "0.8")
        },
    }
    keep = study_data_driven.sparse_means
    return [
        *(Entry(label, flags, scales) for label, flags in variants.items()),
        Entry("no election", mean, scales, lambda x: keep(x, density=0.2)),
        Entry(
            "oracle signs",
            mean,
            scales,
            lambda x: keep(x, density=0.2, reference=joint),
        ),
    ]

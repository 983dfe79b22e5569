"""Merges of the study: a row's task vectors, its tuning, the final merge.

A merged task vector is made once for all candidates that differ in scale or LiNeS
alone, by the streamed merge; these are applied in memory by one compiled function. The
chosen merge is made once more by the command line that users run, and compared.

Legend: T tasks.
"""

import contextlib
import dataclasses
import functools
import io
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import candidates, merge
from experiments.benchmark_merge import measure
from experiments.study_tasks import Score, floats_of
from multitask_jax import checkpoints, merging
from multitask_jax.checkpoints import delta_file

Coefficients = dict[str, Any]
Tensors = Mapping[str, Any]

QUIET = {"progress": False, "report": False, "overwrite": True}
_KEPT = 6  # task vectors: what trimming leaves of each model is used twice
SWEPT = ("scale", "lines_alpha", "lines_beta", "depth_mean")  # applied in memory


class Entry(NamedTuple):
    """A row: fixed flags of `experiments.merge`, and the candidates for others."""

    label: str
    flags: Coefficients
    grid: tuple[Coefficients, ...]
    # The merged task vector of an ablation that no flag has.
    tau: Callable[["Merger"], dict[str, np.ndarray]] | None = None


class Tuned(NamedTuple):
    """What validation chose."""

    coefficients: Coefficients
    scores: list[Score]  # of all candidates, in the grid's order
    tensors: dict[str, Any]  # the best merge


@jax.jit
def add_scaled(base: Tensors, tau: Tensors, alpha: Any, beta: Any) -> Tensors:
    """theta_0 + (alpha + beta l / (L - 1)) tau, as the command line computes it."""
    scaled = merging.scale_by_depth(alpha=alpha, beta=beta)
    # The model given is the task vector itself: nothing is subtracted first.
    return merging.merge(merging.Method((scaled,), start="parameters"), base, [tau])


@jax.jit
def add_tall(base: Tensors, total: Tensors, own: Tensors, tall_lambda: Any) -> Tensors:
    """theta_0 + m_t tau, m_t = |tau_t| > lambda |tau - tau_t|: TALL masks' model t."""

    def add(x: Any, tau: Any, tau_t: Any) -> Any:
        mask = jnp.abs(tau_t) > tall_lambda * jnp.abs(tau - tau_t)
        return x + jnp.where(mask, tau, 0)

    return jax.tree.map(add, base, total, own)


class Merger:
    """Merges of one set of models; the last task vectors are kept."""

    def __init__(self, config: merge.Config, folder: Path):
        self.config, self.folder = config, folder
        self.models = config.models.split(",")
        stored = checkpoints.read_tensors(config.base)
        self.base = floats_of(stored)
        self.rest = {k: x for k, x in stored.items() if k not in self.base}
        self._on_device = jax.device_put(self.base)
        self._kept: dict[str, dict[str, np.ndarray]] = {}

    def task_vector(self, **flags: Any) -> dict[str, np.ndarray]:
        """tau by a method (and other flags) at scale 1, without LiNeS, in float32."""
        if "scale" in candidates.takes(flags["method"]):
            flags = {"scale": 1.0} | flags  # where it has another default
        key = repr(sorted(flags.items()))
        if key not in self._kept:
            with self._merge(flags | {"output_format": "delta"}) as output:
                reader = checkpoints.open(self.config.base)
                found = delta_file.read(output, reader)
                reader.close()
            if len(self._kept) >= _KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = found
        return self._kept[key]

    def merged(self, **flags: Any) -> dict[str, np.ndarray]:
        """The model by a method that nothing scales.

        theta_0 + (theta - theta_0) may differ from theta by a rounding.
        """
        with self._merge(flags) as output:
            return checkpoints.read_tensors(output)

    @contextlib.contextmanager
    def _merge(self, flags: Coefficients) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self.folder) as around:
            output = Path(around) / "merged"
            flags = flags | QUIET | {"output": str(output)}
            quietly(dataclasses.replace(self.config, **flags))
            yield output

    def trimmed(self, model: str, density: float) -> dict[str, np.ndarray]:
        """tau of one model, but for its largest changes over the whole model 0."""
        return self.task_vector(
            method="magnitude_prune",
            models=model,
            trim_scope="model",
            density=str(density),
        )

    def tall(self, t: int, tall_lambda: float) -> dict[str, Any]:
        """The model that TALL masks leave for task t."""
        found = add_tall(self._on_device, self.total, self.own(t), tall_lambda)
        return dict(found) | self.rest

    def own(self, t: int) -> dict[str, np.ndarray]:
        """tau_t = theta_t - theta_0."""
        model = checkpoints.read_tensors(self.models[t])
        return {k: model[k] - x for k, x in self.base.items()}

    @functools.cached_property
    def total(self) -> dict[str, np.ndarray]:
        """sum_t tau_t."""
        return self.task_vector(method="task_arithmetic")

    def norm_alpha(self, tau: Tensors) -> float:
        """LiNeS' alpha by the norm rule, to four digits, so that flags can tell it."""
        alpha = merging.norm_rule(self.total, dict(tau), len(self.models))
        return _four_digits(float(alpha))

    def whole(self, tau: Tensors) -> dict[str, jax.Array]:
        """A task vector on the device, 0 where it has no tensor."""
        full = {
            k: tau[k] if k in tau else np.zeros_like(x) for k, x in self.base.items()
        }
        return jax.device_put(full)

    def at(self, tau: Tensors, swept: Coefficients) -> dict[str, Any]:
        """The model of a `whole` task vector at a scale or with LiNeS."""
        alpha = swept.get("lines_alpha", swept.get("scale", 1.0))
        beta = swept.get("lines_beta", 0.0)
        found = add_scaled(self._on_device, tau, jnp.float32(alpha), jnp.float32(beta))
        return dict(found) | self.rest


def mean(scores: Mapping[str, Score]) -> Score:
    """Over tasks."""
    return Score(*(float(np.mean(x)) for x in zip(*scores.values(), strict=True)))


def tune(
    entry: Entry,
    merger: Merger,
    score: Callable[[Tensors], Score],
    known: Coefficients | None = None,
) -> Tuned:
    """The candidate under which validation labels are likeliest, mean over tasks.

    Not the one of the best accuracy: on a few hundred rows most candidates are a row or
    two apart, and the likelihood follows the accuracy on other rows more closely.

    Args:
      entry: the row.
      merger: of base and models.
      score: on validation rows.
      known: coefficients chosen before: nothing is scored then.
    """
    own = None if entry.tau is None else entry.tau(merger)
    alphas: dict[str, float] = {}  # by the norm rule, of each task vector
    taus: dict[str, Tensors] = {}

    def model(given: Coefficients) -> tuple[Coefficients, dict[str, Any]]:
        every = entry.flags | given
        flags = {k: v for k, v in every.items() if k not in SWEPT}
        swept = {k: v for k, v in every.items() if k in SWEPT}
        if own is None and not swept:
            return given, merger.merged(**flags)
        key = repr(flags)
        if key not in taus:
            made = merger.task_vector(**flags) if own is None else own
            taus[key] = merger.whole(made)
        tau = taus[key]
        if swept.get("lines_alpha") == "norm":
            if key not in alphas:
                alphas[key] = merger.norm_alpha(tau)
            scales = lines_of(alphas[key], swept)
            swept |= scales
            given = given | scales
        return given, merger.at(tau, swept)

    if known is not None and entry.flags.get("lines_alpha") == "norm":
        # The rule is this seed's own.
        known = {k: v for k, v in known.items() if not k.startswith("lines_")}
    grid = entry.grid if known is None else (known,)
    if len(grid) == 1:
        found, tensors = model(grid[0])
        return Tuned(found, [], tensors)
    best: tuple[float, Coefficients, Any] = (-np.inf, {}, None)
    scores = []
    for candidate in grid:
        found, tensors = model(candidate)
        scores.append(score(tensors))
        if scores[-1].likelihood > best[0]:
            best = scores[-1].likelihood, found, tensors
    return Tuned(best[1], scores, best[2])


def lines_of(alpha: float, swept: Coefficients) -> Coefficients:
    """LiNeS' flags at a mean scale over depth of `depth_mean` alpha.

    With lines_beta (0) there is no depth: that is all of the scale.
    """
    mean = swept["depth_mean"]
    if "lines_beta" in swept:
        return {"lines_alpha": _four_digits(mean * alpha), "lines_beta": 0.0}
    beta = _four_digits(2 * alpha * (mean - 1))
    return {"lines_alpha": alpha, "lines_beta": beta}


def _four_digits(x: float) -> float:
    return float(f"{x:.4g}")


def quietly(config: merge.Config) -> None:
    """`experiments.merge` in this process; it prints nothing."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        merge.run(config)


class Final(NamedTuple):
    """A merge by the command line."""

    tensors: dict[str, np.ndarray]
    command: list[str]
    seconds: float
    megabytes: float | None  # of a process of its own, if it is seen (under Linux)

    def record(self) -> dict[str, Any]:
        """What is kept of it."""
        return {
            "command": f"python {shlex.join(self.command[1:])}",
            "merge_seconds": round(self.seconds, 2),
            "merge_megabytes": self.megabytes,
        }


def merge_on_disk(
    config: merge.Config, coefficients: Coefficients, output: Path, *, measured: bool
) -> Final:
    """Runs `experiments.merge`, as a process of its own if it is to be measured."""
    told = {k: v for k, v in coefficients.items() if k != "depth_mean"}
    config = candidates.config_at(config, told)
    config = dataclasses.replace(config, output=str(output), **QUIET)
    command = [sys.executable, "-m", "experiments.merge", *merge.flags_of(config)]
    if measured:
        seconds, peak = measure(command)
        megabytes = peak or None  # of no process is it 0: it was not seen
    else:
        start, megabytes = time.perf_counter(), None
        quietly(config)
        seconds = time.perf_counter() - start
    return Final(checkpoints.read_tensors(output), command, seconds, megabytes)


def difference(a: Tensors, b: Tensors) -> float:
    """The largest difference of any entry; 0 where all bytes are equal.

    Raises:
      ValueError: different tensors.
    """
    if set(a) != set(b):
        raise ValueError(f"tensors differ: {sorted(set(a) ^ set(b))[:5]}")
    largest = 0.0
    for name, value in a.items():
        x, y = np.asarray(value), np.asarray(b[name])
        if x.tobytes() != y.tobytes():
            gap = np.max(np.abs(x.astype(np.float64) - y.astype(np.float64)))
            # Equal values of different bytes (-0) are a difference, too.
            largest = max(largest, float(gap), float(np.finfo(np.float32).tiny))
    return largest


def emr_models(
    config: merge.Config, output: Path, tasks: Sequence[str], *, measured: bool
) -> tuple[dict[str, Tensors], Final]:
    """EMR's model of each task, from the files that the command line writes."""
    config = dataclasses.replace(config, method="emr")
    final = merge_on_disk(config, {}, output, measured=measured)
    reader = checkpoints.open(output)
    base = checkpoints.read_tensors(config.base)
    models = {}
    for task in tasks:
        path = output / "tasks" / f"{task}.safetensors"
        known = merging.load_task(path, reader.tensors)
        models[task] = merging.specialise(final.tensors, known, base=base)
    reader.close()
    return models, final


def mean_of_kept(
    merger: Merger, *, density: float, reference: Tensors | None = None
) -> dict[str, np.ndarray]:
    """TIES without its election: the mean over models of what trimming leaves.

    With a reference model only entries that go its way are left: an oracle of signs.
    """
    total: dict[str, np.ndarray] = {}
    count: dict[str, np.ndarray] = {}
    for model in merger.models:
        trimmed = merger.trimmed(model, density)
        for k, tau in trimmed.items():
            if reference is not None:
                agrees = np.sign(tau) == np.sign(reference[k] - merger.base[k])
                tau = np.where(agrees, tau, np.float32(0))
            total[k] = total.get(k, 0) + tau
            count[k] = count.get(k, 0) + (tau != 0)
    return {k: x / np.maximum(count[k], 1).astype(x.dtype) for k, x in total.items()}

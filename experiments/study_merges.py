"""The rows of the study's tables: methods, their candidates, tuning, the final merge.

Every row has the same budget of evaluations on validation rows. A merged task vector is
made once for all candidates that differ in scale or LiNeS alone, by the streamed merge;
these are applied in memory by one compiled function. The chosen merge is made once more
by the command line that users run, and compared.

Legend: T tasks.
"""

import contextlib
import dataclasses
import functools
import hashlib
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
# lambda of methods that add up T task vectors, and of those that average or choose;
# fewer where a second coefficient shares the budget.
SUMS = ("task_arithmetic", "magnitude_prune", "dare", "della", "breadcrumbs")
SUMS = (*SUMS, "consensus")
SUM_SCALES = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.1, 1.5)
SCALES = (0.1, 0.3, 0.6, 1.0, 1.5, 2.2, 3.2, 5.0)
FEW_SUM_SCALES, FEW_SCALES = (0.2, 0.3, 0.5, 0.8), (0.4, 0.7, 1.0, 1.5)
# Of LiNeS: the mean scale over depth as a multiple m of alpha, beta = 2 alpha (m - 1),
# since alpha by the norm rule differs by two orders between methods.
DEPTH_MEANS = (1.0, 1.5, 2.0, 3.0, 4.5, 7.0, 10.0, 15.0)
FEW_DEPTH_MEANS = (1.0, 1.5, 2.5, 5.0)
TALL_LAMBDAS = ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.8", "1.0")
# A second coefficient: its values share the budget.
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
    "regmean": ("off_diagonal", (0.9, 0.99)),  # with LiNeS; without, it is the only one
}
# Half of the default, by which a merge takes a minute on two cores.
FIXED: dict[str, Coefficients] = {"wudi": {"iterations": 200}}
OFF_DIAGONALS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
BUDGET = 8  # evaluations a row has candidates for, at most
# Their LiNeS rows are not merged once more by the command line: a merge takes from 10
# to 40 s, and what is slow in it was compared without LiNeS.
SLOW = ("wudi", "knots", "iso_cts", "tsv_m")
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
    tensors: dict[str, np.ndarray]  # the best merge


def spread(values: Sequence[Any], count: int) -> list[Any]:
    """`count` of the values, first and last among them, or all if they are fewer."""
    if count == 1:
        return [values[len(values) // 2]]
    places = np.linspace(0, len(values) - 1, min(count, len(values))).round()
    return [values[int(i)] for i in places]


def grid(method: str, *, lines: bool, budget: int) -> tuple[Coefficients, ...]:
    """At most `budget` candidates of a method."""
    if lines:
        axis, along, few = "depth_mean", DEPTH_MEANS, FEW_DEPTH_MEANS
    elif "scale" in candidates.takes(method):
        axis, along, few = "scale", SCALES, FEW_SCALES
        if method in SUMS:
            along, few = SUM_SCALES, FEW_SUM_SCALES
    elif method == "regmean":  # more of its own coefficient
        return tuple({"off_diagonal": x} for x in spread(OFF_DIAGONALS, budget))
    else:
        return ({},)
    name, values = SECOND.get(method, ("", ()))
    if not name or budget < 2 * len(values):
        return tuple({axis: x} for x in spread(along, budget))
    each = budget // len(values)
    part = spread(few if each <= len(few) else along, each)
    return tuple({name: v, axis: x} for v in values for x in part)


def entries(budget: int) -> list[Entry]:
    """Every method that merges T models into one, without and with LiNeS.

    Methods that take no scale have a third row, their task vector scaled (by LiNeS'
    flags, alike at all depths): what LiNeS has beyond a scale is against that.
    """
    out = []
    for method in merging.METHODS:
        if method in LEFT_OUT:
            continue
        flags = {"method": method, **FIXED.get(method, {})}
        own = grid(method, lines=False, budget=budget)
        out.append(Entry(method, flags, own))
        if own == ({},) and method != "linear":  # that is task arithmetic
            out.append(scaled(method, flags, budget))
        flags = flags | {"lines_alpha": "norm"}
        if "scale" in candidates.takes(method):
            flags["scale"] = 1.0  # LiNeS is all the scale there is
        label = f"{method} + LiNeS"
        out.append(Entry(label, flags, grid(method, lines=True, budget=budget)))
    return out


def scaled(row: str, flags: Coefficients, budget: int) -> Entry:
    """A row's task vector, longer or shorter by the multiples that LiNeS has."""
    flags = flags | {"lines_alpha": "norm", "lines_beta": 0.0}
    return Entry(f"{row}, scaled", flags, depth_means(budget))


def with_lines(
    row: str, budget: int, tau: Callable[["Merger"], dict[str, np.ndarray]]
) -> Entry:
    """A row's task vector, scaled by LiNeS."""
    flags = {"lines_alpha": "norm"}
    return Entry(f"{row} + LiNeS", flags, depth_means(budget), tau)


def depth_means(budget: int) -> tuple[Coefficients, ...]:
    """At most `budget` candidates of what has no other coefficient."""
    return tuple({"depth_mean": x} for x in spread(DEPTH_MEANS, budget))


def protocol(budget: int) -> str:
    """A short name of all candidates: results of others are not to be mixed in."""
    told = [(e.label, e.flags, e.grid) for e in entries(budget) + ablations(budget, {})]
    told.append(("TALL masks", {}, spread(TALL_LAMBDAS, budget)))
    told.append(("chosen by", {}, "likelihood"))
    told.append(("unlabelled rows", {}, "drawn"))
    return hashlib.sha256(repr(told).encode()).hexdigest()[:12]


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

    def tall(self, t: int, tall_lambda: float) -> dict[str, np.ndarray]:
        """The model that TALL masks leave for task t."""
        found = add_tall(self._on_device, self.total, self.own(t), tall_lambda)
        return {k: np.asarray(x) for k, x in found.items()} | self.rest

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

    def at(self, tau: Tensors, swept: Coefficients) -> dict[str, np.ndarray]:
        """The model of a task vector at a scale or with LiNeS."""
        alpha = swept.get("lines_alpha", swept.get("scale", 1.0))
        beta = swept.get("lines_beta", 0.0)
        full = {
            k: tau[k] if k in tau else np.zeros_like(x) for k, x in self.base.items()
        }
        found = add_scaled(self._on_device, full, jnp.float32(alpha), jnp.float32(beta))
        return {k: np.asarray(x) for k, x in found.items()} | self.rest


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

    def model(given: Coefficients) -> tuple[Coefficients, dict[str, np.ndarray]]:
        every = entry.flags | given
        flags = {k: v for k, v in every.items() if k not in SWEPT}
        swept = {k: v for k, v in every.items() if k in SWEPT}
        if own is None and not swept:
            return given, merger.merged(**flags)
        tau = merger.task_vector(**flags) if own is None else own
        if swept.get("lines_alpha") == "norm":
            key = repr(flags)
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
    megabytes: float | None  # of a process of its own; None inside this one

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
        seconds, megabytes = measure(command)
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


def ablations(budget: int, joint: Tensors) -> list[Entry]:
    """TIES without one of its steps, or with other settings; scales tuned for each.

    "Oracle signs" are those of the joint model's change of the base.
    """
    scales = tuple({"scale": x} for x in spread(SCALES, budget))
    ties = {"method": "ties", "density": "0.2"}
    variants = {
        "TIES": ties,
        "no trim": ties | {"density": "1.0"},
        "trim per tensor": ties | {"trim_scope": "tensor"},
        "sum of agreeing": ties | {"combine": "sum"},
        **{
            f"density {d}": ties | {"density": d} for d in ("0.05", "0.1", "0.5", "0.8")
        },
    }
    return [
        *(Entry(label, flags, scales) for label, flags in variants.items()),
        Entry("no election", {}, scales, lambda m: mean_of_kept(m, density=0.2)),
        Entry(
            "oracle signs",
            {},
            scales,
            lambda m: mean_of_kept(m, density=0.2, reference=joint),
        ),
    ]

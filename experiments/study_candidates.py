"""The rows of the study's tables: methods, and the candidates that each may try.

Every row has the same budget of evaluations on validation rows.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments import candidates
from experiments.study_merges import (
    Coefficients,
    Entry,
    Merger,
    Tensors,
    mean_of_kept,
)
from multitask_jax import merging

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
    row: str, budget: int, tau: Callable[[Merger], dict[str, np.ndarray]]
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

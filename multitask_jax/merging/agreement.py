"""TALL masks and Consensus: which entries of a merged vector are a task's own.

Wang et al. (2024). tau_t task vector of model t, tau the merged one, m_t task t's mask.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from multitask_jax.merging.arguments import Shares, numbers, per_model
from multitask_jax.merging.core import (
    Array,
    Leaf,
    Measure,
    Method,
    Transform,
    Values,
    add_up,
    at_transform,
    run_transforms,
    settings_by_path,
    statistics_kind,
    times,
    unchanged,
)


def beside(method: Method) -> Transform:
    """Keeps the task vectors and adds the merged one as the last value.

    Args:
      method: a chain on task vectors; its statistics become this transform's.

    Raises:
      ValueError: the method is about parameters.
    """
    if (method.start, method.end) != ("task_vectors", "task_vectors"):
        raise ValueError("beside: got a method on parameters, expected task vectors")
    return inputs_beside(method)


def inputs_beside(method: Method) -> Transform:
    """`beside` for any method: keeps what it starts from, adds what it ends with."""
    steps = method.transforms

    def known(stats: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """Statistics by transform of the chain."""
        out, start = [], 0
        for t in steps:
            out.append(stats[start : start + len(t.measures)])
            start += len(t.measures)
        return out

    def run(
        values: Values, leaf: Leaf, stats: tuple[Any, ...], stop: int | None
    ) -> Values:
        return run_transforms(method, values, leaf, leaf.setting, known(stats), stop)

    def lift(i: int, m: Measure) -> Measure:
        def terms(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
            before = run(values, leaf, stats, i)
            inner = at_transform(leaf, i, leaf.setting)
            return m.values(before, inner, known(stats)[i])

        def ranks(d: int, count: int, stats: tuple[Any, ...]) -> Sequence[Any]:
            return m.rank(d, count, known(stats)[i])

        rank = ranks if callable(m.rank) else m.rank
        # On the task vectors themselves the stream counts on the host.
        plain = i == 0 and m.values is unchanged
        return m._replace(values=m.values if plain else terms, rank=rank)

    needs = {t.needs for t in steps}
    return Transform(
        lambda values, leaf, stats: (*values, *run(values, leaf, stats, None)),
        tuple(lift(i, m) for i, t in enumerate(steps) for m in t.measures),
        settings=functools.partial(settings_by_path, method),
        needs=next((n for n in ("tensor", "row") if n in needs), "element"),
        statistics=statistics_kind(method),
    )


def _masks(values: Values, tall_lambda: tuple[float, ...]) -> tuple[list[Array], Array]:
    *taus, merged = values
    lambdas = per_model(tall_lambda, len(taus), "tall_lambda")
    return [
        jnp.abs(tau) > times(x, jnp.abs(merged - tau))
        for tau, x in zip(taus, lambdas, strict=True)
    ], merged


def localise(*, tall_lambda: Shares = 0.4) -> Transform:
    """After `beside`: m_t tau of each task, m_t = |tau_t| > lambda_t |tau - tau_t|.

    theta_0 + m_t tau serves task t alone, from one vector and a bit per entry.

    Args:
      tall_lambda: how much of the rest a task's change must outweigh; one for all or
        one per model (the paper chooses from .2 to .6 on validation data).
    """
    lambdas = numbers(tall_lambda)

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        masks, merged = _masks(values, lambdas)
        return tuple(jnp.where(m, merged, 0) for m in masks)

    return Transform(apply)


def keep_consensus(*, tall_lambda: Shares = 0.4, k: int = 2) -> Transform:
    """After `beside`: tau where at least k of the masks m_t are set, else 0.

    k = 2 removes what serves one task only ("selfish") and what serves none.

    Raises:
      ValueError: k is negative.
    """
    lambdas = numbers(tall_lambda)
    if k < 0:
        raise ValueError(f"k: got {k}, expected a number of tasks")

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        masks, merged = _masks(values, lambdas)
        votes = add_up([m.astype(jnp.int32) for m in masks])
        return (jnp.where(votes >= k, merged, 0),)

    return Transform(apply)


def choose(task: int) -> Transform:
    """The value of one task."""

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        if not 0 <= task < len(values):
            raise ValueError(f"task: got {task}, expected 0 to {len(values) - 1}")
        return (values[task],)

    return Transform(apply)

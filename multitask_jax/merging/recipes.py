"""Published methods by name, each a short chain. METHODS maps names to recipes.

To add one: write the function, here or in one of the files beside, with keyword
arguments named as the command line's flags (density, scale, t, ...), and enter it in
METHODS; its docstring's first line is its `--help`. The contract tests pick it up.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from multitask_jax.merging import (
    geometry,
    recipes_average,
    recipes_sparse,
    recipes_subspace,
)
from multitask_jax.merging import transforms as tf
from multitask_jax.merging.arguments import Shares
from multitask_jax.merging.core import Method, Scope, chain
from multitask_jax.merging.emr import unify
from multitask_jax.merging.emr_files import write_tasks
from multitask_jax.merging.fitted import fisher, regmean


def linear(*, normalise: bool = True) -> Method:
    """Model soup: weighted average of the parameters, sum w theta / sum w."""
    return Method(
        (tf.weighted_sum(normalise=normalise),), start="parameters", end="parameters"
    )


def task_arithmetic(*, scale: Any = 1.0, normalise: bool = False) -> Method:
    """Task arithmetic: theta_0 + lambda sum w tau (papers use lambda .1 to 1)."""
    return chain(tf.weighted_sum(normalise=normalise), tf.scale(scale))


def ties(
    *,
    density: Shares = 0.2,
    scale: Any = 1.0,
    trim_scope: Scope = "model",
    election: tf.Election = "mass",
    zero_sign: tf.ZeroSign = "majority",
    combine: tf.Combine = "mean",
    normalise: tf.Normalise = "weights",
    rescale: Literal["none", "l1"] = "none",
) -> Method:
    """TIES-Merging: trim small changes, elect a sign, average those that agree.

    mergekit's variant: trim_scope="tensor", election="weighted_mass",
    zero_sign="positive". PEFT's: trim_scope="tensor", election="mass" (or
    "frequency"), zero_sign="positive", normalise="count".
    """
    return chain(
        tf.trim(density=density, scope=trim_scope, rescale=rescale),
        tf.elect_sign(election=election, zero_sign=zero_sign),
        tf.combine_agreeing(combine, normalise),
        tf.scale(scale),
    )


def dare(
    *,
    density: Shares | Mapping[str, Shares] = 0.5,
    scale: Any = 1.0,
    rescale: Literal["density", "l1", "none"] = "density",
    normalise: bool = False,
    seed: int = 0,
) -> Method:
    """DARE: drop changes at random, rescale the rest, then task arithmetic."""
    return chain(
        tf.drop(density=density, rescale=rescale, seed=seed),
        tf.weighted_sum(normalise=normalise),
        tf.scale(scale),
    )


def dare_ties(
    *,
    density: Shares | Mapping[str, Shares] = 0.5,
    scale: Any = 1.0,
    election: tf.Election = "mass",
    zero_sign: tf.ZeroSign = "majority",
    combine: tf.Combine = "mean",
    normalise: tf.Normalise = "weights",
    rescale: Literal["density", "l1", "none"] = "density",
    seed: int = 0,
) -> Method:
    """DARE, then the sign election and disjoint mean of TIES (no second trim)."""
    return chain(
        tf.drop(density=density, rescale=rescale, seed=seed),
        tf.elect_sign(election=election, zero_sign=zero_sign),
        tf.combine_agreeing(combine, normalise),
        tf.scale(scale),
    )


def magnitude_prune(
    *,
    density: Shares = 0.2,
    scale: Any = 1.0,
    trim_scope: Scope = "tensor",
    rescale: Literal["none", "l1"] = "none",
) -> Method:
    """Magnitude pruning: trim small changes, then a weighted sum of the rest."""
    return chain(
        tf.trim(density=density, scope=trim_scope, rescale=rescale),
        tf.weighted_sum(),
        tf.scale(scale),
    )


def slerp(*, t: Any = 0.5, antiparallel: geometry.Antiparallel = "nearest") -> Method:
    """SLERP: spherical interpolation of two models, --t of the way to the second.

    `t=None` (not a flag) takes it from the weights, which sum to 1: w_1.
    """
    return Method(
        (geometry.interpolate_spherically(t=t, antiparallel=antiparallel),),
        start="parameters",
        end="parameters",
        models=2,
        weighted=t is None,
    )


def model_stock(
    *,
    filter_wise: bool = False,
    average: Literal["cosines", "angles"] = "cosines",
    ratio: Literal["clipped", "formula"] = "clipped",
) -> Method:
    """Model Stock: average task vector, shrunk by the angles between models."""
    stock = geometry.stock(filter_wise=filter_wise, average=average, ratio=ratio)
    return chain(stock)._replace(weighted=False)


def emr() -> Method:
    """EMR: one unified task vector; OUT/tasks/ has a mask and a factor for each task.

    In memory `emr_tasks` makes these and `specialise` applies them.
    """
    return unify()._replace(aside=write_tasks)


METHODS: dict[str, Callable[..., Method]] = {
    "linear": linear,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
    "slerp": slerp,
    "model_stock": model_stock,
    "emr": emr,
    **recipes_sparse.METHODS,
    **recipes_average.METHODS,
    **recipes_subspace.METHODS,
    "fisher": fisher.fisher,
    "regmean": regmean.regmean,
}

"""Recipes that average, on a sphere or entry by entry, or copy."""

from collections.abc import Callable
from typing import Any

from multitask_jax.merging import elementwise, spherical
from multitask_jax.merging import transforms as tf
from multitask_jax.merging.arguments import check_choice
from multitask_jax.merging.core import Method, Space, Transform, chain
from multitask_jax.merging.geometry import Antiparallel


def _in_space(transform: Transform, space: Space) -> Method:
    check_choice("space", space, ("task_vectors", "parameters"))
    return Method((transform,), start=space, end=space)


def nuslerp(
    *,
    flatten: bool = True,
    row_wise: bool = False,
    space: Space = "task_vectors",
    antiparallel: Antiparallel = "nearest",
) -> Method:
    """NuSLERP: spherical interpolation of two models by weights, whole or by rows.

    On task vectors; `space="parameters"` needs no base.
    """
    transform = spherical.interpolate_by_weights(
        flatten=flatten, row_wise=row_wise, antiparallel=antiparallel
    )
    return _in_space(transform, space)._replace(models=2)


def multislerp(
    *,
    normalise: bool = True,
    space: Space = "task_vectors",
    antiparallel: Antiparallel = "nearest",
) -> Method:
    """Multi-SLERP: normalised mean direction of many models, times their mean norm.

    On task vectors; `space="parameters"` needs no base.
    """
    transform = spherical.spherical_mean(normalise=normalise, antiparallel=antiparallel)
    return _in_space(transform, space)


def karcher(
    *, max_iter: int = 10, tol: float = 1e-5, space: Space = "parameters"
) -> Method:
    """Karcher: Riemannian mean of the models' directions, times their mean norm."""
    if max_iter < 0:
        raise ValueError(f"max_iter: got {max_iter}, expected a number of steps")
    return _in_space(spherical.spherical_mean(iterations=max_iter, tol=tol), space)


def nearswap(*, t: Any = 0.001) -> Method:
    """Nearswap: moves the base towards one model, no entry further than --t."""
    return chain(elementwise.limit_step(t=t))._replace(models=1, weighted=False)


def magmax(*, scale: Any = 1.0) -> Method:
    """MagMax: of all models, the change of largest magnitude at every entry."""
    return chain(tf.max_magnitude(tie="last"), tf.scale(scale))


def ram(*, epsilon: float = 1e-5, scale: Any = 1.0) -> Method:
    """RAM: averages changes that models share, keeps the ones only one model made."""
    return chain(elementwise.mean_of_active(epsilon=epsilon), tf.scale(scale))._replace(
        weighted=False
    )


def ramplus(
    *, epsilon: float = 1e-5, r: Any = 0.1, alpha: float = 0.2, scale: Any = 1.0
) -> Method:
    """RAM+: RAM, with unique changes raised by the share of a model's shared ones."""
    return chain(
        elementwise.mean_of_active(epsilon=epsilon, r=r, alpha=alpha),
        tf.scale(scale),
    )._replace(weighted=False)


def passthrough(*, scale: Any = 1.0) -> Method:
    """Passthrough: one model as it is, times --scale."""
    return Method(
        (tf.scale(scale),),
        start="parameters",
        end="parameters",
        models=1,
        weighted=False,
    )


METHODS: dict[str, Callable[..., Method]] = {
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "nearswap": nearswap,
    "magmax": magmax,
    "ram": ram,
    "ramplus": ramplus,
    "passthrough": passthrough,
}

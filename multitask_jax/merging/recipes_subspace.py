"""Recipes on whole matrices: singular subspaces and interference between inputs."""

from collections.abc import Callable
from typing import Any, Literal

from multitask_jax.merging import subspace
from multitask_jax.merging import transforms as tf
from multitask_jax.merging.arguments import Shares, check_choice
from multitask_jax.merging.core import Method, Transform, chain
from multitask_jax.merging.interference_free import minimise_interference


def _scaled(transform: Transform, scale: Any) -> Method:
    return chain(transform, tf.scale(scale))._replace(weighted=False)


def iso_c(*, scale: Any = 1.0) -> Method:
    """Iso-C: the summed task vectors with all singular values set to their mean."""
    return _scaled(subspace.flatten_spectrum(), scale)


def iso_cts(*, common_fraction: float = 0.8, scale: Any = 1.0) -> Method:
    """Iso-CTS: Iso-C on a common subspace and on one of each task."""
    return _scaled(
        subspace.flatten_spectrum_by_task(common_fraction=common_fraction), scale
    )


def tsv_m(*, scale: Any = 1.0) -> Method:
    """TSV-M: the top singular vectors of each task, made orthogonal to each other."""
    return _scaled(subspace.join_singular_vectors(), scale)


def knots(
    *,
    combine_by: Literal["mean", "ties", "dare_ties"] = "ties",
    density: Shares = 0.2,
    eps: float = 1e-4,
    input_axis: subspace.InputAxis = "last",
    scale: Any = 1.0,
    seed: int = 0,
) -> Method:
    """KnOTS: task vectors (of LoRA) in one shared basis, merged there by --combine_by.

    `merging.align(method)` takes any other method.
    """
    elected = tf.elect_sign(), tf.disjoint_mean()
    combiners = {
        "mean": (tf.weighted_sum(normalise=True),),
        "ties": (tf.trim(density=density), *elected),
        "dare_ties": (tf.drop(density=density, seed=seed), *elected),
    }
    check_choice("combine_by", combine_by, tuple(combiners))
    inner = chain(*combiners[combine_by])
    return chain(subspace.align(inner, eps=eps, input_axis=input_axis), tf.scale(scale))


def wudi(
    *,
    iterations: int = 400,
    learning_rate: Any = 1e-5,
    input_axis: subspace.InputAxis = "last",
    scale: Any = 1.0,
) -> Method:
    """WUDI: least interference of the merged task vector with each task's, no data."""
    return _scaled(
        minimise_interference(
            iterations=iterations, learning_rate=learning_rate, input_axis=input_axis
        ),
        scale,
    )


METHODS: dict[str, Callable[..., Method]] = {
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "tsv_m": tsv_m,
    "knots": knots,
    "wudi": wudi,
}

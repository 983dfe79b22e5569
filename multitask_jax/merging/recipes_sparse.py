"""Recipes that keep part of each task vector, or of the merged one."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from multitask_jax.merging import agreement, importance, sparsify
from multitask_jax.merging import transforms as tf
from multitask_jax.merging.arguments import Shares, check_choice
from multitask_jax.merging.core import Method, chain


def breadcrumbs(
    *,
    density: Shares = 0.9,
    gamma: Shares = 0.01,
    rescale: Literal["none", "l1"] = "none",
    at_least: Literal[0, 1] = 1,
    scale: Any = 1.0,
    normalise: bool = False,
) -> Method:
    """Model Breadcrumbs: drop outliers and small changes, then a weighted sum."""
    return chain(
        sparsify.drop_extremes(
            density=density, gamma=gamma, rescale=rescale, at_least=at_least
        ),
        tf.weighted_sum(normalise=normalise),
        tf.scale(scale),
    )


def breadcrumbs_ties(
    *,
    density: Shares = 0.9,
    gamma: Shares = 0.01,
    rescale: Literal["none", "l1"] = "none",
    at_least: Literal[0, 1] = 1,
    scale: Any = 1.0,
    election: tf.Election = "mass",
    zero_sign: tf.ZeroSign = "majority",
    combine: tf.Combine = "mean",
    normalise: tf.Normalise = "weights",
) -> Method:
    """Breadcrumbs, then the sign election and disjoint mean of TIES."""
    return chain(
        sparsify.drop_extremes(
            density=density, gamma=gamma, rescale=rescale, at_least=at_least
        ),
        tf.elect_sign(election=election, zero_sign=zero_sign),
        tf.combine_agreeing(combine, normalise),
        tf.scale(scale),
    )


def della(
    *,
    density: Shares | Mapping[str, Shares] = 0.5,
    epsilon: Shares | Mapping[str, Shares] = 0.15,
    scale: Any = 1.0,
    rescale: Literal["probability", "l1", "none"] = "probability",
    normalise: bool = False,
    seed: int = 0,
) -> Method:
    """DELLA: drop at random, small changes of a row first, then a weighted sum."""
    return chain(
        sparsify.drop_by_rank(
            density=density, epsilon=epsilon, rescale=rescale, seed=seed
        ),
        tf.weighted_sum(normalise=normalise),
        tf.scale(scale),
    )


def della_ties(
    *,
    density: Shares | Mapping[str, Shares] = 0.5,
    epsilon: Shares | Mapping[str, Shares] = 0.15,
    scale: Any = 1.0,
    election: tf.Election = "mass",
    zero_sign: tf.ZeroSign = "majority",
    combine: tf.Combine = "mean",
    normalise: tf.Normalise = "weights",
    rescale: Literal["probability", "l1", "none"] = "probability",
    seed: int = 0,
) -> Method:
    """DELLA's dropping, then the sign election and disjoint mean of TIES (the paper).

    mergekit's "della": election="weighted_mass", zero_sign="positive", rescale="l1".
    """
    return chain(
        sparsify.drop_by_rank(
            density=density, epsilon=epsilon, rescale=rescale, seed=seed
        ),
        tf.elect_sign(election=election, zero_sign=zero_sign),
        tf.combine_agreeing(combine, normalise),
        tf.scale(scale),
    )


def sce(*, topk: float = 1.0, at_least: Literal[0, 1] = 1, scale: Any = 1.0) -> Method:
    """SCE: keep what varies between models, weigh by energy, erase minor signs."""
    return chain(
        importance.keep_varying(topk=topk, at_least=at_least),
        importance.energy_mean(),
        tf.scale(scale),
    )._replace(weighted=False)


def pcb(*, density: float = 0.1, clamp_ratio: float = 1e-4, scale: Any = 1.2) -> Method:
    """PCB-Merging: balance competing parameters, keep the top (density = its ratio)."""
    return chain(
        importance.balance_competition(density=density, clamp_ratio=clamp_ratio),
        tf.scale(scale),
    )._replace(weighted=False)


def arcee_fusion(*, iqr_factor: float = 1.5) -> Method:
    """Arcee Fusion: the changes of one model that matter most for its softmax."""
    return chain(importance.keep_diverging(iqr_factor=iqr_factor))._replace(
        models=1, weighted=False
    )


def _multi_task(multi_task: Literal["sum", "ties"], density: Shares) -> tf.Transform:
    check_choice("multi_task", multi_task, ("sum", "ties"))
    total = chain(tf.weighted_sum())
    if multi_task == "ties":
        total = chain(
            tf.trim(density=density), tf.elect_sign(), *total.transforms
        )  # disjoint sum
    return agreement.beside(total)


def tall_masks(
    *,
    task: int = 0,
    tall_lambda: Shares = 0.4,
    multi_task: Literal["sum", "ties"] = "sum",
    density: Shares = 0.2,
) -> Method:
    """TALL masks: the part of the merged task vector that serves one --task (0, ..)."""
    return chain(
        _multi_task(multi_task, density),
        agreement.localise(tall_lambda=tall_lambda),
        agreement.choose(task),
    )


def consensus(
    *,
    k: int = 2,
    tall_lambda: Shares = 0.4,
    multi_task: Literal["sum", "ties"] = "sum",
    density: Shares = 0.2,
    scale: Any = 0.3,
) -> Method:
    """Consensus: the merged task vector where it serves at least --k tasks."""
    return chain(
        _multi_task(multi_task, density),
        agreement.keep_consensus(tall_lambda=tall_lambda, k=k),
        tf.scale(scale),
    )


METHODS: dict[str, Callable[..., Method]] = {
    "breadcrumbs": breadcrumbs,
    "breadcrumbs_ties": breadcrumbs_ties,
    "della": della,
    "della_ties": della_ties,
    "sce": sce,
    "pcb": pcb,
    "arcee_fusion": arcee_fusion,
    "tall_masks": tall_masks,
    "consensus": consensus,
}

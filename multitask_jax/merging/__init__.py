"""Merging: many fine-tuned models, one set of parameters.

`merge` works on pytrees, `merge_checkpoints` from disk to disk; both run the same
chains of task-vector transformations.
"""

from multitask_jax.merging.core import (
    Leaf,
    Measure,
    Method,
    Transform,
    chain,
    merge,
)
from multitask_jax.merging.disk import MergeResult, merge_checkpoints
from multitask_jax.merging.geometry import interpolate_spherically, stock
from multitask_jax.merging.interference import analyse
from multitask_jax.merging.lines import scale_by_depth, with_lines
from multitask_jax.merging.recipes import (
    METHODS,
    dare,
    dare_ties,
    linear,
    magnitude_prune,
    model_stock,
    slerp,
    task_arithmetic,
    ties,
)
from multitask_jax.merging.transforms import (
    disjoint_mean,
    drop,
    elect_sign,
    max_magnitude,
    scale,
    trim,
    weighted_sum,
)

__all__ = [
    "METHODS",
    "Leaf",
    "Measure",
    "MergeResult",
    "Method",
    "Transform",
    "analyse",
    "chain",
    "dare",
    "dare_ties",
    "disjoint_mean",
    "drop",
    "elect_sign",
    "interpolate_spherically",
    "linear",
    "magnitude_prune",
    "max_magnitude",
    "merge",
    "merge_checkpoints",
    "model_stock",
    "scale",
    "scale_by_depth",
    "slerp",
    "stock",
    "task_arithmetic",
    "ties",
    "trim",
    "weighted_sum",
    "with_lines",
]

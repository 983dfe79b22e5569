"""Merging: many fine-tuned models, one set of parameters.

`merge` works on pytrees, `merge_checkpoints` from disk to disk; both run the same
chains of task-vector transformations.
"""

from multitask_jax.merging.agreement import beside, choose, keep_consensus, localise
from multitask_jax.merging.core import Leaf, Measure, Method, Transform, chain, merge
from multitask_jax.merging.disk import MergeResult, merge_checkpoints
from multitask_jax.merging.elementwise import limit_step, mean_of_active
from multitask_jax.merging.emr import EmrTask, emr_tasks, specialise
from multitask_jax.merging.emr_files import load_task, specialise_checkpoint
from multitask_jax.merging.fitted.adamerging import (
    AdaMerging,
    adamerging,
    adamerging_plus_plus,
)
from multitask_jax.merging.fitted.fisher import (
    average_by_fisher,
    fisher,
    fisher_diagonal,
)
from multitask_jax.merging.fitted.gram import dense_leaves, gram_matrices
from multitask_jax.merging.fitted.moments import (
    Moments,
    input_moments,
    load_moments,
    moments_of_rows,
    save_moments,
)
from multitask_jax.merging.fitted.regmean import regmean, regress
from multitask_jax.merging.fitted.regmean_plus_plus import regmean_plus_plus
from multitask_jax.merging.fitted.wemoe import (
    Wemoe,
    wemoe_apply,
    wemoe_fit,
    wemoe_init,
    wemoe_routing,
)
from multitask_jax.merging.geometry import interpolate_spherically, stock
from multitask_jax.merging.importance import (
    balance_competition,
    energy_mean,
    keep_diverging,
    keep_varying,
)
from multitask_jax.merging.interference import analyse
from multitask_jax.merging.interference_free import minimise_interference
from multitask_jax.merging.lines import norm_rule, scale_by_depth, with_lines
from multitask_jax.merging.lines_selection import (
    SingleTask,
    lines_single_task,
    select_alpha,
)
from multitask_jax.merging.mergekit import merge_mergekit
from multitask_jax.merging.recipes import (
    METHODS,
    dare,
    dare_ties,
    emr,
    linear,
    magnitude_prune,
    model_stock,
    slerp,
    task_arithmetic,
    ties,
)
from multitask_jax.merging.recipes_average import (
    karcher,
    magmax,
    multislerp,
    nearswap,
    nuslerp,
    passthrough,
    ram,
    ramplus,
)
from multitask_jax.merging.recipes_sparse import (
    arcee_fusion,
    breadcrumbs,
    breadcrumbs_ties,
    consensus,
    della,
    della_ties,
    pcb,
    sce,
    tall_masks,
)
from multitask_jax.merging.recipes_subspace import iso_c, iso_cts, knots, tsv_m, wudi
from multitask_jax.merging.soups import pareto_front, rewarded_soup, simplex_grid
from multitask_jax.merging.sparsify import drop_by_rank, drop_extremes
from multitask_jax.merging.spherical import interpolate_by_weights, spherical_mean
from multitask_jax.merging.subspace import (
    align,
    flatten_spectrum,
    flatten_spectrum_by_task,
    join_singular_vectors,
)
from multitask_jax.merging.task_statistics import Gram, load_statistics, save_statistics
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
    "AdaMerging",
    "EmrTask",
    "Gram",
    "Leaf",
    "Measure",
    "MergeResult",
    "Method",
    "Moments",
    "SingleTask",
    "Transform",
    "Wemoe",
    "adamerging",
    "adamerging_plus_plus",
    "align",
    "analyse",
    "arcee_fusion",
    "average_by_fisher",
    "balance_competition",
    "beside",
    "breadcrumbs",
    "breadcrumbs_ties",
    "chain",
    "choose",
    "consensus",
    "dare",
    "dare_ties",
    "della",
    "della_ties",
    "dense_leaves",
    "disjoint_mean",
    "drop",
    "drop_by_rank",
    "drop_extremes",
    "elect_sign",
    "emr",
    "emr_tasks",
    "energy_mean",
    "fisher",
    "fisher_diagonal",
    "flatten_spectrum",
    "flatten_spectrum_by_task",
    "gram_matrices",
    "input_moments",
    "interpolate_by_weights",
    "interpolate_spherically",
    "iso_c",
    "iso_cts",
    "join_singular_vectors",
    "karcher",
    "keep_consensus",
    "keep_diverging",
    "keep_varying",
    "knots",
    "limit_step",
    "linear",
    "lines_single_task",
    "load_moments",
    "load_statistics",
    "load_task",
    "localise",
    "magmax",
    "magnitude_prune",
    "max_magnitude",
    "mean_of_active",
    "merge",
    "merge_checkpoints",
    "merge_mergekit",
    "minimise_interference",
    "model_stock",
    "moments_of_rows",
    "multislerp",
    "nearswap",
    "norm_rule",
    "nuslerp",
    "pareto_front",
    "passthrough",
    "pcb",
    "ram",
    "ramplus",
    "regmean",
    "regmean_plus_plus",
    "regress",
    "rewarded_soup",
    "save_moments",
    "save_statistics",
    "scale",
    "scale_by_depth",
    "sce",
    "select_alpha",
    "simplex_grid",
    "slerp",
    "specialise",
    "specialise_checkpoint",
    "spherical_mean",
    "stock",
    "tall_masks",
    "task_arithmetic",
    "ties",
    "trim",
    "tsv_m",
    "weighted_sum",
    "wemoe_apply",
    "wemoe_fit",
    "wemoe_init",
    "wemoe_routing",
    "with_lines",
    "wudi",
]

"""How good predictions are: of uplift, of trajectories and gaze, of depth and video."""

from multitask_jax.evaluation.pictures import (
    Depth,
    depth_errors,
    frechet_distance,
    psnr,
    ssim,
)
from multitask_jax.evaluation.trajectories import (
    Relative,
    align,
    ate,
    gaze_mse,
    relative_errors,
)
from multitask_jax.evaluation.uplift import (
    Calibration,
    Curve,
    Ranking,
    Value,
    calibration,
    interval,
    pehe,
    perfect,
    policy_value,
    qini_curve,
    ranking,
    resample,
    squared_errors,
)

__all__ = [
    "Calibration",
    "Curve",
    "Depth",
    "Ranking",
    "Relative",
    "Value",
    "align",
    "ate",
    "calibration",
    "depth_errors",
    "frechet_distance",
    "gaze_mse",
    "interval",
    "pehe",
    "perfect",
    "policy_value",
    "psnr",
    "qini_curve",
    "ranking",
    "relative_errors",
    "resample",
    "squared_errors",
    "ssim",
]

"""How good predictions are: of uplift, from a randomised experiment."""

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
)

__all__ = [
    "Calibration",
    "Curve",
    "Ranking",
    "Value",
    "calibration",
    "interval",
    "pehe",
    "perfect",
    "policy_value",
    "qini_curve",
    "ranking",
    "resample",
]

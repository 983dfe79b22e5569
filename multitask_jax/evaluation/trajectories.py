"""How far generated trajectories are from true ones: cameras and gaze.

    jax.vmap(ate)(cameras, truth)

Each function takes one clip; callers `vmap`. Cameras are camera-to-world matrices in
metres (`multitask_jax.data.poses`). Lower is better everywhere.

Measures of cameras as by Sturm et al. 2012 (TUM RGB-D), which EgoM2P names; that the
scale is kept, and the stride, are a reconstruction.

Legend: S samples, P pairs of samples.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from multitask_jax.data import poses

Array = jax.Array
Alignment = Literal["rigid", "none"]


class Relative(NamedTuple):
    """Errors of the motion between samples; root mean squares over the pairs."""

    rte: Array  # [] metres
    rre: Array  # [] degrees


def ate(estimate: Array, truth: Array, *, alignment: Alignment = "rigid") -> Array:
    """Absolute trajectory error: root mean square distance of positions, in metres.

    Args:
      estimate, truth: [S, 4, 4]; rotations do not count.
      alignment: "rigid" lays the estimate on the truth first, by the best rotation and
        translation; "none" compares as they are, for both are relative to their first
        sample anyway.

    Returns:
      [] float32.

    Raises:
      ValueError: shapes differ, or an unknown alignment.
    """
    _same(estimate, truth, (4, 4))
    a, b = estimate[:, :3, 3], truth[:, :3, 3]
    if alignment == "rigid":
        a = align(a, b)
    elif alignment != "none":
        raise ValueError(f"alignment: got {alignment!r}, expected rigid or none")
    return _rms(a - b)


def align(points: Array, onto: Array) -> Array:
    """Points [S, 3] moved rigidly, so that their squared distances are the least.

    Umeyama 1991 without the scale: with the covariance's U D V', R = U diag(1, 1, det(U
    V)) V'.
    """
    middle, target = points.mean(0, keepdims=True), onto.mean(0, keepdims=True)
    covariance = jnp.matmul((onto - target).T, points - middle, precision="highest")
    u, _, vt = jnp.linalg.svd(covariance)
    # No mirror: the axis of least spread gives way.
    sign = jnp.stack([1.0, 1.0, jnp.linalg.det(u) * jnp.linalg.det(vt)])
    rotation = jnp.matmul(u * sign[None], vt, precision="highest")
    return jnp.matmul(points - middle, rotation.T, precision="highest") + target


def relative_errors(estimate: Array, truth: Array, *, stride: int = 4) -> Relative:
    """Errors of the motions from each sample to the one `stride` later.

    With E = (Q_i^-1 Q_i+stride)^-1 (P_i^-1 P_i+stride): its translation's length and
    its rotation's angle. Samples are 0, stride, 2 stride, ...: those of frames, with 4.

    Args:
      estimate, truth: P and Q, [S, 4, 4].
      stride: samples.

    Raises:
      ValueError: shapes differ, or fewer than two samples are left.
    """
    _same(estimate, truth, (4, 4))
    if not 1 <= stride < len(truth):
        raise ValueError(f"stride: got {stride}, expected 1 to {len(truth) - 1}")
    p, q = _steps(estimate[::stride]), _steps(truth[::stride])
    error = poses.compose(poses.invert(q), p)
    return Relative(_rms(error[:, :3, 3]), _rms(_degrees(error[:, :3, :3])[:, None]))


def gaze_mse(estimate: Array, truth: Array) -> Array:
    """Mean squared error of a gaze [S, 2] over coordinates of valid samples.

    In shares of the image, squared. Invalid are those where the truth is NaN; NaN if
    all of them are. A NaN of the estimate in a valid sample stays one.

    Raises:
      ValueError: shapes differ.
    """
    _same(estimate, truth, (2,))
    valid = ~jnp.isnan(truth)
    squared = jnp.where(valid, (estimate - truth) ** 2, 0)
    return squared.sum() / valid.sum()


def _steps(x: Array) -> Array:
    """Motions between neighbours: [P + 1, 4, 4] -> [P, 4, 4]."""
    return poses.compose(poses.invert(x[:-1]), x[1:])


def _degrees(rotation: Array) -> Array:
    """The angle of rotations [P, 3, 3].

    By the arc tangent of 2 sin and 2 cos: the arc cosine of the trace alone would be
    off by up to .03 degrees near 0 in float32.
    """
    r = rotation
    axis = jnp.stack(
        [r[:, 2, 1] - r[:, 1, 2], r[:, 0, 2] - r[:, 2, 0], r[:, 1, 0] - r[:, 0, 1]]
    )
    trace = r[:, 0, 0] + r[:, 1, 1] + r[:, 2, 2]
    return jnp.degrees(jnp.atan2(jnp.linalg.norm(axis, axis=0), trace - 1))


def _rms(x: Array) -> Array:
    """Root mean square length of vectors [P, ...]."""
    return jnp.sqrt((x**2).sum(-1).mean())


def _same(estimate: Array, truth: Array, shape: tuple[int, ...]) -> None:
    if estimate.shape != truth.shape or truth.shape[1:] != shape:
        raise ValueError(
            f"got shapes {list(estimate.shape)} and {list(truth.shape)}, expected both"
            f" [samples, {str(list(shape))[1:]} of one clip (vmap over clips)"
        )

"""Camera poses as 4x4 matrices and as nine numbers.

    v = to_vector(relative(poses))   # what a tokenizer reads
    poses = from_vector(v)           # rigid, whatever v is

A pose is camera-to-world in metres, its axes those of OpenCV (x right, y down, z
forward): [[R, t], [0, 1]]. As nine numbers it is the first two columns of R, then t
(Zhou et al. 2019, arXiv 1812.07035; EgoM2P). All but `check` take NumPy's arrays as
well as JAX's, and answer in kind.

Legend: S samples of a trajectory.
"""

from typing import Any

import numpy as np

Array = Any  # of NumPy or JAX
TOLERANCE = 5e-3  # of a rotation's entries: what float16 or four decimals leave
_PARALLEL = 1e-5  # radians below which two columns span no plane (float32)


def relative(poses: Array) -> Array:
    """T_0^-1 T_t, so that the first pose is the identity: [..., S, 4, 4] -> the same.

    The inverse is that of a rigid motion: poses that `check` refuses give nonsense.
    """
    return compose(invert(poses[..., :1, :, :]), poses)


def compose(a: Array, b: Array) -> Array:
    """a b, of poses or rotations, in full precision where a device has another."""
    if isinstance(a, np.ndarray):
        return a @ b
    import jax  # recorders, which have NumPy's arrays, do without

    with jax.default_matmul_precision("highest"):
        return a @ b


def invert(poses: Array) -> Array:
    """World-to-camera of camera-to-world, [[R', -R' t], [0, 1]]: [..., 4, 4]."""
    turned = poses[..., :3, :3].mT
    return _rigid(turned, compose(-turned, poses[..., :3, 3:]))


def to_vector(poses: Array) -> Array:
    """Rotation columns 1 and 2, then the translation: [..., 4, 4] -> [..., 9]."""
    xp = poses.__array_namespace__()
    return xp.concat([poses[..., :3, i] for i in (0, 1, 3)], axis=-1)


def from_vector(v: Array) -> Array:
    """The pose that nine numbers stand for, by Gram-Schmidt: [..., 9] -> [..., 4, 4].

    The columns may have any length and angle. Where they span no plane (zero, or
    parallel), axes of the world stand in, so that the pose is rigid for all finite v.
    """
    xp = v.__array_namespace__()
    world = xp.eye(3, dtype=v.dtype)
    first = _unit(v[..., :3], xp.broadcast_to(world[0], v[..., :3].shape))
    # Least aligned with the first column; always far from parallel to it.
    spare = _across(world[xp.argmin(xp.abs(first), axis=-1)], first)
    second = _unit(v[..., 3:6], spare)
    # Once more, for what is left of a nearly parallel vector is mostly rounding.
    second = _unit(_across(second, first), spare, _PARALLEL)
    second = _unit(_across(second, first), spare)
    rotation = xp.stack([first, second, xp.linalg.cross(first, second)], axis=-1)
    return _rigid(rotation, v[..., 6:, None])


def check(
    poses: np.ndarray, where: str = "poses", *, tolerance: float = TOLERANCE
) -> None:
    """Looks at poses [..., 4, 4], on the host.

    Raises:
      ValueError: one of them is not a rigid motion; names the first.
    """
    x = np.asarray(poses)
    if x.shape[-2:] != (4, 4) or x.dtype.kind != "f":
        raise ValueError(
            f"{where}: got {x.dtype}{list(x.shape)}, expected floats [..., 4, 4]"
        )
    x = x.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        rotation = x[..., :3, :3]
        gap = np.abs(rotation.mT @ rotation - np.eye(3)).max((-2, -1))
        faults = {
            "finite values": ~np.isfinite(x).all((-2, -1)),
            "the last row 0 0 0 1": np.abs(x[..., 3, :] - [0, 0, 0, 1]).max(-1)
            > tolerance,
            "orthonormal columns of the rotation (no scale, no shear)": gap > tolerance,
            "a determinant of 1 (no mirror: flip an axis)": ~(
                np.linalg.det(rotation) > 0
            ),
        }
    for expected, bad in faults.items():
        if bad.any():
            index = [int(i) for i in np.argwhere(bad)[0]]
            raise ValueError(
                f"{where}{index}: got {x[tuple(index)].round(4).tolist()}, expected"
                f" {expected}; a pose is camera-to-world [[R, t], [0, 0, 0, 1]]"
            )


def _rigid(rotation: Array, translation: Array) -> Array:
    """[..., 3, 3] and [..., 3, 1] -> [..., 4, 4]."""
    xp = rotation.__array_namespace__()
    top = xp.concat([rotation, translation], axis=-1)
    last = xp.asarray([[0, 0, 0, 1]], dtype=top.dtype)
    return xp.concat([top, xp.broadcast_to(last, (*top.shape[:-2], 1, 4))], axis=-2)


def _across(v: Array, unit: Array) -> Array:
    """What of v [..., 3] is at right angles to a unit vector."""
    xp = v.__array_namespace__()
    return v - xp.sum(v * unit, axis=-1, keepdims=True) * unit


def _unit(v: Array, otherwise: Array, least: float = 0.0) -> Array:
    """Of length 1, [..., 3]; made from `otherwise` where v is no longer than `least`.

    Divided by its largest entry first, for squares overflow and underflow.
    """
    xp = v.__array_namespace__()
    size = xp.max(xp.abs(v), axis=-1, keepdims=True)
    v = xp.where(size > least, v, otherwise)
    v = v / xp.max(xp.abs(v), axis=-1, keepdims=True)
    return v / xp.sqrt(xp.sum(v * v, axis=-1, keepdims=True))

"""How far generated depth and video are from true ones.

    jax.vmap(depth_errors)(depth, truth)          # one clip each, or one frame
    jax.vmap(ssim)(frames, true_frames).mean()

`frechet_distance` compares two sets by features that the caller brings. FVD itself is
that distance on features of a network trained on Kinetics-400 (I3D); on features of our
own, numbers compare with each other only, and a report must say so.

Legend: H, W pixels, C colours, N and M samples, D features.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
RADIUS, SIGMA = 5, 1.5  # SSIM's window: 11 x 11 pixels


class Depth(NamedTuple):
    """Errors of a depth over the pixels where the truth is known."""

    abs_rel: Array  # [] mean of |d - d*| / d*; lower is better
    delta: Array  # [] share of max(d / d*, d* / d) < 1.25; higher is better


def depth_errors(estimate: Array, truth: Array) -> Depth:
    """AbsRel and delta < 1.25 (Eigen et al. 2014), in metres as they are: no scaling.

    Args:
      estimate, truth: depths [...]; pixels count where the truth is finite and above 0.

    Returns:
      Depth; NaN where no pixel counts. An estimate that is not a finite number above 0
      where one does is a miss, and makes AbsRel what it is there (NaN, infinite).

    Raises:
      ValueError: shapes differ.
    """
    _same(estimate, truth)
    valid = jnp.isfinite(truth) & (truth > 0)
    safe = jnp.where(valid, truth, 1)
    ratio = estimate / safe
    close = (ratio < 1.25) & (ratio > 1 / 1.25)
    count = valid.sum()
    return Depth(
        jnp.where(valid, jnp.abs(ratio - 1), 0).sum() / count,
        (valid & close).sum() / count,
    )


def psnr(estimate: Array, truth: Array, *, peak: float = 255.0) -> Array:
    """Peak signal-to-noise ratio in decibels over all values; infinite if all agree.

    Args:
      estimate, truth: pictures or videos [...], bytes or floats.
      peak: the largest value that there can be.

    Raises:
      ValueError: shapes differ.
    """
    _same(estimate, truth)
    gap = (estimate.astype(jnp.float32) - truth.astype(jnp.float32)) / peak
    return -10 * jnp.log10((gap**2).mean())


def ssim(estimate: Array, truth: Array, *, peak: float = 255.0) -> Array:
    """Structural similarity of two pictures, 1 if they agree (Wang et al. 2004).

    Each colour on its own, in 11 x 11 Gaussian windows that lie in the picture as a
    whole; k_1 = .01, k_2 = .03. The mean over windows and colours.

    Args:
      estimate, truth: [H, W, C], bytes or floats.
      peak: the largest value that there can be.

    Raises:
      ValueError: shapes differ, or a picture is smaller than the window.
    """
    _same(estimate, truth)
    if truth.ndim != 3 or min(truth.shape[:2]) < 2 * RADIUS + 1:
        raise ValueError(
            f"got pictures {list(truth.shape)}, expected [H, W, C] of"
            f" {2 * RADIUS + 1} pixels a side at least (vmap over frames)"
        )
    rows, columns = (jnp.asarray(_window(n)) for n in truth.shape[:2])

    def blur(x: Array) -> Array:
        return jnp.einsum("ih,hwc,jw->ijc", rows, x, columns, precision="highest")

    x, y = (z.astype(jnp.float32) / peak for z in (estimate, truth))
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)  # and contrast: eq. 13
    return (luminance * structure).mean()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance of Gaussians fitted to features, on features of our own.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Dowson and Landau 1982; Heusel
    et al. 2017). With C = R' R (R of a QR decomposition of the centred features), the
    last trace is the sum of the singular values of R_a R_b': no root of a matrix, and
    exact also where a covariance is singular.

    Few samples make it too large: compare distances of equal N only.

    Args:
      a, b: [N, D] and [M, D], on the host; computed in float64.

    Raises:
      ValueError: widths differ, fewer than two samples, or a value is not finite.
    """
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    if (
        a.ndim != 2
        or b.ndim != 2
        or a.shape[1] != b.shape[1]
        or min(map(len, (a, b))) < 2
    ):
        raise ValueError(
            f"got features {list(a.shape)} and {list(b.shape)}, expected [N, D] and"
            " [M, D], two samples each at least"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features: got NaN or infinity, expected finite numbers")
    roots = [
        np.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r") for x in (a, b)
    ]
    shared = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    spread = sum((r**2).sum() for r in roots) - 2 * shared
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + max(spread, 0.0))


def _window(n: int) -> np.ndarray:
    """[n - 10, n] float32: the Gaussian window at each place of a line of n pixels."""
    offset = np.arange(n)[None] - np.arange(n - 2 * RADIUS)[:, None] - RADIUS
    weights = np.exp(-0.5 * (offset / SIGMA) ** 2) * (np.abs(offset) <= RADIUS)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _same(estimate: Array, truth: Array) -> None:
    if estimate.shape != truth.shape:
        raise ValueError(
            f"got shapes {list(estimate.shape)} and {list(truth.shape)}, expected two"
            " of one shape"
        )

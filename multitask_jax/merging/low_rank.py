"""Matrices as products of two thin ones: the truncated SVD of a task vector.

Exact where the smaller side is short: eigenvectors of the smaller Gram matrix in
float64, which find singular values to 1e-8 of the largest, better than a float32 SVD.
Else randomised subspace iteration (Halko, Martinsson and Tropp 2011, arXiv 0909.4061,
algorithm 4.4) in float32: where singular values fall off, as those of task vectors do,
it keeps what the exact one keeps; of white noise, the worst case, over 90% of that.

Legend: m, n sides of a matrix; r rank.
"""

import numpy as np

EXACT = 1024  # smaller sides up to this get an exact SVD
ITERATIONS = 4  # of the randomised one


def factorise(
    tau: np.ndarray, rank: int | None, energy: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest matrix of lower rank, as two factors of equal singular values.

    Args:
      tau: [m, n], float32.
      rank: r at most; None: as `energy` asks.
      energy: if given, the smallest r that keeps this share of |tau|^2 (exact SVD).

    Returns:
      U_r sqrt(S_r) [m, r] and sqrt(S_r) V_r^T [r, n], float32.
    """
    m, n = tau.shape
    if m > n:
        right, left = factorise(tau.T, rank, energy)
        return left.T, right.T
    rank = m if rank is None else min(rank, m)
    size = 2 * rank + 16  # of the subspace
    if energy is None and m > max(EXACT, 4 * size):
        if not tau.any():  # spans nothing
            return np.zeros((m, rank), np.float32), np.zeros((rank, n), np.float32)
        # Q [m, size] spans nearly what as many left singular vectors do.
        rng = np.random.default_rng(0)
        q = _orthonormal(tau @ rng.standard_normal((n, size), np.float32))
        for _ in range(ITERATIONS):
            q = _orthonormal(tau @ _orthonormal(tau.T @ q))
        left, right = factorise(q.T @ tau, rank)
        return q @ left, right
    gram = np.zeros((m, m))
    for start in range(0, n, 4096):
        block = tau[:, start : start + 4096].astype(np.float64)
        gram += block @ block.T
    squares, u = np.linalg.eigh(gram)  # tau tau^T = U S^2 U^T, ascending
    squares, u = np.maximum(squares[::-1], 0), u[:, ::-1]
    if energy is not None:
        short = np.cumsum(squares) < energy * squares.sum() * (1 - 1e-12)
        rank = min(rank, int(short.sum()) + 1)
    u = u[:, :rank].astype(np.float32)
    projected = u.T @ tau  # S_r V_r^T, without dividing by small singular values
    s = np.sqrt(np.linalg.norm(projected, axis=1, keepdims=True))
    return u * s.T, np.divide(projected, s, out=np.zeros_like(projected), where=s > 0)


def _orthonormal(y: np.ndarray) -> np.ndarray:
    """A basis of y's columns [m, l], less what is below 1e-5 of the largest.

    By eigenvectors of y^T y in float64: a few large products, and no division by 0.
    """
    y = y.astype(np.float64)
    squares, v = np.linalg.eigh(y.T @ y)
    keep = squares > 1e-10 * squares[-1]
    return (y @ (v[:, keep] / np.sqrt(squares[keep]))).astype(np.float32)

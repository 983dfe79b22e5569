"""RegMean (Jin et al. 2023): each dense layer as a joint least-squares problem.

W = argmin_W sum_t |X_t W - X_t W_t|^2 = (sum_t G_t)^-1 sum_t G_t W_t, G_t = X_t^T X_t.

Legend: n inputs of a layer, m outputs, T models.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from multitask_jax.merging.core import Leaf, Method, Transform, Values, add_up, times
from multitask_jax.merging.fitted.fisher import average
from multitask_jax.merging.task_statistics import Gram

Array = jax.Array
_REFINEMENTS = 3


@jax.jit  # eager merges compile it once a shape
def solve(a: Array, b: Array) -> Array:
    """a^-1 b for positive semidefinite a [..., n, n]; 0 in directions that a lacks.

    Scaled to a unit diagonal, then Cholesky of a + r I with r = 4 eps n, what rounding
    needs to keep it positive; refinement takes the bias of r out again (the part along
    an eigenvalue mu is short by (r / (r + mu))^4).
    """
    n = a.shape[-1]
    diagonal = jnp.diagonal(a, axis1=-2, axis2=-1)
    some = diagonal > 0
    d = jnp.where(some, lax.rsqrt(jnp.where(some, diagonal, 1)), 0)[..., None]
    a = a * d * d.mT
    ridge = 4 * jnp.finfo(a.dtype).eps * n
    factor = lax.linalg.cholesky(a + ridge * jnp.eye(n, dtype=a.dtype)[_new(a)])

    def roughly(b: Array) -> Array:
        y = lax.linalg.triangular_solve(factor, b, left_side=True, lower=True)
        return lax.linalg.triangular_solve(
            factor, y, left_side=True, lower=True, transpose_a=True
        )

    b = d * b
    x = roughly(b)
    for _ in range(_REFINEMENTS):
        x = x + roughly(b - jnp.matmul(a, x, precision="highest"))
    return d * x


def _new(a: Array) -> tuple[Any, ...]:
    return (None,) * (a.ndim - 2) + (...,)


def as_matrix(w: Array, gram: Gram) -> Array:
    """A weight as [*batch, n, m]; `as_weight` undoes it."""
    w = w.transpose(_order(w.ndim, gram))
    batch = w.shape[: len(gram.batch)]
    n = math.prod(w.shape[len(gram.batch) :][: len(gram.axes)])
    return w.reshape(*batch, n, -1)


def as_weight(matrix: Array, gram: Gram, like: Array) -> Array:
    """[*batch, n, m] as a weight of the shape of `like`."""
    order = _order(like.ndim, gram)
    out = matrix.reshape([like.shape[i] for i in order])
    return out.transpose([order.index(i) for i in range(like.ndim)])


def _order(ndim: int, gram: Gram) -> list[int]:
    first = [*gram.batch, *gram.axes]
    return first + [i for i in range(ndim) if i not in first]


def regress(*, off_diagonal: Any = 0.9) -> Transform:
    """W = (sum w_t G_t)^-1 sum w_t G_t W_t, with off-diagonals of G_t scaled.

    Solved for the difference from the average: exact where the models agree, and the
    average in directions that no input has. Leaves without a Gram are averaged.

    Args:
      off_diagonal: factor of the entries off the diagonals: 1 is the regression, 0
        weighs each input feature on its own; less than 1 steadies it (section 3.3 of
        the paper has .9, and .1 for some models).
    """

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        mean = average(values, leaf)
        if not leaf.statistics:
            return (mean,)
        grams = [
            times(w, _damp(g.matrix, off_diagonal))
            for w, g in zip(leaf.weights, leaf.statistics, strict=True)
        ]
        first = leaf.statistics[0]
        right = [
            jnp.matmul(g, as_matrix(v - mean, first), precision="highest")
            for g, v in zip(grams, values, strict=True)
        ]
        change = solve(add_up(grams), add_up(right))
        return (mean + as_weight(change, first, mean),)

    return Transform(apply, needs="tensor", statistics="gram")


def _damp(g: Array, factor: Any) -> Array:
    eye = jnp.eye(g.shape[-1], dtype=bool)[_new(g)]
    return jnp.where(eye, g, times(jnp.asarray(factor, g.dtype), g))


def regmean(*, off_diagonal: Any = 0.9) -> Method:
    """RegMean: dense layers that fit all models' outputs on their data (--statistics).

    Leaves without statistics are averaged. Needs no base.
    """
    return Method(
        (regress(off_diagonal=off_diagonal),), start="parameters", end="parameters"
    )

"""Merging in singular subspaces: Iso-C, Iso-CTS, TSV-M, KnOTS.

Legend: a matrix tau_t [m, n] of model t, its SVD U diag(s) V^T; k = min(m, n). Tensors
that are not matrices are averaged, as in the papers. Singular vectors do not care which
axis of a matrix is the input, so these serve torch's and flax's layouts alike (KnOTS
shares the space of one axis, see there).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from multitask_jax.merging import core, statistics
from multitask_jax.merging.arguments import check_choice
from multitask_jax.merging.core import Array, Leaf, Transform, Values, add_up, times

InputAxis = Literal["last", "first"]


class Svd(NamedTuple):
    """U diag(s) V^T: u [m, k], s [k] falling, vt [k, n]."""

    u: Array
    s: Array
    vt: Array


def _inverse(x: Array, scale: Array) -> Array:
    """1 / x, or 0 where x is nothing against `scale`."""
    some = jnp.abs(x) > jnp.finfo(x.dtype).eps * scale
    return jnp.where(some, 1 / jnp.where(some, x, 1), 0)


@jax.custom_jvp
def svd(x: Array) -> Svd:
    """The reduced SVD, with gradients that stay finite.

    JAX's own divides by s_j^2 - s_i^2 and by s_i; here directions that the matrix does
    not determine (equal or zero singular values) have gradient 0.
    """
    return Svd(*jnp.linalg.svd(x, full_matrices=False))


@svd.defjvp
def _svd_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Svd, Svd]:
    (x,), (dx,) = primals, tangents
    u, s, vt = out = svd(x)
    middle = u.T @ dx @ vt.T
    gaps = s[None, :] ** 2 - s[:, None] ** 2
    f = _inverse(gaps, s[0] ** 2)
    inverse = _inverse(s, s[0])
    du = u @ (f * (middle * s[None, :] + s[:, None] * middle.T))
    dv = vt.T @ (f * (s[:, None] * middle + middle.T * s[None, :]))
    # What a tall (wide) matrix moves out of the space of U (V).
    du += (dx @ vt.T - u @ middle) * inverse[None, :]
    dv += (dx.T @ u - vt.T @ middle.T) * inverse[None, :]
    return out, Svd(du, jnp.diagonal(middle), dv.T)


@jax.custom_jvp
def polar_factor(x: Array) -> Array:
    """U V^T, the nearest matrix with orthonormal rows or columns."""
    u, _, vt = svd(x)
    return u @ vt


@polar_factor.defjvp
def _polar_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    u, s, vt = svd(x)
    middle = u.T @ dx @ vt.T
    # Equal singular values do no harm here: only their sums divide.
    inside = (middle - middle.T) * _inverse(s[:, None] + s[None, :], s[0])
    inverse = _inverse(s, s[0])
    left = (dx @ vt.T - u @ middle) * inverse[None, :]
    right = inverse[:, None] * (u.T @ dx - middle @ vt)
    return u @ vt, u @ inside @ vt + left @ vt + u @ right


def on_matrices(
    function: Callable[[Values, Leaf], Array], input_axis: InputAxis = "last"
) -> Transform:
    """A transform that merges matrices by `function`; all else is averaged.

    Args:
      function: of matrices [out, in].
      input_axis: where the inputs of the model's matrices are: "last" (torch), or
        "first" (flax kernels), which are then turned.
    """
    check_choice("input_axis", input_axis, ("last", "first"))
    turned = input_axis == "first"

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        if values[0].ndim != 2 or not values[0].size:
            return (times(1 / len(values), add_up(values)),)
        # Accelerators otherwise multiply in fewer bits than the SVD has.
        with jax.default_matmul_precision("highest"):
            out = function(tuple(v.T for v in values) if turned else values, leaf)
        return (out.T if turned else out,)

    return Transform(apply, needs="tensor")


def flatten_spectrum() -> Transform:
    """Iso-C: U mean(s) V^T of the sum of task vectors (Marczak et al. 2025, eq. 6)."""

    def merge(values: Values, leaf: Leaf) -> Array:
        u, s, vt = svd(add_up(values))
        return times(jnp.mean(s), u @ vt)

    return on_matrices(merge)


def flatten_spectrum_by_task(*, common_fraction: float = 0.8) -> Transform:
    """Iso-CTS: the top directions of the sum, and each task's own, all equally strong.

    The common space has `common_fraction` of the k directions, made to leave a multiple
    of T; what a task has outside it, orthogonal on the left, gives (k - common) / T
    directions a task (Marczak et al. 2025, algorithm 1).

    Raises:
      ValueError: common_fraction outside [0, 1].
    """
    if not 0 <= common_fraction <= 1:
        raise ValueError(f"common_fraction: got {common_fraction}, expected 0 to 1")

    def merge(values: Values, leaf: Leaf) -> Array:
        k, tasks = min(values[0].shape), len(values)
        own = min(round((k - int(k * common_fraction)) / tasks), k // tasks)
        common = k - own * tasks
        u, s, vt = svd(add_up(values))
        u, s, vt = u[:, :common], s[:common], vt[:common]
        parts = [Svd(u, s, vt)]
        for tau in values:
            part = svd(tau - u @ (u.T @ tau))
            parts.append(Svd(part.u[:, :own], part.s[:own], part.vt[:own]))
        strength = jnp.mean(jnp.concatenate([p.s for p in parts]))
        return times(strength, _joined(parts, None))

    return on_matrices(merge)


def join_singular_vectors() -> Transform:
    """TSV-M: the top k / T singular triplets of each task, made orthogonal.

    Their left and right vectors, side by side, are replaced by the nearest orthonormal
    ones (Gargiulo et al. 2025, equations 7 to 9). A matrix of fewer directions than
    tasks keeps one of each task, where the authors' code keeps none.
    """

    def merge(values: Values, leaf: Leaf) -> Array:
        r = max(1, min(values[0].shape) // len(values))
        parts = [Svd(p.u[:, :r], p.s[:r], p.vt[:r]) for p in map(svd, values)]
        return _joined(parts, jnp.concatenate([p.s for p in parts]))

    return on_matrices(merge)


def _joined(parts: list[Svd], strengths: Array | None) -> Array:
    """U_perp diag(strengths) V_perp^T of vectors side by side, made orthonormal."""
    u = polar_factor(jnp.concatenate([p.u for p in parts], axis=1))
    vt = polar_factor(jnp.concatenate([p.vt for p in parts], axis=0))
    return (u if strengths is None else u * strengths[None, :]) @ vt


def align(
    method: core.Method, *, eps: float = 1e-4, input_axis: InputAxis = "last"
) -> Transform:
    """KnOTS: task vectors in one shared basis, merged there by any method.

    [tau_1 .. tau_T] = U diag(s) [V_1^T .. V_T^T]; the V_t^T are merged by `method` and
    brought back by U diag(s) (Stoica et al. 2025, section 4). Made for LoRA updates,
    whose bases differ from task to task.

    Args:
      method: a chain on task vectors; what it asks about the whole model (TIES'
        threshold) it is told of the tensor's V_t.
      eps: singular values up to this part of the largest are left out.
      input_axis: the inputs of a matrix: "last" (torch), "first" (flax kernels).

    Raises:
      ValueError: the method is about parameters.
    """
    if (method.start, method.end) != ("task_vectors", "task_vectors"):
        raise ValueError("knots: got a method on parameters, expected task vectors")

    def merge(values: Values, leaf: Leaf) -> Array:
        u, s, vt = svd(jnp.concatenate(values, axis=1))
        kept = s > eps * s[0]
        vt = jnp.where(kept[:, None], vt, 0)
        shared = jnp.split(vt, len(values), axis=1)
        found = jnp.sum(kept, dtype=jnp.int32)
        merged = _merge_rows(method, tuple(shared), leaf, found)
        return (u * jnp.where(kept, s, 0)[None, :]) @ merged

    return on_matrices(merge, input_axis)._replace(
        settings=functools.partial(core.settings_by_path, method)
    )


def _merge_rows(method: core.Method, values: Values, leaf: Leaf, rows: Array) -> Array:
    """Merges matrices of which only the first `rows` (traced) count."""
    most, columns = values[0].shape
    # The base has no place in the shared basis.
    leaf = leaf._replace(base=jnp.zeros_like(values[0]))

    def of_rows(m: core.Measure) -> core.Measure:
        def ranks(size: int, terms: int, earlier: tuple[Any, ...]) -> list[Any]:
            table = [
                [statistics.split(k) for k in core.ranks_of(m, n, terms, earlier)]
                for n in [max(1, r) * columns for r in range(most + 1)]
            ]
            found = jnp.asarray(table, jnp.int32)[rows]
            return [(high, low) for high, low in found]

        return m._replace(rank=ranks) if m.kind == "kth" else m

    for t, setting in zip(method.transforms, leaf.setting, strict=True):
        at = {"": leaf._replace(setting=setting)}
        t = t._replace(measures=tuple(map(of_rows, t.measures)))
        stats = core.measure(t, {"": values}, at)
        values = t.apply(values, at[""], stats[""])
    return core.finish(method._replace(end="parameters"), values, leaf.base)

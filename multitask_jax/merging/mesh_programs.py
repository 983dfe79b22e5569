"""The chain on a mesh: tensors of one shape, stacked and sharded, as jitted programs.

The same `Transform`s as in memory, over stacks of tensors: a model of 80 layers has
about six shapes, so about six programs. What is element-wise needs no communication;
of a statistic over the whole model devices exchange counts (a few integers) or sums.

Legend: L tensors of a stack, T models, G stacks, R ranks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from multitask_jax import sharding
from multitask_jax.merging import core, mesh_statistics, statistics
from multitask_jax.merging.core import Array, Method, Values
from multitask_jax.merging.plan import Entry, Plan

# Statistics of the whole model, by (transform, measure).
Known = Mapping[tuple[int, int], Any]


class Kind(NamedTuple):
    """What tensors share that share a program, besides their shape."""

    spec: PartitionSpec  # of a tensor
    dtypes: tuple[np.dtype, ...]  # of base and models on the mesh
    out: np.dtype  # of the merged tensors on the mesh


class Stack(NamedTuple):
    """L tensors of one shape and kind."""

    entries: tuple[Entry, ...]
    kind: Kind

    @property
    def shape(self) -> tuple[int, ...]:
        """(L, *shape)."""
        return (len(self.entries), *self.entries[0].shape)

    def sharding(self, mesh: Mesh) -> NamedSharding:
        """A tensor's, behind an axis of L that is not cut."""
        return NamedSharding(mesh, stacked(self.kind.spec))


class Inputs(NamedTuple):
    """What a program sees of a stack; without the axis of L, of a tensor."""

    base: Array  # (L, *shape), `carried`
    models: Values  # T of these
    settings: Sequence[Any]  # of each transform, scalars as (L,) arrays


def on_device(dtype: np.dtype) -> np.dtype:
    """float64 and float8 are converted on the host: few accelerators have them."""
    return np.dtype(dtype if dtype.itemsize in (2, 4) else np.float32)


def carried(dtype: np.dtype) -> np.dtype:
    """What arrays of a dtype are on the mesh: half-precision floats are their bits.

    To slice a stack of bfloat16 in a loop, XLA on a CPU makes a float32 copy of it.
    """
    return np.dtype(np.uint16 if dtype.itemsize == 2 else dtype)


def as_float(x: Array, dtype: np.dtype) -> Array:
    """From what is carried to a float32 that computes."""
    x = x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)
    return x.astype(jnp.float32)


def stacked(spec: PartitionSpec) -> PartitionSpec:
    """A stack's, before/after: P("model", None) -> P(None, "model", None)."""
    return PartitionSpec(None, *spec)


def stack_up(
    plan: Plan, mesh: Mesh, rules: sharding.Rules | None, most: int | None
) -> list[Stack]:
    """Tensors that share a program, in stacks of at most `most` input bytes a device.

    Raises:
      ValueError: a tensor that no rule matches, or that can't be cut so.
    """
    alike: dict[Any, list[Entry]] = {}
    for e in plan.merged:
        spec = sharding.leaf_spec(e.path, e.shape, mesh, rules)
        dtypes = tuple(map(on_device, (e.base, *e.models)))
        kind = Kind(spec, dtypes, on_device(e.out))
        alike.setdefault((e.shape, kind), []).append(e)
    stacks = []
    for (_, kind), entries in alike.items():
        parts = math.prod(mesh.shape[n] for n in sharding.names_in(kind.spec))
        room = len(entries)
        if most is not None:
            room = min(room, max(1, most * parts // max(e.nbytes for e in entries)))
        length = -(-len(entries) // -(-len(entries) // room))  # even ones
        for i in range(0, len(entries), length):
            stacks.append(Stack(tuple(entries[i : i + length]), kind))
    return stacks


def model_measures(method: Method) -> list[tuple[int, int]]:
    """(transform, measure) of each statistic over the whole model, in order."""
    return [
        (i, j)
        for i, t in enumerate(method.transforms)
        for j, m in enumerate(t.measures)
        if m.scope == "model"
    ]


def is_elementwise(method: Method) -> bool:
    """Whether a tensor's entries need nothing of each other but model statistics."""
    return all(
        t.needs == "element" and all(m.scope == "model" for m in t.measures)
        for t in method.transforms
    )


def each(method: Method, f: Callable[[Inputs], Any], stack: Inputs) -> Any:
    """`f` of the tensors of a stack.

    Element-wise chains all at once, which XLA fuses into one loop; others one tensor
    after another, so that the temporaries are those of one.
    """
    return jax.vmap(f)(stack) if is_elementwise(method) else lax.map(f, stack)


def walk(
    method: Method,
    kind: Kind,
    weights: Values,
    known: Known,
    x: Inputs,
    *,
    stop: tuple[int, int] | None = None,
) -> tuple[Array, Values, Values, Values]:
    """One tensor through the chain, computed in float32.

    Statistics of the tensor are taken on the way, those of the model are `known`.

    Returns:
      The base, the values at the end (or the terms of measure `stop`), the task vectors
      and what trimming left of them.
    """
    base, *models = map(as_float, (x.base, *x.models), kind.dtypes)
    leaf = core.Leaf(base, weights, size=float(base.size))
    before = after = values = core.start_values(method, base, tuple(models))
    for i, t in enumerate(method.transforms):
        at = core.at_transform(leaf, i, x.settings)
        stats: tuple[Any, ...] = ()
        for j, m in enumerate(t.measures):
            if m.scope == "model" and (i, j) != stop:
                stats = (*stats, known[i, j])
                continue
            terms = m.values(values, at, stats)
            if (i, j) == stop:
                return base, terms, before, after
            stats = (*stats, *core.reduce_terms(m, [[terms]], [stats]))
        values = t.apply(values, at, stats)
        if t.trims and len(values) == len(before):
            after = values
    return base, values, before, after


def merge_program(method: Method, mesh: Mesh, kind: Kind) -> Any:
    """(base, models, settings, weights, known) -> the merged stack, carried.

    It takes the base's memory where that is of its dtype.
    """

    def merge(base, models, settings, weights, known):
        def one(x: Inputs) -> Array:
            theta_0, values, _, _ = walk(method, kind, weights, known, x)
            theta = core.finish(method, values, theta_0).astype(kind.out)
            half = carried(kind.out) != kind.out
            return lax.bitcast_convert_type(theta, jnp.uint16) if half else theta

        return each(method, one, Inputs(base, models, settings))

    same = carried(kind.out) == carried(kind.dtypes[0])
    return jax.jit(
        merge,
        out_shardings=NamedSharding(mesh, stacked(kind.spec)),
        donate_argnums=(0,) if same else (),
    )


def statistic_program(
    method: Method, mesh: Mesh, kinds: Sequence[Kind], i: int, j: int
) -> Any:
    """(G inputs, weights, known) -> measure j of transform i over the whole model."""
    m = method.transforms[i].measures[j]
    specs = [k.spec for k in kinds]

    def statistic(stacks: Sequence[Inputs], weights: Values, known: Known) -> Any:
        earlier = tuple(known[i, before] for before in range(j))

        def of(kind: Kind) -> Callable[[Inputs], Values]:
            return lambda x: walk(method, kind, weights, known, x, stop=(i, j))[1]

        terms = [*map(of, kinds)]
        if m.kind == "count":
            return tuple(mesh_statistics.count(terms, stacks, specs, mesh))
        if m.kind == "sum":
            whole = [each(method, f, x) for f, x in zip(terms, stacks, strict=True)]
            return core.reduce_terms(m, [whole], [earlier])[0]
        d = sum(s.base.size for s in stacks)
        ranks = core.ranks_of(
            m, d, len(mesh_statistics.of_first(terms[0], stacks[0])), earlier
        )
        if is_elementwise(method):  # cheap to form anew in each round
            return mesh_statistics.kth_magnitudes(terms, ranks, stacks, specs, mesh)
        ranked = [lax.map(f, x) for f, x in zip(terms, stacks, strict=True)]
        return mesh_statistics.kth_magnitudes(
            [tuple] * len(ranked), ranks, ranked, specs, mesh
        )

    return jax.jit(statistic)


def nonfinite_program(mesh: Mesh, kind: Kind) -> Any:
    """(base, models) -> per device and tensor, whether a part of it is not finite.

    An array of (*mesh, L), each device's flags staying where they are.
    """

    def local(base: Array, models: Values) -> Array:
        total = core.add_up([*map(as_float, (base, *models), kind.dtypes)])
        bad = ~jnp.isfinite(total).reshape(len(total), -1)
        return jnp.any(bad, axis=1).reshape((1,) * len(mesh.axis_names) + (-1,))

    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(stacked(kind.spec), stacked(kind.spec)),
            out_specs=PartitionSpec(*mesh.axis_names),
        )
    )


def census_program(method: Method, kind: Kind, exact: bool) -> Any:
    """As `merge_program` -> the sums of `interference.LeafStatistics`, one a tensor.

    In float32, for the report alone. Without `exact` only the inner products.
    """

    def census(base, models, settings, weights, known):
        def one(x: Inputs) -> dict[str, Array]:
            theta_0, _, before, after = walk(method, kind, weights, known, x)
            thetas = map(as_float, x.models, kind.dtypes[1:])
            vectors = jnp.stack([*(theta - theta_0 for theta in thetas), theta_0])
            axes = list(range(1, vectors.ndim))
            gram = jnp.tensordot(vectors, vectors, (axes, axes), precision="highest")
            if not exact:
                return {"gram": gram}
            positive = sum((x > 0).astype(jnp.int32) for x in after)
            negative = sum((x < 0).astype(jnp.int32) for x in after)
            total = jax.vmap(lambda x: statistics.total([x]))
            pairs = zip(before, after, strict=True)
            masses = [jnp.where(x != 0, tau * tau, 0) for tau, x in pairs]
            clashes = [positive + negative >= 2, (positive > 0) & (negative > 0)]
            return {
                "gram": gram,
                "kept": total(jnp.stack([x != 0 for x in after])),
                "kept_mass": total(jnp.stack(masses)),
                "clashes": total(jnp.stack(clashes)),
            }

        return lax.map(one, Inputs(base, models, settings))

    return jax.jit(census)

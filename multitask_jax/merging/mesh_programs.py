"""The chain on a mesh: tensors of one shape, stacked and sharded, as jitted programs.

The same `Transform`s as in memory, over stacks of tensors: a model of 80 layers has
about six shapes, so about six programs. What is element-wise needs no communication;
of a statistic over the whole model devices exchange counts (a few integers) or sums.

Legend: L tensors of a stack, T models, G stacks, R ranks.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from multitask_jax import sharding
from multitask_jax.merging import core, statistics
from multitask_jax.merging.core import Array, Method, Values
from multitask_jax.merging.plan import Entry, Plan

# Statistics of the whole model, by (transform, measure).
Known = Mapping[tuple[int, int], Any]


class Stack(NamedTuple):
    """L tensors of one shape, dtypes and sharding; one program merges them."""

    entries: tuple[Entry, ...]
    spec: PartitionSpec  # of a tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(L, *shape)."""
        return (len(self.entries), *self.entries[0].shape)

    @property
    def dtypes(self) -> tuple[np.dtype, ...]:
        """Of base and models on the mesh: as stored, or float32 in place of others."""
        first = self.entries[0]
        return tuple(map(_on_device, (first.base, *first.models)))

    @property
    def out(self) -> np.dtype:
        """Of the merged tensors on the mesh."""
        return _on_device(self.entries[0].out)

    def sharding(self, mesh: Mesh) -> NamedSharding:
        """A tensor's, behind an axis of L that is not cut."""
        return NamedSharding(mesh, stacked(self.spec))


class Inputs(NamedTuple):
    """What a program sees of a stack."""

    base: Array  # (L, *shape)
    models: Values  # T of these
    settings: Sequence[Any]  # of each transform, scalars as (L,) arrays


def _on_device(dtype: np.dtype) -> np.dtype:
    """float64 and float8 are converted on the host: few accelerators have them."""
    return np.dtype(dtype if dtype.itemsize in (2, 4) else np.float32)


def stacked(spec: PartitionSpec) -> PartitionSpec:
    """Of a stack of tensors, before/after: P("model", None) -> P(None, "model", None)."""
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
        alike.setdefault((spec, e._replace(path="")), []).append(e)
    stacks = []
    for (spec, first), entries in alike.items():
        parts = math.prod(mesh.shape[n] for n in sharding.names_in(spec))
        room = len(entries)
        if most is not None:
            room = min(room, max(1, most * parts // first.nbytes))
        length = -(-len(entries) // -(-len(entries) // room))  # even ones
        for i in range(0, len(entries), length):
            stacks.append(Stack(tuple(entries[i : i + length]), spec))
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


def each(method: Method, f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` over the tensors of a stack.

    Element-wise chains all at once, which XLA fuses into one loop; others one tensor
    after another, so that the temporaries are those of one.
    """
    if is_elementwise(method):
        return jax.vmap(f)
    return lambda *stacks: lax.map(lambda x: f(*x), stacks)


def walk(
    method: Method,
    weights: Values,
    known: Known,
    base: Array,
    models: Values,
    settings: Sequence[Any],
    *,
    stop: tuple[int, int] | None = None,
) -> tuple[Values, Values, Values]:
    """One tensor through the chain, computed in float32.

    Statistics of the tensor are taken on the way, those of the model are `known`.

    Returns:
      The values at the end, the task vectors and what trimming left of them; or thrice
      the terms of measure `stop`.
    """
    base, *models = (x.astype(jnp.float32) for x in (base, *models))
    leaf = core.Leaf(base, weights, size=float(base.size))
    before = after = values = core.start_values(method, base, tuple(models))
    for i, t in enumerate(method.transforms):
        at = leaf._replace(setting=settings[i])
        stats: tuple[Any, ...] = ()
        for j, m in enumerate(t.measures):
            if m.scope == "model" and (i, j) != stop:
                stats = (*stats, known[i, j])
                continue
            terms = m.values(values, at, stats)
            if (i, j) == stop:
                return terms, terms, terms
            stats = (*stats, *core.reduce_terms(m, [[terms]], [stats]))
        values = t.apply(values, at, stats)
        if t.trims and len(values) == len(before):
            after = values
    return values, before, after


def merge_program(
    method: Method, mesh: Mesh, spec: PartitionSpec, out: str, donate: bool
) -> Any:
    """(base, models, settings, weights, known) -> the merged stack, in dtype `out`.

    With `donate` it takes the base's memory, which has to be of that dtype.
    """

    def merge(base, models, settings, weights, known):
        def one(base, models, settings):
            values, _, _ = walk(method, weights, known, base, models, settings)
            return core.finish(method, values, base.astype(jnp.float32)).astype(out)

        return each(method, one)(base, models, settings)

    return jax.jit(
        merge,
        out_shardings=NamedSharding(mesh, stacked(spec)),
        donate_argnums=(0,) if donate else (),
    )


def statistic_program(
    method: Method, mesh: Mesh, specs: Sequence[PartitionSpec], i: int, j: int
) -> Any:
    """(G inputs, weights, known) -> measure j of transform i over the whole model."""
    m = method.transforms[i].measures[j]

    def terms_of(stacks, weights, known):
        def one(base, models, settings):
            at = walk(method, weights, known, base, models, settings, stop=(i, j))
            return at[0]

        return [each(method, one)(*s) for s in stacks]

    def statistic(stacks: Sequence[Inputs], weights: Values, known: Known) -> Any:
        earlier = tuple(known[i, before] for before in range(j))
        terms = terms_of(stacks, weights, known)
        if m.kind == "sum":
            return core.reduce_terms(m, [terms], [earlier])[0]
        columns = list(zip(*terms, strict=True))
        if m.kind == "count":
            return tuple(count(columns, specs, mesh))
        d = sum(s.base.size for s in stacks)
        ranks = core.ranks_of(m, d, len(columns), earlier)

        def keys(found: Any) -> Any:
            """What is ranked. Element-wise terms are formed anew in each round.

            Reading the bfloat16 parameters is less than to keep T float32 copies.
            """
            if not is_elementwise(method):
                return columns
            again, _ = lax.optimization_barrier((stacks, found))
            return list(zip(*terms_of(again, weights, known), strict=True))

        return kth_magnitudes(keys, ranks, specs, mesh)

    return jax.jit(statistic)


def count(
    columns: Sequence[Sequence[Array]], specs: Sequence[PartitionSpec], mesh: Mesh
) -> list[tuple[Array, Array]]:
    """Of each column of G stacks, the number of True entries as (high, low).

    Each device counts its parts, then 2 integers a column are added over the mesh.
    """
    shared = [set(mesh.axis_names) - set(sharding.names_in(s)) for s in specs]

    def mine(x: Array, axes: set[str]) -> Array:
        """What several devices hold, one of them counts."""
        for name in sorted(axes):
            x = x & (lax.axis_index(name) == 0)
        return x

    def local(columns):
        counts = [
            jnp.stack(statistics.count([*map(mine, column, shared)]))
            for column in columns
        ]
        return lax.psum(jnp.stack(counts), mesh.axis_names)

    totals = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=([tuple(map(stacked, specs))] * len(columns),),
        out_specs=PartitionSpec(),
    )([*map(tuple, columns)])
    return [(n[0] + (n[1] >> statistics.BITS), n[1] & statistics.LOW) for n in totals]


def kth_magnitudes(
    columns_of: Callable[[Any], Sequence[Sequence[Array]]],
    ranks: Sequence[Any],
    specs: Sequence[PartitionSpec],
    mesh: Mesh,
) -> tuple[Array, ...]:
    """As `statistics.kth_magnitudes`, of columns of stacks on a mesh.

    31 rounds, in each of which every device counts and R pairs of integers are added.
    """

    def try_bit(n: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        columns = [[*map(statistics.magnitude_bits, c)] for c in columns_of(found)]
        tried = [key | (jnp.int32(1) << (30 - n)) for key in found]
        reached = [
            [x >= key for x in columns[r % len(columns)]] for r, key in enumerate(tried)
        ]
        wanted = [statistics.split(k) if isinstance(k, int) else k for k in ranks]
        enough = map(statistics.at_least, count(reached, specs, mesh), wanted)
        return tuple(map(jnp.where, enough, tried, found))

    found = lax.fori_loop(0, 31, try_bit, (jnp.int32(0),) * len(ranks))
    return tuple(lax.bitcast_convert_type(key, jnp.float32) for key in found)


def nonfinite_program(mesh: Mesh, spec: PartitionSpec) -> Any:
    """(base, models) -> per device and tensor, whether a part of it is not finite.

    An array of (*mesh, L), each device's flags staying where they are.
    """

    def local(base: Array, models: Values) -> Array:
        total = core.add_up([x.astype(jnp.float32) for x in (base, *models)])
        bad = ~jnp.isfinite(total).reshape(len(total), -1)
        return jnp.any(bad, axis=1).reshape((1,) * len(mesh.axis_names) + (-1,))

    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(stacked(spec), stacked(spec)),
            out_specs=PartitionSpec(*mesh.axis_names),
            check_vma=False,  # what is replicated has the same flags everywhere
        )
    )


def census_program(method: Method, exact: bool) -> Any:
    """As `merge_program` -> the sums of `interference.LeafStatistics`, one a tensor.

    Without `exact` only the inner products.
    """

    def one(weights, known, base, models, settings):
        base = base.astype(jnp.float32)
        _, before, after = walk(method, weights, known, base, models, settings)
        taus = [m.astype(jnp.float32) - base for m in models]
        vectors = [*taus, base]
        dot = lambda x, y: statistics.total([x * y])  # noqa: E731
        # The lower triangle; the host mirrors it.
        gram = [[dot(x, y) for y in vectors[: i + 1]] for i, x in enumerate(vectors)]
        if not exact:
            return {"gram": gram}
        kept = [x != 0 for x in after]
        positive = sum((x > 0).astype(jnp.int32) for x in after)
        negative = sum((x < 0).astype(jnp.int32) for x in after)
        total = lambda x: statistics.count([x])  # noqa: E731
        return {
            "gram": gram,
            "kept": [total(k) for k in kept],
            "kept_mass": [
                dot(jnp.where(k, b, 0), b) for k, b in zip(kept, before, strict=True)
            ],
            "contested": total(positive + negative >= 2),
            "conflicts": total((positive > 0) & (negative > 0)),
        }

    def census(base, models, settings, weights, known):
        f = functools.partial(one, weights, known)
        return lax.map(lambda x: f(*x), (base, models, settings))

    return jax.jit(census)

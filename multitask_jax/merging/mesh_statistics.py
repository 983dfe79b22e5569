"""Counts and thresholds of stacks of tensors on a mesh, exact, in a few integers.

Each device counts what it holds, one tensor after another; then two integers a column
are added over the mesh, and nothing else. As `statistics` in memory, `selection` on the
host.

Legend: G stacks, R ranks or columns.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from multitask_jax import sharding
from multitask_jax.merging import statistics

Array = jax.Array


def of_first(f: Callable[[Any], Any], stack: Any) -> Any:
    """Shapes of what `f` gives of a tensor of the stack."""
    return jax.eval_shape(lambda s: f(jax.tree.map(lambda x: x[0], s)), stack)


def count(
    columns: Sequence[Callable[[Any], Sequence[Array]]],
    stacks: Sequence[Any],
    specs: Sequence[PartitionSpec],
    mesh: Mesh,
) -> list[tuple[Array, Array]]:
    """How many entries of each column are True, over all stacks, as (high, low).

    Each device counts its parts, one tensor after another; then two integers a column
    are added over the mesh, and nothing else.

    Args:
      columns: for each of G stacks: a tensor of it -> R arrays of bool.
      stacks, specs: G of each.
      mesh: where they lie.
    """
    apart = PartitionSpec(*mesh.axis_names)  # each device its own counts
    totals: Any = 0
    for f, stack, spec in zip(columns, stacks, specs, strict=True):
        # What several devices hold, the first of them counts.
        used = sharding.names_in(spec)
        shared = tuple(name for name in mesh.axis_names if name not in used)
        here = functools.partial(_count_here, shared, len(mesh.axis_names))
        counted = jax.shard_map(here, mesh=mesh, in_specs=spec, out_specs=apart)

        def add(total: Array, x: Any, f: Any = f, counted: Any = counted) -> Any:
            return _carry(total + counted(*f(x))), None

        rows = len(of_first(f, stack))
        zeros = jnp.zeros((*mesh.devices.shape, rows, 2), jnp.int32)
        zeros = lax.with_sharding_constraint(zeros, NamedSharding(mesh, apart))
        totals = _carry(totals + lax.scan(add, zeros, stack)[0])
    pairs = _carry(jnp.sum(totals, axis=range(len(mesh.axis_names))))
    return [(n[0], n[1]) for n in pairs]


def _count_here(shared: Sequence[str], axes: int, *columns: Array) -> Array:
    """(1, ..., 1, R, 2): (high, low) of each column, on a device."""
    first = [lax.axis_index(name) == 0 for name in shared]
    mine = [functools.reduce(operator.and_, first, x) for x in columns]
    pairs = jnp.stack([jnp.stack(statistics.count([x])) for x in mine])
    return pairs.reshape((1,) * axes + pairs.shape)


def _carry(pairs: Array) -> Array:
    """(..., 2) numbers high * 2**16 + low, with low within 16 bits again."""
    high, low = pairs[..., 0], pairs[..., 1]
    return jnp.stack([high + (low >> statistics.BITS), low & statistics.LOW], axis=-1)


def kth_magnitudes(
    terms: Sequence[Callable[[Any], Sequence[Array]]],
    ranks: Sequence[Any],
    stacks: Sequence[Any],
    specs: Sequence[PartitionSpec],
    mesh: Mesh,
) -> tuple[Array, ...]:
    """As `statistics.kth_magnitudes`, of the terms of all tensors on a mesh.

    31 rounds, in each of which every device counts and R pairs of integers are added.
    """
    wanted = [statistics.split(k) if isinstance(k, int) else k for k in ranks]

    def try_bit(n: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        tried = [key | (jnp.int32(1) << (30 - n)) for key in found]

        def reached(f: Any, x: Any) -> list[Array]:
            keys = [*map(statistics.magnitude_bits, f(x))]
            return [keys[r % len(keys)] >= key for r, key in enumerate(tried)]

        columns = [functools.partial(reached, f) for f in terms]
        enough = map(statistics.at_least, count(columns, stacks, specs, mesh), wanted)
        return tuple(map(jnp.where, enough, tried, found))

    found = lax.fori_loop(0, 31, try_bit, (jnp.int32(0),) * len(ranks))
    return tuple(lax.bitcast_convert_type(key, jnp.float32) for key in found)

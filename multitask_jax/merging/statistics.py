"""Whole-tensor and whole-model reductions in JAX, exact where they count.

Exact order statistics and counts use no sort (slow on a CPU, a gather on a mesh): only
comparisons and integer sums, which a mesh turns into psums of a few scalars.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
# Counts go past int32 (a 70 B model), so they are held as high * 2**16 + low.
BITS = 16
LOW = (1 << BITS) - 1
# Terms that are added one by one. A longer chain XLA would copy into each of its users,
# to fuse them, and compile for minutes where all leaves use it; a loop it does not.
_FEW = 16


def magnitude_bits(x: Array) -> Array:
    """int32 keys that order like |x|: a float's bits without the sign."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return bits & jnp.int32(0x7FFFFFFF)


def total(leaves: Sequence[Array]) -> Array:
    """Sum over all entries of all leaves, left to right, in float32 (or float64).

    The last axis is summed on its own first, which keeps the rounding error of big
    matrices at that of a vector.
    """
    wide = any(x.dtype == jnp.float64 for x in leaves)
    zero = jnp.zeros((), jnp.float64 if wide else jnp.float32)
    wider = [x.astype(zero.dtype) for x in leaves]
    sums = [jnp.sum(jnp.sum(x, axis=-1) if x.ndim else x) for x in wider]
    if len(sums) <= _FEW:
        return sum(sums, zero)
    return lax.scan(lambda s, x: (s + x, None), zero, jnp.stack(sums))[0]


def chunk_sum(x: Array) -> Array:
    """Sum of a chunk, adding eighths to each other in an order written out.

    The order of `jnp.sum` and of a dot product is XLA's: on a CPU their bits depend on
    how many cores share the work. Additions of whole slices do not, run in vectors, and
    leave the rounding error of a shallow tree. What is summed last fits one core.
    """
    x = x.reshape(-1)
    while x.size >= 1 << 9:
        part = -(-x.size // 8)
        x = jnp.pad(x, (0, 8 * part - x.size))
        slices = [x[i * part : (i + 1) * part] for i in range(8)]
        x = functools.reduce(operator.add, slices)
    return jnp.sum(x)


def count(leaves: Sequence[Array]) -> tuple[Array, Array]:
    """Exact number of True entries, as (high, low): high * 2**16 + low."""
    parts = [p for x in leaves for p in _partial_counts(x)]
    zero = (jnp.int32(0), jnp.int32(0))
    if len(parts) <= _FEW:
        return functools.reduce(_carry, parts, zero)
    return lax.scan(lambda n, x: (_carry(n, x), None), zero, jnp.stack(parts))[0]


def _carry(n: tuple[Array, Array], part: Array) -> tuple[Array, Array]:
    low = n[1] + (part & LOW)
    return n[0] + (part >> BITS) + (low >> BITS), low & LOW


def _partial_counts(x: Array, most: int = 2**31) -> list[Array]:
    """Counts that each fit int32: below `most`."""
    if x.size < most:
        return [jnp.sum(x, dtype=jnp.int32)]
    if x.shape[-1] >= most:
        half = x.shape[-1] // 2
        parts = x[..., :half], x[..., half:]
        return [n for part in parts for n in _partial_counts(part, most)]
    # Rows fit; a sum of at most `most` // len(rows) rows fits too.
    rows = jnp.sum(x, axis=-1, dtype=jnp.int32).reshape(-1)
    step = max(1, (most - 1) // x.shape[-1])
    return [
        jnp.sum(rows[i : i + step], dtype=jnp.int32) for i in range(0, len(rows), step)
    ]


def split(n: int) -> tuple[int, int]:
    """A Python integer as (high, low), before/after: 65537 -> (1, 1)."""
    return n >> BITS, n & LOW


def part_of(count: tuple[Any, Any], share: float) -> tuple[Array, Array]:
    """floor(share x count) of a (high, low) number, in 16-bit digits; 0 <= share <= 1.

    The share counts as the next multiple of 2**-32, so that 0.3 of 10 is 3.
    """
    units = math.ceil(share * 2**32)
    high = jnp.asarray(count[0]).astype(jnp.uint32)
    digits = (jnp.asarray(count[1]).astype(jnp.uint32), high & LOW, high >> BITS)
    columns: list[Any] = [jnp.uint32(0)] * 7
    for i, a in enumerate(digits):
        for j in range(3):
            product = a * jnp.uint32((units >> (BITS * j)) & LOW)
            columns[i + j] += product & LOW
            columns[i + j + 1] += product >> BITS
    for i in range(6):
        columns[i + 1] += columns[i] >> BITS
    out = (columns[3] & LOW) + (columns[4] << BITS)
    return out.astype(jnp.int32), (columns[2] & LOW).astype(jnp.int32)


def at_least(a: tuple[Any, Any], b: tuple[Any, Any]) -> Array:
    """a >= b for (high, low) numbers."""
    return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))


def kth_magnitudes(groups: Sequence[Sequence[Array]], ks: Sequence[Any]) -> list[Array]:
    """Of each group of arrays, the k-th largest |x| (k = 1: the largest), exactly.

    Finds the largest key that at least k entries reach, bit by bit from the top: 31
    counting passes, of all groups together. 0 for a group without entries. A k may be
    traced, as (high, low).

    Raises:
      ValueError: a k is not in 1..size.
    """
    keys = [
        [lax.stop_gradient(magnitude_bits(x)) for x in group if x.size]
        for group in groups
    ]
    for group, k in zip(keys, ks, strict=True):
        size = sum(x.size for x in group)
        if group and isinstance(k, int) and not 1 <= k <= size:
            raise ValueError(f"got k = {k}, expected 1..{size}")

    def try_bit(i: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        bit = jnp.int32(1) << (30 - i)
        out = []
        for group, k, key in zip(keys, ks, found, strict=True):
            wanted = split(k) if isinstance(k, int) else k
            enough = at_least(count([x >= (key | bit) for x in group]), wanted)
            out.append(jnp.where(enough, key | bit, key))
        return tuple(out)

    found = lax.fori_loop(0, 31, try_bit, (jnp.int32(0),) * len(groups))
    return [
        lax.bitcast_convert_type(key, jnp.float32) if group else jnp.float32(0)
        for group, key in zip(keys, found, strict=True)
    ]

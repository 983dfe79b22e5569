"""Random numbers indexed by position: same seed, same mask, however it is computed.

A counter-based integer hash of (seed, leaf path, model, position), so a mask does not
depend on chunks, shards, devices or the order of tensors, and costs about a tenth of
JAX's Threefry on a CPU.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def path_seed(path: str, seed: int) -> tuple[int, int]:
    """64 bits that identify (leaf path, seed), as two uint32."""
    digest = hashlib.blake2b(f"{seed}\0{path}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _mix(x: Array) -> Array:
    """A bijection of uint32 with full avalanche (the finaliser `lowbias32`)."""
    x = x ^ (x >> 16)
    x = x * jnp.uint32(0x7FEB352D)
    x = x ^ (x >> 15)
    x = x * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def positions(shape: tuple[int, ...], low: Any) -> Array:
    """uint32 flat C-order index of each entry, plus `low`, modulo 2**32."""
    index = jnp.full(shape, jnp.uint32(low))
    stride = 1
    for axis in reversed(range(len(shape))):
        coordinate = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index = index + coordinate * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def uniform(
    shape: tuple[int, ...],
    *,
    seed: tuple[Any, Any],
    model: int,
    offset: tuple[Any, Any],
) -> Array:
    """float32 in [0, 1) with 24 random bits for each entry.

    Args:
      shape: of the tensor or chunk.
      seed: of the leaf, by `path_seed`.
      model: which model the numbers are for.
      offset: flat index of the first entry, as (high, low) 32 bits.

    Raises:
      ValueError: a whole tensor of 2**32 entries or more (positions would repeat);
        merge it in chunks, from disk.
    """
    size = 1
    for n in shape:
        size *= n
    if size > 2**32:
        raise ValueError(
            f"random masks index at most 2**32 entries at once, got shape {shape};"
            " use merge_checkpoints, which works in chunks"
        )
    salt = _mix(jnp.uint32(seed[1]) + jnp.uint32(model) * jnp.uint32(0x9E3779B9))
    salt = _mix(salt ^ jnp.uint32(offset[0]))
    bits = _mix(_mix(positions(shape, offset[1]) ^ jnp.uint32(seed[0])) + salt)
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)

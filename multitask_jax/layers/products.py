"""Products of matrices in bfloat16, summed in float32.

What a TPU does with float32 unless told otherwise. A CPU that multiplies bfloat16 by
itself (AMX) gains as much; on others it costs time. Sums in float32 are not a matter of
accuracy alone: XLA on a CPU has no fast product whose result is bfloat16.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

NAMES = ("float32", "bfloat16")
DENSE = (((1,), (0,)), ((), ()))  # dimension numbers of [N, K] @ [K, M]


@jax.custom_vjp
def product(x: Array, w: Array) -> Array:
    """x w, [N, K] @ [K, M] -> [N, M], of factors rounded to bfloat16.

    So are the products of its gradient. Sums are in float32; results have the dtype
    of the factors, which is one for both.
    """
    return _forward(x, w)[0]


def _rounded(a: Array, b: Array, contracted: tuple[int, int], dtype: Any) -> Array:
    sums = _sums(contracted)(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
    return sums.astype(dtype)


@functools.cache
def _sums(contracted: tuple[int, int]) -> Any:
    """Products of bfloat16 as float32, of two axes that are summed over."""
    dot = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=((contracted[:1], contracted[1:]), ((), ())),
        preferred_element_type=jnp.float32,
    )

    @jax.custom_batching.custom_vmap
    def sums(a: Array, b: Array) -> Array:
        return dot(a, b)

    @sums.def_vmap
    def batched(size: int, which: Any, a: Array, b: Array) -> tuple[Array, bool]:
        # XLA on a CPU compiles some batches of such products and then fails to run
        # them ("Unsupported element type"). In float32 they are the same.
        wide = a.astype(jnp.float32), b.astype(jnp.float32)
        return jax.vmap(dot, [0 if x else None for x in which])(*wide), True

    return sums


def _forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    # What the gradient needs is kept rounded: half the bytes, and not rounded again.
    kept = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return _rounded(*kept, (1, 0), x.dtype), kept


def _backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = kept
    return _rounded(g, w, (1, 1), g.dtype), _rounded(x, g, (0, 0), g.dtype)


product.defvjp(_forward, _backward)


def matmul(x: Array, w: Array) -> Array:
    """x w of [N, K] and [K, M] of one dtype: `product` of bfloat16, else as it is."""
    return product(x, w) if x.dtype == w.dtype == jnp.bfloat16 else x @ w


def dot_general(name: str) -> Any:
    """What `nn.Dense(dot_general=...)` of float32 [N, K] takes, by one of `NAMES`.

    Raises:
      ValueError: another name.
    """
    if name not in NAMES:
        raise ValueError(f"products: got {name!r}, expected one of {NAMES}")
    return jax.lax.dot_general if name == "float32" else _dense


def _dense(x: Array, w: Array, dimensions: Any, **_: Any) -> Array:
    if dimensions != DENSE or {x.dtype, w.dtype} != {jnp.dtype("float32")}:
        raise ValueError(
            f"products in bfloat16: got {x.dtype} {x.shape}, {w.dtype} {w.shape} and"
            f" dimensions {dimensions}, expected float32 [N, K] and [K, M]"
        )
    return product(x, w)

"""Products of matrices in bfloat16, summed in float32.

What a TPU does with float32 unless told otherwise. A CPU that multiplies bfloat16 by
itself (AMX) gains as much; on others it costs time. Sums in float32 are not a matter of
accuracy alone: XLA on a CPU has no fast product whose result is bfloat16, nor one whose
first factor is transposed, and it cannot run all that it makes of a transposed result.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

NAMES = ("float32", "bfloat16")
DENSE = (((1,), (0,)), ((), ()))  # dimension numbers of [N, K] @ [K, M]
_BITS = 8, 7  # of bfloat16's exponent and mantissa


def product(x: Array, w: Array, dtype: Any = None) -> Array:
    """x w, [N, K] @ [K, M] -> [N, M], of factors rounded to bfloat16.

    So are the products of its gradient. Sums are in float32.

    Args:
      x, w: both float32 or both bfloat16.
      dtype: of the result; that of the factors by default.

    Raises:
      ValueError: other dtypes or shapes.
    """
    fits = x.ndim == w.ndim == 2 and x.shape[1] == w.shape[0]
    if not fits or x.dtype != w.dtype or x.dtype.name not in NAMES:
        raise ValueError(
            f"products in bfloat16: got {x.dtype} {x.shape} and {w.dtype} {w.shape},"
            " expected [N, K] and [K, M], both float32 or both bfloat16"
        )
    return _product(x, w, (x.dtype.name, jnp.dtype(dtype or x.dtype).name))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, w: Array, dtypes: tuple[str, str]) -> Array:
    return _forward(x, w, dtypes)[0]


def _forward(x: Array, w: Array, dtypes: tuple[str, str]) -> tuple[Array, Any]:
    # What the gradient needs is kept rounded: half the bytes, and not rounded again.
    kept = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return _sums((1, 0))(*kept).astype(dtypes[1]), kept


def _backward(dtypes: tuple[str, str], kept: Any, g: Array) -> tuple[Array, Array]:
    x, w = kept
    g = g.astype(jnp.bfloat16)
    to_x = _sums((1, 1))(g, w)
    to_w = jax.lax.platform_dependent(
        x,
        g,
        cpu=lambda x, g: _sums((1, 0))(transposed(x), g),
        default=_sums((0, 0)),
    )
    return to_x.astype(dtypes[0]), to_w.astype(dtypes[0])


_product.defvjp(_forward, _backward)


def transposed(x: Array) -> Array:
    """x^T of [N, M] in three steps, which XLA does not make part of a product.

    A product in bfloat16 with x.T takes four times as long on a CPU: its factors are
    converted to float32 first. (Of an odd N this is x.T.)
    """
    n, m = x.shape
    if n % 2:
        return x.T
    return x.reshape(2, n // 2, m).transpose(2, 0, 1).reshape(m, n)


@functools.cache
def _sums(contracted: tuple[int, int]) -> Any:
    """Products of bfloat16 as float32, of two axes that are summed over."""
    dot = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=((contracted[:1], contracted[1:]), ((), ())),
        preferred_element_type=jnp.float32,
    )

    def kept_apart(y: Array) -> Array:
        """As it is. XLA turns (a b)^T into b^T a^T, which it then cannot run."""
        return jax.lax.clamp(jnp.float32(-jnp.inf), y, jnp.float32(jnp.inf))

    @jax.custom_batching.custom_vmap
    def sums(a: Array, b: Array) -> Array:
        y = dot(a, b)
        return jax.lax.platform_dependent(y, cpu=kept_apart, default=lambda y: y)

    @sums.def_vmap
    def batched(size: int, which: Any, a: Array, b: Array) -> tuple[Array, bool]:
        # XLA on a CPU compiles some batches of such products and then fails to run
        # them ("Unsupported element type"). In float32 they are the same; a compiler
        # may drop a rounding that is a change of dtype, but not this one.
        wide = (jax.lax.reduce_precision(x.astype(jnp.float32), *_BITS) for x in (a, b))
        return jax.vmap(dot, [0 if x else None for x in which])(*wide), True

    return sums


def matmul(x: Array, w: Array, dtype: Any = None) -> Array:
    """x w of [N, K] and [K, M] of one dtype: `product` of bfloat16, else as it is."""
    if x.dtype == w.dtype == jnp.bfloat16:
        return product(x, w, dtype)
    return (x @ w).astype(dtype or x.dtype)


def dot_general(name: str) -> Any:
    """What `nn.Dense(dot_general=...)` of [N, K] takes, by one of `NAMES`.

    Raises:
      ValueError: another name.
    """
    if name not in NAMES:
        raise ValueError(f"products: got {name!r}, expected one of {NAMES}")
    return jax.lax.dot_general if name == "float32" else _dense


def _dense(x: Array, w: Array, dimensions: Any, **_: Any) -> Array:
    if dimensions != DENSE:
        raise ValueError(
            f"products in bfloat16: got dimensions {dimensions} of {x.shape} and"
            f" {w.shape}, expected {DENSE}: [N, K] @ [K, M]"
        )
    return product(x, w)

"""Products of float32 matrices in bfloat16, summed in float32.

What a TPU does with float32 unless told otherwise. A CPU that multiplies bfloat16 by
itself (AMX) gains as much; on others it costs time.
"""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

NAMES = ("float32", "bfloat16")
DENSE = (((1,), (0,)), ((), ()))  # dimension numbers of [N, K] @ [K, M]


@jax.custom_vjp
def product(x: Array, w: Array) -> Array:
    """x w, [N, K] @ [K, M] -> [N, M], of factors rounded to bfloat16; float32.

    So are the products of its gradient.
    """
    return _forward(x, w)[0]


def _rounded(a: Array, b: Array, contracted: tuple[int, int]) -> Array:
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    axes = ((contracted[:1], contracted[1:]), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    # What the gradient needs is kept rounded: half the bytes, and not rounded again.
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return _rounded(x, w, (1, 0)), (x, w)


def _backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = kept
    return _rounded(g, w, (1, 1)), _rounded(x, g, (0, 0))


product.defvjp(_forward, _backward)


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

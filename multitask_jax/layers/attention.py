"""Scaled dot-product attention (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

Legend: B batch, N queries, M keys, H heads, d width of a head.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def attend(query: Array, key: Array, value: Array, mask: Array | None = None) -> Array:
    """softmax(q k^T / sqrt(d)) v; at least float32 between the products.

    A query that may look at nothing gets the mean of all values.

    Args:
      query: [B, N, H, d].
      key, value: [B, M, H, d].
      mask: bool, broadcast to [B, H, N, M]; a query looks where it is True.

    Returns:
      [B, N, H, d].
    """
    # Heads first, and keys as columns: what a CPU multiplies without copying.
    q, k, v = query.transpose(0, 2, 1, 3), key.transpose(0, 2, 3, 1), value
    v = v.transpose(0, 2, 1, 3)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.matmul(q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(wide).min)
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weight = jnp.exp(logits - highest)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    # The division is of [B, H, N, d], not of [B, H, N, M], and so is its gradient.
    y = (weight.astype(v.dtype) @ v) / total
    return y.astype(v.dtype).transpose(0, 2, 1, 3)

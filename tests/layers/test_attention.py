"""Attention against JAX's own, which is written another way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax.layers.attention import attend

B, N, M, H, D = 2, 5, 7, 3, 4


def inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (B, N, H, D), (B, M, H, D), (B, M, H, D)
    return [
        2 * jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)
    ]


MASKS = {
    "none": None,
    "keys": np.arange(M)[None, None, None] < np.array([3, 7]).reshape(B, 1, 1, 1),
    "pairs": np.arange(M)[None, None, None] <= np.arange(N)[None, None, :, None],
}


@pytest.mark.parametrize("mask", MASKS)
def test_values_and_gradients_are_those_of_jax(mask):
    theirs = functools.partial(jax.nn.dot_product_attention, mask=MASKS[mask])

    def both(f):
        g = jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), argnums=(0, 1, 2))
        return jax.jit(lambda *x: (f(*x), g(*x)))

    got = both(functools.partial(attend, mask=MASKS[mask]))(*inputs())
    expected = both(theirs)(*inputs())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), got, expected
    )


def test_a_query_that_may_look_at_nothing_gets_the_mean():
    q, k, v = inputs()
    got = jax.jit(attend)(q, k, v, np.zeros((1, 1, N, M), bool))
    mean = np.broadcast_to(np.mean(v, axis=1, keepdims=True), got.shape)
    np.testing.assert_allclose(got, mean, atol=1e-6)


def test_large_logits_neither_overflow_nor_vanish():
    q, k, v = inputs()
    got = jax.jit(attend)(1e4 * q, 1e4 * k, v)
    winner = np.argmax(np.einsum("bnhd,bmhd->bhnm", q, k), axis=-1)  # [B, H, N]
    expected = np.asarray(v)[np.arange(B)[:, None, None], winner, np.arange(H)[:, None]]
    np.testing.assert_allclose(got, expected.transpose(0, 2, 1, 3), rtol=1e-6)


def test_bfloat16_is_summed_in_float32():
    got = jax.jit(attend)(*inputs(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    exact = jax.jit(attend)(*(x.astype(jnp.float32) for x in inputs(jnp.bfloat16)))
    np.testing.assert_allclose(np.float32(got), exact, atol=0.04)

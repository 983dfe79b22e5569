"""Attention against JAX's own, which is written another way."""

import functools

import chex
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
    chex.assert_trees_all_close(got, expected, rtol=1e-7, atol=3e-6)


def test_a_query_that_may_look_at_nothing_gets_the_mean():
    q, k, v = inputs()
    got = jax.jit(attend)(q, k, v, np.zeros((1, 1, N, M), bool))
    mean = np.broadcast_to(np.mean(v, axis=1, keepdims=True), got.shape)
    np.testing.assert_allclose(got, mean, atol=1e-6)


def test_what_is_not_looked_at_has_no_gradient():
    mask = np.ones((1, 1, N, M), bool)
    mask[:, :, 0], mask[..., -1] = False, False

    def loss(q, k, v):
        return jnp.sum(jnp.sin(attend(q, k, v, mask)))

    dq, dk, _ = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*inputs())
    np.testing.assert_array_equal(dq[:, 0], 0)
    np.testing.assert_array_equal(dk[:, -1], 0)
    assert np.all(np.any(dq[:, 1:] != 0, axis=-1))


def test_masked_logits_may_be_infinite():
    q, k, v = inputs()
    k = k.at[:, -1].set(jnp.inf)
    mask = np.arange(M)[None, None, None] < M - 1
    assert np.isfinite(jax.jit(attend)(q, k, v, mask)).all()


def test_large_logits_neither_overflow_nor_vanish():
    q, k, v = inputs()
    got = jax.jit(attend)(1e4 * q, 1e4 * k, v)
    winner = np.argmax(np.einsum("bnhd,bmhd->bhnm", q, k), axis=-1)  # [B, H, N]
    expected = np.asarray(v)[np.arange(B)[:, None, None], winner, np.arange(H)[:, None]]
    np.testing.assert_allclose(got, expected.transpose(0, 2, 1, 3), rtol=1e-6)


def test_bfloat16_is_as_near_as_its_own_rounding():
    keys = jax.random.split(jax.random.key(1), 3)
    q, k, v = (jax.random.normal(key, (2, 64, 3, 32), jnp.bfloat16) for key in keys)
    got = jax.jit(attend)(q, k, v)
    assert got.dtype == jnp.bfloat16
    exact = jax.jit(attend)(*(x.astype(jnp.float32) for x in (q, k, v)))
    error = np.sqrt(np.mean((np.float32(got) - exact) ** 2))
    theirs = np.float32(jax.jit(jax.nn.dot_product_attention)(q, k, v))
    assert error < 1.2 * np.sqrt(np.mean((theirs - exact) ** 2))

"""Products of rounded factors: what is rounded, and what their gradients are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax.layers import products

SIZES = (5, 7), (7, 3)


@pytest.fixture
def factors():
    keys = jax.random.split(jax.random.key(0))
    return [jax.random.normal(k, s) for k, s in zip(keys, SIZES, strict=True)]


def rounded(x):
    return np.asarray(x.astype(jnp.bfloat16), np.float64)


def test_factors_are_rounded_and_sums_are_not(factors):
    x, w = factors
    expected = rounded(x) @ rounded(w)
    got = jax.jit(products.product)(x, w)
    assert got.dtype == jnp.float32
    # Sums in bfloat16 would be off by 1e-2.
    np.testing.assert_allclose(got, expected, atol=2e-6)
    assert np.abs(got - x @ w).max() > 1e-4  # rounding is there


def test_gradients_are_products_of_rounded_factors(factors):
    x, w = factors
    g = jax.random.normal(jax.random.key(1), (5, 3))
    _, pull = jax.vjp(products.product, x, w)
    to_x, to_w = jax.jit(pull)(g)
    np.testing.assert_allclose(to_x, rounded(g) @ rounded(w).T, atol=4e-6)
    np.testing.assert_allclose(to_w, rounded(x).T @ rounded(g), atol=4e-6)


def test_results_have_the_dtype_of_the_factors(factors):
    x, w = (a.astype(jnp.bfloat16) for a in factors)
    got, pull = jax.vjp(products.matmul, x, w)
    assert [a.dtype for a in (got, *pull(got))] == ["bfloat16"] * 3
    # Rounded once, after the sum.
    once = jnp.asarray(rounded(x) @ rounded(w), jnp.bfloat16)
    np.testing.assert_allclose(rounded(got), rounded(once), rtol=2**-7)
    text = str(jax.make_jaxpr(products.matmul)(x, w))
    assert "preferred_element_type=float32" in text
    wide = products.matmul(*factors)
    np.testing.assert_array_equal(wide, factors[0] @ factors[1])


def test_a_gradient_for_each_example(factors):
    x, w = factors
    g = jax.random.normal(jax.random.key(1), (5, 3))

    def one(x, g):
        return jax.vjp(lambda w: products.product(x[None], w), w)[1](g[None])[0]

    each = jax.jit(jax.vmap(one))(x, g)
    expected = np.einsum("ni,nj->nij", rounded(x), rounded(g))
    np.testing.assert_allclose(each, expected, rtol=1e-6)
    sums = jax.jit(jax.vmap(products.product, (0, None)))(x[:, None], w)
    np.testing.assert_allclose(sums[:, 0], rounded(x) @ rounded(w), atol=2e-6)


def test_whole_numbers_lose_nothing():
    x = jnp.arange(15.0).reshape(5, 3)
    w = jnp.arange(12.0).reshape(3, 4) - 6
    np.testing.assert_array_equal(jax.jit(products.product)(x, w), x @ w)


def test_what_dense_takes(factors):
    x, w = factors
    dense = (((1,), (0,)), ((), ()))
    same = products.dot_general("float32")(x, w, dense)
    np.testing.assert_array_equal(same, jax.lax.dot_general(x, w, dense))
    got = products.dot_general("bfloat16")(x, w, dense, precision=None)
    np.testing.assert_array_equal(got, products.product(x, w))


def test_others_are_refused(factors):
    x, w = factors
    with pytest.raises(ValueError, match="products: got 'bf16', expected one of"):
        products.dot_general("bf16")
    dot = products.dot_general("bfloat16")
    with pytest.raises(ValueError, match=r"got float32 \(5, 7\), float32 \(3, 7\)"):
        dot(x, w.T, (((1,), (1,)), ((), ())))
    with pytest.raises(ValueError, match="got float16"):
        dot(x.astype(jnp.float16), w, products.DENSE)

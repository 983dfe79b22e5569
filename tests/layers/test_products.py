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


def test_results_have_the_dtype_of_the_factors():
    keys = jax.random.split(jax.random.key(2))
    x, w = (
        jax.random.normal(k, shape, jnp.bfloat16)
        for k, shape in zip(keys, [(5, 512), (512, 3)], strict=True)
    )
    got, pull = jax.vjp(products.matmul, x, w)
    assert [a.dtype for a in (got, *pull(got))] == ["bfloat16"] * 3
    # Rounded once, after the sum: sums in bfloat16 are off by several of its units.
    exact = rounded(x) @ rounded(w)
    error = np.abs(rounded(got) - exact)
    assert np.all(error <= 2.0**-8 * np.abs(exact) + 1e-5)
    wide = products.matmul(x, w, jnp.float32)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, exact, atol=1e-4)
    for function, args in ((products.matmul, (x, w)), (pull, (got,))):
        text = str(jax.make_jaxpr(function)(*args))
        dots = text.count("dot_general")
        assert dots == text.count("preferred_element_type=float32") > 0


def test_float32_is_multiplied_as_it_is(factors):
    x, w = factors
    np.testing.assert_array_equal(products.matmul(x, w), x @ w)


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


@pytest.mark.parametrize("rows", [64, 65])
def test_transposed_results_and_gradients_run(rows):
    keys = jax.random.split(jax.random.key(3), 3)
    shapes = (rows, 96), (96, 32), (rows, 32)
    x, w, g = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))

    def all_transposed(x, w, g):
        y, pull = jax.vjp(products.product, x, w)
        return [a.T for a in (y, *pull(g))]

    got = jax.jit(all_transposed)(x, w, g)
    expected = (
        rounded(x) @ rounded(w),
        rounded(g) @ rounded(w).T,
        rounded(x).T @ rounded(g),
    )
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a.T, b, atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (0, 3), (1, 4)])
def test_transposed_is_the_transpose(shape):
    x = jax.random.normal(jax.random.key(4), shape)
    np.testing.assert_array_equal(products.transposed(x), x.T)


def test_what_is_not_finite_stays():
    x = jnp.array([[jnp.inf, 1.0], [jnp.nan, 1.0], [-jnp.inf, 1.0]])
    got = jax.jit(products.product)(x, jnp.ones((2, 1)))[:, 0]
    np.testing.assert_array_equal(got, [jnp.inf, jnp.nan, -jnp.inf])


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
    with pytest.raises(ValueError, match=r"expected .*N, K.* @ .*K, M"):
        dot(x, w.T, (((1,), (1,)), ((), ())))
    for a, b in ((x, w.T), (x.astype(jnp.float16), w), (x[None], w)):
        with pytest.raises(ValueError, match=r"expected .*both float32 or both bf"):
            products.product(a, b)

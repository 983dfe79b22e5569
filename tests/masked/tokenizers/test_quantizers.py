import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multitask_jax.masked.tokenizers import quantizers
from multitask_jax.masked.tokenizers.quantizers import Codebook

# Few: each is a program of its own.
LEVELS = st.sampled_from([(2,), (3, 2), (8, 5, 5, 5), (7, 5, 5, 5, 5), (4, 9, 2)])


def _codebook(codes, counts):
    """A codebook whose sums are what its counts of its own codes give."""
    codes = jnp.asarray(codes, jnp.float32)
    counts = jnp.asarray(counts, jnp.float32)
    return Codebook(codes, counts, counts[:, None] * codes)


@functools.partial(jax.jit, static_argnums=1)
def _fsq_and_back(z, levels):
    out = quantizers.fsq(z, levels)
    return out, quantizers.fsq_values(out.codes, levels)


@given(LEVELS)
def test_every_fsq_code_survives_its_values(levels):
    size = int(np.prod(levels))
    codes = jnp.arange(size, dtype=jnp.int32)
    values = jax.jit(quantizers.fsq_values, static_argnums=1)(codes, levels)
    half = np.array([n // 2 for n in levels])
    digits = np.asarray(values) * half + half
    radix = np.concatenate([[1], np.cumprod(levels)[:-1]])
    np.testing.assert_allclose(digits @ radix, codes, atol=1e-3)
    assert len(np.unique(digits.round(), axis=0)) == size


@given(LEVELS, st.integers(0, 9))
def test_fsq_values_are_those_of_its_codes_and_all_levels_are_reached(levels, seed):
    z = np.random.default_rng(seed).normal(0, 4, (50, len(levels)))
    z[0], z[1] = -99, 99  # the ends
    out, again = _fsq_and_back(jnp.asarray(z, jnp.float32), levels)
    np.testing.assert_array_equal(out.values, again)
    np.testing.assert_array_equal(out.codes[:2], [0, np.prod(levels) - 1])
    assert 0 <= int(out.codes.min()) <= int(out.codes.max()) < np.prod(levels)


def test_fsq_of_zero_is_zero():
    np.testing.assert_array_equal(
        quantizers.fsq(jnp.zeros((1, 4)), (8, 5, 2, 3)).values, np.zeros((1, 4))
    )


def test_fsq_refuses_another_width_and_levels_without_choice():
    with pytest.raises(ValueError, match=r"expected a last axis of 2"):
        quantizers.fsq(jnp.zeros((5, 3)), (8, 5))
    with pytest.raises(ValueError, match=r"levels: got \(8, 1\)"):
        quantizers.check_levels((8, 1))


def test_the_most_levels_are_all_of_the_vocabulary():
    """Of more, the highest would round to one beyond it."""
    for count in (999, 1000):
        quantizers.check_levels((count,))
        codes = quantizers.fsq(jnp.array([[-99.0], [99.0]]), (count,)).codes
        np.testing.assert_array_equal(codes, [0, count - 1])
    with pytest.raises(ValueError, match=r"levels: got \(8, 1001\), .* 2 to 1000"):
        quantizers.check_levels((8, 1001))


def test_the_gradient_passes_the_rounding_unchanged():
    """d loss / d encoding = d loss / d decoder's input, and the value is exact."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, q, w = (jax.random.normal(k, (6, 4)) for k in keys)

    def loss(x, q):
        return jnp.sum(w * jnp.tanh(quantizers.straight_through(x, q)))

    gx, gq = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, q)
    np.testing.assert_allclose(gx, w * (1 - jnp.tanh(q) ** 2), rtol=1e-5)
    np.testing.assert_array_equal(gq, np.zeros_like(q))
    np.testing.assert_array_equal(quantizers.straight_through(x, q), q)


@pytest.mark.parametrize("kind", ["vq", "fsq"])
def test_the_encoder_gets_the_decoders_gradient(kind):
    """Through the quantiser it is that of what comes before the rounding alone."""
    keys = jax.random.split(jax.random.key(1), 3)
    z, w = (jax.random.normal(k, (7, 4)) for k in keys[:2])
    codebook = quantizers.init_codebook(keys[2], 16, 4)
    levels = (5, 5, 7, 3)

    def decoded(z):
        if kind == "vq":
            return jnp.sum(w * quantizers.vq(codebook, z).values)
        return jnp.sum(w * quantizers.fsq(z, levels).values)

    def smooth(z):
        if kind == "vq":
            return jnp.sum(w * quantizers.normalize(z))
        half = jnp.array([(n - 1) * (1 + 1e-3) / 2 for n in levels])[None]
        whole = jnp.array([n // 2 for n in levels])[None]
        return jnp.sum(w * half * jnp.tanh(z) / whole)

    found, expected = jax.jit(lambda z: (jax.grad(decoded)(z), jax.grad(smooth)(z)))(z)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_vq_looks_up_the_highest_cosine_whatever_the_length():
    codebook = _codebook([[1, 0], [0, 1], [-1, 0]], [1, 1, 1])
    z = jnp.array([[5.0, 0.1], [0.01, 0.03], [-0.2, 0.1]])
    out = jax.jit(quantizers.vq)(codebook, z)
    np.testing.assert_array_equal(out.codes, [0, 1, 2])
    np.testing.assert_array_equal(out.values, codebook.codes)
    longer = jax.jit(quantizers.vq)(codebook, 7 * z)
    np.testing.assert_allclose(out.loss, longer.loss, rtol=1e-5)


def test_commitment_is_zero_on_the_codes_and_its_gradient_pulls_towards_them():
    codebook = _codebook([[1, 0], [0, 1]], [1, 1])
    assert quantizers.vq(codebook, 3 * codebook.codes).loss == 0
    z = jnp.array([[1.0, 0.5]])
    down = z - 0.1 * jax.grad(lambda z: quantizers.vq(codebook, z).loss)(z)
    assert quantizers.vq(codebook, down).loss < quantizers.vq(codebook, z).loss


def test_moving_averages_of_known_counts():
    codebook = _codebook([[1, 0], [0, 1]], [10, 20])
    z = jnp.array([[2.0, 0.0], [0.6, 0.8], [0.0, 4.0], [0.0, 1.0]])
    codes = jnp.array([0, 0, 1, 1])
    update = jax.jit(functools.partial(quantizers.ema_update, decay=0.9))
    new = update(codebook, z, codes, jax.random.key(0))
    np.testing.assert_allclose(new.counts, [9 + 0.2, 18 + 0.2], rtol=1e-6)
    # Encodings count by their directions: (1, 0) + (.6, .8) for the first code.
    sums = np.array([[9 + 0.1 * 1.6, 0.08], [0, 18 + 0.2]])
    np.testing.assert_allclose(new.sums, sums, rtol=1e-6)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    np.testing.assert_allclose(new.codes, sums / lengths, rtol=1e-6)


def test_dead_codes_become_encodings_of_the_batch_and_living_ones_stay():
    rng = np.random.default_rng(0)
    codes, z = (
        x / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (rng.standard_normal((8, 3)), rng.standard_normal((40, 3)))
    )
    codebook = _codebook(codes, [50, 0, 50, 0, 0, 50, 1e-3, 50])
    alive, dead = [0, 2, 5, 7], [1, 3, 4, 6]
    new = jax.jit(quantizers.ema_update)(
        codebook, jnp.asarray(z, jnp.float32), jnp.array(alive * 10), jax.random.key(2)
    )
    found = np.asarray(new.codes)
    gaps = np.abs(found[dead, None] - z[None]).max(axis=-1).min(axis=1)
    np.testing.assert_allclose(gaps, 0, atol=1e-6)
    np.testing.assert_allclose(np.asarray(new.counts)[dead], 0.1 * 40 / 8)
    assert len(np.unique(found.round(5), axis=0)) == 8
    np.testing.assert_allclose(found[alive], codes[alive], atol=0.1)


def test_a_new_codebook_is_encodings_after_one_update():
    z = jax.random.normal(jax.random.key(1), (2, 8, 4))

    def update():
        codebook = quantizers.init_codebook(jax.random.key(0), 16, 4)
        out = quantizers.vq(codebook, z)
        # As if all had chosen code 0, which becomes their mean: it is not dead.
        new = quantizers.ema_update(
            codebook, z, jnp.zeros_like(out.codes), jax.random.key(2)
        )
        return codebook.codes, out.loss, new, quantizers.vq(new, z).loss

    codes, before, new, after = jax.jit(update)()
    np.testing.assert_allclose(jnp.linalg.norm(codes, axis=1), 1, rtol=1e-5)
    z = np.asarray(z).reshape(16, 4)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    gaps = np.abs(np.asarray(new.codes)[1:, None] - z[None]).max(axis=-1).min(axis=1)
    np.testing.assert_allclose(gaps, 0, atol=1e-6)
    assert after < before / 2


@jax.jit
def _frequencies(codes):
    counts = quantizers.code_counts(codes, 24)
    return quantizers.perplexity(counts), quantizers.used_share(counts)


@given(st.integers(1, 20))
def test_perplexity_and_use_of_equally_frequent_codes(used):
    codes = np.resize(np.arange(used), 20 * 19 * 18)
    perplexity, share = _frequencies(codes)
    np.testing.assert_allclose(perplexity, used, rtol=1e-4)
    np.testing.assert_allclose(share, used / 24, rtol=1e-6)

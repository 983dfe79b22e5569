import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from multitask_jax.evaluation import pictures

SSIM = jax.jit(pictures.ssim)


def picture(seed: int, size: tuple[int, ...] = (20, 17, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def ssim_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """Equation 13 of Wang et al. 2004, window by window, in float64."""
    i = np.arange(11) - 5
    w = np.exp(-(i[:, None] ** 2 + i[None] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    out = []
    for colour in range(x.shape[2]):
        for row in range(x.shape[0] - 10):
            for column in range(x.shape[1] - 10):
                place = np.s_[row : row + 11, column : column + 11, colour]
                a, b = x[place].astype(float), y[place].astype(float)
                ma, mb = (w * a).sum(), (w * b).sum()
                va, vb = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum()
                cov = (w * (a - ma) * (b - mb)).sum()
                out.append(
                    (2 * ma * mb + c1)
                    * (2 * cov + c2)
                    / ((ma**2 + mb**2 + c1) * (va + vb + c2))
                )
    return float(np.mean(out))


@pytest.mark.parametrize("noise", [0, 3, 40])
def test_ssim_is_the_equation(noise):
    y = np.clip(np.cumsum(picture(1) % 5, axis=1) * 8, 0, 255).astype(np.uint8)
    x = np.clip(y + noise * np.sin(np.arange(y.size)).reshape(y.shape), 0, 255)
    x = x.astype(np.uint8)
    np.testing.assert_allclose(SSIM(x, y), ssim_by_loops(x, y), atol=2e-5)


@given(st.integers(0, 1000))
def test_ssim_is_symmetric_and_at_most_one(seed):
    x, y = picture(seed), picture(seed + 1)
    np.testing.assert_allclose(SSIM(x, y), SSIM(y, x), atol=1e-6)
    np.testing.assert_allclose(SSIM(x, x), 1, atol=1e-6)
    assert SSIM(x, y) < 0.2


def test_ssim_by_peak():
    x, y = picture(2), picture(3)
    scaled = jax.jit(lambda a, b: pictures.ssim(a, b, peak=1.0))
    np.testing.assert_allclose(scaled(x / 255.0, y / 255.0), SSIM(x, y), atol=1e-5)


def test_psnr_of_a_known_error():
    y = picture(4) // 2
    np.testing.assert_allclose(
        pictures.psnr(y + np.uint8(16), y), 20 * np.log10(255 / 16), rtol=1e-5
    )
    np.testing.assert_allclose(pictures.psnr(y, y ^ np.uint8(1)), 48.13, rtol=1e-3)
    assert pictures.psnr(y, y) == np.inf


def test_depth_errors_of_known_depths():
    truth = jnp.array([1.0, 2.0, 4.0, jnp.nan, 0.0, jnp.inf])
    estimate = jnp.array([1.1, 2.0, 2.0, 5.0, jnp.nan, 1.0])
    found = jax.jit(pictures.depth_errors)(estimate, truth)
    np.testing.assert_allclose(found.abs_rel, (0.1 + 0 + 0.5) / 3, rtol=1e-5)
    np.testing.assert_allclose(found.delta, 2 / 3, rtol=1e-6)


@pytest.mark.parametrize(("ratio", "delta"), [(1.2, 1), (1.3, 0), (0.82, 1), (0.78, 0)])
def test_delta_is_symmetric_in_the_ratio(ratio, delta):
    truth = jnp.linspace(0.5, 30, 12).reshape(3, 4)
    found = pictures.depth_errors(ratio * truth, truth)
    assert found.delta == delta
    np.testing.assert_allclose(found.abs_rel, abs(ratio - 1), rtol=1e-5)


def test_an_unknown_estimate_is_a_miss():
    truth = jnp.ones(4)
    found = pictures.depth_errors(truth.at[0].set(jnp.nan), truth)
    assert jnp.isnan(found.abs_rel)
    assert found.delta == 0.75
    nothing = pictures.depth_errors(truth, truth * jnp.nan)
    assert jnp.isnan(nothing.abs_rel)
    assert jnp.isnan(nothing.delta)


@given(st.integers(0, 1000), st.integers(2, 9))
def test_frechet_distance_is_that_of_the_matrix_root(seed, width):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(40, width)) @ rng.normal(size=(width, width))
    b = rng.normal(size=(30, width)) + rng.normal(size=width)
    ca, cb = (np.atleast_2d(np.cov(x.T)) for x in (a, b))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(
        ca + cb - 2 * scipy.linalg.sqrtm(ca @ cb).real
    )
    np.testing.assert_allclose(pictures.frechet_distance(a, b), expected, rtol=1e-6)


@given(st.integers(0, 1000))
def test_frechet_distance_where_features_outnumber_samples(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(6, 20)), rng.normal(size=(9, 20))
    turn = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    found = pictures.frechet_distance(a, b)
    assert pictures.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert pictures.frechet_distance(a, a + 2) == pytest.approx(80)
    assert found == pytest.approx(pictures.frechet_distance(b, a))
    assert found == pytest.approx(pictures.frechet_distance(a @ turn, b @ turn))


def test_frechet_distance_of_two_lines():
    """N(0, s^2) and N(m, r^2): m^2 + (s - r)^2."""
    x = np.array([[-1.0], [1.0]]) / 2**0.5  # of variance 1
    assert pictures.frechet_distance(2 * x, 5 * x + 3) == pytest.approx(9 + 9)


def test_errors_say_what_is_wrong():
    x = picture(5)
    with pytest.raises(ValueError, match=r"got shapes \[20, 17, 3\] and \[20, 17, 1\]"):
        pictures.psnr(x, x[..., :1])
    with pytest.raises(ValueError, match=r"got pictures \[10, 17, 3\], expected"):
        pictures.ssim(x[:10], x[:10])
    with pytest.raises(ValueError, match=r"got features \[1, 3\] and \[9, 3\]"):
        pictures.frechet_distance(np.ones((1, 3)), np.ones((9, 3)))
    with pytest.raises(ValueError, match="NaN or infinity"):
        pictures.frechet_distance(np.full((2, 3), np.nan), np.ones((9, 3)))

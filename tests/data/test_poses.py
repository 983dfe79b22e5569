import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from multitask_jax.data import poses


def path(seed: int, samples: int = 7, reach: float = 5.0) -> np.ndarray:
    """Random rigid motions [S, 4, 4] in float64."""
    rng = np.random.default_rng(seed)
    x = np.tile(np.eye(4), (samples, 1, 1))
    x[:, :3, :3] = Rotation.random(samples, rng=rng).as_matrix()
    x[:, :3, 3] = reach * rng.normal(size=(samples, 3))
    return x


@given(st.integers(0, 1000))
def test_nine_numbers_and_back(seed):
    x = path(seed)
    v = poses.to_vector(x)
    assert v.shape == (7, 9)
    np.testing.assert_array_equal(v[:, :3], x[:, :3, 0])
    np.testing.assert_array_equal(v[:, 3:6], x[:, :3, 1])
    np.testing.assert_array_equal(v[:, 6:], x[:, :3, 3])
    np.testing.assert_allclose(poses.from_vector(v), x, atol=1e-12)


@given(st.integers(0, 1000))
def test_relative_starts_at_the_identity_and_forgets_the_world(seed):
    x, world = path(seed), path(seed + 1, 1)
    found = poses.relative(x)
    np.testing.assert_allclose(found[0], np.eye(4), atol=1e-12)
    np.testing.assert_allclose(poses.relative(world @ x), found, atol=1e-9)
    np.testing.assert_allclose(x[0] @ found, x, atol=1e-9)
    np.testing.assert_allclose(poses.relative(found), found, atol=1e-12)


def test_inverse():
    x = path(3)
    np.testing.assert_allclose(
        poses.invert(x) @ x, np.tile(np.eye(4), (7, 1, 1)), atol=1e-12
    )


def test_columns_of_any_length_and_angle_give_the_nearest_frame():
    x = path(4)
    v = poses.to_vector(x)
    v[:, 3:6] = 1e-3 * (v[:, 3:6] + 3 * v[:, :3])  # shorter, and leaning on the first
    v[:, :3] *= 1e20
    np.testing.assert_allclose(poses.from_vector(v), x, atol=1e-12)


DEGENERATE = {
    "zero": [0] * 9,
    "parallel": [1, 2, 3, 2, 4, 6, 0, 0, 0],
    "opposite": [0, 0, 1, 0, 0, -1, 0, 0, 0],
    "first is zero": [0, 0, 0, 1, 0, 0, 0, 0, 0],
    "second is zero": [0, 1, 0, 0, 0, 0, 0, 0, 0],
    "nearly parallel": [1, 1, 1, 1, 1, 1.000001, 0, 0, 0],
    "huge": [1e30, -1e30, 1e30, 3e38, 0, 1, 0, 0, 0],
    "tiny": [1e-30, 0, 0, 0, 1e-30, 1e-30, 0, 0, 0],
}


@jax.jit
def both(v):
    """Poses, and the gradient of a sum of them."""
    weights = jnp.arange(16.0).reshape(1, 4, 4)
    return poses.from_vector(v), jax.grad(
        lambda u: (weights * poses.from_vector(u)).sum()
    )(v)


def test_any_nine_finite_numbers_are_a_rigid_motion():
    found, gradient = both(jnp.array(list(DEGENERATE.values()), jnp.float32))
    assert found.dtype == jnp.float32
    poses.check(np.asarray(found), tolerance=1e-5)
    ordinary = [name not in ("huge", "tiny") for name in DEGENERATE]
    assert np.isfinite(gradient[np.array(ordinary)]).all()


def test_jax_as_numpy_under_vmap():
    x = np.stack([path(5), path(6)]).astype(np.float32)

    @jax.jit
    def there_and_back(x):
        own = jax.vmap(poses.relative)(x)
        return own, poses.from_vector(poses.to_vector(own))

    own, back = there_and_back(x)
    assert isinstance(own, jax.Array)
    assert isinstance(poses.relative(x), np.ndarray)
    np.testing.assert_allclose(own, poses.relative(x), atol=2e-5)
    np.testing.assert_allclose(back, own, atol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda x: x.__setitem__((2, 0, 3), np.nan), "finite"),
        (lambda x: x.__setitem__((2, 3), [0, 0, 0, 2]), "last row"),
        (lambda x: x.__imul__(np.array([2, 2, 2, 1])), "orthonormal"),
        (lambda x: x[2, :3, :3].__imul__([1, 1, -1]), "determinant"),
    ],
)
def test_check_names_the_first_bad_pose(spoil, expected):
    x = path(7)
    poses.check(x)
    poses.check(x.astype(np.float16))
    spoil(x)
    with pytest.raises(ValueError, match=expected) as e:
        poses.check(x[None], "camera.npz")
    first = 0 if expected == "orthonormal" else 2
    assert f"camera.npz[0, {first}]: got [[" in str(e.value)


def test_check_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"got float64\[7, 3, 4\], expected floats"):
        poses.check(path(8)[:, :3])


def test_products_are_precise_on_all_devices():
    """TPUs round the factors of float32 unless they are told not to."""
    said = str(jax.make_jaxpr(poses.relative)(jnp.eye(4)[None]))
    assert said.count("dot_general") == said.count("Precision.HIGHEST") / 2 > 0

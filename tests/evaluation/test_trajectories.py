import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from multitask_jax.evaluation import trajectories


def walk(seed: int, samples: int = 16) -> np.ndarray:
    """A random walk [S, 4, 4], float32, that turns as it goes."""
    rng = np.random.default_rng(seed)
    x = np.tile(np.eye(4), (samples, 1, 1))
    x[:, :3, :3] = Rotation.from_rotvec(
        np.cumsum(0.1 * rng.normal(size=(samples, 3)), axis=0)
    ).as_matrix()
    x[:, :3, 3] = np.cumsum(0.3 * rng.normal(size=(samples, 3)), axis=0)
    return x.astype(np.float32)


def motion(seed: int) -> np.ndarray:
    """One rigid motion [1, 4, 4]."""
    rng = np.random.default_rng(seed)
    x = np.eye(4)
    x[:3, :3] = Rotation.random(rng=rng).as_matrix()
    x[:3, 3] = rng.normal(size=3)
    return x[None].astype(np.float32)


def yaw(degrees: np.ndarray) -> np.ndarray:
    """Turns about y [..., 4, 4]."""
    x = np.tile(np.eye(4), (*np.shape(degrees), 1, 1))
    x[..., :3, :3] = Rotation.from_euler(
        "y", np.reshape(degrees, (-1, 1)), degrees=True
    ).as_matrix()
    return x.astype(np.float32)


@jax.jit
def measures(estimate, truth):
    return (
        trajectories.ate(estimate, truth),
        trajectories.ate(estimate, truth, alignment="none"),
        trajectories.relative_errors(estimate, truth, stride=4),
    )


@given(st.integers(0, 1000))
def test_rigid_motions_of_the_world_do_not_count(seed):
    truth = walk(seed)
    aligned, plain, relative = measures(motion(seed + 1) @ truth, truth)
    np.testing.assert_allclose(aligned, 0, atol=1e-5)
    assert plain > 0.1
    np.testing.assert_allclose(relative.rte, 0, atol=1e-5)
    np.testing.assert_allclose(relative.rre, 0, atol=1e-3)


@given(st.integers(0, 1000))
def test_alignment_is_the_best_one(seed):
    """No rigid motion of SciPy's, nor none at all, brings the points nearer."""
    a, b = walk(seed), walk(seed + 1)
    found, plain, _ = measures(a, b)
    x, y = (z[:, :3, 3] - z[:, :3, 3].mean(0) for z in (a, b))
    best = Rotation.align_vectors(y, x)[1] / len(x) ** 0.5
    np.testing.assert_allclose(found, best, rtol=1e-4, atol=1e-5)
    assert found <= plain + 1e-5


def test_a_mirrored_path_is_not_aligned_away():
    truth = walk(3)
    mirrored = truth.copy()
    mirrored[:, 0, 3] *= -1
    assert measures(mirrored, truth)[0] > 0.05


def test_a_known_offset():
    truth = walk(4)
    moved = truth.copy()
    moved[:, :3, 3] += [3, 0, 4]
    aligned, plain, _ = measures(moved, truth)
    np.testing.assert_allclose(plain, 5, rtol=1e-5)
    np.testing.assert_allclose(aligned, 0, atol=1e-5)


def test_paths_without_extent_are_finite():
    still = np.tile(np.eye(4, dtype=np.float32), (16, 1, 1))
    line = still.copy()
    line[:, 2, 3] = np.arange(16)
    np.testing.assert_allclose(measures(still, still)[0], 0, atol=1e-6)
    np.testing.assert_allclose(measures(line, line)[0], 0, atol=1e-5)
    np.testing.assert_allclose(
        measures(still, line)[0], np.std(np.arange(16)), rtol=1e-5
    )


def test_a_constant_error_of_yaw():
    """Half a degree a sample too much, standing still: 2 degrees a stride of 4."""
    samples = np.arange(16)
    truth, estimate = yaw(3.0 * samples), yaw(3.5 * samples)
    _, _, relative = measures(estimate, truth)
    np.testing.assert_allclose(relative.rre, 2, rtol=1e-4)
    np.testing.assert_allclose(relative.rte, 0, atol=1e-6)
    np.testing.assert_allclose(
        measures(yaw(180.0 * (samples // 4)), yaw(0.0 * samples))[2].rre, 180
    )


def test_a_walk_of_the_wrong_speed():
    """.25 m a sample instead of .2: .2 m a stride of 4 too far."""
    truth, estimate = (np.tile(np.eye(4, dtype=np.float32), (16, 1, 1)) for _ in "ab")
    truth[:, 2, 3], estimate[:, 2, 3] = 0.2 * np.arange(16), 0.25 * np.arange(16)
    _, _, relative = measures(estimate, truth)
    np.testing.assert_allclose(relative.rte, 0.2, rtol=1e-5)


def test_gaze_counts_valid_samples_only():
    truth = jnp.array([[0.5, 0.5], [jnp.nan, jnp.nan], [0.2, 0.4]])
    estimate = jnp.array([[0.6, 0.5], [jnp.nan, 9.0], [0.2, 0.1]])
    mse = jax.jit(trajectories.gaze_mse)
    np.testing.assert_allclose(mse(estimate, truth), (0.01 + 0.09) / 4, rtol=1e-5)
    assert jnp.isnan(mse(estimate, jnp.full((3, 2), jnp.nan)))
    assert jnp.isnan(mse(truth, estimate.at[1].set(0.5)))


def test_clips_are_vmapped():
    truth = np.stack([walk(5), walk(6)])
    estimate = np.stack([walk(7), walk(8)])
    found = jax.jit(jax.vmap(lambda a, b: measures(a, b)))(estimate, truth)
    alone = measures(estimate[1], truth[1])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x[1], y, rtol=1e-4), found, alone
    )


def test_errors_say_what_is_wrong():
    x = walk(9)
    with pytest.raises(ValueError, match=r"got shapes \[16, 4, 4\] and \[8, 4, 4\]"):
        trajectories.ate(x, x[:8])
    with pytest.raises(ValueError, match="got 'scale', expected rigid or none"):
        trajectories.ate(x, x, alignment="scale")
    with pytest.raises(ValueError, match="stride: got 16, expected 1 to 15"):
        trajectories.relative_errors(x, x, stride=16)
    with pytest.raises(ValueError, match=r"\[samples, 2\] of one clip"):
        trajectories.gaze_mse(x, x)

"""What singular-subspace methods promise, on matrices whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax import merging
from multitask_jax.merging import subspace
from tests.merging.common import merged


def deltas(method, taus):
    """The merged task vector of matrices."""
    base = np.zeros_like(taus[0])
    return np.asarray(merged(method, {"w": base}, [{"w": t} for t in taus])["w"])


def matrices(count, shape, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_iso_c_makes_directions_equally_strong(shape):
    taus = matrices(3, shape)
    u, s, vt = np.linalg.svd(sum(taus), full_matrices=False)
    out = deltas(merging.iso_c(), taus)
    np.testing.assert_allclose(out, s.mean() * u @ vt, atol=1e-4)
    np.testing.assert_allclose(np.linalg.svd(out)[1], s.mean(), rtol=1e-4)


@pytest.mark.parametrize("fraction", [0.0, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_iso_cts_has_all_directions_equally_strong(fraction, count):
    out = deltas(merging.iso_cts(common_fraction=fraction), matrices(count, (8, 11)))
    s = np.linalg.svd(out)[1]
    np.testing.assert_allclose(s, s[0], rtol=1e-4)


def test_iso_cts_of_common_directions_alone_is_iso_c():
    taus = matrices(3, (6, 9))
    np.testing.assert_allclose(
        deltas(merging.iso_cts(common_fraction=1.0), taus),
        deltas(merging.iso_c(), taus),
        atol=1e-5,
    )


def test_tsv_m_adds_tasks_that_do_not_meet():
    """Rank-2 tasks with orthogonal rows and columns come through whole."""
    rng = np.random.default_rng(1)
    u = np.linalg.qr(rng.standard_normal((8, 6)))[0]
    v = np.linalg.qr(rng.standard_normal((10, 6)))[0]
    taus = [(u[:, i : i + 2] * [3.0, 1.5 + i]) @ v[:, i : i + 2].T for i in (0, 2, 4)]
    taus = [t.astype(np.float32) for t in taus]
    np.testing.assert_allclose(deltas(merging.tsv_m(), taus), sum(taus), atol=1e-5)


def test_tsv_m_of_one_model_is_the_model():
    (tau,) = matrices(1, (5, 8))
    np.testing.assert_allclose(deltas(merging.tsv_m(), [tau]), tau, atol=1e-5)


@pytest.mark.parametrize("axis", ["last", "first"])
def test_knots_by_mean_is_the_mean(axis):
    """A change of basis does not change a linear merge."""
    taus = matrices(3, (6, 4))
    method = merging.knots(combine_by="mean", input_axis=axis)
    np.testing.assert_allclose(deltas(method, taus), sum(taus) / 3, atol=1e-5)


def test_knots_shares_the_output_space_of_either_layout():
    taus = matrices(3, (6, 4))
    torch = deltas(merging.knots(density=0.4), taus)
    flax = deltas(merging.knots(density=0.4, input_axis="first"), [t.T for t in taus])
    np.testing.assert_allclose(torch, flax.T, atol=1e-6)


def test_knots_takes_any_method():
    taus = matrices(2, (6, 4))
    inner = merging.chain(merging.max_magnitude())
    out = deltas(merging.chain(merging.align(inner)), taus)
    u, s, vt = np.linalg.svd(np.concatenate(taus, axis=1), full_matrices=False)
    a, b = np.split(vt, 2, axis=1)
    want = (u * s) @ np.where(np.abs(a) >= np.abs(b), a, b)
    np.testing.assert_allclose(out, want, atol=1e-5)


def test_knots_by_dare_ties_drops_in_the_shared_basis():
    taus = matrices(2, (6, 4))
    paths = ("w", "x")
    base = {p: np.zeros_like(taus[0]) for p in paths}
    models = [dict.fromkeys(paths, t) for t in taus]
    method = merging.knots(combine_by="dare_ties", density=0.5, seed=3)
    out = merged(method, base, models)
    u, s, vt = np.linalg.svd(np.concatenate(taus, axis=1), full_matrices=False)
    shared = [dict.fromkeys(paths, v) for v in np.split(vt, 2, axis=1)]
    inner = merging.dare_ties(density=0.5, seed=3)
    by_path = merged(inner, {p: np.zeros((6, 4), "f") for p in paths}, shared)
    for p in paths:
        np.testing.assert_allclose(out[p], (u * s) @ by_path[p], atol=1e-5)
    assert not np.allclose(out["w"], out["x"], atol=0.1)  # each leaf has its own masks


def interference(m, taus):
    return sum(np.sum(((m - t) @ t.T) ** 2) / np.sum(t**2) for t in taus)


def test_wudi_reaches_the_closed_form():
    """Where inputs do not span the space, (m - tau_i) A = 0 has a solution."""
    taus = matrices(2, (5, 4))
    out = deltas(merging.wudi(iterations=3000, learning_rate=1e-2), taus)
    grams = [t.T @ t / np.sum(t**2) for t in taus]
    want = sum(t @ g for t, g in zip(taus, grams, strict=True)) @ np.linalg.inv(
        sum(grams)
    )
    np.testing.assert_allclose(out, want, atol=1e-3)
    assert interference(out, taus) < interference(sum(taus), taus) / 2


def test_wudi_in_either_layout():
    taus = matrices(2, (5, 4))
    torch = deltas(merging.wudi(iterations=20, learning_rate=0.01), taus)
    method = merging.wudi(iterations=20, learning_rate=0.01, input_axis="first")
    np.testing.assert_allclose(torch, deltas(method, [t.T for t in taus]).T, atol=1e-6)


@pytest.mark.parametrize("name", ["iso_c", "iso_cts", "tsv_m", "knots", "wudi"])
def test_other_tensors_are_averaged(name):
    shapes = {"scalar": (), "vector": (5,), "conv": (2, 3, 4), "one": (1, 1)}
    base = {k: np.zeros(s, np.float32) for k, s in shapes.items()}
    models = [{k: x + 1 + t for k, x in base.items()} for t in range(3)]
    out = merged(merging.METHODS[name](), base, models)
    for k in ("scalar", "vector", "conv"):
        np.testing.assert_allclose(out[k], base[k] + 2, rtol=1e-6)
    assert np.isfinite(out["one"]).all()


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
@pytest.mark.parametrize("function", [subspace.polar_factor, lambda x: nuclear(x)])
def test_gradients_as_differences(shape, function):
    x, dx, c = (m.astype(np.float64) for m in matrices(3, shape, seed=2))
    with jax.enable_x64(True):
        f = lambda t: jnp.sum(jnp.sin(function(x + t * dx)) * c)  # noqa: E731
        slope = jax.grad(f)(0.0)
        near = (f(1e-6) - f(-1e-6)) / 2e-6
    np.testing.assert_allclose(slope, near, rtol=1e-6)


def nuclear(x):
    """Every part of an SVD, in a form that signs do not change."""
    u, s, vt = subspace.svd(x)
    return (u[:, :2] * s[None, :2] ** 1.5) @ vt[:2]


def test_errors():
    with pytest.raises(ValueError, match=r"common_fraction: got 1\.5"):
        merging.iso_cts(common_fraction=1.5)
    with pytest.raises(ValueError, match="input_axis: got 'x'"):
        merging.knots(input_axis="x")
    with pytest.raises(ValueError, match="knots: got a method on parameters"):
        merging.align(merging.linear())
    with pytest.raises(ValueError, match="iterations: got -1"):
        merging.wudi(iterations=-1)


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (3, 64), (2, 2)])
@pytest.mark.parametrize("name", ["iso_c", "iso_cts", "tsv_m", "knots"])
def test_more_tasks_than_directions(name, shape):
    """No matrix's change is lost."""
    for count in (2, 4, 5):
        taus = matrices(count, shape)
        out = deltas(merging.METHODS[name](), taus)
        assert np.isfinite(out).all()
        assert np.linalg.norm(out) > 0.1 * np.linalg.norm(sum(taus)) / count


def test_knots_keeps_small_changes():
    taus = matrices(3, (3, 64))
    large = deltas(merging.knots(density=0.5), taus)
    small = deltas(merging.knots(density=0.5), [t * np.float32(2**-20) for t in taus])
    np.testing.assert_allclose(small * 2**20, large, atol=1e-4)

"""Means and variances of dense layers' inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax import merging

D, H = 5, 3


def apply(params, x):
    return jnp.tanh(x["tokens"] @ params["first"]) @ params["second"]


def mask(x):
    return x["mask"].reshape(-1)


@pytest.fixture
def params():
    first = jax.random.normal(jax.random.key(0), (D, H))
    return {"first": first, "second": jnp.ones((H, 1))}


def expected(rows):
    mean = rows.mean(axis=0)
    return mean, np.sum((rows - mean) ** 2) / len(rows)


def batches_of(x, sizes):
    ends = np.cumsum(sizes)
    return [x[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def test_they_are_those_of_all_rows_whatever_the_batches(params):
    x = np.random.default_rng(0).normal(size=(12, 4, D)).astype(np.float32)
    x[6:] += 3  # batches differ
    for sizes in ((12,), (5, 5, 2)):
        batches = [{"tokens": b} for b in batches_of(x, sizes)]
        found = merging.input_moments(apply, params, batches)
        h = np.tanh(x @ np.asarray(params["first"]))
        for name, rows in (("first", x.reshape(-1, D)), ("second", h.reshape(-1, H))):
            for got, wanted in zip(found[name], expected(rows), strict=True):
                np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_small_variance_around_a_large_mean_keeps_its_digits(params):
    x = (1000 + 0.1 * np.random.default_rng(0).normal(size=(64, 4, D))).astype("f4")
    batches = [{"tokens": b} for b in batches_of(x, (40, 24))]
    found = merging.input_moments(apply, params, batches)["first"]
    mean, variance = expected(x.reshape(-1, D).astype(np.float64))
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(found.variance, variance, rtol=1e-3)


def test_padding_does_not_count(params):
    """Whatever stands there, and if a batch is nothing else."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(6, 4, D)).astype(np.float32)
    there = rng.random((6, 4)) < 0.5
    there[4:] = False
    x[~there] = 100
    batches = [{"tokens": x[i : i + 2], "mask": there[i : i + 2]} for i in (0, 2, 4)]
    found = merging.input_moments(apply, params, batches, rows=mask)["first"]
    for got, wanted in zip(found, expected(x[there]), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no rows, or weights that are all 0"):
        merging.input_moments(apply, params, batches[2:], rows=mask)
    with pytest.raises(ValueError, match=r"rows: got weights \[2\] for"):
        merging.input_moments(apply, params, batches, rows=lambda x: x["mask"][:, 0])


@pytest.mark.parametrize("way", ["twice", "shared in a scan", "stacked"])
def test_all_uses_of_a_weight_count(way):
    """Those of one weight together; stacked layers each."""
    x = 50 + np.random.default_rng(2).normal(size=(3, 7, D)).astype(np.float32)
    shape = (3, D, H) if way == "stacked" else (D, H)

    def uses(params, x):
        w = params["w"]
        if way == "twice":
            return [x[:, 0] @ w, x[:, 1] @ w, x[:, 2] @ w]
        steps = jnp.swapaxes(x, 0, 1)
        if way == "stacked":
            return jax.lax.scan(lambda c, xw: (c, xw[0] @ xw[1]), 0, (steps, w))[1]
        return jax.lax.scan(lambda c, x: (c, x @ w), 0, steps)[1]

    batches = [np.swapaxes(x, 0, 1)]  # examples first
    found = merging.input_moments(uses, {"w": jnp.ones(shape)}, batches)["w"]
    each = [expected(rows) for rows in x]
    mean, variance = (
        map(np.stack, zip(*each, strict=True))
        if way == "stacked"
        else expected(x.reshape(-1, D))
    )
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(found.variance, variance, rtol=1e-4)


def test_those_of_arrays_are_those_of_all_rows(tmp_path):
    """Of a model that is not in JAX; whatever the batches, and if one has no row."""
    rng = np.random.default_rng(3)
    x = (100 + rng.normal(size=(9, 4, D))).astype(np.float32)
    there = rng.random((9, 4)) < 0.7
    there[6:] = False
    batches = [{"up": x[i : i + 3][there[i : i + 3]]} for i in (0, 3, 6)]
    found = merging.moments_of_rows(b for b in batches)
    assert found.keys() == {"up"}
    mean, variance = expected(np.float64(x[there]))
    np.testing.assert_allclose(found["up"].mean, mean, rtol=1e-6)
    np.testing.assert_allclose(found["up"].variance, variance, rtol=1e-5)
    merging.save_moments(tmp_path / "moments.safetensors", found)
    loaded = merging.load_moments(tmp_path / "moments.safetensors")["up"]
    for got, wanted in zip(loaded, found["up"], strict=True):
        assert got.shape == wanted.shape
        np.testing.assert_array_equal(got, wanted)
    whole = merging.moments_of_rows([{"up": x}])["up"]  # leading axes are rows
    np.testing.assert_allclose(whole.mean, x.reshape(-1, D).mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "got no batches"),
        ({"up": np.ones((2, D))}, "got one batch"),
        ([{"up": np.ones((0, D))}], "up: got no rows"),
        ([{"up": np.full((2, D), np.nan)}], "expected finite inputs"),
        ([{"up": np.ones((2, D))}, {"up": np.ones((2, 3))}], "3 wide after some 5"),
    ],
)
def test_arrays_that_have_no_moments_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        merging.moments_of_rows(batches)

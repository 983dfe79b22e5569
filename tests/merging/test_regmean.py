"""RegMean is joint least squares; golden files; hard systems."""

import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax import merging
from multitask_jax.merging.fitted import regmean
from tests.merging.common import merged
from tests.merging.test_golden import cases

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("torch", [False, True])
def test_linear_models_are_merged_exactly(torch):
    """The solution of all tasks' regressions together, from their solutions alone."""
    inputs = [normal(30, 6), normal(30, 6) * [3, 1, 1, 1, 0.1, 1], normal(30, 6)]
    targets = [x @ normal(6, 4) + 0.1 * normal(30, 4) for x in inputs]
    models = [
        np.linalg.lstsq(x, y, rcond=None)[0].astype(np.float32)
        for x, y in zip(inputs, targets, strict=True)
    ]
    turn = (lambda w: w.T) if torch else (lambda w: w)
    apply = lambda p, x: x @ turn(p["w"])  # noqa: E731
    models = [{"w": turn(w)} for w in models]
    grams = [
        merging.gram_matrices(apply, m, [x[:16], x[16:]])
        for m, x in zip(models, inputs, strict=True)
    ]
    got = merged(merging.regmean(off_diagonal=1.0), models[0], models, statistics=grams)
    joint = np.linalg.lstsq(np.concatenate(inputs), np.concatenate(targets), rcond=None)
    np.testing.assert_allclose(turn(got["w"]), joint[0], rtol=1e-4, atol=1e-5)
    average = np.mean([turn(m["w"]) for m in models], axis=0)
    assert np.abs(average - joint[0]).max() > 0.1  # the average is no solution


def test_directions_that_no_input_has_are_averaged():
    models = [{"w": normal(5, 3)} for _ in range(2)]
    inputs = [normal(8, 5) * [1, 0, 1, 0, 1] for _ in range(2)]
    grams = [
        merging.gram_matrices(lambda p, x: x @ p["w"], m, [x.astype(np.float32)])
        for m, x in zip(models, inputs, strict=True)
    ]
    got = merged(
        merging.regmean(off_diagonal=1.0), models[0], models, statistics=grams
    )["w"]
    got = np.asarray(got)
    mean = (models[0]["w"] + models[1]["w"]) / 2
    np.testing.assert_allclose(got[[1, 3]], mean[[1, 3]], rtol=1e-6)
    assert np.abs(got[[0, 2, 4]] - mean[[0, 2, 4]]).max() > 0.05


def test_hard_systems_stay_finite_and_accurate():
    """Fewer rows than inputs, features of very different sizes, one direction huge."""
    n = 128
    x = normal(40, n) * np.logspace(-3, 3, n).astype(np.float32) + 100 * normal(40, 1)
    a = x.T @ x
    b = a @ normal(n, 4)
    got = regmean.solve(jnp.asarray(a), jnp.asarray(b))
    assert np.isfinite(got).all()
    d = 1 / np.sqrt(np.diag(a))[:, None]
    residual = d * (a.astype(np.float64) @ np.asarray(got, np.float64) - b)
    assert np.abs(residual).max() < 1e-3 * np.abs(d * b).max()


def test_two_contracted_axes_and_weights():
    models = [{"o": normal(2, 3, 4)} for _ in range(2)]
    apply = lambda p, x: jnp.einsum("bhw,hwo->bo", x, p["o"])  # noqa: E731
    xs = [normal(20, 2, 3) for _ in models]
    grams = [
        merging.gram_matrices(apply, m, [x]) for m, x in zip(models, xs, strict=True)
    ]
    got = merged(
        merging.regmean(), models[0], models, weights=(1.0, 0.5), statistics=grams
    )["o"]

    def damped(x):
        g = x.reshape(20, 6).T @ x.reshape(20, 6)
        return np.where(np.eye(6), g, 0.9 * g)

    gs = [w * damped(x) for w, x in zip((1.0, 0.5), xs, strict=True)]
    right = sum(g @ m["o"].reshape(6, 4) for g, m in zip(gs, models, strict=True))
    want = np.linalg.solve(sum(gs), right).reshape(2, 3, 4)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_the_first_where_weights_add_up_to_nothing():
    models = [{"w": normal(4, 3), "b": normal(3)} for _ in range(2)]
    x = normal(9, 4)
    grams = [{"w": merging.Gram(x.T @ x, (0,))}] * 2
    got = merged(
        merging.regmean(), models[0], models, weights=(1, -1), statistics=grams
    )
    np.testing.assert_array_equal(got["b"], models[0]["b"])
    np.testing.assert_array_equal(got["w"], models[0]["w"])


def test_golden(shared):
    for case, f in cases(shared, "regmean").items():
        p = f["params"]
        axis = 1 if p["weight_layout"] == "[out, in]" else 0
        models = [{k: v[t] for k, v in f["models"].items()} for t in range(3)]
        grams = [{"fc.weight": merging.Gram(g, (axis,))} for g in f["gram"]]
        got = merged(
            merging.regmean(off_diagonal=p["off_diagonal_ratio"]),
            models[0],
            models,
            statistics=grams,
        )
        for k, want in f["expected"].items():
            np.testing.assert_allclose(
                got[k], want, atol=1e-5, rtol=1e-5, err_msg=f"{case} {k}"
            )

"""Fisher information against closed forms, and the merge against known optima."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax import merging
from tests.merging.common import merged, stream
from tests.merging.test_golden import cases, check

RNG = np.random.default_rng(0)


def logits_of(params, inputs):
    return inputs @ params["w"] + params["b"][None]


@pytest.fixture
def softmax_regression():
    w = RNG.standard_normal((5, 3)).astype(np.float32)
    x = RNG.standard_normal((22, 5)).astype(np.float32)
    return {"w": w, "b": RNG.standard_normal(3).astype(np.float32)}, x


def split(*arrays, sizes=(8, 8, 6)):
    at = np.cumsum(sizes)[:-1]
    parts = list(zip(*(np.split(a, at) for a in arrays), strict=True))
    return [p[0] if len(p) == 1 else p for p in parts]


def test_expected_fisher_in_closed_form(softmax_regression):
    """d log p_y / d logits = e_y - p, so sum_y p_y (e_y - p)^2 = p (1 - p)."""
    params, x = softmax_regression
    got = merging.fisher_diagonal(logits_of, params, split(x))
    p = np.asarray(jax.nn.softmax(logits_of(params, x)))
    variance = p * (1 - p)
    np.testing.assert_allclose(got["b"], variance.mean(0), rtol=1e-5)
    np.testing.assert_allclose(got["w"], (x**2).T @ variance / len(x), rtol=1e-5)


def test_empirical_fisher_in_closed_form(softmax_regression):
    params, x = softmax_regression
    y = RNG.integers(0, 3, len(x))
    got = merging.fisher_diagonal(
        logits_of, params, split(x, y), labels="given", examples_at_once=3
    )
    p = np.asarray(jax.nn.softmax(logits_of(params, x)))
    square = (np.eye(3)[y] - p) ** 2
    np.testing.assert_allclose(got["b"], square.mean(0), rtol=1e-5)
    np.testing.assert_allclose(got["w"], (x**2).T @ square / len(x), rtol=1e-5)


@pytest.mark.parametrize("at_once", [1, 4, 5, 100])
def test_examples_at_once_and_batches_do_not_matter(softmax_regression, at_once):
    params, x = softmax_regression
    whole = merging.fisher_diagonal(logits_of, params, [x])
    parts = merging.fisher_diagonal(
        logits_of, params, split(x), examples_at_once=at_once
    )
    for k in params:
        np.testing.assert_allclose(parts[k], whole[k], rtol=1e-5)


def test_compiled_once_for_ragged_batches(softmax_regression):
    params, x = softmax_regression
    traces = []

    def counted(params, inputs):
        traces.append(inputs.shape)
        return logits_of(params, inputs)

    merging.fisher_diagonal(counted, params, split(x))
    assert traces == [(1, 5)]


def test_integer_leaves_and_pytree_inputs():
    params = {"w": np.ones((2, 3), np.float32), "steps": np.int32(7)}
    batch = {"a": np.ones((4, 2), np.float32), "b": np.ones((4, 2), np.float32)}
    got = merging.fisher_diagonal(
        lambda p, x: (x["a"] + x["b"]) @ p["w"], params, [batch]
    )
    np.testing.assert_allclose(got["w"], np.full((2, 3), 4 * 2 / 9), rtol=1e-5)
    assert got["steps"] == 0


def test_bad_inputs(softmax_regression):
    params, x = softmax_regression
    with pytest.raises(ValueError, match=r"logits \(1, 5, 3\).*expected"):
        merging.fisher_diagonal(
            lambda p, x: jnp.broadcast_to(logits_of(p, x)[:, None], (1, 5, 3)),
            params,
            [x],
        )
    with pytest.raises(ValueError, match="no batches"):
        merging.fisher_diagonal(logits_of, params, [])
    with pytest.raises(ValueError, match=r"batch of 6 .* after one of 4"):
        merging.fisher_diagonal(logits_of, params, [x[:4], x[4:10]])
    for label in (-1, 3):
        batch = (x, np.full(len(x), label))
        with pytest.raises(ValueError, match="a label is not one of its classes"):
            merging.fisher_diagonal(logits_of, params, [batch], labels="given")
    with pytest.raises(ValueError, match="labels: got 'true'"):
        merging.fisher_diagonal(logits_of, params, [x], labels="true")


def test_exact_for_quadratics_with_diagonal_hessians():
    """argmin_theta sum_t h_t (theta - theta_t)^2 = sum h theta_t / sum h."""
    models = RNG.standard_normal((3, 40)).astype(np.float32)
    hessians = RNG.random((3, 40)).astype(np.float32) + 0.1
    method = merging.fisher(normalise=False, fisher_floor=0.0)
    got = merged(method, models[0], list(models), statistics=list(hessians))

    def loss(theta):
        return jnp.sum(hessians * (theta[None] - models) ** 2)

    np.testing.assert_allclose(jax.grad(loss)(got), np.zeros(40), atol=1e-5)
    np.testing.assert_allclose(got, (hessians * models).sum(0) / hessians.sum(0), 1e-5)


def test_a_task_keeps_the_parameters_that_only_it_uses():
    x = np.eye(4, dtype=np.float32)
    models = [{"w": np.float32([[v, -v]] * 4)} for v in (1.0, 2.0)]
    batches = [[x[:2]], [x[2:]]]  # each task sees half of the inputs
    f = [
        merging.fisher_diagonal(lambda p, x: x @ p["w"], m, b)
        for m, b in zip(models, batches, strict=True)
    ]
    got = merged(merging.fisher(fisher_floor=0), models[0], models, statistics=f)
    np.testing.assert_allclose(got["w"][:2], models[0]["w"][:2], rtol=1e-6)
    np.testing.assert_allclose(got["w"][2:], models[1]["w"][2:], rtol=1e-6)


def test_a_model_without_any_information_does_not_count():
    models = [jnp.ones(3), 3 * jnp.ones(3)]
    method = merging.fisher(fisher_floor=0.0)
    some = merged(method, models[0], models, statistics=[jnp.zeros(3), jnp.ones(3)])
    np.testing.assert_allclose(some, models[1])
    none = merged(merging.fisher(), models[0], models, statistics=[jnp.zeros(3)] * 2)
    np.testing.assert_allclose(none, [2, 2, 2])


@pytest.mark.parametrize("small", [1e-25, 1e-15, 1e-5])
def test_norms_whose_squares_no_float32_holds(small, tmp_path):
    """Two models that differ in the scale of F alone weigh the same."""
    base = {"w": np.zeros(300, np.float32)}
    models = [{"w": np.full(300, v, np.float32)} for v in (1, 3)]
    one = RNG.random(300).astype(np.float32)
    f = [{"w": np.float32(small) * one}, {"w": np.float32(1e-2) * one}]
    method = merging.fisher(fisher_floor=0)
    got = merging.merge(method, base, models, statistics=f)
    np.testing.assert_allclose(got["w"], np.full(300, 2), rtol=1e-5)
    streamed = stream(tmp_path, method, base, models, statistics=f)
    np.testing.assert_array_equal(streamed["w"], got["w"])
    grown = [{"w": x["w"] * np.float32(1e24)} for x in f]  # squares beyond it
    got = merging.merge(method, base, models, statistics=grown)
    np.testing.assert_allclose(got["w"], np.full(300, 2), rtol=1e-5)


def test_the_first_where_weights_add_up_to_nothing():
    models = [jnp.ones(3), 3 * jnp.ones(3)]
    method = merging.fisher(normalise=False)
    f = [jnp.float32([1, 1, 2])] * 2
    got = merged(method, models[0], models, weights=(1, -1), statistics=f)
    np.testing.assert_array_equal(got, models[0])
    nothing = merging.fisher(normalise=False, fisher_floor=0)
    zeros = [jnp.float32([0, 0, 1]), jnp.float32([0, 0, 3])]
    got = merged(nothing, models[0], models, statistics=zeros)
    np.testing.assert_allclose(got, [1, 1, 2.5])


def test_options_and_labels(softmax_regression):
    params, x = softmax_regression
    y = RNG.integers(0, 3, len(x))

    def refused(message, batch, **options):
        with pytest.raises(ValueError, match=message):
            merging.fisher_diagonal(logits_of, params, batch, **options)

    for n in (0, -2):
        refused(f"examples_at_once: got {n}", [x], examples_at_once=n)
    given = {"labels": "given"}
    refused("is a ndarray, expected pairs", [x], **given)
    refused("is a tuple, expected pairs", [(x, y, y)], **given)
    refused("is a dict, expected pairs", [{"x": x, "y": y}], **given)
    refused(r"got int\d+ \(22, 1\), expected integers", [(x, y[:, None])], **given)
    refused(r"got float32 \(22, 3\).*argmax", [(x, np.eye(3, dtype="f")[y])], **given)
    refused(r"got float32 \(22,\)", [(x, y.astype("f"))], **given)
    refused(r"got one batch .*\(22, 5\)", x)
    refused("got one batch", {"x": x})


def test_golden(shared):
    for case, f in cases(shared, "fisher").items():
        p = f["params"]
        count = len(p["coefficients"])
        check(
            "fisher",
            case,
            merging.fisher(normalise=p["normalize"], fisher_floor=p["minimum"]),
            f,
            weights=p["coefficients"],
            statistics=[
                {k: v[t] for k, v in f["fisher"].items()} for t in range(count)
            ],
        )

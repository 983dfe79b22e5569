"""RegMean++ against its definition, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax import merging, tree

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def network(p, x):
    x = p["embed"][x]
    for i in range(2):
        b = p[f"block_{i}"]
        x = x * b["norm"][None]
        x = jnp.tanh(x @ b["up"] + b["bias"][None]) @ b["down"]
    return x @ p["head"]


def model():
    blocks = {
        f"block_{i}": {
            "norm": 1 + 0.1 * normal(5),
            "up": normal(5, 6),
            "bias": normal(6),
            "down": normal(6, 5),
        }
        for i in range(2)
    }
    return blocks | {"embed": normal(9, 5), "head": normal(5, 3)}


@pytest.fixture(scope="module")
def problem():
    models = [model(), model()]
    return models, [[RNG.integers(0, 9, 40), RNG.integers(0, 9, 24)] for _ in models]


def regression(inputs, weights, ratio):
    grams = [x.T.astype(np.float64) @ x for x in inputs]
    grams = [np.where(np.eye(len(g)), g, ratio * g) for g in grams]
    right = sum(g @ w for g, w in zip(grams, weights, strict=True))
    return np.linalg.solve(sum(grams), right)


@pytest.mark.parametrize("level", ["block", "leaf"])
def test_as_defined(problem, level):
    models, batches = problem
    got = merging.regmean_plus_plus(network, models, batches, level=level)
    got = jax.tree.map(np.asarray, got)
    tokens = [np.concatenate(b) for b in batches]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *models)
    for leaf in ("embed", "block_0/norm", "block_1/bias"):
        a, b = (tree.flatten(x)[leaf] for x in (got, mean))
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    xs = [mean["embed"][t] for t in tokens]  # through the merged embedding
    for name in ("block_0", "block_1"):
        own = [m[name] for m in models]
        now = own if level == "block" else [mean[name]] * 2  # what is used before `up`
        xs = [x * b["norm"] for x, b in zip(xs, now, strict=True)]
        up = regression(xs, [b["up"] for b in own], 0.9)
        np.testing.assert_allclose(got[name]["up"], up, rtol=2e-3, atol=2e-3)
        ups = [up] * 2 if level == "leaf" else [b["up"] for b in own]
        hs = [np.tanh(x @ w + b["bias"]) for x, w, b in zip(xs, ups, now, strict=True)]
        down = regression(hs, [b["down"] for b in own], 0.9)
        np.testing.assert_allclose(got[name]["down"], down, rtol=2e-3, atol=2e-3)
        # The next block sees what the merged one makes.
        merged, x0 = got[name], [x / b["norm"] for x, b in zip(xs, now, strict=True)]
        xs = [
            np.tanh(x * merged["norm"] @ merged["up"] + merged["bias"]) @ merged["down"]
            for x in x0
        ]
    head = regression(xs, [m["head"] for m in models], 0.9)
    np.testing.assert_allclose(got["head"], head, rtol=2e-3, atol=2e-3)


def test_equal_models_stay(problem):
    models, batches = problem
    got = merging.regmean_plus_plus(network, [models[0]] * 2, batches)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(models[0]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_layer_is_regmean_and_heads_may_differ():
    models = [{"w": normal(4, 3)} for _ in range(2)]
    heads = [normal(3, 2), normal(3, 5)]
    functions = [lambda p, x, h=h: (x @ p["w"]) @ h for h in heads]
    batches = [[normal(16, 4)] for _ in models]
    seen = []
    got = merging.regmean_plus_plus(
        functions,
        models,
        batches,
        level="leaf",
        weights=(1.0, 2.0),
        progress=lambda i, n: seen.append((i, n)),
    )
    grams = [
        merging.gram_matrices(f, m, b)
        for f, m, b in zip(functions, models, batches, strict=True)
    ]
    want = merging.merge(
        merging.regmean(), models[0], models, weights=(1.0, 2.0), statistics=grams
    )
    np.testing.assert_allclose(got["w"], want["w"], rtol=1e-6)
    assert seen == [(0, 1)]


def test_compiled_once(problem):
    models, batches = problem
    traces = []

    def counted(p, x):
        traces.append(x.shape)
        return network(p, x)

    merging.regmean_plus_plus(counted, models, [[b[0]] for b in batches])
    # One look at the leaves, one trace for 2 models and 3 layers.
    assert len(traces) == 2


def test_wrong_inputs(problem):
    models, batches = problem
    with pytest.raises(ValueError, match="batches of 1 tasks for 2 models"):
        merging.regmean_plus_plus(network, models, batches[:1])
    with pytest.raises(ValueError, match="level: got 'all'"):
        merging.regmean_plus_plus(network, models, batches, level="all")
    flat = [{"w": normal(4, 3)} for _ in range(2)]
    with pytest.raises(ValueError, match="can't tell the blocks"):
        merging.regmean_plus_plus(lambda p, x: x @ p["w"], flat, [[normal(2, 4)]] * 2)


def test_without_a_dense_layer_nothing_is_merged():
    models, batches = [{"scale": normal(5)} for _ in "ab"], [[normal(8, 5)]] * 2
    with pytest.raises(ValueError, match="multiplies its inputs with no parameter"):
        merging.regmean_plus_plus(
            lambda p, x: x * p["scale"][None], models, batches, level="leaf"
        )


def test_a_plain_mlp_is_sent_to_leaves():
    flax = [{"Dense_0": {"kernel": normal(4, 3)}} for _ in range(2)]
    apply = lambda p, x: x @ p["Dense_0"]["kernel"]  # noqa: E731
    batches = [[normal(9, 4)] for _ in flax]
    with pytest.raises(ValueError, match='pass level="leaf"'):
        merging.regmean_plus_plus(apply, flax, batches)
    merging.regmean_plus_plus(apply, flax, batches, level="leaf")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda b: [iter(x) for x in b],
            r"batches\[0\]: got an iterator, which runs out",
        ),
        (lambda b: [b[0], iter(b[1])], r"batches\[1\]: got an iterator"),
        (lambda b: [x[0] for x in b], r"batches\[0\]: got one batch .*\(40,\)"),
        (lambda b: [b[0], {"x": b[1][0]}], r"batches\[1\]: got one batch"),
        (
            lambda b: np.stack([x[0] for x in b]),
            "got a ndarray, expected for each of 2",
        ),
        (iter, "got a list_iterator, expected"),
        (lambda b: [[], b[1]], "got no batches"),
    ],
)
def test_batches_that_are_not_lists_of_batches(problem, spoil, message):
    models, batches = problem
    with pytest.raises(ValueError, match=message):
        merging.regmean_plus_plus(network, models, spoil(batches))

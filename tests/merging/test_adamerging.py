"""AdaMerging recovers planted coefficients and makes predictions surer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from multitask_jax import merging
from multitask_jax.merging.fitted.entropy import prediction_entropy

RNG = np.random.default_rng(0)
TASKS = (0.8, 0.15)


def planted(t, leaf="w"):
    """Logits of task t, surest where the leaf has moved by planted lambda_t tau_t.

    The models' changes lie in different entries, so the optimum is known.
    """

    def apply(params, x):
        gap = 5 - 4 * (params[leaf][t] - TASKS[t]) ** 2
        return jnp.stack([gap * x[:, 0], jnp.zeros(len(x))], axis=1)

    return apply


BASE = {"w": np.zeros(2, np.float32), "step": np.int32(3)}
MODELS = [
    {"w": np.float32([1, 0]), "step": np.int32(5)},
    {"w": np.float32([0, 1]), "step": np.int32(9)},
]
ONES = [np.ones((4, 1), np.float32), np.ones((2, 1), np.float32)]  # a ragged last one


@pytest.mark.parametrize("level", ["task", "leaf"])
def test_planted_coefficients_are_recovered(level):
    found = merging.adamerging(
        [planted(0), planted(1)],
        BASE,
        MODELS,
        [ONES, ONES],
        level=level,
        steps=150,
        optimiser=optax.adam(0.03),
    )
    (coefficients,) = [v for k, v in found.coefficients.items() if k != "step"]
    np.testing.assert_allclose(coefficients, TASKS, atol=0.01)
    np.testing.assert_allclose(found.params["w"], TASKS, atol=0.01)
    assert found.params["step"] == 3
    assert found.entropy.shape == (150,)
    assert found.entropy[-1] < found.entropy[0]


def test_defaults_are_the_papers():
    """Adam's first step moves by the learning rate."""
    found = merging.adamerging(
        [planted(0), planted(1)], BASE, MODELS, [ONES, ONES], steps=1
    )
    np.testing.assert_allclose(found.coefficients["w"], [0.301, 0.299], atol=1e-5)


def test_coefficients_stay_in_their_range():
    models = [{"w": -m["w"], "step": m["step"]} for m in MODELS]  # wants lambda < 0
    args = ([planted(0), planted(1)], BASE, models, [ONES, ONES])
    found = merging.adamerging(*args, steps=60, optimiser=optax.adam(0.03))
    np.testing.assert_array_equal(found.coefficients["w"], [0, 0])
    found = merging.adamerging(*args, clip=None, steps=300, optimiser=optax.adam(0.03))
    np.testing.assert_allclose(found.coefficients["w"], [-0.8, -0.15], atol=0.02)


def network(params, x):
    for i in range(2):
        block = params[f"block_{i}"]
        x = jax.nn.relu(x @ block["kernel"] + block["bias"][None])
    return x @ params["head"]


@pytest.fixture
def networks():
    def make():
        blocks = {
            f"block_{i}": {
                "kernel": RNG.standard_normal((6, 6)).astype(np.float32),
                "bias": RNG.standard_normal(6).astype(np.float32),
            }
            for i in range(2)
        }
        return blocks | {"head": RNG.standard_normal((6, 3)).astype(np.float32)}

    base = make()
    models = [jax.tree.map(lambda a, b: a + b, base, make()) for _ in range(2)]
    batches = [[RNG.standard_normal((16, 6)).astype(np.float32)] for _ in models]
    return base, models, batches


@pytest.mark.parametrize(("level", "count"), [("task", 1), ("block", 3), ("leaf", 5)])
def test_entropy_falls_at_every_level(networks, level, count):
    base, models, batches = networks
    seen = []
    found = merging.adamerging(
        network,
        base,
        models,
        batches,
        level=level,
        steps=25,
        optimiser=optax.adam(0.01),
        progress=lambda i, h: seen.append(i),
    )
    assert len(found.coefficients) == count
    assert seen == list(range(25))
    assert found.entropy[-1] < 0.95 * found.entropy[0]
    # The history is the entropy of what task arithmetic with init .3 predicts.
    start = merging.merge(merging.task_arithmetic(scale=0.3), base, models)
    h = sum(prediction_entropy(network(start, b[0])).mean() for b in batches)
    np.testing.assert_allclose(found.entropy[0], h, rtol=1e-4)


def test_compiled_once(networks):
    base, models, batches = networks
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return network(params, x)

    ragged = [[b[0], b[0][:5]] for b in batches]
    merging.adamerging(counted, base, models, ragged, steps=6)
    assert traces == [(16, 6)]  # one program serves both tasks


def test_plus_plus_is_on_trimmed_and_elected_task_vectors(networks):
    base, models, batches = networks
    found = merging.adamerging_plus_plus(
        network, base, models, batches, density=0.3, steps=0
    )
    agreeing = merging.chain(
        merging.trim(density=0.3), merging.elect_sign(), merging.weighted_sum()
    )
    want = merging.merge(merging.chain(agreeing, merging.scale(0.3)), base, models)
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert found.entropy.shape == (0,)


def test_bfloat16_stays(networks):
    base, models, batches = networks
    base, *models = [
        jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), m) for m in (base, *models)
    ]
    found = merging.adamerging(network, base, models, batches, steps=2)
    assert {x.dtype for x in jax.tree.leaves(found.params)} == {jnp.dtype("bfloat16")}
    assert found.coefficients["head"].dtype == np.float32


def test_wrong_inputs(networks):
    base, models, batches = networks
    with pytest.raises(ValueError, match="batches of 1 tasks for 2 models"):
        merging.adamerging(network, base, models, batches[:1])
    with pytest.raises(ValueError, match="1 functions for 2 models"):
        merging.adamerging([network], base, models, batches)
    with pytest.raises(ValueError, match="level: got 'layer'"):
        merging.adamerging(network, base, models, batches, level="layer")
    with pytest.raises(ValueError, match="an iterator, which runs out"):
        merging.adamerging(network, base, models, [iter(b) for b in batches])
    with pytest.raises(ValueError, match=r"batches\[0\]: got one batch .*\(16, 6\)"):
        merging.adamerging(network, base, models, [b[0] for b in batches])
    with pytest.raises(ValueError, match="steps: got -1"):
        merging.adamerging(network, base, models, batches, steps=-1)
    for init in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=f"init: got {init}, .*clip="):
            merging.adamerging(network, base, models, batches, init=init)
    merging.adamerging(network, base, models, batches, init=1.5, clip=None, steps=0)
    flat, tuned = base["block_0"], [m["block_0"] for m in models]
    with pytest.raises(ValueError, match='pass level="leaf"'):
        merging.adamerging(network, flat, tuned, batches, level="block")
    with pytest.raises(ValueError, match="no batches"):
        merging.adamerging(network, base, models, [batches[0], []])
    with pytest.raises(ValueError, match="model 0 has other leaves"):
        merging.adamerging(network, base, [models[0]["block_0"]] * 2, batches)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax import tree
from multitask_jax.models import uplift_baselines as baselines

F, A, O, B = 5, 3, 2, 30
KEY = jax.random.key(0)


# Ablations of MTMT have tests of their own.
LEARNERS = [n for n in baselines.MODELS if n not in ("flat effects", "shared bottom")]


@pytest.mark.parametrize("name", LEARNERS)
def test_learners_keep_their_contract(name):
    """Shapes; people are independent; a step along the gradient lowers the loss."""
    learner = baselines.MODELS[name](A, O)
    keys = jax.random.split(jax.random.key(0), 3)
    x, y = jax.random.normal(keys[0], (B, F)), jax.random.normal(keys[1], (B, O))
    arm = jnp.arange(B) % A

    @jax.jit
    def run(key):
        params = learner.init(key, F)
        loss, gradient = jax.value_and_grad(learner.loss)(params, x, arm, y)
        stepped = jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient)
        one = learner.predict(params, x[:1])
        return (
            learner.predict(params, x),
            one,
            loss,
            learner.loss(stepped, x, arm, y),
        )

    all_of_them, one, before, after = run(keys[2])
    assert all_of_them.shape == (B, A, O)
    np.testing.assert_allclose(all_of_them[:1], one, rtol=1e-3, atol=1e-5)
    assert after < before


@pytest.mark.parametrize("features", [F, 40])
def test_a_shared_bottom_is_as_large_as_the_experts_together(features):
    sizes = {}
    for name in ("MTMT", "shared bottom"):
        learner = baselines.MODELS[name](A, O)
        shapes = jax.eval_shape(lambda k, f=learner: f.init(k, features), KEY)
        sizes[name] = {p: x.size for p, x in tree.flatten(shapes).items()}
    mmoe, shared = sizes["MTMT"], sizes["shared bottom"]
    kernels = [p for p in mmoe if p.startswith("experts") and p.endswith("kernel")]
    assert len(kernels) == 2
    for path in kernels:
        assert shared[path] == mmoe[path], path
    # Without the others' biases of outputs, and the gate's columns.
    rest = sum(mmoe[p] for p in ("experts/down_bias", "gates", "gates_bias"))
    assert sum(mmoe.values()) - sum(shared.values()) == rest * 3 // 4


def test_observed_takes_each_persons_own_arm():
    outcomes = jnp.arange(12.0).reshape(2, 3, 2)
    found = baselines.observed(outcomes, jnp.array([2, 0]))
    np.testing.assert_array_equal(found, [[4, 5], [6, 7]])


@pytest.mark.parametrize("name", baselines.BOOSTED)
def test_boosting_finds_an_effect(name):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 2)).astype(np.float32)
    arm = rng.integers(0, 2, 3000)
    effect = np.where(x[:, 0] > 0, 2.0, 0.0)
    amount = effect * arm + 0.1 * rng.normal(size=3000)
    bought = rng.uniform(size=3000) < 0.2 + 0.2 * effect * arm
    y = np.stack([bought, amount], axis=1).astype(np.float32)
    found = baselines.boosting(
        name, (x, arm, y), x, arms=2, binary=(True, False), seed=0
    )
    uplift = found[:, 1] - found[:, 0]
    for o, size in enumerate((0.4, 2.0)):
        assert uplift[effect > 0, o].mean() == pytest.approx(size, rel=0.3)
        assert abs(uplift[effect == 0, o].mean()) < 0.15 * size


def test_an_outcome_that_nobody_had_is_no_error():
    x = np.zeros((20, 1), np.float32)
    y = np.zeros((20, 1), np.float32)
    data = (x, np.arange(20) % 2, y)
    found = baselines.boosting("GBM T-learner", data, x, arms=2, binary=(True,), seed=0)
    assert not found.any()

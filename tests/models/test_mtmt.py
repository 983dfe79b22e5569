"""MTMT's equations, and that it finds effects where they are identified."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax import tree
from multitask_jax.models import mtmt

F, B = 12, 40
SIZES = mtmt.Sizes(3, 2, mtmt.tiered(3), experts=2, hidden=8, channels=4, width=8)


@pytest.fixture(scope="module")
def params():
    return jax.jit(functools.partial(mtmt.init, features=F, sizes=SIZES))(
        jax.random.key(0)
    )


@pytest.fixture(scope="module")
def people():
    keys = jax.random.split(jax.random.key(1), 2)
    arm = jnp.arange(B) % 3
    return jax.random.normal(keys[0], (B, F)), arm, jax.random.normal(keys[1], (B, 2))


@pytest.fixture(scope="module")
def predict():
    return jax.jit(functools.partial(mtmt.predict, sizes=SIZES))


def test_tiers_are_a_base_and_increments():
    assert mtmt.tiered(2) == ((0,), (1,))
    assert mtmt.tiered(3) == ((0, 0), (1, 0), (1, 1))
    assert mtmt.tiered(4) == ((0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 0, 1))
    assert mtmt.flat(3) == ((0, 0), (1, 0), (0, 1))


def test_arms_sum_their_tiers_and_the_control_has_no_effect(params, people, predict):
    x = people[0]
    natural, effects = jax.jit(mtmt.Mtmt(SIZES).apply)({"params": params}, x)
    found = predict(params, x)
    np.testing.assert_array_equal(found[:, 0], natural)
    base, more = effects[:, 0], effects[:, 1]
    np.testing.assert_allclose(found[:, 1], natural + base, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[:, 2], natural + base + more, rtol=1e-5, atol=1e-6)
    assert (np.abs(effects).mean(axis=0) > 1e-3).all()


@pytest.mark.parametrize(("arms", "outcomes"), [(2, 1), (4, 2)])
def test_any_number_of_arms_and_outcomes(people, arms, outcomes):
    """Each arm is the natural response and its own tiers' effects."""
    sizes = SIZES._replace(arms=arms, outcomes=outcomes, tiers=mtmt.tiered(arms))
    x = people[0]

    @jax.jit
    def run(key):
        params = mtmt.init(key, F, sizes)
        both = mtmt.Mtmt(sizes).apply({"params": params}, x)
        return both, mtmt.predict(params, x, sizes=sizes)

    (natural, effects), found = run(jax.random.key(3))
    assert found.shape == (B, arms, outcomes)
    for arm, used in enumerate(mtmt.tiered(arms)):
        expected = natural + sum(effects[:, j] * u for j, u in enumerate(used))
        np.testing.assert_allclose(found[:, arm], expected, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_papers(params, people, predict):
    x, arm, y = people
    rows = predict(params, x)[np.arange(B), arm]
    expected = np.mean(np.sum((rows - y) ** 2, axis=1))
    found = jax.jit(functools.partial(mtmt.loss, sizes=SIZES))(params, *people)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(("arm", "silent"), [(2, "natural"), (0, "effect")])
def test_natural_responses_learn_from_the_control_effects_from_the_treated(
    params, people, arm, silent
):
    x, _, y = people
    grad = jax.jit(jax.grad(functools.partial(mtmt.loss, sizes=SIZES)))
    found = tree.flatten(grad(params, x, jnp.full(B, arm), y))
    for path, g in found.items():
        if path.startswith(silent):
            assert not np.any(g), path
    loud = "effect" if silent == "natural" else "natural"
    assert any(np.any(g) for p, g in found.items() if p.startswith(loud))


def test_people_are_independent(params, people, predict):
    x = people[0]
    order = np.random.default_rng(0).permutation(B)
    np.testing.assert_allclose(
        predict(params, x)[order], predict(params, x[order]), rtol=1e-4, atol=1e-5
    )


def test_treatments_keep_more_than_a_sign(params, people, predict):
    """The authors' normalisation over an axis of length 1 leaves signs only.

    So a treatment of the same signs but of another size has other effects.
    """
    x = people[0]
    effect = params["effect_0"]
    scaled = params | {"effect_0": effect | {"treatment": 3 * effect["treatment"]}}
    before, after = predict(params, x), predict(scaled, x)
    np.testing.assert_array_equal(after[:, 0], before[:, 0])
    sizes = np.abs(before[:, 1] - before[:, 0])
    changes = np.abs(after[:, 1] - before[:, 1])
    assert (changes.mean(axis=0) > 1e-3 * sizes.mean(axis=0)).all()
    assert len(np.unique(np.round(changes, 7), axis=0)) > B // 2  # each their own


def test_the_resnet_reads_as_many_features_as_there_are():
    sizes = SIZES._replace(expert="resnet", channels=8)
    x = jnp.ones((2, 70))
    run = jax.jit(lambda k: mtmt.Experts(sizes).init_with_output(k, x)[0])
    assert run(jax.random.key(0)).shape == (2, 2, 3, 8)  # ceil(70 / 32) tokens


def test_treatments_choose_where_a_resnet_reads_few_features():
    """Of one token attention would give the same to every query."""
    sizes = SIZES._replace(expert="resnet", channels=32)
    x = jax.random.normal(jax.random.key(1), (8, 18))
    arm, y = jnp.ones(8, int), jnp.ones((8, sizes.outcomes))
    params = jax.jit(lambda k: mtmt.init(k, 18, sizes))(jax.random.key(0))
    found = jax.jit(jax.grad(functools.partial(mtmt.loss, sizes=sizes)))(
        params, x, arm, y
    )
    assert np.abs(found["effect_0"]["treatment"]).max() > 1e-6


@pytest.mark.parametrize(
    "options",
    [{"attention": False}, {"experts": 1}, {"expert": "resnet", "channels": 32}],
)
def test_ablations_have_finite_gradients(people, options):
    sizes = SIZES._replace(**options)

    @jax.jit
    def gradient(key):
        params = mtmt.init(key, F, sizes)
        return jax.grad(lambda p: mtmt.loss(p, *people, sizes=sizes))(params)

    for g in jax.tree.leaves(gradient(jax.random.key(0))):
        assert np.isfinite(g).all()

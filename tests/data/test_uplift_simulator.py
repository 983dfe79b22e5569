import numpy as np
import pytest

from multitask_jax.data.uplift_simulator import simulate


def test_true_effects_are_what_arms_differ_by():
    trial = simulate(60_000, seed=1, arms=3, outcomes=2, noise=0.5)
    assert trial.effects.shape == (60_000, 3, 2)
    assert not trial.effects[:, 0].any()
    for a in (1, 2):
        found = trial.y[trial.arm == a].mean(0) - trial.y[trial.arm == 0].mean(0)
        error = 3 * (trial.y.var(0) * 2 / 20_000) ** 0.5
        assert (np.abs(found - trial.effects[:, a].mean(0)) < error).all()


def test_effects_differ_between_people_and_are_tiered():
    trial = simulate(2000, arms=4, outcomes=3)
    effects = trial.effects
    assert (effects[:, 1:].std(axis=0) > 0.01).all()
    # On the continuous outcome, where no chance is clipped, treated arms share the
    # base effect: they differ less from each other than from the control.
    amount = effects[..., -1]
    apart = (amount[:, 2] - amount[:, 1]).std()
    assert 0.1 < apart < amount[:, 1].std()
    # Each arm is the best one for some people.
    assert set(np.argmax(amount, axis=1)) == {0, 1, 2, 3}


def test_binary_outcomes_are_coins_and_no_effect_is_none():
    trial = simulate(500, effect=0.0)
    assert trial.binary == (True, True, False)
    assert set(np.unique(trial.y[:, :2])) == {0, 1}
    np.testing.assert_allclose(trial.effects, 0, atol=1e-6)


def test_seeds_repeat_and_rows_are_cut():
    a, b = simulate(50, seed=3), simulate(50, seed=3)
    np.testing.assert_array_equal(a.y, b.y)
    part = a.at(np.array([4, 2]))
    np.testing.assert_array_equal(part.x, a.x[[4, 2]])
    np.testing.assert_array_equal(part.effects, a.effects[[4, 2]])


def test_others_are_of_the_same_population():
    """Noise-free: what is learned of the first people holds for the others."""
    sizes = {"features": 2, "arms": 2, "outcomes": 1}
    a, b = (simulate(4000, seed=3, others=o, **sizes) for o in (False, True))
    other = simulate(4000, seed=4, **sizes)
    errors = []
    for trial in (b, other):
        assert len(np.unique(np.concatenate([a.x, trial.x]), axis=0)) == 8000
        apart = ((trial.x[:500, None] - a.x[None]) ** 2).sum(axis=2)
        nearest = a.effects[apart.argmin(axis=1), 1, 0]
        errors.append(np.abs(nearest - trial.effects[:500, 1, 0]).mean())
    assert errors[0] < 0.05 < 0.2 < errors[1]


def test_too_little_is_refused():
    with pytest.raises(ValueError, match="a control"):
        simulate(10, arms=1)

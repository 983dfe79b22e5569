"""Cross-validated training: who is predicted by what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import mtmt_training as training
from multitask_jax.data.uplift_simulator import simulate
from multitask_jax.models.uplift_baselines import BOOSTED, MODELS, Learner, boosting
from tests.experiments.mtmt_common import one_thread


def test_folds_hold_everyone_once_and_keep_parts_apart():
    arm = np.random.default_rng(0).integers(0, 3, 101)
    folds = training.make_folds(arm, 4, seed=1, validation=0.2)
    counts = np.zeros(101, int)
    for train, validation, test in zip(*folds, strict=True):
        parts = [set(p) for p in (train, validation, test)]
        assert not (parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2])
        counts[list(parts[2])] += 1
        shares = np.bincount(arm[test], minlength=3) / len(test)
        assert np.abs(shares - np.bincount(arm) / 101).max() < 0.05
    assert (counts == 1).all()


def test_each_is_predicted_by_the_model_of_the_own_fold():
    arm = np.random.default_rng(0).integers(0, 2, 50)
    folds = training.make_folds(arm, 3, seed=1, validation=0.2)
    fold = training.fold_of(folds, 50)
    for k in range(3):
        assert set(np.flatnonzero(fold == k)) == set(folds.test[k])
        assert not np.isin(np.flatnonzero(fold == k), folds.train[k]).any()
    told = Learner(  # whose model it is, and of which person
        lambda key, f: jnp.zeros(()),
        lambda *args: 0.0,
        lambda p, x: jnp.tile(100 * p + x[:, :, None], (1, 2, 1)),
    )
    trainer = training.make_trainer(told, 1, rate=1, epochs=1, rows=4, batch=2)
    state = training.State(None, None, jnp.arange(3.0), None)
    scale = training.Scale(jnp.zeros((3, 1)), jnp.ones((3, 1)))
    person = np.arange(50, dtype=np.float32)
    trial = simulate(50, features=1, arms=2, outcomes=1)._replace(x=person[:, None])
    found = training.out_of_fold(trainer, state, scale, trial, folds)
    assert (found == (100 * fold + person)[:, None, None]).all()


@pytest.mark.parametrize("name", ["S-learner", "GBM T-learner"])
def test_ones_own_outcomes_do_not_move_ones_predictions(name):
    """Nor scales, nor which epoch is kept: those of a fold may be anything."""
    trial = simulate(120, features=3, arms=2, outcomes=1)
    folds = training.make_folds(trial.arm, 2, 0, 0.2)
    options = {"rate": 5e-3, "epochs": 2, "rows": folds.train.shape[1], "batch": 32}

    def predicted(trial):
        if name in BOOSTED:
            with one_thread():
                return training.boosted_out_of_fold(name, trial, folds, seed=0)
        state, scale = training.fit(
            trainer, trial, folds, epochs=2, seed=0, each=lambda i, losses: None
        )
        return training.out_of_fold(trainer, state, scale, trial, folds)

    if name not in BOOSTED:
        trainer = training.make_trainer(MODELS[name](2, 1), 3, **options)
    other = trial.y.copy()
    other[folds.test[0]] = np.flip(1 - other[folds.test[0]], axis=0)
    before, after = predicted(trial), predicted(trial._replace(y=other))
    own, rest = folds.test
    np.testing.assert_array_equal(after[own], before[own])
    assert (after[rest] != before[rest]).mean() > 0.9


def test_noise_is_not_predicted():
    """Boosting finds it in those whom it was trained on, not out of folds."""
    rng = np.random.default_rng(0)
    trial = simulate(600, features=4, arms=2, outcomes=1)
    trial = trial._replace(y=rng.normal(size=(600, 1)).astype(np.float32))
    folds = training.make_folds(trial.arm, 2, 0, 0.1)
    fold = training.fold_of(folds, 600)
    rows = fold == 1  # all of whom the first fold's model was trained on
    part = trial.x[rows], trial.arm[rows], trial.y[rows]
    options = {"arms": 2, "binary": trial.binary, "seed": 0}
    with one_thread():
        found = training.boosted_out_of_fold("GBM T-learner", trial, folds, seed=0)
        seen = boosting("GBM T-learner", part, trial.x[rows], **options)

    def agreement(predicted, rows):
        own = np.take_along_axis(predicted[:, :, 0], trial.arm[rows][:, None], axis=1)
        return np.corrcoef(own[:, 0], trial.y[rows, 0])[0, 1]

    assert agreement(seen, rows) > 0.3
    for k in range(2):  # four standard errors
        assert abs(agreement(found[fold == k], fold == k)) < 4 * 300**-0.5


def test_the_best_epoch_is_kept_not_the_last():
    """A number that every step makes larger, on its way from -1 past 0, the target."""
    larger = Learner(
        lambda key, f: jnp.float32(-1.0),
        lambda p, x, arm, y: -p,
        lambda p, x: p + jnp.zeros((len(x), 2, 1)),
    )
    trial = simulate(40, features=1, arms=2, outcomes=1)
    trial = trial._replace(y=np.zeros((40, 1), np.float32))
    folds = training.make_folds(trial.arm, 2, 0, 0.2)
    rows = folds.train.shape[1]
    trainer = training.make_trainer(
        larger, 1, rate=0.5, epochs=8, rows=rows, batch=rows
    )
    errors = []
    state, scale = training.fit(
        trainer,
        trial,
        folds,
        epochs=8,
        seed=0,
        each=lambda i, x: errors.append(x["validation"]),
    )
    assert min(errors) < 0.1 < 1 < errors[-1]
    np.testing.assert_allclose(state.loss, min(errors), rtol=1e-6)
    np.testing.assert_allclose(state.best**2, state.loss, rtol=1e-6)
    assert (state.params > 1).all()
    found = training.out_of_fold(trainer, state, scale, trial, folds)
    np.testing.assert_allclose(found**2, min(errors), rtol=1e-6)


@pytest.mark.parametrize("people", [1, 7, 8, 9, 20])
def test_people_are_predicted_in_blocks(people, monkeypatch):
    """In their order, with a memory that does not grow with them."""
    monkeypatch.setattr(training, "BLOCK", 8)
    sizes = []

    def predict(x):
        sizes.append(len(x))
        return jnp.stack([x, 2 * x], axis=1)

    x = np.arange(2 * people, dtype=np.float32).reshape(people, 2)
    found = jax.jit(lambda x: training.in_blocks(predict, x))(x)
    np.testing.assert_array_equal(found, np.stack([x, 2 * x], axis=1))
    assert sizes == [{20: 7, 9: 5}.get(people, people)]


def test_outcomes_are_scaled_by_training_rows_alone():
    y = np.array([[0.0], [2.0], [100.0]])
    scale = training.scale_of(y, np.array([[0, 1]]))
    assert (scale.mean, scale.spread) == (1.0, 1.0)


def test_mtmt_finds_individual_effects_where_they_are_identified():
    """Better than the average effect for everyone, by far; coins tell less."""
    trial = simulate(12_000, seed=5, features=4, arms=3, outcomes=2, noise=0.3)
    folds = training.make_folds(trial.arm, 2, 0, 0.1)
    options = {"rate": 5e-3, "epochs": 12, "rows": folds.train.shape[1], "batch": 256}
    trainer = training.make_trainer(MODELS["MTMT"](3, 2), 4, **options)
    state, scale = training.fit(
        trainer, trial, folds, epochs=12, seed=0, each=lambda i, losses: None
    )
    found = training.out_of_fold(trainer, state, scale, trial, folds)
    uplift = found - found[:, :1]
    error = np.sqrt(np.mean((uplift - trial.effects)[:, 1:] ** 2, axis=(0, 1)))
    constant = np.sqrt(np.mean(trial.effects[:, 1:].var(axis=0), axis=0))
    assert trial.binary == (True, False)
    binary, continuous = error / constant
    assert continuous < 0.6
    assert binary < 0.8

"""The uplift study on *synthetic* people."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import mtmt, mtmt_model
from experiments import mtmt_training as training
from multitask_jax.data import hillstrom
from multitask_jax.data.uplift_simulator import simulate
from multitask_jax.models import mtmt as models
from multitask_jax.models.uplift_baselines import MODELS
from tests.experiments.common import from_flagfile


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return from_flagfile(
        mtmt.Config,
        "mtmt/smoke",
        workdir=str(tmp_path_factory.mktemp("mtmt")),
        progress=False,
    )


@pytest.fixture(scope="module")
def result(config):
    return mtmt.run(config)


def test_full_is_the_default(monkeypatch):
    assert from_flagfile(mtmt.Config, "mtmt/full") == mtmt.Config()


def test_everything_is_written(result, config):
    workdir = Path(config.workdir)
    for name in ("config.json", "metrics.jsonl", "qini.png", "deciles.png"):
        assert (workdir / name).stat().st_size
    assert (workdir / "report.md").read_text() == result.report
    assert "ynthetic" in result.report
    for p in result.predictions.values():
        assert p.shape == (1, 1500, 3, 3)
        assert np.isfinite(p).all()


def test_epochs_folds_and_seeds_share_one_program(result):
    for traced in result.traced.values():
        assert sorted(traced) == ["epoch", "predict", "start"]


def test_a_second_run_trains_nothing_and_another_one_is_refused(result, config):
    again = mtmt.run(config)
    assert not again.traced
    for name, p in result.predictions.items():
        np.testing.assert_array_equal(again.predictions[name], p)
    with pytest.raises(ValueError, match=r"epochs: 2, now 3"):
        mtmt.run(dataclasses.replace(config, epochs=3))
    for name in ("batch_size", "bootstrap", "rows"):
        with pytest.raises(ValueError, match=f"--{name}: got 0, expected at least 1"):
            mtmt.run(dataclasses.replace(config, **{name: 0}))


def test_a_model_of_other_settings_goes_with_its_predictions(result, config, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    before = dataclasses.replace(config, workdir=str(tmp_path / "run"))
    mtmt._same_run(tmp_path / "run", before, result.trial)
    mtmt._same_run(tmp_path / "run", before, result.trial)
    assert (tmp_path / "run" / "model").exists()
    other = dataclasses.replace(before, epochs=3)
    mtmt._same_run(tmp_path / "run", other, result.trial)
    assert not (tmp_path / "run" / "model").exists()


def test_the_saved_model_is_a_function_of_features(result, config):
    predict, about = mtmt_model.load(Path(config.workdir) / "model")
    found = predict(result.trial.x[:7])
    assert found.shape == (7, 3, 3)
    assert about["arms"] == list(result.trial.arms)
    # Outcomes' own units: near the means of what was seen.
    seen, spread = result.trial.y.mean(axis=0), result.trial.y.std(axis=0)
    assert (np.abs(found.mean(axis=(0, 1)) - seen) < 2 * spread).all()


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


def test_customers_are_scored(shared, tmp_path):
    """Of the real experiment, by a model that has learned nothing yet."""
    file = shared / "data" / "uplift" / "hillstrom.csv"
    encoder = hillstrom.encoder_of(file)
    features = len(encoder.features)
    sizes = models.Sizes(3, 3, models.tiered(3))
    init = jax.jit(functools.partial(models.init, features=features, sizes=sizes))
    mtmt_model.save(
        tmp_path / "run" / "model",
        init(jax.random.key(0)),
        sizes=sizes,
        features=features,
        mean=np.zeros(3),
        spread=np.ones(3),
        about={
            "arms": hillstrom.ARMS,
            "outcomes": hillstrom.OUTCOMES,
            "policy_outcome": "spend",
            "encoder": encoder.to_json(),
        },
    )
    lines = file.read_text().splitlines()
    (tmp_path / "people.csv").write_text("\n".join(lines[:20]) + "\n")
    scored = tmp_path / "scored.csv"
    mtmt.run(
        mtmt.Config(
            predict=True,
            checkpoint=str(tmp_path / "run" / "model"),
            input=str(tmp_path / "people.csv"),
            output=str(scored),
        )
    )
    table, _ = hillstrom.read_text(scored)
    assert len(table["best_arm"]) == 19
    assert set(table["best_arm"]) <= set(hillstrom.ARMS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": "MTTM"}, "expected one of"),
        ({"models": "MTMT,MTMT"}, "got MTMT twice"),
        ({"folds": 1}, "two folds or more"),
        ({"seeds": "0,0"}, "each once"),
        ({"policy_outcome": "clicks"}, "expected one of"),
        ({"predict": True}, "needs --checkpoint"),
    ],
)
def test_wrong_flags_are_named(tmp_path, options, message):
    config = mtmt.Config(workdir=str(tmp_path), data="simulator", rows=60)
    with pytest.raises(ValueError, match=message):
        mtmt.run(dataclasses.replace(config, **options))


def test_networks_that_still_learn_are_named(tmp_path):
    """Best after the last epoch with every seed, not with some."""
    path = tmp_path / "metrics.jsonl"
    assert mtmt.still_learning(tmp_path, 2) == []
    errors = {"a": ((3.0, 2.0), (3.0, 2.0)), "b": ((3.0, 2.0), (2.0, 3.0))}
    lines = [
        {"step": i + 1, "model": model, "seed": seed, "loss": 0.0, "validation": v}
        for model, by_seed in errors.items()
        for seed, values in enumerate(by_seed)
        for i, v in enumerate(values)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert mtmt.still_learning(tmp_path, 2) == ["a"]


def test_diverged_training_is_told(tmp_path):
    """Not hidden by the random network that was the best so far."""
    config = mtmt.Config(
        workdir=str(tmp_path), data="simulator", rows=300, models="S-learner",
        folds=2, seeds="0", epochs=1, batch_size=64, rate=1e30, progress=False,
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match="lower --rate"):
        mtmt.run(config)
    assert not list((tmp_path / "predictions").glob("*"))


def test_the_public_data_are_asked_for(tmp_path, monkeypatch):
    from multitask_jax.data import hillstrom_builder

    def builder():
        raise OSError("no internet")

    monkeypatch.setattr(hillstrom_builder, "builder", builder)
    with pytest.raises(OSError, match="no internet"):
        mtmt.run(mtmt.Config(workdir=str(tmp_path), download=True))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the folder model/"):
        mtmt_model.load(tmp_path)
    (tmp_path / "about.json").write_text(json.dumps({"sizes": {}}))
    with pytest.raises(ValueError, match="train again"):
        mtmt_model.load(tmp_path)

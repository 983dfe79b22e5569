"""The uplift study on *synthetic* people."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import json_files, mtmt, mtmt_data, mtmt_model
from experiments import mtmt_training as training
from multitask_jax import tree
from multitask_jax.data import hillstrom, trial_table
from multitask_jax.data.trial_features import Encoder, fit_encoder
from multitask_jax.models import mtmt as models
from multitask_jax.models.uplift_baselines import MODELS
from tests.experiments.common import from_flagfile
from tests.experiments.mtmt_common import one_thread


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return from_flagfile(
        mtmt.Config,
        "mtmt/smoke",
        workdir=str(tmp_path_factory.mktemp("mtmt")),
        seeds="0,1",
        progress=False,
    )


@pytest.fixture(scope="module")
def result(config):
    with one_thread():
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
        assert p.shape == (2, 1500, 3, 3)
        assert np.isfinite(p).all()


def test_epochs_folds_and_seeds_share_one_program(result, config):
    assert (config.epochs, config.folds, config.seeds) == (2, 2, "0,1")
    assert set(result.traced) == {"MTMT", "S-learner"}
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


def test_another_policy_outcome_changes_what_is_told_alone(result, config):
    workdir = Path(config.workdir)
    weights = workdir / "model" / "model.safetensors"
    before = weights.stat().st_ino, weights.stat().st_mtime_ns
    told = result.trial.outcomes[0]
    for outcome in (told, f"-{told}", None):
        mtmt.run(dataclasses.replace(config, policy_outcome=outcome))
        about = mtmt_model.load(workdir / "model")[1]
        assert about["policy_outcome"] == (outcome or result.trial.outcomes[-1])
    assert (weights.stat().st_ino, weights.stat().st_mtime_ns) == before


@pytest.mark.parametrize("damage", ["", "no JSON\n"])
def test_a_line_that_a_kill_cut_short_is_no_end(tmp_path, damage):
    """Nor is a log that is damaged further up: only a note comes of it."""
    config = mtmt.Config(
        workdir=str(tmp_path), data="simulator", rows=120, models="S-learner",
        folds=2, seeds="0", epochs=1, batch_size=16, bootstrap=2, progress=False,
    )  # fmt: skip
    log = tmp_path / "metrics.jsonl"
    mtmt._same_run(tmp_path, config, mtmt_data.load(config)[0])
    log.write_text(damage + '{"step": 1, "mod')
    report = mtmt.run(config).report
    assert log.read_text().startswith(damage + '{"step": 1, "model": "S-learner"')
    # Which of one epoch is the last is the best.
    assert ("Best on validation rows" in report) == (not damage)


def test_people_in_another_order_are_other_people(result, config, tmp_path):
    run = dataclasses.replace(config, workdir=str(tmp_path))
    mtmt._same_run(tmp_path, run, result.trial)
    (tmp_path / "predictions").mkdir()
    mtmt._same_run(tmp_path, run, result.trial)
    order = np.arange(len(result.trial.arm))[::-1]
    with pytest.raises(ValueError, match="predictions of another run"):
        mtmt._same_run(tmp_path, run, result.trial.at(order))
    file = tmp_path / "config.json"  # as written before networks were told
    about = json_files.read(file)
    del about["networks"]
    json_files.write(file, about)
    with pytest.raises(ValueError, match=r"another run \(other networks\)"):
        mtmt._same_run(tmp_path, run, result.trial)


@pytest.mark.parametrize("name", ["flat effects", "shared bottom"])
def test_ablations_are_trained_and_predict(result, config, tmp_path, name):
    learner, trial = MODELS[name](3, 3), result.trial
    params = jax.eval_shape(lambda key: learner.init(key, 8), jax.random.key(0))
    experts = {p: x for p, x in tree.flatten(params).items() if "up_kernel" in p}
    assert [len(x) for x in experts.values()] == [1 if "bottom" in name else 4]
    folds = training.make_folds(trial.arm, 2, 0, 0.1)
    options = {"rate": 5e-3, "epochs": 2, "rows": folds.train.shape[1], "batch": 128}
    trainer = training.make_trainer(learner, 8, **options)
    losses = []
    state, scale = training.fit(
        trainer, trial, folds, epochs=2, seed=0, each=lambda i, x: losses.append(x)
    )
    assert losses[1]["loss"] < losses[0]["loss"]
    found = training.out_of_fold(trainer, state, scale, trial, folds)
    assert np.isfinite(found).all()
    assert (found[:, 1:] != found[:, :1]).any(axis=(0, 2)).all()


def test_flat_effects_are_each_arms_own():
    """In one tier, an arm's outcomes do not depend on another arm's effect."""
    for name, shared in (("MTMT", True), ("flat effects", False)):
        learner = MODELS[name](3, 1)
        x = jnp.ones((2, 4))
        params = jax.jit(lambda key, f=learner.init: f(key, 4))(jax.random.key(0))
        flat = tree.flatten(params)
        first = sorted({p.split("/")[0] for p in flat if p.endswith("treatment")})[0]
        changed = tree.nest(
            {
                p: a + 1 if p.startswith(f"{first}/out/bias") else a
                for p, a in flat.items()
            }
        )
        gap = jax.jit(learner.predict)(changed, x) - jax.jit(learner.predict)(params, x)
        np.testing.assert_allclose(gap[0, :, 0], [0, 1, shared], atol=1e-5)


def test_a_model_of_other_settings_goes_with_its_predictions(result, config, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text("")
    before = dataclasses.replace(config, workdir=str(tmp_path / "run"))
    mtmt._same_run(tmp_path / "run", before, result.trial)
    mtmt._same_run(tmp_path / "run", before, result.trial)
    assert (tmp_path / "run" / "model").exists()
    assert log.exists()
    other = dataclasses.replace(before, epochs=3)
    mtmt._same_run(tmp_path / "run", other, result.trial)
    assert not (tmp_path / "run" / "model").exists()
    assert not log.exists()


def test_the_saved_model_is_a_function_of_features(result, config):
    predict, about = mtmt_model.load(Path(config.workdir) / "model")
    found = predict(result.trial.x[:7])
    assert found.shape == (7, 3, 3)
    assert about["arms"] == list(result.trial.arms)
    # Outcomes' own units: near the means of what was seen.
    seen, spread = result.trial.y.mean(axis=0), result.trial.y.std(axis=0)
    assert (np.abs(found.mean(axis=(0, 1)) - seen) < 2 * spread).all()


def test_customers_are_scored(shared, tmp_path):
    """Of the real experiment, by a model that has learned nothing yet."""
    file = shared / "data" / "uplift" / "hillstrom.csv"
    columns = hillstrom.read(file).columns
    encoder = fit_encoder(hillstrom.SCHEMA.features, columns)
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
            "arms": hillstrom.SCHEMA.arms,
            "outcomes": list(hillstrom.SCHEMA.outcomes),
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
    table, _ = trial_table.read_text(scored)
    assert len(table["best_arm"]) == 19
    assert set(table["best_arm"]) <= set(hillstrom.SCHEMA.arms)


def test_the_simulator_has_other_populations():
    config = mtmt.Config(data="simulator", rows=50)
    first, same, other = (
        mtmt_data.load(dataclasses.replace(config, population_seed=seed))[0]
        for seed in (None, 0, 1)
    )
    np.testing.assert_array_equal(first.effects, same.effects)
    assert (first.effects != other.effects)[:, 1:].all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": "MTTM"}, "expected one of"),
        ({"models": "MTMT,MTMT"}, "got MTMT twice"),
        ({"folds": 1}, "two folds or more"),
        ({"seeds": "0,0"}, "expected different numbers"),
        ({"seeds": "0,-1"}, "expected different numbers"),
        ({"policy_outcome": "clicks"}, "expected one of"),
        ({"policy_outcome": "-clicks"}, "got policy_outcome='-clicks'"),
        ({"population_seed": -1}, "--population_seed: got -1"),
        ({"data": "hillstrom", "population_seed": 1}, "--data=hillstrom does not"),
        ({"data": "hillstrom", "arms": "a,b"}, "--arms: --data=hillstrom does not"),
        ({"predict": True}, "--workdir, --data, --rows: not read with --predict"),
        ({"input": "a.csv"}, "--input: only read with --predict"),
        ({"output": "a.csv", "checkpoint": "b"}, "--checkpoint, --output: only read"),
        ({"rate": 0.0}, "--rate: got 0.0, expected more than 0"),
        ({"download": True}, "--download: --data=simulator does not read"),
        ({"data_path": "a.csv"}, "--data_path: --data=simulator does not read"),
        ({"data": "hillstrom", "effect": 0.0}, "--effect: --data=hillstrom does not"),
        ({"data": "hillstrom", "control": "a"}, "--control: --data=hillstrom does"),
        ({"data": "table", "data_path": "a.csv"}, "needs --arm_column, --control"),
        (
            {"data": "hillstrom", "data_path": "a.csv", "download": True},
            "one of the two",
        ),
        ({"rows": 24}, "outside a fold of --folds=5; expected at least 11"),
    ],
)
def test_wrong_flags_are_named(tmp_path, options, message):
    config = mtmt.Config(workdir=str(tmp_path), data="simulator", rows=60)
    with pytest.raises(ValueError, match=message):
        mtmt.run(dataclasses.replace(config, **options))


def test_scoring_needs_its_files_and_reads_no_more():
    with pytest.raises(ValueError, match="--predict needs --checkpoint, --output; see"):
        mtmt.run(mtmt.Config(predict=True, input="a.csv"))
    files = {"checkpoint": "a", "input": "b", "output": "c"}
    config = mtmt.Config(predict=True, progress=False, policy_outcome="d", **files)
    for name, value in (("models", "MTMT"), ("folds", 3), ("data_path", "a.csv")):
        with pytest.raises(ValueError, match=f"--{name}: not read with --predict"):
            mtmt.run(dataclasses.replace(config, **{name: value}))
    with pytest.raises(FileNotFoundError, match="expected the folder model/"):
        mtmt.run(config)


def test_networks_that_still_learn_are_named(tmp_path):
    """Best after the last epoch with every seed, not with some."""
    path = tmp_path / "metrics.jsonl"
    assert mtmt.still_learning(tmp_path, 2, "ab", [0, 1]) == []
    errors = {"a": ((3.0, 2.0), (3.0, 2.0)), "b": ((3.0, 2.0), (2.0, 3.0))}
    lines = [
        {"step": i + 1, "model": model, "seed": seed, "loss": 0.0, "validation": v}
        for model, by_seed in errors.items()
        for seed, values in enumerate(by_seed)
        for i, v in enumerate(values)
    ]
    # Of other models, seeds and epochs, which some other run left.
    other = {"step": 2, "model": "c", "seed": 0, "validation": 0.0}
    lines += [other, other | {"model": "a", "seed": 7, "step": 1}]
    lines += [other | {"model": "a", "step": 3}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert mtmt.still_learning(tmp_path, 2, "ab", [0, 1]) == ["a"]
    for line in ("no JSON", '{"step": 2}'):
        path.write_text(f"{line}\n{path.read_text()}")
        assert mtmt.still_learning(tmp_path, 2, "ab", [0, 1]) == []


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["none", "mail"]}, "arms: got .*, expected 3 names"),
        ({"arms": "abc"}, "arms: got 'abc'"),
        ({"outcomes": ["visit", 2, "spend"]}, "outcomes: got"),
        ({"outcomes": None}, "outcomes: got None"),
        ({"mean": [0.0]}, "expected 3 numbers each"),
        ({"sizes": {"hidden": "64"}}, "got hidden='64', expected one like 64"),
        ({"sizes": {"tiers": [[0, 0]]}}, r"got tiers \(1, 2\)"),
        ({"sizes": {"depth": 3}}, "unexpected keyword argument 'depth'"),
        ({"encoder": {"fill": {}}}, "the encoder can't be read"),
        ({"encoder": "WIDE"}, "the model takes 8"),
    ],
)
def test_a_model_with_other_facts_is_named(result, config, tmp_path, changes, message):
    folder = tmp_path / "model"
    shutil.copytree(Path(config.workdir) / "model", folder)
    if "sizes" in changes:
        kept = json.loads((folder / "about.json").read_text())["sizes"]
        changes = {"sizes": kept | changes["sizes"]}
    if changes.get("encoder") == "WIDE":
        kinds = {f"column {i}": "flag" for i in range(9)}
        changes = {"encoder": Encoder(kinds, dict.fromkeys(kinds, 0), {}, {}).to_json()}
    mtmt_model.amend(folder, **changes)
    with pytest.raises(ValueError, match=message):
        mtmt_model.load(folder)

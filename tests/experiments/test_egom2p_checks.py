"""What flags of EgoM2P and of its study must hold before hours of work begin."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import egom2p, egom2p_checks, egom2p_study
from experiments import egom2p_training as training
from experiments.egom2p_tokens import Tokens
from multitask_jax.data.egocentric import MODALITIES, Clips


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "--batch: got 0, expected at least 1"),
        ({"inputs": 0}, "--inputs: got 0"),
        ({"focus": 75}, "--focus: got 75, expected a share"),
        ({"top_p": 80}, "--top_p: got 80"),
        ({"top_p": 0}, "--top_p: got 0, expected a share above 0"),
        (
            {"size": "base", "targets_budget": 200},
            "--targets_budget: got 200, expected at most 128 or a multiple of it",
        ),
        ({"mesh": "data"}, "mesh: got 'data', expected axes and their sizes"),
        ({"mesh": "model=2"}, "mesh: got axes model; expected some of data, fsdp"),
        ({"mesh": "data=4096"}, "needs 4096 devices"),
        ({"mesh": "data=2,fsdp=2", "batch": 6}, "--batch: got 6, .* multiple of 4"),
        (
            {"mesh": "data=1,tensor=4", "size": "mini"},
            "--mesh: got data=1,tensor=4, .* --size=mini: .*: axis of 2 in",
        ),
        ({"masking": "uniform", "focus": 0.5}, "--focus: got 0.5 beside --masking"),
        ({"temperature": -1}, "--temperature: got -1"),
        ({"seed": -1}, "--seed: got -1, expected at least 0"),
        ({"rate": 0.0}, "--rate: got 0.0, expected a number above 0"),
        ({"rate": math.nan}, "--rate: got nan"),
        ({"temperature": math.nan}, "--temperature: got nan, expected a finite number"),
        ({"guidance": math.nan}, "--guidance: got nan"),
        ({"guidance": math.inf}, "--guidance: got inf"),
        ({"clips": 5}, "clips: got 5 for 6 data sets"),
        ({"clips": 11}, "--clips: got 11, 1 of them of maps of test, .* 12 clips"),
    ],
)
def test_numbers_out_of_range_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        egom2p.run(egom2p.Config(workdir=str(tmp_path / "w"), **options))
    assert not (tmp_path / "w").exists()


def test_clips_count_only_where_they_are_recorded(tmp_path):
    few = egom2p.Config(workdir=str(tmp_path), clips=11)
    egom2p_checks.check(dataclasses.replace(few, clips=12))
    egom2p_checks.check(dataclasses.replace(few, stage="tokenize"))
    (tmp_path / "clips").mkdir()  # the user's own
    egom2p_checks.check(few)


def having(*kinds, count=2):
    """So many clips that have some modalities, as far as checks go."""
    present = {k: np.full(count, k in kinds) for k in MODALITIES}
    return Clips({}, present, [""] * count, [""] * count)


def test_clips_of_which_nothing_would_be_measured_are_refused(capsys):
    """Unless no evaluation follows: a model can be made of them, to generate."""
    most, pair = ("rgb", "depth", "gaze"), ("camera", "gaze")
    few, two = having("rgb", "depth", count=1), having("camera", "gaze")
    for train, test in ((most, few), (most, having("rgb", "camera")), (pair, two)):
        with pytest.raises(ValueError, match=r"'rgb -> depth': \d, .* to measure"):
            egom2p_checks.measurable(train, test, "all")
        egom2p_checks.measurable(train, test, "tokenize")
        assert "nothing to measure" in capsys.readouterr().out
    egom2p_checks.measurable(most, having("rgb", "depth"), "all")
    assert not capsys.readouterr().out


def test_after_an_interruption_it_is_told_what_goes_on():
    for stage in ("evaluate", "generate"):
        assert "begins anew" in egom2p.interrupted(egom2p.Config(stage=stage))
    for stage in ("all", "pretrain"):
        assert "goes on" in egom2p.interrupted(egom2p.Config(stage=stage))


def test_a_mesh_that_is_not_there_is_refused(tmp_path):
    config = egom2p.Config(workdir=str(tmp_path), stage="pretrain", mesh="data=4096")
    with pytest.raises(ValueError, match="needs 4096 devices"):
        egom2p_checks.mesh_of(config)
    assert (
        egom2p_checks.mesh_of(dataclasses.replace(config, mesh="data=4,tensor=2")).size
        == 8
    )


def test_a_mesh_and_a_focus_do_not_matter_where_nothing_is_trained():
    egom2p_checks.check(
        egom2p.Config(stage="evaluate", mesh="data=4096", masking="uniform")
    )
    base = egom2p.Config(size="base", stage="pretrain")
    for count in (100, 128, 256):
        egom2p_checks.check(dataclasses.replace(base, targets_budget=count))


@pytest.mark.parametrize(
    "given", [{"temperature": 1.0}, {"top_p": 0.5}, {"guidance": 2.0}, {"schedule": ""}]
)
def test_a_mean_refuses_flags_of_sampling(given):
    config = egom2p.Config(stage="generate", mean=True, **given)
    with pytest.raises(ValueError, match=f"--{next(iter(given))}: .* beside --mean"):
        egom2p.run(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "--batch: got 0, expected at least 1"),
        ({"seeds": 0}, "--seeds: got 0"),
        ({"slow_clips": 0}, "--slow_clips: got 0"),
        ({"focus": 2.0}, "--focus: got 2.0, expected a share"),
        ({"rate": math.nan}, "--rate: got nan, expected a number above 0"),
        ({"size": "base", "targets": 200}, "--targets: got 200, expected at most 128"),
    ],
)
def test_the_studys_numbers_are_checked_first(tmp_path, options, message):
    config = egom2p_study.Config(workdir=str(tmp_path / "study"), **options)
    with pytest.raises(ValueError, match=message):
        egom2p_study.run(config)
    assert not (tmp_path / "study").exists()


def tokens(count, known=True):
    return Tokens(
        np.zeros((count, 4), np.int32),
        np.ones((count, 2), bool),
        np.full((count, 4), known),
    )


def test_no_clips_to_learn_from_are_told():
    with pytest.raises(ValueError, match="no training clip has what"):
        training.batches(tokens(0), 2, seed=0)
    with pytest.raises(ValueError, match="no validation clip has what"):
        training._judge(len, tokens(3, known=False), None)


def test_validation_that_was_asked_for_nothing_chooses_no_checkpoint():
    judge = training._judge(
        lambda *_: (jnp.zeros(()), {"gaze": jnp.full((), jnp.nan)}), tokens(3), None
    )
    with pytest.raises(ValueError, match="validation clips were asked for nothing"):
        judge({})


def test_fewer_clips_than_a_batch_are_told(capsys):
    six = tokens(6)
    assert len(training.batches(six, 8, 0, parts=3)(0).ids) == 6
    assert "only 6 training clips" in capsys.readouterr().out
    training.batches(six, 4, 0, parts=4)
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match=r"only 6 training clips; .* multiple of 4"):
        training.batches(six, 8, 0, parts=4)

"""What flags of EgoM2P and of its study must hold before hours of work begin."""

import dataclasses

import numpy as np
import pytest

from experiments import egom2p, egom2p_checks, egom2p_study
from experiments import egom2p_training as training
from experiments.egom2p_tokens import Tokens


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
        ({"masking": "uniform", "focus": 0.5}, "--focus: got 0.5 beside --masking"),
        ({"temperature": -1}, "--temperature: got -1"),
        ({"seed": -1}, "--seed: got -1, expected at least 0"),
    ],
)
def test_numbers_out_of_range_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        egom2p.run(egom2p.Config(workdir=str(tmp_path / "w"), **options))
    assert not (tmp_path / "w").exists()


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
        ({"size": "base", "targets": 200}, "--targets: got 200, expected at most 128"),
    ],
)
def test_the_studys_numbers_are_checked_first(tmp_path, options, message):
    config = egom2p_study.Config(workdir=str(tmp_path / "study"), **options)
    with pytest.raises(ValueError, match=message):
        egom2p_study.run(config)
    assert not (tmp_path / "study").exists()


def test_no_clips_to_learn_from_are_told():
    nothing = Tokens(*(np.zeros((0, 4), t) for t in (np.int32, bool, bool)))
    with pytest.raises(ValueError, match="no training clip has what"):
        training.batches(nothing, 2, seed=0)

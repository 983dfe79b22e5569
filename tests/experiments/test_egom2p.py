"""EgoM2P from recording to generation, at the smallest size, and its parts."""

import dataclasses
import functools
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import (
    egom2p,
    egom2p_evaluation,
    egom2p_regressor,
    egom2p_study,
    egom2p_study_report,
    egom2p_study_runs,
    egom2p_tokens,
)
from experiments import egom2p_training as training
from experiments.egom2p_tokens import Tokens
from multitask_jax import sharding
from multitask_jax.data import egocentric, poses
from multitask_jax.masked.modalities import flatten
from multitask_jax.models.egom2p import Shape
from tests.experiments.common import from_flagfile
from tests.masked.common import MODALITIES
from tests.masked.test_modalities import random_tokens

SHAPE = Shape(width=16, heads=2, encoder_depth=1, decoder_depth=1)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("egom2p"))
    return from_flagfile(egom2p.Config, "egom2p/smoke", workdir=workdir, progress=False)


@pytest.fixture(scope="module")
def found(config):
    pytest.importorskip("vizdoom", reason="pip install multitask-jax[egocentric]")
    return egom2p.run(config)


def test_full_is_the_default():
    assert from_flagfile(egom2p.Config, "egom2p/full") == egom2p.Config()


def test_everything_is_written(found, config):
    workdir = Path(config.workdir)
    for name in ("config.json", "grid.png", "curves.png", "report.md"):
        assert (workdir / name).stat().st_size
    report = (workdir / "report.md").read_text()
    for task in egom2p_evaluation.TASKS:
        assert task.name in report
        methods = found[task.name]
        more = ["constant of least AbsRel"] if task.wanted == "depth" else []
        assert set(methods) == {
            "EgoM2P, mean", "EgoM2P, shown another clip", "EgoM2P, sample", "constant",
            "first held", "its own tokens", *more,
        }  # fmt: skip
        for measures in methods.values():
            for name, values in measures.items():
                assert values.shape == (2,), name  # 12 clips, 6 data sets
                assert np.isfinite(values).any(), name
    assert "proxy" in report
    for other in ("constant", "constant of least AbsRel", "first held"):
        assert f"**EgoM2P, mean** against **{other}**: better in" in report


def test_a_second_run_does_nothing_anew_and_another_one_is_refused(found, config):
    workdir = Path(config.workdir)
    before = (workdir / "model" / "params").stat().st_mtime_ns
    again = egom2p.run(config)
    assert (workdir / "model" / "params").stat().st_mtime_ns == before
    for task, methods in found.items():
        for method in (m for m in methods if m.startswith("EgoM2P")):
            for name, values in methods[method].items():
                np.testing.assert_array_equal(again[task][method][name], values)
    other = dataclasses.replace(config, steps=11, stage="pretrain")
    with pytest.raises(ValueError, match=r"other settings.*'steps': \(4, 11\)"):
        egom2p.run(other)


def test_evaluation_generates_by_the_seed_given(found, config, monkeypatch):
    """Whatever seed the model was trained by; its folders still fit."""
    seeds = []

    def of_model(*args, seed, **sampling):
        seeds.append(seed)
        raise KeyboardInterrupt

    monkeypatch.setattr(egom2p_evaluation, "of_model", of_model)
    with pytest.raises(KeyboardInterrupt):
        egom2p.run(dataclasses.replace(config, stage="evaluate", seed=5))
    assert seeds == [5]


def test_tasks_that_cannot_be_measured_are_left_out(
    found, config, tmp_path, monkeypatch, capsys
):
    """And no clip is complete, so that none is drawn."""
    for path in Path(config.workdir).iterdir():
        if path.is_dir():
            (tmp_path / path.name).symlink_to(path)
    read = egom2p_tokens.read_clips
    lacking = {"gaze": 2, "depth": 1, "camera": 0}  # of the two test clips

    def read_clips(folder, limit=None):
        clips = read(folder, limit)
        if folder.name == "test":
            for name, count in lacking.items():
                clips.present[name][:count] = False
        return clips

    monkeypatch.setattr(egom2p_tokens, "read_clips", read_clips)
    evaluate = dataclasses.replace(config, workdir=str(tmp_path), stage="evaluate")
    some = egom2p.run(evaluate)
    assert list(some) == ["rgb -> camera"]
    told = capsys.readouterr().out
    assert "rgb -> gaze: left out, 0 test clips have both" in told
    assert "depth -> rgb: left out, 1 test clips have both" in told
    report = (tmp_path / "report.md").read_text()
    assert "| rgb -> camera |" in report
    assert "| depth -> rgb |" not in report
    assert "grid.png" not in report
    assert not (tmp_path / "grid.png").exists()
    lacking["camera"] = 1
    with pytest.raises(ValueError, match="no task can be measured"):
        egom2p.run(evaluate)


def test_without_vizdoom_the_extra_is_named_and_nothing_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    config = egom2p.Config(workdir=str(tmp_path), stage="record")
    with pytest.raises(OSError, match=r"\[egocentric\].*put your own clips into"):
        egom2p.run(config)
    assert not (tmp_path / "clips").exists()


def own_clips(folder, kinds=("camera", "gaze"), count=2, seed=0):
    """Random walks and gazes in the splits, some of them (*synthetic*)."""
    rng = np.random.default_rng(seed)
    camera = np.tile(np.eye(4, dtype=np.float32), (count, egocentric.SAMPLES, 1, 1))
    camera[:, 1:, :3, 3] = rng.normal(size=(count, egocentric.SAMPLES - 1, 3))
    gaze = rng.random((count, *egocentric.SHAPES["gaze"]), np.float32)
    gaze[:, :8] = np.nan  # the first token of each
    arrays = {"camera": camera, "gaze": gaze}
    for split in ("train", "validation", "test"):
        egocentric.save_shard(
            folder / split / "mine.npz", {k: arrays[k] for k in kinds}
        )


def test_a_stage_that_failed_on_its_input_goes_on_when_that_is_mended(config, tmp_path):
    """Of one's own clips, and stages in the wrong order; stale tokens are refused."""

    def stage(name, **changes):
        return egom2p.run(
            dataclasses.replace(config, workdir=str(tmp_path), stage=name, **changes)
        )

    with pytest.raises(FileNotFoundError, match="tokenize"):
        stage("pretrain")
    own_clips(tmp_path / "clips", ("gaze",))
    with pytest.raises(ValueError, match=r"training clips have \['gaze'\], expected"):
        stage("tokenize")
    (tmp_path / "clips" / "train" / "mine.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="can't be read"):
        stage("tokenize")
    own_clips(tmp_path / "clips")
    with pytest.raises(ValueError, match="evaluate has nothing to measure"):
        stage("all")
    stage("tokenize", mirror=False)
    tokens = egom2p_tokens.read(tmp_path / "tokens" / "train.npz")
    assert tokens.known[:, :-8].all()  # of cameras
    assert not tokens.known[:, -8].any()  # of gazes
    assert tokens.known[:, -7:].all()
    # Clips or flags that the tokens are not of make no model.
    with pytest.raises(ValueError, match=r"tokenizers was made .*'mirror'"):
        stage("pretrain")
    own_clips(tmp_path / "clips", seed=1)
    with pytest.raises(ValueError, match=r"tokenizers was made .*'files'"):
        stage("pretrain", mirror=False)
    own_clips(tmp_path / "clips")
    about = tmp_path / "tokens" / "settings.json"
    made = json.loads(about.read_text())
    about.write_text(json.dumps(made | {"codes": "of others"}))
    with pytest.raises(ValueError, match=r"tokens was made .*'codes'"):
        stage("pretrain", mirror=False)
    assert not (tmp_path / "model").exists()
    about.write_text(json.dumps(made))
    stage("pretrain", mirror=False)
    assert (tmp_path / "model" / "params").exists()
    assert not list(tmp_path.glob("*/*.partial"))


def test_a_clip_is_made_of_another_modality(found, config, tmp_path):
    """By model/ and tokenizers/ alone, wherever they were copied to."""
    for name in ("model", "tokenizers"):
        shutil.copytree(Path(config.workdir) / name, tmp_path / "copy" / name)
    clip = next((Path(config.workdir) / "clips" / "test").rglob("*.npz"))
    make = dataclasses.replace(
        config,
        workdir=str(tmp_path / "copy"),
        stage="generate",
        input=str(clip),
        output=str(tmp_path / "made"),
    )
    made = egom2p.run(dataclasses.replace(make, given="rgb", targets="depth,camera"))
    assert made["depth"].shape == (16, 64, 64)
    poses.check(made["camera"])
    assert (tmp_path / "made" / "camera.png").exists()
    (tmp_path / "made" / "note.txt").write_text("mine")
    mean = egom2p.run(
        dataclasses.replace(make, given="rgb", targets="depth", mean=True)
    )
    assert mean["depth"].shape == (16, 64, 64)
    assert (mean["depth"] != made["depth"]).any()
    # Of the pictures that the first call left, those that are not made now are gone.
    files = {p.name for p in (tmp_path / "made").iterdir()}
    assert files == {"made.npz", "depth.gif", "depth.png", "note.txt"}
    # The input is never written to, whatever its name.
    (tmp_path / "link.npz").symlink_to(tmp_path / "made" / "made.npz")
    before = (tmp_path / "made" / "made.npz").read_bytes()
    for name in ("made/made.npz", "made", "link.npz"):
        again = dataclasses.replace(make, input=str(tmp_path / name), targets="rgb")
        with pytest.raises(ValueError, match=r"--input: got .* would be overwritten"):
            egom2p.run(again)
    assert (tmp_path / "made" / "made.npz").read_bytes() == before
    for changes, message in (
        ({"targets": ""}, "needs --input=clip.npz and --targets"),
        ({"targets": "sound"}, "targets: got 'sound'"),
        (
            {"targets": "depth", "given": "depth"},
            "something given that is not a target",
        ),
        ({"targets": "depth", "clip": 99}, "--clip=99: .* has clips 0 to"),
    ):
        with pytest.raises(ValueError, match=message):
            egom2p.run(dataclasses.replace(make, **changes))


def test_by_default_all_is_given_that_the_model_knows(tmp_path, monkeypatch, capsys):
    own_clips(tmp_path)
    known = dict.fromkeys(("rgb", "depth", "camera"))
    model = egom2p_evaluation.Model({}, (), SHAPE, known)
    monkeypatch.setattr("experiments.egom2p_generate.load_model", lambda *_: model)
    monkeypatch.setattr(egom2p.folders, "as_trained", lambda config: config)
    monkeypatch.setattr(egom2p_tokens, "tokenize", lambda *_: None)
    asked = []
    monkeypatch.setattr(
        egom2p_evaluation, "predict", lambda *args, **_: asked.append(args[2]) or {}
    )
    clip = str(tmp_path / "test" / "mine.npz")
    make = egom2p.Config(
        stage="generate", input=clip, targets="depth", output=str(tmp_path / "made")
    )
    egom2p.run(make)
    assert asked == [("camera",)]
    assert "does not know it: gaze" in capsys.readouterr().out
    with pytest.raises(ValueError, match="given: got 'gaze', expected one of"):
        egom2p.run(dataclasses.replace(make, given="gaze"))


def test_a_stage_without_the_one_before_says_which(tmp_path):
    for stage, needed in (
        ("tokenize", "record"), ("pretrain", "tokenize"), ("evaluate", "tokenize")
    ):  # fmt: skip
        bare = egom2p.Config(workdir=str(tmp_path / stage), stage=stage)
        with pytest.raises(
            FileNotFoundError, match=needed if needed != "record" else "clips"
        ):
            egom2p.run(bare)


def tokens(count, seed=0, missing=False):
    ids, present = flatten(
        MODALITIES, random_tokens(np.random.default_rng(seed), count)
    )
    if missing:
        present = np.random.default_rng(seed).random(present.shape) < 0.6
        present[:, 0] = True
    return Tokens(ids, present, np.ones(ids.shape, bool))


SETTINGS = training.Settings(
    steps=6, batch=8, inputs=16, targets=12, evaluate_every=3, rate=1e-2
)


def run(workdir=None, settings=SETTINGS, **options):
    return training.pretrain(
        tokens(32, missing=True),
        tokens(16, seed=1),
        MODALITIES,
        SHAPE,
        settings,
        workdir=workdir,
        progress=False,
        **options,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole") / "run")


def test_training_goes_on_bit_for_bit_after_it_was_stopped(
    whole, tmp_path, monkeypatch
):
    real = training.batches

    def stopping(*args, **options):
        at = real(*args, **options)

        def batch(step):
            if step == 4:
                raise KeyboardInterrupt
            return at(step)

        return batch

    monkeypatch.setattr(training, "batches", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    monkeypatch.setattr(training, "batches", real)
    resumed = run(tmp_path / "cut")
    for a, b in zip(
        jax.tree.leaves(whole.params), jax.tree.leaves(resumed.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert whole.history == resumed.history
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 6]


def test_training_on_a_mesh_is_that_on_one_device(whole):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    born = []
    cut = run(mesh=mesh, start=lambda params: born.append(params) or params)
    kernels = [x for x in jax.tree.leaves(born) if x.ndim > 1]
    assert any(x.sharding.shard_shape(x.shape) != x.shape for x in kernels)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(born)} == {8}
    for a, b in zip(whole.history, cut.history, strict=True):
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=1e-3), name
    with pytest.raises(ValueError, match="got axes model"):
        run(mesh=sharding.make_mesh({"model": 8}))


def test_batches_are_epochs_without_repetition():
    at = training.batches(tokens(10), 4, seed=0)
    of = functools.partial(np.unique, axis=0)
    ids = tokens(10).ids
    for epoch in (0, 1):
        rows = np.concatenate([at(2 * epoch + i).ids for i in range(2)])
        assert len(of(rows)) == 8
        assert len(of(np.concatenate([rows, ids]))) == 10
    np.testing.assert_array_equal(at(1).ids, at(1).ids)
    assert (at(0).ids != at(2).ids).any()


@pytest.fixture(scope="module")
def study(found, config, tmp_path_factory):
    # Tokens of single frames take minutes: see below.
    return from_flagfile(
        egom2p_study.Config,
        "egom2p/study_smoke",
        base=config.workdir,
        workdir=str(tmp_path_factory.mktemp("study")),
        parts="coverage,specialists,decoding,merging",
        tasks="camera",
        progress=False,
    )


@pytest.fixture(scope="module")
def results(study):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(egom2p_study, "SCALES", (0.3, 1.0))  # each is two merges
        return egom2p_study.run(study)


def test_parts_are_measured_and_told(results, study):
    assert set(results) == {"coverage", "specialists", "decoding", "merging"}
    report = (Path(study.workdir) / "report.md").read_text()
    for text in ("(a) ", "(c) ", "specialist regressor", "merged: TIES", "proxy"):
        assert text in report, text
    for name in ("curves", "regressors"):
        assert (Path(study.workdir) / f"{name}.png").stat().st_size
    special = results["specialists"]
    assert set(special) == {"rgb -> camera"}
    for task, methods in special.items():
        for method, measures in methods.items():
            for name, values in measures.items():
                assert np.isfinite(values).any(), (task, method, name)


def test_other_parts_are_told_as_they_were_measured(results, tmp_path):
    seconds = results["decoding"]["seconds"]
    assert len(seconds) == 1
    for by_steps in seconds[0].values():
        assert list(by_steps) == ["1 step", "few steps", "token by token"]
        assert all(s > 0 for s in by_steps.values())
    one = results["coverage"]["all"][0]
    quality = {"rgb": {"psnr": 20.0}, "depth": {"abs_rel": 0.1}}
    told = {
        "decoding": results["decoding"],
        "masking": {"one": one, "another": one},
        "frames": {"measured": {"4": one, "1": one}, "quality": {"4": quality}},
    }
    said = egom2p_study_report.write(tmp_path, told, [])
    assert "measures" in said["decoding"]
    assert "better in 0, worse in 0" in said["masking"]
    report = (tmp_path / "report.md").read_text()
    for text in ("(b) ", "token by token / few", "(d) ", "(e) "):
        assert text in report


def test_a_second_run_trains_and_measures_nothing(results, study, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "pretrain", refuse)
    monkeypatch.setattr(egom2p_regressor, "fit", refuse)
    again = egom2p_study.run(study)
    for task, methods in results["merging"]["measured"].items():
        for method, measures in methods.items():
            for name, values in measures.items():
                np.testing.assert_array_equal(
                    again["merging"]["measured"][task][method][name], values
                )
    with pytest.raises(ValueError, match="steps"):
        egom2p_study.run(dataclasses.replace(study, steps=3))
    with pytest.raises(ValueError, match="parts: got 'all'"):
        egom2p_study.run(dataclasses.replace(study, parts="all"))


def test_the_bases_model_is_copied_if_a_run_would_be_the_same(found, study, tmp_path):
    base = json.loads((Path(study.base) / "model" / "settings.json").read_text())
    own = dataclasses.replace(study, steps=base["steps"], workdir=str(tmp_path / "w"))
    runs = egom2p_study_runs.Study(own)
    runs.share(tmp_path / "all-0", runs.settings())
    assert (tmp_path / "all-0" / "params").is_dir()
    assert not (tmp_path / "all-0" / "params").is_symlink()
    runs.made_of["codes"] = "of other tokenizers"
    runs.share(tmp_path / "other", runs.settings())
    assert not (tmp_path / "other").exists()


def test_tokens_and_models_of_other_tokenizers_are_refused(found, study, config):
    report = Path(config.workdir) / "tokenizers" / "gaze.json"
    before = report.read_text()
    report.write_text(before + " ")
    clip = next((Path(config.workdir) / "clips" / "test").rglob("*.npz"))
    try:
        with pytest.raises(ValueError, match=r"tokens was made with other tokenizers"):
            egom2p_study.run(study)
        with pytest.raises(ValueError, match=r"model was made with other tokenizers"):
            egom2p.run(
                dataclasses.replace(
                    config, stage="generate", input=str(clip), targets="gaze"
                )
            )
    finally:
        report.write_text(before)


def test_what_is_tokenized_is_not_read_again(found, config, monkeypatch):
    one = egom2p_tokens.read_clips(Path(config.workdir) / "clips" / "test", 1)
    monkeypatch.setattr(egom2p_tokens, "read_clips", None)
    egom2p.run(dataclasses.replace(config, stage="tokenize"))
    monkeypatch.setattr(egom2p_tokens, "read_clips", lambda *_: one)  # now, of test
    with pytest.raises(ValueError, match="nothing to measure"):
        egom2p.run(config)


def test_without_a_base_the_command_is_told(tmp_path):
    bare = egom2p_study.Config(base=str(tmp_path), workdir=str(tmp_path / "study"))
    with pytest.raises(FileNotFoundError, match=r"experiments\.egom2p --workdir"):
        egom2p_study.run(bare)
    assert not (tmp_path / "study").exists()


def test_the_studys_flagfile_is_the_default():
    assert from_flagfile(egom2p_study.Config, "egom2p/study") == egom2p_study.Config()


def test_the_base_is_the_first_run_if_it_has_as_many_steps():
    base, own = egom2p.Config(), egom2p_study.Config()
    for mine, its in (("targets", "targets_budget"), *((n, n) for n in (
        "batch", "rate", "inputs", "focus", "evaluate_every",
    ))):  # fmt: skip
        assert getattr(own, mine) == getattr(base, its), mine

"""EgoM2P from recording to generation, at the smallest size, and its parts."""

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import (
    benchmark_egom2p,
    egom2p,
    egom2p_evaluation,
    egom2p_plan,
    egom2p_regressor,
    egom2p_report,
    egom2p_study,
    egom2p_study_report,
)
from experiments import egom2p_training as training
from experiments.egom2p_evaluation import MEASURES, TASKS
from experiments.egom2p_tokens import Tokens
from multitask_jax import sharding
from multitask_jax.data import egocentric, poses
from multitask_jax.data.egocentric import Clips
from multitask_jax.masked import tokenizers
from multitask_jax.masked.modalities import flatten, modality_of
from multitask_jax.masked.tokenizers import types
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


def test_a_mesh_that_is_not_there_is_refused(tmp_path):
    config = egom2p.Config(workdir=str(tmp_path), stage="pretrain", mesh="data=4096")
    with pytest.raises(ValueError, match="needs 4096 devices"):
        egom2p.mesh_of(config)
    assert egom2p.mesh_of(dataclasses.replace(config, mesh="data=4,tensor=2")).size == 8


def test_clips_that_came_later_are_seen(tmp_path):
    (tmp_path / "clips").mkdir()
    config = egom2p.Config(workdir=str(tmp_path))
    for _ in range(2):
        egom2p._same(config, tmp_path / "tokenizers", ("record", "tokenize"))
    (tmp_path / "clips" / "mine.npz").write_bytes(b"1")
    with pytest.raises(ValueError, match=r"made with other settings.*'files'"):
        egom2p._same(config, tmp_path / "tokenizers", ("record", "tokenize"))


def test_a_clip_is_made_of_another_modality(found, config, tmp_path):
    clip = next((Path(config.workdir) / "clips" / "test").rglob("*.npz"))
    make = dataclasses.replace(
        config, stage="generate", input=str(clip), output=str(tmp_path / "made")
    )
    made = egom2p.run(dataclasses.replace(make, given="rgb", targets="depth,camera"))
    assert made["depth"].shape == (16, 64, 64)
    poses.check(made["camera"])
    mean = egom2p.run(
        dataclasses.replace(make, given="rgb", targets="depth", mean=True)
    )
    assert mean["depth"].shape == (16, 64, 64)
    assert (mean["depth"] != made["depth"]).any()
    files = {p.name for p in (tmp_path / "made").iterdir()}
    assert files == {"made.npz", "depth.gif", "depth.png", "camera.png"}
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
    return Tokens(ids, present)


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


def test_training_goes_on_bit_for_bit_after_it_was_stopped(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    real = training.batches

    def stopping(*args):
        at = real(*args)

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


def test_training_on_a_mesh_is_that_on_one_device():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    alone, cut = run(), run(mesh=mesh)
    for a, b in zip(alone.history, cut.history, strict=True):
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


def clips(count=3):
    rng = np.random.default_rng(0)
    arrays = {
        "rgb": rng.integers(0, 256, (count, *egocentric.SHAPES["rgb"]), np.uint8),
        "depth": rng.uniform(1, 9, (count, 16, 64, 64)).astype(np.float32),
        "camera": np.tile(np.eye(4, dtype=np.float32), (count, 64, 1, 1)),
        "gaze": rng.random((count, 64, 2), np.float32),
    }
    arrays["camera"][:, :, 2, 3] = np.linspace(0, 3, 64)
    arrays["gaze"][0, :5] = np.nan
    present = {k: np.ones(count, bool) for k in arrays}
    return Clips(arrays, present, [str(i) for i in range(count)], ["a"] * count)


@pytest.mark.parametrize("kind", egocentric.MODALITIES)
def test_scores_are_best_for_the_truth_and_baselines_are_of_its_shape(kind):
    some = clips()
    truth = some.arrays[kind]
    best = egom2p_evaluation.score(kind, np.nan_to_num(truth), truth)
    for other in (
        egom2p_evaluation.constant(kind, some, len(truth)),
        egom2p_evaluation.copy_first(kind, truth),
    ):
        assert other.shape == truth.shape
        assert other.dtype == truth.dtype
        assert np.isfinite(other).all()
        worse = egom2p_evaluation.score(kind, other, truth)
        for name, (_, more) in egom2p_evaluation.MEASURES[kind].items():
            good, bad = best[name].mean(), worse[name].mean()
            assert good >= bad if more else good <= bad, name


def test_the_best_constant_depth_is_found_by_search():
    """Of few depths at a pixel, none has a smaller mean |x - d| / d."""
    rng = np.random.default_rng(0)
    some = clips(5)
    depth = rng.uniform(0.2, 9, some.arrays["depth"].shape).astype(np.float32)
    depth[0, 0, :8] = np.nan
    some = some._replace(arrays=some.arrays | {"depth": depth})
    best = egom2p_evaluation.least_abs_rel(some, 2, every=1)
    assert best.shape == (2, *depth.shape[1:])
    for i, j in ((0, 0), (10, 50)):
        d = depth[:, :, i, j].reshape(-1)
        d = d[np.isfinite(d)]
        error = [np.mean(np.abs(x - d) / d) for x in (best[0, 0, i, j], *d)]
        assert error[0] <= min(error) + 1e-6


def test_rows_are_spread_evenly():
    np.testing.assert_array_equal(training.spread(10, 5), [0, 2, 4, 6, 8])
    np.testing.assert_array_equal(training.spread(3, 5), [0, 1, 2])


def test_the_paths_first_held_is_no_motion():
    held = egom2p_evaluation.copy_first("camera", clips().arrays["camera"])
    np.testing.assert_array_equal(held, np.tile(np.eye(4), (3, 64, 1, 1)))
    ate = egom2p_evaluation.score("camera", held, clips().arrays["camera"])["ATE"]
    np.testing.assert_allclose(ate, np.sqrt(np.mean(np.linspace(0, 3, 64) ** 2)), 1e-5)


def test_intervals_cover_the_mean():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(100):
        values = rng.normal(1.0, 1.0, 50)
        values[:5] = np.nan
        mean, low, high = egom2p_evaluation.bootstrap(values, seed=seed)
        assert low < mean < high
        hits += low < 1.0 < high
    assert 86 <= hits <= 100


def test_flops_by_formula_are_those_of_the_compiler_without_loops():
    """Six FLOPs a weight and token, for a wide model that attention costs little."""
    shape = Shape(width=768, heads=12, encoder_depth=12, decoder_depth=12)
    few = egom2p_plan.step_flops(shape, inputs=1, targets=0)
    encoder = 12 * (4 * 768**2 + 3 * 768 * 2048)
    cross = 12 * 2 * 768**2  # keys and values of the inputs
    assert few == pytest.approx(6 * (encoder + cross), rel=1e-3)


def test_the_papers_size_compiles_for_meshes_that_are_not_there(tmp_path):
    """Of a flagfile's settings but for the mesh and the batch, to be brief."""
    config = from_flagfile(egom2p_plan.Config, "egom2p/gpu_8", output_dir=str(tmp_path))
    config = dataclasses.replace(config, mesh="data=2,fsdp=2,tensor=2", batch=8)
    plan = egom2p_plan.run(config)
    assert plan.devices == 8
    assert 350e6 < plan.parameters < 450e6
    # Parameters and two moments in float32, over fsdp and tensor but for small leaves.
    assert 12 * plan.parameters / 4 <= plan.state < 12.5 * plan.parameters / 4
    assert plan.temporaries > 0
    assert {"all-reduce", "all-gather"} <= set(plan.exchanged)
    assert "as compiled for a CPU" in (tmp_path / "report.md").read_text()
    for name in ("v5e_256", "gpu_8"):
        told = from_flagfile(egom2p_plan.Config, f"egom2p/{name}")
        axes = sharding.parse_axes(told.mesh)
        assert told.batch % np.prod(list(axes.values())) == 0


def test_the_benchmark_measures_a_step_masks_and_a_batch(tmp_path):
    config = benchmark_egom2p.Config(
        sizes="mini", batch=2, repeats=1, output_dir=str(tmp_path)
    )
    found = benchmark_egom2p.run(config)
    assert set(found) == {"mini", "mini and masks", "masks", "batch"}
    assert all(ms > 0 for ms in found.values())
    assert "masks alone" in (tmp_path / "report.md").read_text()
    with pytest.raises(ValueError, match="sizes: got 'huge'"):
        benchmark_egom2p.run(dataclasses.replace(config, sizes="huge"))


def test_embeddings_and_head_begin_as_the_codes_geometry():
    """Cosines of embeddings are about those of codes, and of the head's columns too."""
    config = tokenizers.Config("gaze", codes=3, width=8, blocks=1, heads=2, samples=8)
    codes = np.array([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0]]) @ np.eye(2, 32)
    variables = {"codebook": SimpleNamespace(codes=codes)}
    tokenizer = tokenizers.Tokenizer(config, variables, None)
    params = {"token_embedding": np.zeros((3, 512)), "head": np.zeros((512, 3))}
    made = training.with_codebooks(
        jax.tree.map(jax.numpy.asarray, params), {"gaze": tokenizer}, jax.random.key(0)
    )
    for x in (made["token_embedding"], made["head"].T):
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        np.testing.assert_allclose(x @ x.T, codes @ codes.T, atol=0.1)
    # Embeddings are as large as places: sines and cosines are .71 on average.
    assert np.sqrt((made["token_embedding"] ** 2).mean()) == pytest.approx(0.8, abs=0.1)


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


@pytest.mark.parametrize("kind", ["depth", "gaze"])
def test_patches_come_back(kind):
    sizes = {"width": 8, "frames": 8, "size": 16, "samples": 16}
    made = tokenizers.Config(kind, **sizes)
    shape = (8, 16, 16, 1) if kind == "depth" else (16, 2)
    x = jax.random.normal(jax.random.key(0), (3, *shape))
    cut = egom2p_regressor.patches(made, x)
    assert cut.shape[1] == np.prod(types.grid(made))
    np.testing.assert_array_equal(egom2p_regressor.signal_of(made, cut), x)


def test_a_specialists_masks_show_one_modality_and_ask_for_another():
    names = [m.name for m in MODALITIES]
    settings = training.Settings(inputs=6, targets=5, task=(names[0], names[2]))
    masks = training.task_masks(jax.random.key(0), 7, MODALITIES, settings)
    of = modality_of(MODALITIES)
    for slots, wanted, room in ((masks.inputs, 0, 6), (masks.targets, 2, 5)):
        position, valid = map(np.asarray, slots)
        count = min(MODALITIES[wanted].length, room)
        np.testing.assert_array_equal(valid.sum(axis=1), count)
        assert (of[position[valid]] == wanted).all()


def test_verdicts_follow_the_interval_of_paired_differences():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(2, 60)) * 10

    def run(shift, seed):
        return {
            task.name: {
                "": {
                    name: base[seed] + (shift if more else -shift)
                    for name, (_, more) in MEASURES[task.wanted].items()
                }
            }
            for task in TASKS
        }

    first, second = ([run(s, i) for i in range(2)] for s in (1.0, 0.0))
    total = sum(len(MEASURES[task.wanted]) for task in TASKS)
    for a, b, said in ((first, second, "better"), (second, first, "worse")):
        text, count = egom2p_report.compared(a, b, ("a", "b"))
        assert count[said] == total
        assert "+- " in text
    noise = [
        jax.tree.map(lambda x: np.asarray(x + rng.normal(size=60)), m) for m in first
    ]
    _, count = egom2p_report.compared(noise, first, ("a", "b"))
    assert count["undecided"] >= total - 2

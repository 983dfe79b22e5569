"""Rows of the study's tables: candidates, tuning, and merges as the command line's."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from experiments import (
    benchmark_merge,
    merge,
    study_candidates,
    study_merges,
    study_tasks,
)
from experiments.study_stand_in import make_base
from multitask_jax import checkpoints, merging
from multitask_jax.models import bert


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("study") / "base")


@pytest.mark.parametrize("budget", [1, 2, 8])
def test_no_method_has_more_candidates_than_the_budget(budget):
    entries = study_candidates.entries(budget)
    assert {e.flags["method"] for e in entries} | set(study_candidates.LEFT_OUT) == set(
        merging.METHODS
    )
    for entry in entries:
        assert 1 <= len(entry.grid) <= budget
        assert len({repr(c) for c in entry.grid}) == len(entry.grid)
        for candidate in entry.grid:
            every = entry.flags | candidate
            if "depth_mean" in every:
                every |= study_merges.lines_of(0.5, every)
                del every["depth_mean"]
            merge.build_method(merge.Config(**every))


@pytest.fixture(scope="module")
def models(base):
    tensors = checkpoints.read_tensors(base)
    rng = np.random.default_rng(1)
    paths = []
    for name in ("a", "b", "c"):
        moved = {
            k: x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype)
            if x.dtype.kind == "f"
            else x
            for k, x in tensors.items()
        }
        paths.append(str(base.with_name(name)))
        bert.save(paths[-1], moved, like=base)
    return merge.Config(base=str(base), models=",".join(paths))


@pytest.mark.parametrize(
    ("flags", "swept"),
    [
        ({"method": "ties", "density": "0.3"}, {"scale": 1.3}),
        ({"method": "task_arithmetic"}, {"scale": 0.3}),
        ({"method": "ties"}, {"lines_alpha": 0.2, "lines_beta": 0.7}),
        ({"method": "consensus"}, {"scale": 1.6}),  # whose default scale is not 1
    ],
)
def test_scaled_task_vectors_are_merges_on_disk(models, tmp_path, flags, swept):
    merger = study_merges.Merger(models, tmp_path)
    got = merger.at(merger.whole(merger.task_vector(**flags)), swept)
    config = dataclasses.replace(models, **flags)
    final = study_merges.merge_on_disk(config, swept, tmp_path / "out", measured=False)
    assert study_merges.difference(got, final.tensors) == 0


def test_tensors_that_a_task_vector_lacks_are_the_bases(models, tmp_path):
    merger = study_merges.Merger(models, tmp_path)
    name = "embeddings.word_embeddings.weight"
    tau = {k: x for k, x in merger.own(0).items() if k != name}
    got = merger.at(merger.whole(tau), {"scale": 0.5})
    np.testing.assert_array_equal(got[name], merger.base[name])
    assert set(got) == set(checkpoints.read_tensors(models.base))
    other = next(k for k in tau if np.any(tau[k]))
    expected = merger.base[other] + 0.5 * tau[other]
    np.testing.assert_allclose(got[other], expected, rtol=1e-6)


def test_one_grid_may_have_scales_and_the_norm_rule(models, tmp_path):
    grid = ({"scale": 1.0}, {"lines_alpha": "norm", "depth_mean": 1.0})
    entry = study_merges.Entry("row", {"method": "ties"}, grid)
    likely = iter([0.0, 1.0])
    merger = study_merges.Merger(models, tmp_path)
    tuned = study_merges.tune(
        entry, merger, lambda _: study_tasks.Score(0.5, next(likely))
    )
    assert tuned.coefficients["lines_alpha"] > 0
    assert tuned.coefficients["lines_beta"] == 0


@pytest.mark.parametrize("method", ["linear", "karcher", "multislerp", "model_stock"])
def test_what_nothing_scales_is_the_command_lines(models, tmp_path, method):
    """theta itself: theta_0 + (theta - theta_0) is a rounding away from it."""
    merger = study_merges.Merger(models, tmp_path)
    entry = study_merges.Entry(method, {"method": method}, ({},))
    got = study_merges.tune(entry, merger, None).tensors
    config = dataclasses.replace(models, method=method)
    final = study_merges.merge_on_disk(config, {}, tmp_path / "out", measured=False)
    assert study_merges.difference(got, final.tensors) == 0


def test_tall_masks_in_memory_are_the_command_lines(models, tmp_path):
    merger = study_merges.Merger(models, tmp_path)
    config = dataclasses.replace(models, method="tall_masks", task=1)
    final = study_merges.merge_on_disk(
        config, {"tall_lambda": "0.3"}, tmp_path / "out", measured=False
    )
    assert study_merges.difference(merger.tall(1, 0.3), final.tensors) == 0


def test_lines_after_a_method_with_statistics(models, tmp_path):
    files = []
    for i, path in enumerate(models.models.split(",")):
        fisher = {
            k: np.full_like(x, i + 1)
            for k, x in checkpoints.read_tensors(path).items()
            if x.dtype.kind == "f"
        }
        files.append(str(tmp_path / f"{i}.safetensors"))
        merging.save_statistics(files[-1], fisher)
    merger = study_merges.Merger(models, tmp_path)
    found = {e.label: e for e in study_candidates.entries(2)}["fisher + LiNeS"]
    found = found._replace(flags=found.flags | {"statistics": ",".join(files)})
    tuned = study_merges.tune(found, merger, lambda x: study_tasks.Score(0.5, -1.0))
    expected = {"depth_mean": 1.0, "lines_alpha": 1.0, "lines_beta": 0.0}
    assert tuned.coefficients == expected
    flags = dataclasses.replace(models, **found.flags)
    final = study_merges.merge_on_disk(
        flags, tuned.coefficients, tmp_path / "out", measured=False
    )
    assert study_merges.difference(tuned.tensors, final.tensors) == 0


def test_the_likeliest_candidate_is_chosen(models, tmp_path):
    merger = study_merges.Merger(models, tmp_path)
    entry = study_merges.Entry(
        "ties", {"method": "ties"}, tuple({"scale": x} for x in (0.5, 1.0, 2.0))
    )
    found = iter([(0.5, -1.0), (0.8, -0.9), (0.7, -0.8)])
    tuned = study_merges.tune(entry, merger, lambda _: study_tasks.Score(*next(found)))
    assert tuned.coefficients == {"scale": 2.0}
    assert [s.accuracy for s in tuned.scores] == [0.5, 0.8, 0.7]


def test_lines_rule_is_each_seeds_own(models, tmp_path):
    """Of coefficients chosen elsewhere the multiple is kept, alpha is not."""
    merger = study_merges.Merger(models, tmp_path)
    every = {e.label: e for e in study_candidates.entries(2)}
    known = {"depth_mean": 3.0, "lines_alpha": 9.0, "lines_beta": 9.0}
    tau = merger.task_vector(method="ties")
    alpha = merger.norm_alpha(tau)
    found = study_merges.tune(every["ties + LiNeS"], merger, None, known)
    beta = float(f"{4 * alpha:.4g}")
    assert found.coefficients == {
        "depth_mean": 3.0, "lines_alpha": alpha, "lines_beta": beta
    }  # fmt: skip
    # Alike at all depths: the mean scale that LiNeS has, by the command line's flags.
    found = study_merges.tune(every["karcher, scaled"], merger, None, known)
    swept = found.coefficients
    assert swept["lines_beta"] == 0.0
    own = merger.norm_alpha(merger.task_vector(method="karcher"))
    assert swept["lines_alpha"] == float(f"{3 * own:.4g}")
    final = study_merges.merge_on_disk(
        dataclasses.replace(models, method="karcher"),
        swept,
        tmp_path / "out",
        measured=False,
    )
    assert study_merges.difference(found.tensors, final.tensors) == 0


def test_memory_that_was_not_seen_is_not_0(models, monkeypatch):
    """As without /proc."""
    monkeypatch.setattr(study_merges, "measure", lambda command: (2.0, 0.0))
    final = study_merges.merge_on_disk(models, {}, Path(models.base), measured=True)
    assert final.record()["merge_megabytes"] is None
    runs = {benchmark_merge.FLOOR: [(2.0, 0.0)]}
    (row,) = benchmark_merge.summarise(runs, {}, 10**9)
    assert row["memory_mb"] is None
    assert benchmark_merge.as_table([row]).endswith("|  |  | 2.0 |\n")


def test_differences_are_seen():
    x = {"a": np.array([1.0, 0.0], np.float32)}
    assert study_merges.difference(x, {"a": x["a"].copy()}) == 0
    assert study_merges.difference(x, {"a": np.array([1.0, -0.0], np.float32)}) > 0
    assert study_merges.difference(x, {"a": x["a"] + 1}) == 1
    with pytest.raises(ValueError, match="tensors differ"):
        study_merges.difference(x, {"b": x["a"]})


def test_means_of_what_is_kept_by_hand(models, tmp_path):
    merger = study_merges.Merger(models, tmp_path)
    own = [merger.own(t) for t in range(3)]
    flat = [np.concatenate([v.reshape(-1) for v in tau.values()]) for tau in own]
    kept = []
    for tau in flat:
        k = len(tau) - int(0.2 * len(tau))
        kept.append(np.where(np.abs(tau) >= np.sort(np.abs(tau))[k - 1], tau, 0))
    count = np.maximum(sum((x != 0).astype(int) for x in kept), 1)
    got = study_merges.mean_of_kept(merger, density=0.2)
    got = np.concatenate([got[k].reshape(-1) for k in own[0]])
    np.testing.assert_allclose(got, sum(kept) / count, rtol=1e-6, atol=1e-9)
    # An oracle that is one of the models keeps that model's own entries.
    first = checkpoints.read_tensors(merger.models[0])
    one = dataclasses.replace(models, models=merger.models[0])
    alone = study_merges.Merger(one, tmp_path)
    got = study_merges.mean_of_kept(alone, density=0.2, reference=first)
    got = np.concatenate([got[k].reshape(-1) for k in own[0]])
    np.testing.assert_array_equal(got, kept[0])

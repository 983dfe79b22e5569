"""mergekit's methods and defaults, against ours with the options that they mean."""

import numpy as np
import pytest

from multitask_jax import merging
from multitask_jax.merging.mergekit import run as mergekit_run
from tests.merging.common import assert_same_bits, load
from tests.merging.test_mergekit import models_in, run

ELECTION = {"election": "weighted_mass", "zero_sign": "positive", "combine": "sum"}
MEAN = ELECTION | {"combine": "mean"}
# mergekit's name -> parameters by model, of the recipe, and what that is in our words.
METHODS = {
    "dare_linear": (
        [{"weight": 0.5, "density": 0.4}, {"weight": 1}],
        {"density": 0.6, "lambda": 0.7},
        lambda: merging.dare(density=(0.4, 0.6), rescale="l1", scale=0.7, seed=3),
    ),
    "dare_ties": (
        [{"weight": 0.5}, {"weight": 1}],
        {"density": 0.6, "rescale": False},
        lambda: merging.dare_ties(density=0.6, rescale="none", seed=3, **ELECTION),
    ),
    "della": (
        [{"weight": 0.5, "epsilon": 0.1, "density": 0.5}, {"weight": 1}],
        {},
        lambda: merging.della_ties(
            density=(0.5, 1.0), epsilon=(0.1, 0.0), rescale="l1", seed=3, **MEAN
        ),
    ),
    "della_linear": (
        [{"weight": 0.5}, {"weight": 1}],
        {"density": 0.6, "epsilon": 0.2},
        lambda: merging.della(density=0.6, epsilon=0.2, rescale="l1", seed=3),
    ),
    "breadcrumbs": (
        [{"weight": 0.5, "gamma": 0.1}, {"weight": 1}],
        {"density": 0.6},
        lambda: merging.breadcrumbs(density=0.6, gamma=(0.1, 0.01)),
    ),
    "breadcrumbs_ties": (
        [{"weight": 0.5}, {"weight": 1}],
        {"density": 0.6, "gamma": 0.1, "normalize": True},
        lambda: merging.breadcrumbs_ties(density=0.6, gamma=0.1, **MEAN),
    ),
    "multislerp": (
        [{"weight": 0.5}, {"weight": 1}],
        {},
        lambda: merging.multislerp(),
    ),
    "nuslerp": ([{"weight": 0.5}, {"weight": 1}], {}, lambda: merging.nuslerp()),
    "ram": ([{}, {}], {"epsilon": 0.05}, lambda: merging.ram(epsilon=0.05)),
    "ramplus_tl": (
        [{}, {}],
        {"epsilon": 0.05, "r": 0.2},
        lambda: merging.ramplus(epsilon=0.05, r=0.2),
    ),
    "nearswap": ([{}], {"t": 0.03}, lambda: merging.nearswap(t=0.03)),
    "arcee_fusion": ([{}], {}, lambda: merging.arcee_fusion()),
    "model_stock": (
        [{}, {}],
        {"filter_wise": True},
        lambda: merging.model_stock(filter_wise=True, ratio="formula"),
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_by_mergekits_names(tmp_path, name):
    folder = models_in(tmp_path, 2, layers=1)
    each, common, ours = METHODS[name]
    names = [f"m{t + 1}" for t in range(len(each))]
    got, _ = run(
        folder,
        tmp_path / "recipe",
        name,
        list(zip(names, each, strict=True)),
        base="base",
        parameters=common,
        seed=3,
    )
    weighted = ours().weighted and len(each) > 1
    merging.merge_checkpoints(
        ours(),
        folder / "base",
        [folder / n for n in names],
        tmp_path / "direct",
        weights=[0.5, 1] if weighted else None,
        progress=False,
        report_files=False,
    )
    want = load(tmp_path / "direct")
    assert got.keys() == want.keys()
    for k, v in want.items():
        np.testing.assert_allclose(got[k], v, rtol=1e-6, atol=1e-7, err_msg=k)
    base = load(folder / "base")
    assert any((got[k] != v).any() for k, v in base.items())


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_random_masks_over_depth_are_one_job(tmp_path, name, monkeypatch):
    """Each layer as if merged alone with its density; nothing is compiled twice."""
    folder = models_in(tmp_path, 1, layers=2)
    streams = []
    original = mergekit_run.Stream

    def spy(*args, **kwargs):
        streams.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(mergekit_run, "Stream", spy)
    common = {"weight": 1, "density": [0.3, 0.7]}
    common |= {"epsilon": [0.1, 0.2]} if name == "della_linear" else {}
    got, _ = run(
        folder, tmp_path / "1", name, [("m1", {})], base="base", parameters=common
    )
    assert len(streams) == 1
    for layer, density, epsilon in ((0, 0.3, 0.1), (1, 0.7, 0.2)):
        method = merging.dare(density=density, rescale="l1")
        if name == "della_linear":
            method = merging.della(density=density, epsilon=epsilon, rescale="l1")
        out = tmp_path / f"layer{layer}"
        merging.merge_checkpoints(
            method,
            folder / "base",
            [folder / "m1"],
            out,
            progress=False,
            report_files=False,
        )
        want = {k: v for k, v in load(out).items() if f"layers.{layer}." in k}
        assert len(want) == 2
        assert_same_bits({k: got[k] for k in want}, want)

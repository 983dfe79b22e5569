"""mergekit's methods and defaults, against ours with the options that they mean."""

import numpy as np
import pytest

from multitask_jax import merging
from tests.merging.common import load
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

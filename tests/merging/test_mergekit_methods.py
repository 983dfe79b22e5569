"""mergekit's methods and defaults, against ours with the options that they mean."""

import numpy as np
import pytest

from multitask_jax import merging
from multitask_jax.merging import execution
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
        lambda: merging.breadcrumbs(density=0.6, gamma=(0.1, 0.01), at_least=0),
    ),
    "breadcrumbs_ties": (
        [{"weight": 0.5}, {"weight": 1}],
        {"density": 0.6, "gamma": 0.1, "normalize": True},
        lambda: merging.breadcrumbs_ties(density=0.6, gamma=0.1, **MEAN),
    ),
    "breadcrumbs, rescaled": (
        [{"weight": 0.5}, {"weight": 1}],
        {"density": 0.6, "rescale": True},
        lambda: merging.breadcrumbs(density=0.6, rescale="l1"),
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
        name.split(",")[0],
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
    original = execution.Stream

    def spy(*args, **kwargs):
        streams.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(execution, "Stream", spy)
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


@pytest.mark.parametrize(
    ("method", "normalize", "share"),
    [("ties", True, 1), ("dare_linear", False, 0.5), ("dare_linear", True, 1 / 3)],
)
def test_densities_beyond_the_range_keep_all_or_nothing(
    tmp_path, method, normalize, share
):
    """What is absent counts in the divisor of a sum, not of an election."""
    folder = models_in(tmp_path, 2, layers=1)
    density = [{"filter": "mlp", "value": 1.5}, {"value": 0}]
    models = [
        ("m1", {"weight": 1, "density": density}),
        ("m2", {"weight": 0.5, "density": 2}),
    ]
    got, _ = run(
        folder,
        tmp_path / "out",
        method,
        models,
        base="base",
        parameters={"normalize": normalize},
    )
    base, m1, m2 = (load(folder / n) for n in ("base", "m1", "m2"))
    k = "layers.0.attn.q.weight"
    want = base[k] + share * (m2[k] - base[k])
    np.testing.assert_allclose(got[k], want, rtol=1e-5, atol=1e-6)
    k = "layers.0.mlp.weight"
    assert not np.isclose(got[k], base[k] + share * (m2[k] - base[k])).all()
    assert (got[k] != base[k]).any()
    assert (m1[k] != base[k]).any()


def test_sce_keeps_none_of_a_small_tensor(tmp_path):
    """Of 6 entries a share of 0.1 is none, of 48 it is 4; ours alone keeps one."""
    folder = models_in(tmp_path, 2, layers=1)
    base = load(folder / "base")
    both = [("m1", {}), ("m2", {})]
    changed = {}
    for topk in (0.1, 0, -1):
        got, _ = run(
            folder,
            tmp_path / str(topk),
            "sce",
            both,
            base="base",
            parameters={"select_topk": topk},
        )
        changed[topk] = {k: int((got[k] != v).sum()) for k, v in base.items()}
    assert changed[0.1]["norm.weight"] == 0
    assert changed[0.1]["embed.weight"] == 4
    assert not any([*changed[0].values(), *changed[-1].values()])
    models = [load(folder / n) for n in ("m1", "m2")]
    ours = merging.merge(merging.sce(topk=0.1), base, models)
    assert (np.asarray(ours["norm.weight"]) != base["norm.weight"]).sum() == 1

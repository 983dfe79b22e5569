"""Parity of the field's other methods with their references (see the data's README)."""

import jax
import numpy as np
import pytest

from multitask_jax import checkpoints, merging
from multitask_jax.merging import sparsify
from tests.merging.test_golden import cases, check


def densities(params):
    d = params["density"]
    return tuple(d) if isinstance(d, list) else d


# mergekit's election and mean, in our words.
def election(params):
    return {
        "election": "weighted_mass",
        "zero_sign": "positive",
        "combine": "mean" if params["normalize"] else "sum",
    }


def test_breadcrumbs(shared):
    for case, f in cases(shared, "breadcrumbs").items():
        p = f["params"]
        common = {"density": densities(p), "gamma": p["gamma"], "scale": p["lambda"]}
        if p["method"] == "breadcrumbs_ties":
            method = merging.breadcrumbs_ties(**common, **election(p))
        else:
            method = merging.breadcrumbs(**common, normalise=p["normalize"])
        check("breadcrumbs", case, method, f, weights=p["weight"])


def test_della(shared, monkeypatch):
    for case, f in cases(shared, "della").items():
        p = f["params"]
        for t, model in enumerate(f["models"]):
            tau = model - f["base"]
            got = sparsify.keep_probabilities(tau, p["density"], p["epsilon"])
            want = f["expected_keep_probability"][t]
            np.testing.assert_allclose(got, want, atol=1e-6)
        # The reference's random numbers in the place of ours.
        uniforms = f["uniforms"]
        monkeypatch.setattr(
            sparsify,
            "uniform",
            lambda shape, *, seed, model, offset, u=uniforms: u[model],
        )
        common = {
            "density": p["density"],
            "epsilon": p["epsilon"],
            "rescale": p["rescale"] or "none",
            "scale": p["lambda"],
        }
        if p["method"] == "della":
            method = merging.della_ties(**common, **election(p))
        else:
            method = merging.della(**common, normalise=p["normalize"])
        check("della", case, method, f, weights=p["weight"])


def space(fields):
    return "task_vectors" if "base" in fields else "parameters"


def test_nuslerp(shared):
    for case, f in cases(shared, "nuslerp").items():
        p = f["params"]
        method = merging.nuslerp(
            flatten=p["flatten"], row_wise=p["row_wise"], space=space(f)
        )
        check("nuslerp", case, method, f, weights=p["weight"])


def test_multislerp(shared):
    for case, f in cases(shared, "multislerp").items():
        p = f["params"]
        method = merging.multislerp(
            normalise=p["normalize_weights"], space=space(f), antiparallel="lerp"
        )
        check("multislerp", case, method, f, weights=p["weight"])


def test_karcher(shared):
    for case, f in cases(shared, "karcher").items():
        p = f["params"]
        method = merging.karcher(max_iter=p["max_iter"], tol=p["tol"])
        check("karcher", case, method, f, weights=p["weight"])


def test_sce(shared):
    for case, f in cases(shared, "sce").items():
        want = f["expected"]
        if want.ndim > f["base"].ndim:  # nothing varies: the reference repeats the base
            assert np.all(want == f["base"])
            f["expected"] = want[0]
        check("sce", case, merging.sce(topk=f["params"]["select_topk"]), f)


def test_ram(shared):
    for case, f in cases(shared, "ram").items():
        p = f["params"]
        options = {k: v for k, v in p.items() if k != "method"}
        check("ram", case, merging.METHODS[p["method"]](**options), f)


def test_nearswap(shared):
    for case, f in cases(shared, "nearswap").items():
        check("nearswap", case, merging.nearswap(t=f["params"]["t"]), f)


def test_magmax(shared):
    for case, f in cases(shared, "magmax").items():
        check("magmax", case, merging.magmax(scale=f["params"]["lambda"]), f)


def test_pcb(shared):
    for case, f in cases(shared, "pcb").items():
        p = f["params"]
        method = merging.pcb(
            density=p["ratio"], clamp_ratio=p["clamp_ratio"], scale=p["lambda"]
        )
        check("pcb", case, method, f)


def test_arcee_fusion(shared):
    for case, f in cases(shared, "arcee_fusion").items():
        method = merging.arcee_fusion(iqr_factor=f["params"]["iqr_factor"])
        check("arcee_fusion", case, method, f)
        merge = jax.jit(lambda b, m, method=method: merging.merge(method, b, m))
        out = np.asarray(merge(f["base"], list(f["models"])))
        moved = f["models"][0] != f["base"]
        np.testing.assert_array_equal(
            out != f["base"], moved & f["expected_mask"].astype(bool)
        )


def multi_task(params):
    if params["multi_task_vector"] == "sum":
        return {"multi_task": "sum"}
    return {"multi_task": "ties", "density": 0.2}


def test_consensus(shared):
    for case, f in cases(shared, "consensus").items():
        p = f["params"]
        method = merging.consensus(
            k=p["consensus_k"],
            tall_lambda=p["tall_lambda"],
            scale=p["lambda"],
            **multi_task(p),
        )
        check("consensus", case, method, f | {"float64_gap": 0.0})


def test_tall_masks(shared):
    for case, f in cases(shared, "tall_masks").items():
        p = f["params"]
        for task in range(3):
            method = merging.tall_masks(
                task=task, tall_lambda=p["tall_lambda"], **multi_task(p)
            )
            want = {k: v[task] for k, v in f["expected"].items()}
            fields = f | {"expected": want, "float64_gap": 0.0}
            check("tall_masks", case, method, fields)


def test_passthrough():
    base, model = {"w": np.zeros(4, np.float32)}, {"w": np.arange(4, dtype=np.float32)}
    out = merging.merge(merging.passthrough(scale=0.5), base, [model])
    np.testing.assert_array_equal(out["w"], [0, 0.5, 1, 1.5])


MERGEKIT = {
    "nuslerp_axis_last": (
        "gpt2",
        2,
        lambda: merging.nuslerp(flatten=False, space="parameters"),
        [0.7, 0.3],
    ),
    "karcher": ("gpt2", 3, lambda: merging.karcher(max_iter=15, tol=1e-6), None),
    "sce_topk": ("t5", 3, lambda: merging.sce(topk=0.5), None),
}


@pytest.mark.parametrize("name", sorted(MERGEKIT))
def test_checkpoints_as_mergekit_merges_them(shared, tmp_path, name):
    arch, count, recipe, weights = MERGEKIT[name]
    root = shared / "golden" / "merging"
    models = root / "models" / arch
    merging.merge_checkpoints(
        recipe(),
        models / "base",
        [models / f"ft{i}" for i in range(1, count + 1)],
        tmp_path / "out",
        weights=weights,
        out_dtype="float32",
        progress=False,
    )
    want = checkpoints.open(root / "mergekit" / name / "expected")
    got = checkpoints.open(tmp_path / "out")
    assert set(got.tensors) | set(got.aliases) == set(want.tensors) | set(want.aliases)
    atol = 1e-6 if name == "sce_topk" else 5e-6
    for path in want.tensors:
        np.testing.assert_allclose(
            got.read(path), want.read(path), rtol=1e-5, atol=atol, err_msg=path
        )

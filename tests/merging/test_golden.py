"""Parity with reference implementations on their inputs (see the data's README)."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax import checkpoints, merging
from multitask_jax.merging import transforms

# Tolerances stated with the data.
ATOL = dict.fromkeys(("slerp", "model_stock"), 5e-6) | dict.fromkeys(
    ("iso_c", "iso_cts", "tsv_m", "knots"), 1e-5
)


def cases(shared: Path, name: str) -> dict[str, dict[str, Any]]:
    """Case -> params and arrays (or trees of arrays)."""
    data = np.load(shared / "golden" / "merging" / "functions" / f"{name}.npz")
    out: dict[str, dict[str, Any]] = {}
    for case in json.loads(str(data["cases"])):
        fields: dict[str, Any] = {}
        for key in data.files:
            parts = key.split("/", 2)
            if parts[0] == case and len(parts) == 2:
                fields[parts[1]] = data[key]
            elif parts[0] == case:
                fields.setdefault(parts[1], {})[parts[2]] = data[key]
        fields["params"] = json.loads(str(fields["params"]))
        out[case] = fields
    return out


def check(name: str, case: str, method: Any, fields: Any, **kwargs: Any) -> None:
    """Within the tolerance stated with the data; eager as jitted is a contract."""
    models = fields["models"]
    if isinstance(models, dict):
        count = len(next(iter(models.values())))
        models = [{k: v[t] for k, v in models.items()} for t in range(count)]
    else:
        models = list(models)
    base = fields.get("base", models[0])
    atol = max(ATOL.get(name, 1e-6), 4 * float(np.max(fields["float64_gap"])))
    out = jax.jit(lambda b, m: merging.merge(method, b, m, **kwargs))(base, models)
    for got, want in zip(
        jax.tree.leaves(out), jax.tree.leaves(fields["expected"]), strict=True
    ):
        np.testing.assert_allclose(
            got, want, atol=atol, rtol=1e-5, err_msg=f"{name}/{case}"
        )


def test_ties_over_the_whole_model(shared):
    for case, f in cases(shared, "ties_global").items():
        p = f["params"]
        method = merging.ties(
            density=p["density"], combine=p["combine"], scale=p["lambda"]
        )
        check("ties_global", case, method, f)
        # Masks are exact.
        trim = merging.chain(transforms.trim(density=p["density"]))
        trimmed = jax.jit(lambda b, m, trim=trim: merging.merge(trim, b, [m]))
        for t in range(len(f["expected_kept"])):
            kept = trimmed(f["base"], {k: v[t] for k, v in f["models"].items()})
            for k in f["base"]:
                changed = np.asarray(kept[k]) != f["base"][k]
                moved = f["models"][k][t] != f["base"][k]
                np.testing.assert_array_equal(
                    changed, moved & f["expected_mask"][k][t].astype(bool)
                )


def test_ties_per_tensor_as_mergekit(shared):
    for case, f in cases(shared, "ties_tensor").items():
        p = f["params"]
        density = p["density"]
        method = merging.ties(
            density=tuple(density) if isinstance(density, list) else density,
            trim_scope="tensor",
            election="weighted_mass",
            zero_sign="positive",
            combine="mean" if p["normalize"] else "sum",
            scale=p["lambda"],
            rescale=p["rescale"] or "none",
        )
        check("ties_tensor", case, method, f, weights=p["weight"])


def test_ties_as_peft(shared):
    for case, f in cases(shared, "peft_ties").items():
        p = f["params"]
        method = merging.ties(
            density=p["density"],
            trim_scope="tensor",
            election="mass" if p["majority"] == "total" else "frequency",
            zero_sign="positive",
            normalise="count",
        )
        check("peft_ties", case, method, f, weights=p["weight"])


def test_magnitude_prune(shared):
    for case, f in cases(shared, "magnitude_prune").items():
        p = f["params"]
        if p["density"] == 0:
            with pytest.raises(ValueError, match=r"density: got 0.0.*\(0, 1\]"):
                merging.magnitude_prune(density=0.0)
            continue
        method = merging.magnitude_prune(density=p["density"])
        check("magnitude_prune", case, method, f, weights=p["weight"])


def test_task_arithmetic(shared):
    for case, f in cases(shared, "task_arithmetic").items():
        p = f["params"]
        method = merging.task_arithmetic(scale=p["lambda"], normalise=p["normalize"])
        check("task_arithmetic", case, method, f, weights=p["weight"])


def test_linear(shared):
    for case, f in cases(shared, "linear").items():
        p = f["params"]
        method = merging.linear(normalise=p["normalize"])
        check("linear", case, method, f, weights=p["weight"])


def test_slerp(shared):
    for case, f in cases(shared, "slerp").items():
        method = merging.slerp(t=f["params"]["t"], antiparallel="lerp")
        check("slerp", case, method, f)


def test_model_stock(shared):
    for case, f in cases(shared, "model_stock").items():
        p = f["params"]
        method = merging.model_stock(
            filter_wise=p.get("filter_wise", False),
            average="angles" if p["variant"] == "mean_of_angles" else "cosines",
        )
        check("model_stock", case, method, f)


def test_dare(shared, monkeypatch):
    for case, f in cases(shared, "dare").items():
        p = f["params"]
        masks = jnp.asarray(f["masks"])
        # The references' masks in the place of our random numbers.
        monkeypatch.setattr(
            transforms,
            "uniform",
            lambda shape, *, seed, model, offset, masks=masks: 1.0 - masks[model],
        )
        rescale = {"l1": "l1", None: "none", "1/density": "density"}[p["rescale"]]
        common = {"density": p["density"], "rescale": rescale}
        if p["method"] == "dare_linear":
            method = merging.dare(
                **common,
                scale=p.get("lambda", 1.0),
                normalise=p.get("normalize", False),
            )
        elif "majority" in p:  # PEFT
            method = merging.dare_ties(
                **common,
                election="mass" if p["majority"] == "total" else "frequency",
                zero_sign="positive",
                normalise="count",
            )
        else:  # mergekit
            method = merging.dare_ties(
                **common,
                election="weighted_mass",
                zero_sign="positive",
                combine="mean" if p["normalize"] else "sum",
                scale=p["lambda"],
            )
        check("dare", case, method, f, weights=p["weight"])


def test_lines_factors(shared):
    for f in cases(shared, "lines_scaling").values():
        p = f["params"]
        for pattern in (None, p["block_pattern"]):
            method = merging.chain(
                merging.scale_by_depth(
                    alpha=p["alpha"], beta=p["beta"], block_pattern=pattern
                )
            )
            zeros = {k: np.zeros_like(v) for k, v in f["delta"].items()}
            out = merging.merge(method, zeros, [f["delta"]])
            for k, want in f["expected_delta"].items():
                np.testing.assert_allclose(out[k], want, atol=1e-6, rtol=1e-5)


MERGEKIT = {
    "linear_weights": ("llama_tied", lambda: merging.linear(), [1.0, 0.5, 0.25]),
    "model_stock": ("clip_vision", lambda: merging.model_stock(ratio="formula"), None),
    "task_arithmetic_lambda_base_listed": (
        "gpt2",
        lambda: merging.task_arithmetic(scale=0.8),
        [0.6, 0.4, -0.2],
    ),
    "ties_weights_densities": (
        "llama",
        lambda: merging.ties(
            density=(0.5, 0.2, 0.7),
            trim_scope="tensor",
            election="weighted_mass",
            zero_sign="positive",
        ),
        [0.5, 0.3, 0.8],
    ),
    "ties_bfloat16_output": (
        "gpt2",
        lambda: merging.ties(
            density=0.4,
            trim_scope="tensor",
            election="weighted_mass",
            zero_sign="positive",
        ),
        [1.0, 1.0, 0.7],
    ),
}


@pytest.mark.parametrize("name", sorted(MERGEKIT))
def test_checkpoints_as_mergekit_merges_them(shared, tmp_path, name):
    arch, recipe, weights = MERGEKIT[name]
    root = shared / "golden" / "merging"
    models = [root / "models" / arch / f"ft{i}" for i in (1, 2, 3)]
    bfloat16 = name == "ties_bfloat16_output"
    merging.merge_checkpoints(
        recipe(),
        root / "models" / arch / "base",
        models,
        tmp_path / "out",
        weights=weights,
        out_dtype="bfloat16" if bfloat16 else "float32",
        progress=False,
    )
    want = checkpoints.open(root / "mergekit" / name / "expected")
    got = checkpoints.open(tmp_path / "out")
    assert set(got.tensors) | set(got.aliases) == set(want.tensors) | set(want.aliases)
    for path, info in want.tensors.items():
        assert got.tensors[path][1:] == info[1:]
        a = got.read(path).astype(np.float32)
        b = want.read(path).astype(np.float32)
        if bfloat16:
            np.testing.assert_allclose(a, b, rtol=2**-8, atol=1e-6)
        else:
            atol = 5e-6 if name == "model_stock" else 1e-6
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("name", ["bert_ties", "vit_ties_lines"])
def test_checkpoints_as_the_ties_notebook_merges_them(shared, tmp_path, name):
    folder = shared / "golden" / "merging" / "whole_model" / name
    recipe = json.loads((folder / "recipe.json").read_text())
    method = merging.ties(
        density=recipe["density"],
        combine=recipe.get("combine", "mean"),
        scale=recipe["lambda"],
    )
    if "lines" in recipe:
        lines = recipe["lines"]
        method = merging.with_lines(method, alpha=lines["alpha"], beta=lines["beta"])
    merging.merge_checkpoints(
        method,
        folder / recipe["base_model"],
        [folder / m for m in recipe["models"]],
        tmp_path / "out",
        progress=False,
    )
    want = checkpoints.open(folder / "expected")
    got = checkpoints.open(tmp_path / "out")
    assert set(got.tensors) | set(got.aliases) == set(want.tensors)
    for path in want.tensors:
        np.testing.assert_allclose(
            got.read(path), want.read(path), rtol=1e-5, atol=1e-6, err_msg=path
        )

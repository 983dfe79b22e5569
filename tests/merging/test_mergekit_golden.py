"""mergekit recipes give what mergekit 0.1.4 gave (see the data's README)."""

import json

import numpy as np
import pytest
import yaml

from multitask_jax import checkpoints, merging

CONFIGS = (
    "karcher",
    "linear_weights",
    "model_stock",
    "nuslerp_axis_last",
    "sce_topk",
    "slerp_gradient_filters",
    "task_arithmetic_lambda_base_listed",
    "task_arithmetic_weight_gradient",
    "ties_bfloat16_output",
    "ties_weights_densities",
)
SPHERICAL = ("karcher", "model_stock", "nuslerp_axis_last", "slerp_gradient_filters")


@pytest.mark.parametrize("name", CONFIGS)
def test_recipes_give_what_mergekit_gives(shared, tmp_path, name):
    folder = shared / "golden" / "merging" / "mergekit" / name
    merging.merge_mergekit(
        folder / "config.yml", tmp_path / "out", progress=False, report_files=False
    )
    want = checkpoints.open(folder / "expected")
    got = checkpoints.open(tmp_path / "out")
    assert set(got.tensors) | set(got.aliases) == set(want.tensors) | set(want.aliases)
    for path, info in want.tensors.items():
        assert got.tensors[path][1:] == info[1:]
        a, b = (r.read(path).astype(np.float32) for r in (got, want))
        if name == "ties_bfloat16_output":
            np.testing.assert_allclose(a, b, rtol=2**-8, atol=1e-6)
        else:
            atol = 5e-6 if name in SPHERICAL else 1e-6
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol, err_msg=path)
    configs = [
        json.loads((p / "config.json").read_text())
        for p in (tmp_path / "out", folder / "expected")
    ]
    for key in ("num_hidden_layers", "n_layer", "num_layers", "vocab_size", "dtype"):
        assert configs[0].get(key) == configs[1].get(key)


def as_slices(content, folder, layers, *, cut):
    """The same merge written as slices; two slices only where nothing has gradients."""
    content = dict(content)
    models = [m | {"model": str(folder / m["model"])} for m in content.pop("models")]
    ranges = [(0, 1), (1, layers)] if cut else [(0, layers)]
    content["slices"] = [
        {"sources": [m | {"layer_range": list(r)} for m in models]} for r in ranges
    ]
    if "base_model" in content:
        content["base_model"] = str(folder / content["base_model"])
    return content


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("slerp_gradient_filters", False),
        ("task_arithmetic_weight_gradient", False),
        ("ties_weights_densities", True),
    ],
)
def test_slices_give_the_same(shared, tmp_path, name, cut):
    folder = shared / "golden" / "merging" / "mergekit" / name
    content = yaml.safe_load((folder / "config.yml").read_text())
    merging.merge_mergekit(
        as_slices(content, folder, 4, cut=cut),
        tmp_path / "out",
        progress=False,
        report_files=cut,
    )
    want = checkpoints.open(folder / "expected")
    got = checkpoints.open(tmp_path / "out")
    assert set(got.tensors) == set(want.tensors)
    for path in want.tensors:
        a, b = got.read(path), want.read(path)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6, err_msg=path)


def test_one_model_whole(shared, tmp_path):
    """passthrough copies, byte for byte, and says so in the report."""
    model = shared / "golden" / "merging" / "models" / "llama_tied" / "ft1"
    content = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
    merging.merge_mergekit(content, tmp_path / "out", progress=False)
    want, got = checkpoints.open(model), checkpoints.open(tmp_path / "out")
    for path, info in want.tensors.items():
        assert got.tensors[path] == info
        np.testing.assert_array_equal(
            got.read(path).view(np.uint16), want.read(path).view(np.uint16)
        )
    report = (tmp_path / "out" / "merge_report.md").read_text()
    assert "merge_method: passthrough" in report

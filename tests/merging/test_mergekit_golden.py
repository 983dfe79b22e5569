"""mergekit recipes give what mergekit 0.1.4 gave (see the data's README)."""

import json

import numpy as np
import pytest

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

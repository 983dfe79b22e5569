"""What mergekit recipes are refused for, and that nothing is written then."""

import json

import numpy as np
import pytest

from multitask_jax import merging
from multitask_jax.checkpoints import CheckpointError
from tests.merging.common import load, save
from tests.merging.test_mergekit import models_in, plain, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models_in(tmp_path_factory.mktemp("models"))


def test_what_is_refused(folder, tmp_path):
    def refused(match, method, models, error=ValueError, **top):
        with pytest.raises(error, match=match):
            run(folder, tmp_path / "out", method, models, **top)
        assert not (tmp_path / "out").exists()

    both = plain("m1", "m2")
    refused("base_model: ties needs one", "ties", both)
    refused("base_model: slerp needs one: the model at t = 0", "slerp", both)
    refused(
        r"parameters.weight: ties needs it, but nothing gives it for embed.weight for"
        r" models\[0\] \(.*m1\)",
        "ties",
        both,
        base="base",
    )
    refused("parameters.t: slerp needs it", "slerp", both, base="m1")
    refused(
        r"models: slerp merges base_model and one other model; got 3, 1 of them",
        "slerp",
        plain("m1", "m2", "m3"),
        base="m1",
        parameters={"t": 0.5},
    )
    refused(
        "models: nuslerp merges exactly 2 models besides base_model, got 3",
        "nuslerp",
        plain("m1", "m2", "m3", weight=1),
        base="base",
    )
    refused("no models besides base_model", "ties", plain("base"), base="base")
    refused(
        r"recipe: models\[0\].parameters.weight, models\[1\].parameters.weight: got"
        r" \(1.0, -1.0\), which add up to 0.*\(for embed.weight\)",
        "linear",
        [("m1", {"weight": 1}), ("m2", {"weight": -1})],
    )
    refused(
        "add up to 0: no average has such weights; .* normalize_weights: false",
        "multislerp",
        [("m1", {"weight": 1}), ("m2", {"weight": -1})],
    )
    for key, value in (("max_iter", 2.5), ("max_iter", 0), ("tol", -1)):
        refused(
            rf"parameters.{key}: got {value}(\.0)?, expected a n",
            "karcher",
            both,
            parameters={key: value},
        )
    refused(
        r"recipe: models\[0\].parameters.gamma: got 2.0, expected a number in \[0, 1\)"
        r" \(for embed",
        "breadcrumbs",
        plain("m1", weight=1, density=0.5, gamma=2),
        base="base",
    )
    refused(
        "parameters.epsilon: got 0.15 with density 0.9",
        "della",
        plain("m1", weight=1, density=0.9),
        base="base",
    )
    refused(
        "dtype: got 'int8', expected one of",
        "linear",
        both,
        dtype="int8",
        parameters={"weight": 1},
    )
    refused(
        "the filter 'self_atn' is in none of 10 names",
        "linear",
        both,
        parameters={"weight": [{"filter": "self_atn", "value": 1}, {"value": 1}]},
    )
    refused(
        "recipe: models: model_stock merges at least 2 models besides base_model, got",
        "model_stock",
        plain("m1"),
        base="base",
    )


def test_a_filter_without_a_fallback_is_an_error(folder, tmp_path):
    with pytest.raises(ValueError, match=r"nothing gives it for embed.weight"):
        run(
            folder,
            tmp_path / "out",
            "linear",
            plain("m1", weight=[{"filter": "mlp", "value": 1}]),
        )


def test_damaged_models_are_named(folder, tmp_path):
    bad = load(folder / "m1")
    bad["layers.2.mlp.weight"][1, 1] = np.nan
    save(tmp_path / "bad", bad)
    for models in ([str(folder / "m2"), "bad"], ["bad", str(folder / "m2")]):
        content = {
            "merge_method": "linear",
            "slices": [
                {"sources": [{"model": m, "layer_range": [a, a + 2]} for m in models]}
                for a in (0, 2)
            ],
            "parameters": {"weight": 1},
        }
        path = tmp_path / "recipe.yml"
        path.write_text(json.dumps(content))
        with pytest.raises(
            CheckpointError, match=r"/bad: tensor 'layers.2.mlp.weight' h"
        ):
            merging.merge_mergekit(path, tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()


def test_models_that_differ(folder, tmp_path):
    other = load(folder / "m1")
    other["classifier.weight"] = np.ones((2, 6), np.float32)
    del other["norm.weight"]
    save(tmp_path / "other", other)
    content = {
        "merge_method": "linear",
        "models": [{"model": str(folder / "m2")}, {"model": str(tmp_path / "other")}],
        "parameters": {"weight": 1},
    }
    with pytest.raises(CheckpointError) as e:
        merging.merge_mergekit(content, tmp_path / "out", progress=False)
    assert "missing in other: norm.weight" in str(e.value)
    assert "only in other: classifier.weight" in str(e.value)
    result = merging.merge_mergekit(
        content, tmp_path / "out", progress=False, allow_missing="base"
    )
    assert any("norm.weight missing in other: copied" in n for n in result.notes)
    assert set(load(tmp_path / "out")) == set(load(folder / "m2"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mistralai/Mistral-7B-v0.1", "models\\[0\\]: mistralai/.* hub, download it"),
        ("m1+lora", r"models\[0\]: m1: no such file or directory"),
        ("./nowhere", r"models\[0\]: ./nowhere: no such file or directory"),
    ],
)
def test_models_that_are_not_there(tmp_path, name, message):
    content = {"merge_method": "karcher", "models": [{"model": name}]}
    with pytest.raises(CheckpointError, match=message):
        merging.merge_mergekit(content, tmp_path / "out")


def test_errors_name_the_file(folder, tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text("merge_method: karcher\nmodels: [{model: nowhere}]")
    with pytest.raises(CheckpointError, match=r"recipe.yml: models\[0\]: nowhere: no"):
        merging.merge_mergekit(path, tmp_path / "out")


def test_the_output_may_not_overlap(folder, tmp_path):
    content = {
        "merge_method": "linear",
        "models": [{"model": str(folder / "m1")}],
        "parameters": {"weight": 1},
    }
    with pytest.raises(CheckpointError, match="overlap"):
        merging.merge_mergekit(content, folder / "m1" / "out", progress=False)
    with pytest.raises(CheckpointError, match="more than max_memory"):
        merging.merge_mergekit(content, tmp_path / "out", max_memory=1)
    with pytest.raises(ValueError, match="threads: got 0"):
        merging.merge_mergekit(content, tmp_path / "out", threads=0)
    with pytest.raises(ValueError, match="a recipe makes a whole model"):
        merging.merge_mergekit(content, tmp_path / "out", output_format="delta")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("n" * 400, "no such file or directory"),
        ("~nobody-of-this-name/model", "no such file or directory"),
        ("\x1b[2J", "control characters"),
        ("nul\0", "control characters"),
        ("a/" * 600, "1200 characters"),
    ],
)
def test_models_that_no_file_system_has(tmp_path, model, message):
    recipe = {"merge_method": "linear", "models": [{"model": model}]}
    recipe["models"][0]["parameters"] = {"weight": 1}
    with pytest.raises(ValueError, match=message) as error:
        merging.merge_mergekit(recipe, tmp_path / "out", progress=False)
    assert "\x1b" not in str(error.value)

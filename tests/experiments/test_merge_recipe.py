"""mergekit recipes on the command line."""

import json

import numpy as np
import pytest

from experiments import merge
from multitask_jax import merging
from tests.merging.common import assert_same_bits, load, make_models, save

RECIPE = """
merge_method: dare_ties
base_model: base
models:
- model: m0
  parameters: {weight: 0.5, density: 0.4}
- model: m1
parameters:
  weight: 1.0  # a comment
  density: 0.6
  int8_mask: true
out_dtype: bfloat16
"""


@pytest.fixture
def recipe(tmp_path):
    base, models = make_models(2, rows=10, blocks=2)
    save(tmp_path / "base", base)
    for t, m in enumerate(models):
        save(tmp_path / f"m{t}", m)
    path = tmp_path / "recipe.yml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_is_run(tmp_path, recipe, capsys):
    out = tmp_path / "out"
    result = merge.run(
        merge.Config(
            mergekit_config=str(recipe), output=str(out), seed=5, progress=False
        )
    )
    printed = capsys.readouterr()
    assert "note: int8_mask: has no effect" in printed.err
    assert f"merged by {recipe} in" in printed.out
    assert result.output == out
    merging.merge_checkpoints(
        merging.dare_ties(
            density=(0.4, 0.6),
            rescale="l1",
            election="weighted_mass",
            zero_sign="positive",
            combine="sum",
            seed=5,
        ),
        tmp_path / "base",
        [tmp_path / "m0", tmp_path / "m1"],
        tmp_path / "direct",
        weights=[0.5, 1.0],
        out_dtype="bfloat16",
        report_files=False,
        progress=False,
    )
    assert_same_bits(load(out), load(tmp_path / "direct"))


def test_the_report_has_the_recipe(tmp_path, recipe):
    out = tmp_path / "out"
    config = merge.Config(
        mergekit_config=str(recipe), output=str(out), seed=5, progress=False
    )
    merge.run(config)
    for name in ("merge_report.md", "README.md"):
        text = (out / name).read_text()
        assert f"--mergekit_config={recipe}" in text
        assert "--seed=5" in text
        assert "--method" not in text
        assert RECIPE.strip() in text  # as it was written, comments too
    report = json.loads((out / "merge_report.json").read_text())
    assert report["recipe"]["yaml"] == RECIPE
    assert report["weights"] == [0.5, 1.0]
    assert len(report["total"]["norms"]) == 2
    # The report makes the same merge again.
    (tmp_path / "again.yml").write_text(report["recipe"]["yaml"])
    merge.run(
        merge.Config(
            mergekit_config=str(tmp_path / "again.yml"),
            output=str(tmp_path / "again"),
            seed=5,
            progress=False,
            report=False,
        )
    )
    assert_same_bits(load(out), load(tmp_path / "again"))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("models", "m0,m1"),
        ("base", "base"),
        ("method", "linear"),
        ("density", "0.5"),
        ("lines_alpha", 0.1),
        ("dtype", "float32"),
        ("include", "x"),
    ],
)
def test_flags_that_the_recipe_has(tmp_path, recipe, flag, value):
    config = merge.Config(
        mergekit_config=str(recipe), output=str(tmp_path / "out"), **{flag: value}
    )
    with pytest.raises(ValueError, match=rf"--{flag}={value}: the recipe of"):
        merge.run(config)


def test_dry_run_prints_the_plan(tmp_path, recipe, capsys):
    merge.run(merge.Config(mergekit_config=str(recipe), dry_run=True))
    printed = capsys.readouterr().out
    assert "mergekit dare_ties" in printed
    assert "models       3: " in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "base",
        "m0",
        "m1",
        "recipe.yml",
    ]


def test_errors_say_where(tmp_path, recipe):
    recipe.write_text(RECIPE.replace("density: 0.6", "densty: 0.6"))
    with pytest.raises(
        ValueError, match=r"recipe.yml: parameters.densty: unknown key; did you mean de"
    ):
        merge.run(merge.Config(mergekit_config=str(recipe), output=str(tmp_path / "o")))
    with pytest.raises(ValueError, match=r"--output: got none"):
        merge.run(merge.Config(mergekit_config=str(recipe)))
    assert not np.any([p.name == "o" for p in tmp_path.iterdir()])

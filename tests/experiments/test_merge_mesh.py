"""--mesh, --sharding_rules, and plans of models that are not there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import merge
from tests.merging.common import assert_same_bits, load, make_models, save

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "torch_dtype": "bfloat16",
}


def run(**kwargs):
    defaults = {"method": "task_arithmetic", "report": False, "progress": False}
    return merge.run(merge.Config(**{**defaults, **kwargs}))


def test_a_mesh_changes_nothing(tmp_path):
    base, models = make_models(2, rows=16, blocks=1)
    paths = [save(tmp_path / str(i), p) for i, p in enumerate((base, *models))]
    flags = {"base": str(paths[0]), "models": f"{paths[1]},{paths[2]}", "scale": 0.4}
    run(**flags, output=str(tmp_path / "a"))
    rules = "mlp/kernel=data,model;embed=None,model;.*="
    run(
        **flags,
        output=str(tmp_path / "b"),
        mesh="data=2,model=4",
        sharding_rules=rules,
    )
    assert_same_bits(load(tmp_path / "a"), load(tmp_path / "b"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mesh": "8"}, "mesh: got '8', expected .* model=8"),
        ({"mesh": "model=16"}, "needs 16 devices, got 8"),
        ({"sharding_rules": ".*="}, "--sharding_rules needs --mesh"),
        ({"mesh": "model=8", "mergekit_config": "x.yml"}, "--mesh: recipes of"),
        ({"mesh": "model=8", "sharding_rules": "x"}, "sharding rules: got 'x'"),
    ],
)
def test_flags_that_make_no_sense(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(models="m", base="b", output=str(tmp_path / "out"), **flags)


def test_a_plan_without_weights(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    inputs = {"base": str(path), "models": f"{path},{path},{path}", "method": "ties"}
    result = run(**inputs, mesh="model=8", dry_run=True)
    assert result.plan in capsys.readouterr().out
    for said in (
        r"tensors      39 merged \(180,800 parameters\)",
        r"mesh         model=8: 8 devices; all tensors stay on the mesh",
        # Four checkpoints of 2 bytes a parameter, on 8 devices.
        r"statistic \(kth\)\n    arguments 180\.\d kB, .*: all-reduce of s32, 24 B at",
        r"merge 8 x \(128, 64\) as \(model, None\)\n    arguments 65\.\d kB, outputs"
        r" 16\.4 kB \(16\.4 kB in place of arguments\).*; collectives: none",
    ):
        assert re.search(said, result.plan), said
    with pytest.raises(ValueError, match="without its weights"):
        run(**inputs, output=str(tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_any_number_of_devices_in_a_plan(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    command = [sys.executable, "-m", "experiments.merge", "--dry_run"]
    command += ["--mesh=data=4,model=16", "--method=task_arithmetic"]
    command += [f"--base={path}", f"--models={path},{path}"]
    out = subprocess.run(
        command, capture_output=True, text=True, cwd=REPOSITORY, check=True
    ).stdout
    assert "data=4, model=16: 64 devices; stacks of tensors come and go" in out
    assert "merge 8 x (128, 64) as (('data', 'model'), None)" in out
    assert out.count("collectives: none") == 6  # shapes

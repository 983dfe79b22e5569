"""Orbax: what it saves is read in slices; damage is an error."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from multitask_jax import checkpoints
from multitask_jax.checkpoints import orbax_file
from multitask_jax.checkpoints.types import CheckpointError
from tests.checkpoints.orbax_common import SAVERS, by_path, halve, train_tree, write


@pytest.mark.parametrize("saver", [s.__name__ for s in SAVERS])
def test_reads_what_orbax_saves(saved, saver):
    reader = checkpoints.open(saved[saver])
    expected = {name: np.asarray(a) for name, a in by_path(train_tree()).items()}
    assert reader.format == "orbax"
    assert set(reader.tensors) == set(expected)
    for name, a in expected.items():
        info = reader.tensors[name]
        assert (info.name, info.shape) == (name, a.shape)
        if name != "step":  # how wide a Python number is stored is Orbax's choice
            assert info.dtype == a.dtype
        assert np.array_equal(reader.read(name).reshape(a.shape), a)
        for start in range(0, a.size, 7):
            for stop in (start, start + 1, start + 5, start + 23, a.size):
                part = reader.read(name, start, min(stop, a.size))
                assert np.array_equal(part, a.reshape(-1)[start:stop])
    reader.close()


def _damaged(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "damaged"))


@pytest.mark.parametrize("saver", ["_save_v1", "_save_standard", "_save_zarr"])
@pytest.mark.parametrize("action", [halve, Path.unlink])
def test_any_file_of_data_lost_is_an_error(saved, tmp_path, saver, action):
    path = _damaged(saved[saver], tmp_path)
    data = [p for p in path.rglob("*") if p.is_file() and p.stat().st_size > 4]
    data = [p for p in data if p.parent.name == "d" or p.name[0].isdigit()]
    assert data
    for file in data:
        action(file)
    with pytest.raises(CheckpointError, match="damaged"):
        _read_all(path)


def _read_all(path: Path) -> None:
    reader = checkpoints.open(path)
    for name in reader.tensors:
        reader.read(name)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"tree_metadata": {"a": 1}}']
)
def test_damaged_metadata_is_an_error(saved, tmp_path, content):
    path = _damaged(saved["_save_v1"], tmp_path)
    (path / "state" / "_METADATA").write_text(content)
    with pytest.raises(CheckpointError, match="_METADATA: damaged"):
        checkpoints.open(path)


def test_a_lost_manifest_or_array_is_an_error(saved, tmp_path):
    path = _damaged(saved["_save_v1"], tmp_path)
    halve(path / "state" / "manifest.ocdbt")
    with pytest.raises(CheckpointError, match=r"damaged.*manifest"):
        checkpoints.open(path)
    (path / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        checkpoints.open(path)


def test_a_chunk_lost_from_what_we_write_is_an_error(tmp_path):
    path = write(tmp_path / "out", {"a/w": np.ones(100)}, max_shard_size=80)
    (path / "pytree" / "a.w" / "3").unlink()
    reader = checkpoints.open(path)
    assert reader.read("a/w", 0, 30).sum() == 30
    with pytest.raises(CheckpointError, match="out: a/w cannot be read"):
        reader.read("a/w", 0, 40)


def test_what_is_no_finished_tree_is_an_error(saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved["_save_step"], run / "3")
    with pytest.raises(CheckpointError, match=r"the steps 3; open one .*run/3"):
        orbax_file.open_reader(run)
    unfinished = tmp_path / "x.orbax-checkpoint-tmp-1"
    shutil.copytree(saved["_save_v1"], unfinished)
    with pytest.raises(CheckpointError, match="incomplete"):
        checkpoints.open(unfinished)
    (run / "3" / "default" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="no _METADATA"):
        checkpoints.open(run / "3")


def test_several_items_have_to_be_told_apart(tmp_path):
    trees = {"model": {"w": np.ones(2)}, "ema": {"w": np.zeros(2)}}
    ocp.save_checkpointables(tmp_path / "x", trees)
    with pytest.raises(CheckpointError, match=r"the items ema, model"):
        checkpoints.open(tmp_path / "x")
    assert orbax_file.open_reader(tmp_path / "x" / "model").read("w").tolist() == [1, 1]


def test_leaves_that_are_no_arrays_are_refused_by_name(tmp_path):
    ocp.save(tmp_path / "x", {"w": np.ones(2), "a": {"name": "text"}})
    with pytest.raises(CheckpointError, match="a/name is a string"):
        checkpoints.open(tmp_path / "x")


def test_a_name_cannot_lead_out_of_the_checkpoint(tmp_path):
    path = write(tmp_path / "out", {"w": np.ones(2)})
    file = path / "pytree" / "_METADATA"
    tree = json.loads(file.read_text().replace('"key": "w"', '"key": "../../w"'))
    file.write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="bad or repeated name"):
        checkpoints.open(path)

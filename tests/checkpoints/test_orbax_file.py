"""Orbax: what it saves is read in slices, and it loads what we write."""

import gc
import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp_v0
import pytest
from flax.training import train_state
from orbax.checkpoint import v1 as ocp

from multitask_jax import checkpoints
from multitask_jax.checkpoints import orbax_file
from multitask_jax.checkpoints.types import CheckpointError, TensorInfo

DTYPES = [
    *(np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.bool_, np.complex64),
    *(np.int64, np.int32, np.int16, np.int8, np.uint64, np.uint32, np.uint16, np.uint8),
    *(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
]
SHAPES = [(), (0,), (3,), (4, 0, 2), (2, 3, 5), (1, 1), (5, 1, 700)]


def _array(shape: tuple[int, ...], dtype: np.dtype, seed: int = 0) -> np.ndarray:
    size = math.prod(shape)
    values = np.random.default_rng(seed).integers(0, 100, size)
    return (values % 2 if dtype.kind == "b" else values).astype(dtype).reshape(shape)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()


def _infos(flat: dict[str, np.ndarray]) -> list[TensorInfo]:
    return [TensorInfo(name, a.shape, a.dtype) for name, a in flat.items()]


def _fill(writer, flat: dict[str, np.ndarray], step: int) -> None:
    """Writes slices of `step` entries, the last ones first."""
    for name, a in reversed(flat.items()):
        for start in reversed(range(0, a.size, step)):
            writer.write(name, start, a.reshape(-1)[start : start + step])


def _write(path: Path, flat: dict[str, np.ndarray], step: int = 77, **options) -> Path:
    with checkpoints.create(path, _infos(flat), format="orbax", **options) as writer:
        _fill(writer, flat, step)
    return path


def _flat(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in leaves}


def _mesh() -> jax.sharding.Mesh:
    return jax.make_mesh(
        (4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )


def _sharding(*axes) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(_mesh(), jax.sharding.PartitionSpec(*axes))


def _state() -> dict:
    """A train state's tree: sharded parameters, lists, host integers, numbers."""
    kernel = np.arange(16 * 8, dtype=np.float32).reshape(16, 8)
    kernel = jax.device_put(kernel, _sharding("x", "y"))
    columns = jax.device_put(jnp.arange(64.0).reshape(2, 32), _sharding(None, "x"))
    return {
        "params": {
            "dense": {"kernel": kernel, "bias": jnp.ones(8, jnp.bfloat16)},
            "blocks": [columns, jnp.float32(3)],
        },
        "opt_state": ({"mu": kernel * 2}, None, {}),
        "count": np.arange(5) + 2**40 + 1,
        "step": 7,
    }


def _save_v1(path: Path) -> None:
    ocp.save(path, _state())


def _save_standard(path: Path) -> None:
    with ocp_v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, _state())


def _save_pytree(path: Path, **options) -> None:
    with ocp_v0.PyTreeCheckpointer(**options) as checkpointer:
        checkpointer.save(path, _state())


def _save_zarr(path: Path) -> None:
    _save_pytree(path, use_ocdbt=False, use_zarr3=False)


def _save_zarr3(path: Path) -> None:
    _save_pytree(path, use_ocdbt=True, use_zarr3=True)


def _save_step(path: Path) -> None:
    with ocp_v0.CheckpointManager(path.parent / "run") as manager:
        manager.save(3, args=ocp_v0.args.StandardSave(_state()))
    (path.parent / "run" / "3").rename(path)


SAVERS = [
    *(_save_v1, _save_standard, _save_pytree, _save_zarr, _save_zarr3, _save_step)
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict:
    """A checkpoint by each of Orbax's ways to save."""
    home = tmp_path_factory.mktemp("saved")
    for save in SAVERS:
        save(home / save.__name__)
    return {save.__name__: home / save.__name__ for save in SAVERS}


@pytest.mark.parametrize("saver", [s.__name__ for s in SAVERS])
def test_reads_what_orbax_saves(saved, saver):
    reader = checkpoints.open(saved[saver])
    expected = {name: np.asarray(a) for name, a in _flat(_state()).items()}
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


@pytest.mark.parametrize("saver", [s.__name__ for s in SAVERS])
def test_restores_with_the_shardings_of_the_target(saved, saver):
    state = _state()
    replicated = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=_sharding()),
        state["params"],
    )
    kernel = replicated["dense"]["kernel"].update(sharding=_sharding("y", "x"))
    replicated["dense"]["kernel"] = kernel
    found = orbax_file.restore(saved[saver], {**state, "params": replicated})
    assert found["params"]["dense"]["kernel"].sharding == _sharding("y", "x")
    assert jax.tree.all(jax.tree.map(np.array_equal, found["params"], state["params"]))


def test_an_item_is_opened_and_restored_by_itself(saved):
    for item in (saved["_save_v1"] / "state", saved["_save_step"] / "default"):
        reader = checkpoints.open(item)
        assert reader.read("params/dense/kernel", 7, 9).tolist() == [7, 8]
        found = orbax_file.restore(item, _state())
        assert int(found["step"]) == 7


def test_restoring_another_tree_or_shape_is_an_error(saved):
    path = saved["_save_v1"]
    state = _state()
    bias = state["params"]["dense"].pop("bias")
    with pytest.raises(CheckpointError, match=r"1 leaves .*dense/bias \(checkp"):
        orbax_file.restore(path, state)
    state["params"]["dense"] |= {"bias": bias, "scale": bias}
    with pytest.raises(CheckpointError, match=r"1 leaves .*dense/scale \(target"):
        orbax_file.restore(path, state)
    state = _state()
    state["params"]["dense"]["bias"] = jnp.ones(7, jnp.bfloat16)
    with pytest.raises(CheckpointError, match=r"dense/bias: the .* \(8,\), .* \(7,\)"):
        orbax_file.restore(path, state)
    columns = jax.ShapeDtypeStruct((2, 32), np.float32, sharding=_sharding("x"))
    state = _state()
    state["params"]["blocks"][0] = columns
    with pytest.raises(CheckpointError, match=r"params/blocks/0: .*divide"):
        orbax_file.restore(path, state)


# Orbax drops its own unfinished tasks when one of them fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_data_are_an_error_to_read_and_to_restore(tmp_path):
    # Large enough not to be stored within the database's own nodes.
    tree = {"w": np.random.default_rng(0).normal(size=(64, 64))}
    ocp.save(tmp_path / "x", tree)
    for file in tmp_path.glob("x/state/ocdbt.process_0/d/*"):
        _halve(file)
    with pytest.raises(CheckpointError, match=r"w cannot be read.* damaged"):
        checkpoints.open(tmp_path / "x").read("w")
    with pytest.raises(CheckpointError, match="x: "):
        orbax_file.restore(tmp_path / "x", tree)
    gc.collect()


def test_a_train_state_is_read_by_path_and_restored_sharded(tmp_path):
    def init() -> train_state.TrainState:
        params = {"dense": {"kernel": jnp.arange(32.0).reshape(8, 4)}}
        return train_state.TrainState.create(
            apply_fn=None, params=params, tx=optax.adam(0.1)
        )

    def shard(leaf) -> jax.sharding.NamedSharding:
        return _sharding("x") if leaf.ndim else _sharding()

    abstract = jax.eval_shape(init)
    shardings = jax.tree.map(shard, abstract)
    state = jax.jit(init, out_shardings=shardings)()
    ocp.save(tmp_path / "x", state)
    reader = checkpoints.open(tmp_path / "x")
    moments = [f"opt_state/0/{m}/dense/kernel" for m in ("mu", "nu")]
    assert sorted(reader.tensors) == sorted(
        ["opt_state/0/count", *moments, "params/dense/kernel", "step"]
    )
    assert reader.read("params/dense/kernel", 5, 8).tolist() == [5, 6, 7]
    target = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        abstract,
        shardings,
    )
    found = orbax_file.restore(tmp_path / "x", target)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, state))
    assert jax.tree.map(lambda a: a.sharding, found) == shardings


@pytest.mark.parametrize("chunk_bytes", [1, 64, 1000, orbax_file.CHUNK_BYTES])
def test_orbax_loads_what_we_write(tmp_path, chunk_bytes):
    flat = {
        f"params/{np.dtype(d).name}/s{i}": _array(s, np.dtype(d), i)
        for d in DTYPES[: None if chunk_bytes > 1000 else 5]
        for i, s in enumerate(SHAPES if chunk_bytes > 100 else SHAPES[:-1])
    }
    flat["long"] = np.array([2**40 + 1, -(2**62)])
    staging = tmp_path / "staging"
    staging.mkdir()
    writer = orbax_file.OrbaxWriter(staging, _infos(flat), chunk_bytes=chunk_bytes)
    _fill(writer, flat, 501)
    writer.finish()
    path = staging.rename(tmp_path / "renamed")
    found = _flat(ocp.load(path))
    assert set(found) == set(flat)
    assert all(isinstance(found[name], np.ndarray) for name in flat)
    assert all(_same(found[name], a) for name, a in flat.items())
    reader = checkpoints.open(path)
    assert list(reader.tensors) == list(flat)
    for name, a in flat.items():
        assert _same(reader.read(name).reshape(a.shape), a)
        assert _same(reader.read(name, 1, 4), a.reshape(-1)[1:4])


def test_what_we_write_is_restored_sharded(tmp_path):
    w = _array((16, 24), np.dtype(np.float32))
    path = _write(tmp_path / "out", {"params/w": w}, max_shard_size=300)
    files = [p for p in path.rglob("*") if p.is_file() and "_" not in p.name]
    assert max(p.stat().st_size for p in files) <= 300
    target = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=_sharding("y", "x"))
    found = orbax_file.restore(path, {"params": {"w": target}})["params"]["w"]
    assert found.sharding == target.sharding
    assert found.addressable_shards[0].data.shape == (8, 6)
    assert _same(found, w)


def test_the_first_version_of_orbax_loads_what_we_write(tmp_path):
    flat = {"params/w": _array((3, 4), np.dtype(np.float32))}
    path = _write(tmp_path / "out", flat)
    with ocp_v0.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.restore(path / orbax_file.ITEM)
    assert _same(found["params"]["w"], flat["params/w"])


def test_threads_write_and_read_slices_of_one_tensor(tmp_path):
    flat = {"w": _array((300, 70), np.dtype(np.float32))}
    info, a = _infos(flat)[0], flat["w"].reshape(-1)
    starts = range(0, a.size, 97)
    with ThreadPoolExecutor(8) as pool:
        with checkpoints.create(
            tmp_path / "out", [info], format="orbax", max_shard_size=4096
        ) as writer:
            list(pool.map(lambda s: writer.write("w", s, a[s : s + 97]), starts))
        reader = checkpoints.open(tmp_path / "out")
        parts = pool.map(lambda s: reader.read("w", s, min(s + 97, a.size)), starts)
        assert _same(np.concatenate(list(parts)), a)


def test_names_and_metadata(tmp_path):
    flat = {"model.layers.0.w": np.ones(2), "a/b/0": np.zeros(1), "weiß η": np.ones(1)}
    path = _write(tmp_path / "out", flat, metadata={"method": "ties"})
    found = ocp.load(path)
    assert set(found) == {"model.layers.0.w", "a", "weiß η"}
    assert found["a"]["b"].keys() == {"0"}
    assert ocp.metadata(path).custom_metadata == {"method": "ties"}
    assert checkpoints.open(path).metadata == {"method": "ties"}


def _damaged(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "damaged"))


def _halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("saver", ["_save_v1", "_save_standard", "_save_zarr"])
@pytest.mark.parametrize("action", [_halve, Path.unlink])
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
    _halve(path / "state" / "manifest.ocdbt")
    with pytest.raises(CheckpointError, match=r"damaged.*manifest"):
        checkpoints.open(path)
    (path / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        checkpoints.open(path)


def test_a_chunk_lost_from_what_we_write_is_an_error(tmp_path):
    path = _write(tmp_path / "out", {"a/w": np.ones(100)}, max_shard_size=80)
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
    with pytest.raises(CheckpointError, match=r"several items \(ema, model\)"):
        checkpoints.open(tmp_path / "x")
    assert orbax_file.open_reader(tmp_path / "x" / "model").read("w").tolist() == [1, 1]


def test_leaves_that_are_no_arrays_are_refused_by_name(tmp_path):
    ocp.save(tmp_path / "x", {"w": np.ones(2), "a": {"name": "text"}})
    with pytest.raises(CheckpointError, match="a/name is a string"):
        checkpoints.open(tmp_path / "x")


def test_a_name_cannot_lead_out_of_the_checkpoint(tmp_path):
    path = _write(tmp_path / "out", {"w": np.ones(2)})
    file = path / "pytree" / "_METADATA"
    tree = json.loads(file.read_text().replace('"key": "w"', '"key": "../../w"'))
    file.write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="bad or repeated name"):
        checkpoints.open(path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.b", "a/b"), "'a.b', which is reserved or another"),
        (("_METADATA",), "reserved"),
        (("manifest.ocdbt",), "reserved"),
        (("..",), "reserved"),
        (("x" * 256,), "255"),
        (("a", "a/b"), "fit in no tree"),
        (("a//b",), "non-empty keys"),
    ],
)
def test_names_that_orbax_cannot_hold_are_refused(tmp_path, names, message):
    infos = [TensorInfo(name, (1,), np.dtype(np.float32)) for name in names]
    with pytest.raises(CheckpointError, match=message):
        checkpoints.create(tmp_path / "out", infos, format="orbax")
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_tensorstore_lacks_is_refused(tmp_path):
    info = TensorInfo("a/w", (1,), np.dtype(np.longdouble))
    with pytest.raises(CheckpointError, match=f"a/w: got {info.dtype}"):
        checkpoints.create(tmp_path / "out", [info], format="orbax")


def test_a_wrong_or_missing_slice_is_an_error(tmp_path):
    info = TensorInfo("w", (4,), np.dtype(np.float32))
    writer = orbax_file.create_writer(tmp_path, [info])
    with pytest.raises(ValueError, match="w: got 1 float64"):
        writer.write("w", 0, np.ones(1))
    with pytest.raises(ValueError, match="within 4"):
        writer.write("w", 3, np.ones(2, np.float32))
    writer.write("w", 0, np.ones(3, np.float32))
    with pytest.raises(CheckpointError, match="not fully written"):
        writer.finish()
    with pytest.raises(CheckpointError, match="no _METADATA"):
        orbax_file.open_reader(tmp_path)

"""Orbax: it loads what we write, and what it cannot hold is refused."""

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp_v0
import pytest
from orbax.checkpoint import v1 as ocp

from multitask_jax import checkpoints
from multitask_jax.checkpoints import orbax_reader, orbax_writer
from multitask_jax.checkpoints.types import CheckpointError, TensorInfo
from multitask_jax.checkpoints.zarr_boxes import CHUNK_BYTES
from tests.checkpoints.orbax_common import (
    array,
    by_path,
    fill,
    same,
    tensor_infos,
    write,
)

DTYPES = [
    *(np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.bool_, np.complex64),
    *(np.int64, np.int32, np.int16, np.int8, np.uint64, np.uint32, np.uint16, np.uint8),
    *(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
]


SHAPES = [(), (0,), (3,), (4, 0, 2), (2, 3, 5), (1, 1), (5, 1, 700)]


@pytest.mark.parametrize("chunk_bytes", [1, 64, 1000, CHUNK_BYTES])
def test_orbax_loads_what_we_write(tmp_path, chunk_bytes):
    flat = {
        f"params/{np.dtype(d).name}/s{i}": array(s, np.dtype(d), i)
        for d in DTYPES[: None if chunk_bytes > 1000 else 5]
        for i, s in enumerate(SHAPES if chunk_bytes > 100 else SHAPES[:-1])
    }
    flat["long"] = np.array([2**40 + 1, -(2**62)])
    staging = tmp_path / "staging"
    staging.mkdir()
    writer = orbax_writer.OrbaxWriter(
        staging, tensor_infos(flat), chunk_bytes=chunk_bytes
    )
    fill(writer, flat, 501)
    writer.finish()
    path = staging.rename(tmp_path / "renamed")
    found = by_path(ocp.load(path))
    assert set(found) == set(flat)
    assert all(isinstance(found[name], np.ndarray) for name in flat)
    assert all(same(found[name], a) for name, a in flat.items())
    reader = checkpoints.open(path)
    assert list(reader.tensors) == list(flat)
    for name, a in flat.items():
        assert same(reader.read(name).reshape(a.shape), a)
        assert same(reader.read(name, 1, 4), a.reshape(-1)[1:4])


def test_the_first_version_of_orbax_loads_what_we_write(tmp_path):
    flat = {"params/w": array((3, 4), np.dtype(np.float32))}
    path = write(tmp_path / "out", flat)
    with ocp_v0.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.restore(path / orbax_writer.ITEM)
    assert same(found["params"]["w"], flat["params/w"])


def test_threads_write_and_read_slices_of_one_tensor(tmp_path):
    flat = {"w": array((300, 70), np.dtype(np.float32))}
    info, a = tensor_infos(flat)[0], flat["w"].reshape(-1)
    starts = range(0, a.size, 97)
    with ThreadPoolExecutor(8) as pool:
        with checkpoints.create(
            tmp_path / "out", [info], format="orbax", max_shard_size=4096
        ) as writer:
            list(pool.map(lambda s: writer.write("w", s, a[s : s + 97]), starts))
        reader = checkpoints.open(tmp_path / "out")
        parts = pool.map(lambda s: reader.read("w", s, min(s + 97, a.size)), starts)
        assert same(np.concatenate(list(parts)), a)


def test_names_and_metadata(tmp_path):
    flat = {"model.layers.0.w": np.ones(2), "a/b/0": np.zeros(1), "weiß η": np.ones(1)}
    path = write(tmp_path / "out", flat, metadata={"method": "ties"})
    found = ocp.load(path)
    assert set(found) == {"model.layers.0.w", "a", "weiß η"}
    assert found["a"]["b"].keys() == {"0"}
    assert ocp.metadata(path).custom_metadata == {"method": "ties"}
    assert checkpoints.open(path).metadata == {"method": "ties"}


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
    writer = orbax_writer.create_writer(tmp_path, [info])
    with pytest.raises(ValueError, match="w: got 1 float64"):
        writer.write("w", 0, np.ones(1))
    with pytest.raises(ValueError, match="within 4"):
        writer.write("w", 3, np.ones(2, np.float32))
    writer.write("w", 0, np.ones(3, np.float32))
    with pytest.raises(CheckpointError, match="not fully written"):
        writer.finish()
    with pytest.raises(CheckpointError, match="no _METADATA"):
        orbax_reader.open_reader(tmp_path)

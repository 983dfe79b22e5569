"""Orbax: which bytes a slice of a tensor touches, and how much memory it takes."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from multitask_jax import checkpoints
from multitask_jax.checkpoints import orbax_reader, zarr_boxes
from multitask_jax.checkpoints.types import CheckpointError, TensorInfo
from tests.checkpoints.orbax_common import same

sizes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@given(sizes, st.data())
def test_boxes_are_the_flat_range(shape, data):
    a = np.arange(math.prod(shape)).reshape(shape)
    stop = data.draw(st.integers(0, a.size))
    start = data.draw(st.integers(0, stop))
    found = [a[box] for box in zarr_boxes.boxes(shape, start, stop)]
    assert len(found) <= max(1, 2 * len(shape) - 1)
    assert [i for part in found for i in np.ravel(part)] == [*range(start, stop)]


@given(sizes, st.integers(1, 8), st.integers(1, 2000), st.data())
def test_chunks_are_flat_ranges_of_at_most_the_limit(shape, item, limit, data):
    chunk = zarr_boxes.chunk_shape(shape, item, limit)
    assert math.prod(chunk) * item <= max(limit, item)
    a = np.arange(math.prod(shape)).reshape(shape)
    stop = data.draw(st.integers(0, a.size))
    start = data.draw(st.integers(0, stop))
    at = start
    for file, before, low, high in zarr_boxes.spans(shape, chunk, start, stop):
        assert low == at < high
        index = [int(i) for i in file.split(".")] if shape else []
        corner = [slice(i * c, (i + 1) * c) for i, c in zip(index, chunk, strict=True)]
        block = np.ravel(a[tuple(corner)])
        assert block[before : before + high - low].tolist() == [*range(low, high)]
        at = high
    assert at == stop


def test_a_large_stored_chunk_is_decoded_once(tmp_path, monkeypatch):
    w = np.random.default_rng(0).normal(size=(1024, 64)).astype(np.float32)
    ocp.save(tmp_path / "x", {"w": w, "b": w[:50]})
    monkeypatch.setattr(orbax_reader, "CHUNK_BYTES", 1000)
    reader = orbax_reader.open_reader(tmp_path / "x")
    assert reader.cache_bytes == w.nbytes
    assert same(reader.read("w", 100, 999), w.reshape(-1)[100:999])
    for file in tmp_path.glob("x/*/ocdbt.process_0/d/*"):
        file.unlink()
    assert same(reader.read("w", 65000, 65536), w.reshape(-1)[65000:])
    with pytest.raises(CheckpointError, match="b cannot be read"):
        reader.read("b")
    reader.close()


def test_a_small_stored_chunk_is_decoded_once_too(tmp_path):
    """A sample of the whole model reads many slices of it."""
    w = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    ocp.save(tmp_path / "x", {"w": w})
    reader = orbax_reader.open_reader(tmp_path / "x")
    assert reader.cache_bytes == 0
    assert same(reader.read("w", 100, 999), w.reshape(-1)[100:999])
    for file in tmp_path.glob("x/*/ocdbt.process_0/d/*"):
        file.unlink()
    assert same(reader.read("w", 4000, 4096), w.reshape(-1)[4000:])
    reader.close()


def _resident_growth(reader, name: str, entries: int) -> int:
    before = _anonymous()
    most = 0
    for start in range(0, reader.tensors[name].size, entries):
        part = reader.read(name, start, start + entries)
        most = max(most, _anonymous() - before)
        del part
    return most


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("shape", [(1 << 26,), (2, 1 << 25)])
def test_reading_slices_takes_the_memory_of_slices(tmp_path, shape):
    info = TensorInfo("w", shape, np.dtype(np.float32))  # 256 MiB
    with checkpoints.create(tmp_path / "x", [info], format="orbax") as writer:
        for start in range(0, info.size, 1 << 22):
            writer.write("w", start, np.full(1 << 22, start, np.float32))
    reader = checkpoints.open(tmp_path / "x")
    assert reader.read("w", (1 << 22) - 1, (1 << 22) + 1).tolist() == [0, 1 << 22]
    assert _resident_growth(reader, "w", 1 << 20) < info.nbytes // 2
    reader.close()

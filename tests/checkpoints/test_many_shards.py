"""Thousands of shards, and few file descriptors."""

import subprocess
import sys

import numpy as np
import pytest

from multitask_jax import checkpoints
from multitask_jax.checkpoints import CheckpointError, TensorInfo
from multitask_jax.checkpoints.writing import OpenFiles

SHARDS = """
import os, resource, sys
import numpy as np
from concurrent.futures import ThreadPoolExecutor
from multitask_jax import checkpoints
from multitask_jax.checkpoints import TensorInfo

resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
path, count = sys.argv[1], 3000
infos = [TensorInfo(f"t{i}", (8,), np.dtype(np.float32)) for i in range(count)]
halves = [(i, start) for start in (0, 4) for i in range(count)]  # each file twice
with (
    checkpoints.create(path, infos, max_shard_size=32) as writer,
    ThreadPoolExecutor(4) as pool,
):
    value = lambda i, start: np.arange(start, start + 4, dtype=np.float32) + 8 * i
    done = pool.map(lambda a: writer.write(f"t{a[0]}", a[1], value(*a)), halves)
    list(done)
readers = [checkpoints.open(path), checkpoints.open(path)]
for reader in readers:
    read = np.concatenate([np.array(reader.read(t.name)) for t in infos])
    np.testing.assert_array_equal(read, np.arange(8 * count, dtype=np.float32))
    reader.read("t0")  # mapped again
print(len(os.listdir(path)), len(os.listdir("/proc/self/fd")))
for reader in readers:
    reader.close()
print(len(os.listdir("/proc/self/fd")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts /proc/self/fd")
def test_3000_shards_with_200_descriptors(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", SHARDS, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    files, held, after = map(int, run.stdout.split())
    assert files == 3001
    assert held < 100
    assert after < 40


def test_a_shard_replaced_by_another_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr("multitask_jax.checkpoints.safetensors_file.MOST_MAPS", 1)
    infos = [TensorInfo(name, (8,), np.dtype(np.float32)) for name in "ab"]
    with checkpoints.create(tmp_path / "x", infos, max_shard_size=32) as writer:
        for info in infos:
            writer.write(info.name, 0, np.ones(8, np.float32))
    reader = checkpoints.open(tmp_path / "x")
    reader.read("b")
    first = next((tmp_path / "x").glob("*-00001-*"))
    first.write_bytes(first.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match=r"00001-of.*4 bytes now.*changed mean"):
        reader.read("a")


def test_open_files_keeps_the_latest(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(b"--")
    files = OpenFiles(most=2)
    used = []
    for path in [*paths, paths[2], paths[0]]:
        with files.use(path) as fd, files.use(path) as second:
            assert fd != second  # two threads at once
            used.append(fd)
    assert used[2] == used[3]  # c stayed open
    files.close()
    with files.use(paths[0]):  # may be used again
        pass
    files.close()


def test_a_few_entries_of_a_large_tensor_are_read_as_a_map_has_them(tmp_path):
    size = 1 << 20
    infos = [TensorInfo(name, (size,), np.dtype(np.float32)) for name in "ab"]
    values = np.arange(2 * size, dtype=np.float32).reshape(2, size)
    with checkpoints.create(tmp_path / "x", infos) as writer:
        for info, row in zip(infos, values, strict=True):
            writer.write(info.name, 0, row)
    file = tmp_path / "x" / "model.safetensors"
    reader = checkpoints.open(file)
    for start, stop in ((0, 5), (7, 7), (size - 3, size), (100, 20_000), (5, size)):
        got = reader.read("b", start, stop)
        np.testing.assert_array_equal(got, values[1, start:stop])
        assert not got.flags.writeable
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"ends before 'b': it was changed"):
        reader.read("b", size - 3, size)
    reader.close()

import errno
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from multitask_jax import checkpoints
from multitask_jax.checkpoints import CheckpointError, TensorInfo, staging

INFO = [TensorInfo("a", (4,), np.dtype(np.float32))]


def write(path, value=1.0, **kwargs):
    with checkpoints.create(path, INFO, **kwargs) as writer:
        writer.write("a", 0, np.full(4, value, np.float32))


def test_missing_path_suggests(tmp_path):
    write(tmp_path / "llama-math")
    with pytest.raises(CheckpointError, match=r"no such file.*did you mean llama-math"):
        checkpoints.open(tmp_path / "lama-math")


def test_not_a_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"not a checkpoint: found notes\.txt"):
        checkpoints.open(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="found nothing"):
        checkpoints.open(tmp_path / "empty")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "a.ckpt", "a.pkl"])
def test_pickles_are_refused_unopened(tmp_path, name):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=r"is a pickle.*safe_serialization"):
            checkpoints.open(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("format", ["safetensors", "orbax", "msgpack"])
def test_formats_are_told_apart(tmp_path, format):
    write(tmp_path / "a", format=format)
    reader = checkpoints.open(tmp_path / "a")
    assert reader.format == format
    np.testing.assert_array_equal(reader.read("a"), np.ones(4, np.float32))
    reader.close()
    with pytest.raises(ValueError, match="got format 'gguf', expected one of safet"):
        write(tmp_path / "b", format="gguf")


def test_output_must_not_exist_unless_overwritten(tmp_path):
    write(tmp_path / "a", 1.0)
    with pytest.raises(CheckpointError, match=r"exists; pass overwrite"):
        write(tmp_path / "a", 2.0)
    write(tmp_path / "a", 3.0, overwrite=True)
    assert checkpoints.open(tmp_path / "a").read("a")[0] == 3.0
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_overwrite_deletes_only_checkpoints(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        write(tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


def test_overwrite_deletes_no_folder_of_several_checkpoints(tmp_path):
    """A trainer's with a folder a step, or one of an Orbax item and logs."""
    trainer, runs = tmp_path / "trainer", tmp_path / "runs"
    write(trainer)
    (trainer / "1_Pooling").mkdir()  # as sentence encoders have it
    (trainer / "1_Pooling" / "config.json").write_text("{}")
    write(trainer, overwrite=True)
    write(trainer / "checkpoint-500")
    write(tmp_path / "orbax", format="orbax")
    item = next(p.parent for p in (tmp_path / "orbax").rglob("_METADATA"))
    shutil.copytree(item, runs / "final")
    (runs / "logs").mkdir()
    checkpoints.open(runs).close()  # it can be read
    before = sorted(tmp_path.rglob("*"))
    for path in (trainer, runs):
        with pytest.raises(CheckpointError, match="more than one checkpoint"):
            write(path, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
    write(tmp_path / "orbax", 2.0, format="orbax", overwrite=True)


def test_output_and_inputs_may_not_overlap(tmp_path):
    write(tmp_path / "in")
    for path in (tmp_path / "in", tmp_path / "in" / "out", tmp_path):
        with pytest.raises(CheckpointError, match="overlap"):
            write(path, overwrite=True, inputs=[tmp_path / "in"])
    file = tmp_path / "in" / "model.safetensors"
    with pytest.raises(CheckpointError, match="overlap"):
        write(tmp_path / "in", overwrite=True, inputs=[file])


def test_a_failure_leaves_nothing(tmp_path):
    def fail_half_way():
        with checkpoints.create(tmp_path / "a", INFO, overwrite=True) as writer:
            writer.write("a", 0, np.zeros(2, np.float32))
            raise RuntimeError("half-way")

    write(tmp_path / "a", 1.0)
    with pytest.raises(RuntimeError, match="half-way"):
        fail_half_way()
    assert checkpoints.open(tmp_path / "a").read("a")[0] == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_disk_full_is_told_before_work(tmp_path, monkeypatch):
    def full(fd, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match=r"no room for the output: it takes 16 b"):
        write(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_disk_full_for_real(tmp_path):
    """A limit on file size (as a full disk) in a process of its own."""
    code = f"""
import resource, signal, numpy as np
from multitask_jax import checkpoints
from multitask_jax.checkpoints import TensorInfo
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
info = [TensorInfo("a", (100000,), np.dtype(np.float32))]
try:
    with checkpoints.create({str(tmp_path / "out")!r}, info) as writer:
        writer.write("a", 0, np.zeros(100000, np.float32))
except checkpoints.CheckpointError as e:
    print(e)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "no room for the output: it takes 400,000 bytes" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_output_and_the_next_one_cleans_up(tmp_path):
    code = f"""
import time, numpy as np
from multitask_jax import checkpoints
from multitask_jax.checkpoints import TensorInfo
info = [TensorInfo("a", (4,), np.dtype(np.float32))]
with checkpoints.create({str(tmp_path / "out")!r}, info) as writer:
    writer.write("a", 0, np.zeros(2, np.float32))
    print("half", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.iterdir()
    assert re.fullmatch(rf"\.out\.partial-0-[A-Za-z0-9]+-{process.pid}", left.name)
    time.sleep(0.05)
    write(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_output_moved_half_way_is_restored(tmp_path):
    """Killed between the two renames of an overwrite: the old output comes back."""
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    write(tmp_path / "out", 5.0)
    name = staging.replaced(tmp_path / "out").name.rpartition("-")[0]
    (tmp_path / "out").rename(tmp_path / f"{name}-{gone.pid}")
    with pytest.raises(CheckpointError, match="exists"):
        write(tmp_path / "out", 6.0)
    assert checkpoints.open(tmp_path / "out").read("a")[0] == 5.0


def test_two_writers_of_one_path_do_not_disturb_each_other(tmp_path):
    def overtaken():
        with checkpoints.create(tmp_path / "out", INFO) as writer:
            write(tmp_path / "out", 2.0)
            writer.write("a", 0, np.ones(4, np.float32))

    with pytest.raises(CheckpointError, match="exists"):
        overtaken()
    assert checkpoints.open(tmp_path / "out").read("a")[0] == 2.0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file, not a directory"):
        write(tmp_path / "file" / "out")


def test_companions_are_copied_but_not_weights_or_cards(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    target.mkdir()
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "generation_config.json",
        "chat_template.jinja",
        "merges.txt",
        "README.md",
        "model.safetensors.index.json",
        "model.safetensors",
        "pytorch_model.bin",
    ):
        (source / name).write_text(name)
    copied = checkpoints.copy_companions(source, target)
    assert sorted(copied) == sorted(p.name for p in target.iterdir())
    assert set(copied) == {
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "generation_config.json",
        "chat_template.jinja",
        "merges.txt",
    }


def test_attach_goes_on_with_files_in_the_making(tmp_path):
    infos = [TensorInfo(n, (4,), np.dtype(np.float32)) for n in "abc"]
    first = checkpoints.create(tmp_path / "out", infos, max_shard_size=32)
    first.write("a", 0, np.full(4, 1, np.float32))
    args = (first.directory, tmp_path / "out")
    with pytest.raises(CheckpointError, match="of another merge"):
        checkpoints.attach(*args, [infos[2], infos[1]])
    second = checkpoints.attach(*args, infos, max_shard_size=32)
    assert second.shards == [["a", "b"], ["c"]]
    second.skip(["a"])
    second.write("b", 0, np.full(4, 2, np.float32))
    second.write("c", 0, np.full(4, 3, np.float32))
    second.commit()
    reader = checkpoints.open(tmp_path / "out")
    assert [reader.read(n)[0] for n in "abc"] == [1, 2, 3]
    reader.close()

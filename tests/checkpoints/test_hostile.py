"""Files made to harm: refused with a message, at once, in bounded memory."""

import json
import os
import struct
import subprocess
import sys
import time

import msgpack
import numpy as np
import pytest
from safetensors.numpy import save_file

from multitask_jax import checkpoints
from multitask_jax.checkpoints import CheckpointError, json_file, lora_config
from multitask_jax.checkpoints.delta_file import fingerprint
from multitask_jax.merging.emr_files import TaskFile
from multitask_jax.merging.mergekit.vocabularies import read_vocabulary
from multitask_jax.merging.task_statistics import StatisticsFile
from tests.merging.common import save


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refused(path, message, *more):
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoints.open(path, *more)
    assert time.perf_counter() - started < 5
    text = str(error.value)
    assert path.name in text
    assert len(text) < 5000
    text.encode()


EIGHT = b"\0" * 8
HEADERS = {
    "float shape": (raw({"a": entry([2.0])}, EIGHT), "natural numbers"),
    "bool shape": (raw({"a": entry([True, 2])}, EIGHT), "natural numbers"),
    "text offsets": (raw({"a": entry(offsets=["0", 8])}, EIGHT), "expected a range"),
    "bool offsets": (raw({"a": entry(offsets=[False, 8])}, EIGHT), "expected a range"),
    "NaN": (raw({"a": entry([float("nan")])}, EIGHT), "natural numbers"),
    "no list": (raw({"a": entry({"0": 2})}, EIGHT), "natural numbers"),
    "a long shape": (raw({"a": entry([1] * 100_000)}, EIGHT), "100000 axes"),
    "a huge product": (raw({"a": entry([2**57] * 60)}, EIGHT), r"fewer than 2\*\*58"),
    "huge and empty": (
        raw({"a": entry([0, 2**57, 2**57], (0, 0))}),
        r"fewer than 2\*\*58",
    ),
    "a number of digits": (raw(b'{"a": ' + b"9" * 9000 + b"}"), "not valid JSON"),
    "a long name": (raw({"n" * 1025: entry()}, EIGHT), "1025 characters"),
    "NUL in a name": (raw({"a\0": entry()}, EIGHT), "control characters"),
    "escapes in a name": (raw({"\x1b[2J": entry()}, EIGHT), "control characters"),
    "half a pair": (raw({"\ud800": entry()}, EIGHT), "surrogates"),
    "half a pair in bytes": (raw(b'{"\xed\xa0\x80": {}}'), "not valid JSON"),
    "UTF-16": (raw('{"a": 1}'.encode("utf-16")), "not valid JSON"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "expected texts by name"),
    "metadata of another type": (raw({"__metadata__": [1]}), "expected texts by name"),
    "deep": (raw(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"), "deep.safetensors"),
    "an empty tensor amid another": (
        raw({"a": entry(), "b": entry([0], [4, 4])}, EIGHT),
        "overlapping",
    ),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers(tmp_path, kind):
    content, message = HEADERS[kind]
    path = tmp_path / "deep.safetensors"
    path.write_bytes(content)
    refused(path, message)


def test_what_the_format_allows_is_read(tmp_path):
    """Any order in the header, empty tensors anywhere between others, odd names."""
    header = {
        "b": entry([1], [4, 8]),
        "none": entry([0, 3], [4, 4]),
        "a": entry([1], [0, 4]),
        "last": entry([5, 0], [8, 8]),
        "é/ü \u4e2d": entry([], [8, 12]),
    }
    data = np.arange(3, dtype=np.float32).tobytes()
    (tmp_path / "x.safetensors").write_bytes(raw(header, data))
    reader = checkpoints.open(tmp_path / "x.safetensors")
    assert list(reader.tensors) == ["a", "none", "b", "last", "é/ü \u4e2d"]
    assert [reader.read(n).tolist() for n in reader.tensors] == [[0], [], [1], [], [2]]


def test_headers_of_many_values_are_refused_before_they_are_parsed(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(json_file, "MAX_VALUES", 1000)
    (tmp_path / "x.safetensors").write_bytes(raw(b'{"a": [' + b"{}," * 999 + b"{}]}"))
    refused(tmp_path / "x.safetensors", "more than 1,000 values")


def test_memory_is_bounded_by_the_file_not_by_its_claims(tmp_path):
    """In 200 MB of memory on top, where each of these claims 10**18 and more."""
    big = 10**18
    ext = msgpack.ExtType(1, msgpack.packb(((2**40, 2**17), "int8", b"x")))
    files = {
        "header.safetensors": struct.pack("<Q", big) + b"{}",
        "shape.safetensors": raw({"a": entry([big], [0, 4 * big])}, EIGHT),
        "empty.safetensors": raw({"a": entry([0, big], [0, 0])}, EIGHT),
        "map.msgpack": b"\xdf\xff\xff\xff\xff" + b"\xa1a\x01" * 100,
        "text.msgpack": b"\x81\xdb\xff\xff\xff\xff" + b"a" * 100,
        "array.msgpack": msgpack.packb({"w": ext}),
        # Every leaf would repeat the names above it.
        "names.msgpack": (b"\x81\xda\x03\xe8" + b"n" * 1000) * 60
        + b"\xdd\x00\x07\xa1\x20"
        + b"\x01" * 500_000,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    script = """
import resource, sys
from multitask_jax import checkpoints
import multitask_jax.checkpoints.msgpack_file
held = next(int(x.split()[1]) for x in open("/proc/self/status") if "VmData" in x)
resource.setrlimit(resource.RLIMIT_DATA, ((held << 10) + (200 << 20),) * 2)
for path in sys.argv[1:]:
    try:
        checkpoints.open(path)
    except checkpoints.CheckpointError as e:
        print(e)
    else:
        raise SystemExit(f"{path} was accepted")
"""
    paths = [str(tmp_path / name) for name in files]
    done = subprocess.run(
        [sys.executable, "-c", script, *paths], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(files)


# -- paths -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../evil.safetensors", "expected one in this directory"),
        ("/dev/zero", "expected one in this directory"),
        ("a/../../evil.safetensors", "expected one in this directory"),
        ("..\\evil.safetensors", "expected one in this directory"),
        ("C:evil.safetensors", "expected one in this directory"),
        ("..", "expected one in this directory"),
        ("", "expected one in this directory"),
        ("nul\0", "expected one in this directory"),
        ("\ud800.safetensors", "expected one in this directory"),
        ("n" * 300, "expected one in this directory"),
        (5, "expected file names"),
        (None, "expected file names"),
        (["a.safetensors"], "expected file names"),
        ("gone.safetensors", "is missing"),
        ("folder.safetensors", "is missing"),
        ("pipe.safetensors", "is missing"),
    ],
)
def test_an_index_names_plain_files_beside_it(tmp_path, name, message):
    home = tmp_path / "model"
    (home / "folder.safetensors").mkdir(parents=True)
    os.mkfifo(home / "pipe.safetensors")
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "evil.safetensors")
    index = home / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    refused(home, message)


def test_links_are_followed_but_not_from_an_index(tmp_path):
    """A hub's cache keeps files as links to blobs beside the snapshots."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"w": np.ones(2, np.float32)}, blobs / "123")
    (snapshot / "model-1.safetensors").symlink_to("../../blobs/123")
    index = snapshot / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "model-1.safetensors"}}')
    assert checkpoints.open(snapshot).read("w").tolist() == [1, 1]
    index.write_text('{"weight_map": {"w": "../../blobs/123"}}')
    refused(snapshot, "expected one in this directory")
    (snapshot / "model-1.safetensors").unlink()
    (snapshot / "model-1.safetensors").symlink_to("model-1.safetensors")
    index.write_text('{"weight_map": {"w": "model-1.safetensors"}}')
    refused(snapshot, "is missing")


@pytest.mark.parametrize("name", ["x.safetensors", "x.msgpack"])
def test_what_is_no_file_neither_hangs_nor_ends(tmp_path, name):
    os.mkfifo(tmp_path / name)
    refused(tmp_path / name, "expected a regular file")
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / name).symlink_to("/dev/zero")
    refused(tmp_path / "zero", "expected a regular file")
    (tmp_path / "folder" / name).mkdir(parents=True)
    refused(tmp_path / "folder", "expected a regular file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_pipes_beside_the_weights_do_not_hang(tmp_path, name):
    path = save(tmp_path / "model", {"w": np.ones(2, np.float32)})
    os.mkfifo(path / name)
    refused(path, "expected a regular file")


# -- changes of a base -----------------------------------------------------------------


def adapter(path, tensors, **config):
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1} | config
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a?" * 30 + "a" * 30, "may take too long"),
        ("(a|a)" * 30 + "b", "may take too long"),
        (".*" * 9 + "x", "may take too long"),
        ("a{99999999999999999999}", "is no regex"),
        ("(?i)a", "is no regex"),  # fine alone, but not within another
        ("(?x)a #", "is no regex"),
        ("[[a]", "is no regex"),  # a FutureWarning
    ],
)
def test_patterns_that_never_end(tmp_path, pattern, message):
    base = checkpoints.open(save(tmp_path / "base", {"a" * 40: np.ones((2, 2), "f4")}))
    module = "base_model.model." + "a" * 40
    tensors = {
        f"{module}.lora_A.weight": np.ones((1, 2), np.float32),
        f"{module}.lora_B.weight": np.ones((2, 1), np.float32),
    }
    path = adapter(tmp_path / "lora", tensors, rank_pattern={pattern: 1})
    refused(path, message, base)


def test_patterns_of_ordinary_models_are_matched(tmp_path):
    names = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(80) for x in "qkvo"]
    about = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 1.0,
        "rank_pattern": {
            r"^.*\.layers\.\d+\.self_attn\.(q|k)_proj": 8,
            "79.self_attn.o_proj": 16,
        },
        "alpha_pattern": {r"layers\.(0|1|2|3|4|5|6|7)\.self_attn\.v_proj": 2.0},
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    config = lora_config.read_config(tmp_path / "adapter_config.json")
    lora_config.check_cost("config", config, names)
    assert [config.rank_of(n) for n in names[:4]] == [8, 8, 4, 4]
    assert config.rank_of(names[-1]) == 16
    assert config.scaling(names[2]) == 0.5


def test_lora_of_tensors_without_entries(tmp_path):
    base = {"e.weight": np.ones((3, 0), np.float32), "w.weight": np.ones((2, 2), "f4")}
    tensors = {
        "e.lora_A.weight": np.ones((1, 0), np.float32),
        "e.lora_B.weight": np.ones((3, 1), np.float32),
        "w.lora_A.weight": np.ones((1, 2), np.float32),
        "w.lora_B.weight": np.full((2, 1), np.nan, np.float32),
    }
    path = adapter(tmp_path / "lora", tensors)
    reader = checkpoints.open(path, checkpoints.open(save(tmp_path / "base", base)))
    assert reader.read("e.weight").shape == (0,)
    assert np.isnan(reader.read("w.weight")).all()


def test_a_whole_tensor_with_nan_is_no_other_tensor(tmp_path):
    base = {"w.weight": np.ones((2, 2), np.float32), "w.bias": np.ones(2, np.float32)}
    tensors = {"base_model.model.w.bias": np.array([np.nan, 1], np.float32)}
    path = adapter(tmp_path / "lora", tensors, bias="all")
    reader = checkpoints.open(path, checkpoints.open(save(tmp_path / "base", base)))
    np.testing.assert_array_equal(reader.read("w.bias"), [np.nan, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # Differences of these wrap around to natural numbers in int64.
        ({"starts/a": [0, 2**63 - 1, 2**64 - 2, 3]}, "does not fit together"),
        ({"starts/a": [0, 3, 2, 3]}, "does not fit together"),
        ({"starts/a": [1, 1, 2, 3]}, "does not fit together"),
        ({"positions/a": [5, 7, 60000]}, "does not fit together"),  # beyond the end
        ({"values/a": np.array([1, 2, 3])}, "expected floats"),
        ({"positions/a": [7, 7, 9]}, "a: positions out of order"),
        ({"values/i": np.ones(0, "f4")}, "expected floats"),
        ({"__metadata__": {"format": "multitask_jax.delta"}}, "got metadata"),
    ],
)
def test_sparse_deltas_that_lie(tmp_path, change, message):
    theta = {"a": np.zeros(140_000, np.float32), "i": np.arange(3)}
    base = checkpoints.open(save(tmp_path / "base", theta))
    starts = [0, 2, 2, 3] if "positions/a" in change else [0, 1, 2, 3]
    tensors = {
        "values/a": np.ones(3, np.float32),
        "positions/a": np.array([5, 7, 9], np.uint16),
        "starts/a": np.array(starts, np.uint64),
    }
    about = {
        "format": "multitask_jax.delta",
        "version": "1",
        "base": fingerprint(base),
    }
    about = change.get("__metadata__", about)
    for name, x in change.items():
        if name != "__metadata__":
            tensors[name] = np.asarray(x, tensors.get(name, np.asarray(x)).dtype)
    if "values/a" in change:
        tensors["values/a"] = change["values/a"]
    path = tmp_path / "delta"
    path.mkdir()
    save_file(tensors, path / "delta.safetensors", metadata=about)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoints.open(path, base).read("a")
    assert str(path) in str(error.value)


# -- task files, statistics, tokenizers ------------------------------------------------


@pytest.mark.parametrize(
    "tensors",
    [
        {"__rescale__": np.zeros(0), "__sample__": np.zeros(1, np.float32)},
        {"__rescale__": np.ones(2), "__sample__": np.zeros(1, np.float32)},
        {"__rescale__": np.ones(1), "__sample__": np.zeros((1, 1), np.float32)},
        {"__rescale__": np.ones(1), "__sample__": np.array([True])},
        {"__rescale__": np.array([np.inf]), "__sample__": np.zeros(1, np.float32)},
    ],
)
def test_task_files(tmp_path, tensors):
    path = tmp_path / "t.safetensors"
    save_file(tensors, path, metadata={"format": "multitask_jax.emr_task"})
    with pytest.raises(CheckpointError, match=r"t\.safetensors: no finite"):
        TaskFile(path)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ([1, 1], None),
        ([np.nan, np.nan], "of another merge"),
        ([1], "a sample of 1 entries"),
    ],
)
def test_samples_of_task_files(tmp_path, sample, message):
    readers = [
        checkpoints.open(save(tmp_path / name, {"w": np.full(2, x, np.float32)}))
        for name, x in (("base", 1), ("merged", 2))
    ]
    tensors = {
        "__rescale__": np.ones(1),
        "__sample__": np.array(sample, np.float32),
        "w": np.array([0b11000000], np.uint8),
    }
    metadata = {"format": "multitask_jax.emr_task", "base": fingerprint(readers[0])}
    save_file(tensors, tmp_path / "t.safetensors", metadata=metadata)
    task = TaskFile(tmp_path / "t.safetensors")
    if message is None:
        task.check_merge(*readers)
        return
    with pytest.raises(CheckpointError, match=message):
        task.check_merge(*readers)


@pytest.mark.parametrize(
    "axes", ["[", "[]", '{"w": 1}', '{"w": {"axes": "01", "batch": []}}', "[" * 9999]
)
def test_statistics_files(tmp_path, axes):
    path = tmp_path / "s.safetensors"
    metadata = {"statistics": "gram", "axes": axes}
    save_file({"w": np.eye(2, dtype=np.float32)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="damaged: its metadata"):
        StatisticsFile(path)


def test_an_orbax_directory_is_no_statistics(tmp_path):
    path = save(tmp_path / "o", {"w": np.ones(2, np.float32)}, format="orbax")
    with pytest.raises(CheckpointError, match="a checkpoint, not statistics"):
        StatisticsFile(path)


def test_chunks_that_no_memory_holds(tmp_path):
    """tensorstore would end the process by std::bad_alloc."""
    w = {"w": np.arange(5, dtype=np.float32)}
    path = save(tmp_path / "o", w, format="orbax")
    (about,) = path.rglob(".zarray")
    about.write_text(about.read_text().replace('"chunks":[5]', f'"chunks":[{2**40}]'))
    refused(path, "w claims chunks of 4,398,046,511,104 bytes")


@pytest.mark.parametrize(
    "vocabulary",
    ['{"a": 1e3}', '{"\\ud800": 1}', '{"a": 0, "a": 1}', '{"a": -1}', "[1]", "[" * 99],
)
def test_tokenizers(tmp_path, vocabulary):
    (tmp_path / "vocab.json").write_text(vocabulary)
    with pytest.raises(CheckpointError, match=r"vocab\.json"):
        read_vocabulary(tmp_path)


def test_names_in_msgpack(tmp_path):
    array = msgpack.ExtType(1, msgpack.packb(((1,), "float32", b"1234")))
    wide = msgpack.ExtType(1, msgpack.packb(((0, 2**60, 2**60), "int8", b"")))
    flat = msgpack.ExtType(1, msgpack.packb(([1] * 65, "float32", b"1234")))
    for content, message in (
        ({"a" * 1025: array}, "1025 characters"),
        ({"a" * 600: {"b" * 600: array}}, "1201 characters"),
        ({"a\0": array}, "control characters"),
        ({"a" * 5000: array}, "a name of 5000 bytes"),
        ({"w": wide}, r"below 2\*\*58"),
        ({"w": flat}, "65 axes"),
    ):
        (tmp_path / "x.msgpack").write_bytes(msgpack.packb(content))
        refused(tmp_path / "x.msgpack", message)


def test_limits_leave_room_for_large_models():
    """400,000 tensors in one header, where mixtures of experts have 100,000."""
    name = "model.layers.61.mlp.experts.255.down_proj.weight"
    text = json.dumps({name: entry([7168, 2048], [10**12, 10**12 + 10**7], "BF16")})
    values = sum(map(text.count, ",[{"))
    assert 400_000 * values < json_file.MAX_VALUES
    assert 400_000 * len(text) < json_file.MAX_BYTES


def test_pipes_among_the_companions_do_not_hang(tmp_path):
    """Cards and settings that are no files are left alone, or refused."""
    from multitask_jax import merging

    w = {"w": np.ones(2, np.float32)}
    base = save(tmp_path / "base", w, format="msgpack")
    models = [save(tmp_path / "m", w)]
    for name in ("README.md", "config.json", "notes.txt"):
        os.mkfifo(base / name)
    merging.merge_checkpoints(
        merging.task_arithmetic(), base, models, tmp_path / "out", progress=False
    )
    assert checkpoints.open(tmp_path / "out").read("w").tolist() == [1, 1]
    assert not (tmp_path / "out" / "notes.txt").exists()

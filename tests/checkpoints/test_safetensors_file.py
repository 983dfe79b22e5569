import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from multitask_jax import checkpoints
from multitask_jax.checkpoints import CheckpointError, TensorInfo, safetensors_file
from multitask_jax.checkpoints.safetensors_file import DTYPES
from multitask_jax.checkpoints.safetensors_writer import plan_shards


def header_and_data(header: object, data: bytes = b"", length: int | None = None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


ARRAYS = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.arange(4, dtype=np.float16),
    "brain": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "double": np.arange(3, dtype=np.float64) / 3,
    "long": np.array([2**40 + 1, -5], np.int64),
    "flag": np.array([True, False, True]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 7), np.float32),
    "small": np.array([1.5, 240.0], ml_dtypes.float8_e4m3fn),
}


def write(path, arrays, **kwargs):
    infos = [TensorInfo(k, v.shape, v.dtype) for k, v in arrays.items()]
    with checkpoints.create(path, infos, **kwargs) as writer:
        for k, v in arrays.items():
            middle = v.size // 2  # in two pieces, the second first
            writer.write(k, middle, v.reshape(-1)[middle:])
            writer.write(k, 0, v.reshape(-1)[:middle])


def read(path):
    reader = checkpoints.open(path)
    return {
        k: np.array(reader.read(k)).reshape(info.shape)
        for k, info in reader.tensors.items()
    }


@pytest.mark.parametrize("max_shard_size", [None, 40, 1])
def test_round_trip(tmp_path, max_shard_size):
    write(tmp_path / "a", ARRAYS, max_shard_size=max_shard_size)
    got = read(tmp_path / "a")
    assert got.keys() == ARRAYS.keys()
    for k, v in ARRAYS.items():
        assert got[k].dtype == v.dtype
        np.testing.assert_array_equal(
            got[k].reshape(-1).view(np.uint8), v.reshape(-1).view(np.uint8)
        )
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    if max_shard_size:
        index = json.loads((tmp_path / "a" / files[-1]).read_text())
        assert list(index["weight_map"]) == list(ARRAYS)
        assert index["metadata"]["total_size"] == sum(v.nbytes for v in ARRAYS.values())
        assert len(files) == len(set(index["weight_map"].values())) + 1
    else:
        assert files == ["model.safetensors"]


def test_the_reference_library_reads_what_we_write_and_the_reverse(tmp_path):
    arrays = {k: v for k, v in ARRAYS.items() if k != "small"}
    write(tmp_path / "ours", arrays)
    theirs = safetensors.numpy.load_file(tmp_path / "ours" / "model.safetensors")
    for k, v in arrays.items():
        np.testing.assert_array_equal(theirs[k], v)
    safetensors.numpy.save_file(arrays, tmp_path / "theirs.safetensors")
    for k, v in read(tmp_path / "theirs.safetensors").items():
        np.testing.assert_array_equal(v, arrays[k])


@given(
    st.dictionaries(
        st.text("abc.é", min_size=1, max_size=5),
        hnp.arrays(
            st.sampled_from([np.float32, np.float16, np.int64, np.bool_, np.uint8]),
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        ),
        max_size=5,
    )
)
def test_round_trip_of_any_shapes(tmp_path_factory, arrays):
    path = tmp_path_factory.mktemp("any") / "out"
    write(path, arrays)
    got = read(path)
    for k, v in arrays.items():
        assert got[k].shape == v.shape
        np.testing.assert_array_equal(got[k], v)


def test_slices_are_views(tmp_path):
    write(tmp_path / "a", ARRAYS)
    reader = checkpoints.open(tmp_path / "a")
    part = reader.read("matrix", 3, 7)
    np.testing.assert_array_equal(part, [3, 4, 5, 6])
    assert not part.flags.owndata
    assert not part.flags.writeable


DAMAGE = {
    "no header": (b"abc", "got 3 bytes"),
    "huge header": (header_and_data({}, length=1 << 60), "claims 1152921504606846976"),
    "not json": (header_and_data(b"{nonsense"), "not valid JSON"),
    "a list": (header_and_data([1]), "not an object"),
    "deep": (header_and_data(b"[" * 100000), "JSON"),
    "missing field": (
        header_and_data({"a": {"dtype": "F32"}}),
        "expected dtype, shape and data_offsets",
    ),
    "unknown dtype": (
        header_and_data({"a": entry("F4")}, b"\0" * 8),
        "got dtype 'F4', expected one of F64",
    ),
    "dtype of another type": (header_and_data({"a": entry(["F32"])}), "got dtype"),
    "negative shape": (header_and_data({"a": entry(shape=(-2,))}), "natural numbers"),
    "shape of strings": (header_and_data({"a": entry(shape=("2",))}), "natural"),
    "beyond the end": (
        header_and_data({"a": entry(shape=(4,), offsets=(0, 16))}, b"\0" * 8),
        "within the 8 bytes",
    ),
    "reversed": (header_and_data({"a": entry(offsets=(8, 0))}, b"\0" * 8), "range"),
    "size lies": (
        header_and_data({"a": entry(shape=(3,))}, b"\0" * 8),
        "takes 12: the file is damaged",
    ),
    "overlap": (
        header_and_data(
            {"a": entry(offsets=(0, 8)), "b": entry(offsets=(4, 12))}, b"\0" * 12
        ),
        "overlapping tensors or a hole",
    ),
    "hole": (
        header_and_data({"a": entry(offsets=(4, 12))}, b"\0" * 12),
        "overlapping tensors or a hole",
    ),
    "bytes left over": (
        header_and_data({"a": entry()}, b"\0" * 12),
        "does not describe the whole file",
    ),
    "a name twice": (
        header_and_data(b'{"a": 1, "a": 2}'),
        "occurs twice",
    ),
    "huge shape": (
        header_and_data({"a": entry(shape=(1 << 62, 1 << 62))}, b"\0" * 8),
        r"natural numbers below 2\*\*58: damaged",
    ),
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_damage_is_named(tmp_path, damage):
    content, message = DAMAGE[damage]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.open(path)


@pytest.mark.parametrize("keep", [0, 7, 8, 40, -1])
def test_truncation_is_named(tmp_path, keep):
    write(tmp_path / "a", ARRAYS)
    whole = (tmp_path / "a" / "model.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        checkpoints.open(path)


@given(st.binary(max_size=200))
def test_noise_is_an_error_never_a_crash(tmp_path_factory, noise):
    path = tmp_path_factory.mktemp("noise") / "x.safetensors"
    for content in (noise, header_and_data(noise)):
        path.write_bytes(content)
        try:
            checkpoints.open(path)
        except CheckpointError:
            pass
        else:  # an empty object is a checkpoint without tensors
            assert b"{" in content


def test_index_problems(tmp_path):
    write(tmp_path / "a", ARRAYS, max_shard_size=40)
    index = tmp_path / "a" / safetensors_file.INDEX_NAME
    good = json.loads(index.read_text())
    for name, message in (
        ("../evil.safetensors", "expected one in this directory"),
        ("gone.safetensors", r"shard gone\.safetensors is missing"),
    ):
        index.write_text(json.dumps({"weight_map": {"matrix": name}}))
        with pytest.raises(CheckpointError, match=message):
            checkpoints.open(tmp_path / "a")
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="non-empty weight_map"):
        checkpoints.open(tmp_path / "a")
    index.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json"):
        checkpoints.open(tmp_path / "a")
    # A tensor that no shard holds, and one that the index does not list.
    shard = next(iter(good["weight_map"].values()))
    phantom = {"weight_map": good["weight_map"] | {"ghost": shard}}
    index.write_text(json.dumps(phantom))
    with pytest.raises(CheckpointError, match=r"only in the index \['ghost'\]"):
        checkpoints.open(tmp_path / "a")
    first, *rest = good["weight_map"].items()
    index.write_text(json.dumps({"weight_map": {"x": first[1], **dict(rest)}}))
    with pytest.raises(CheckpointError, match=r"only in shards \['matrix'\]"):
        checkpoints.open(tmp_path / "a")
    # One tensor in two shards.
    index.write_text(json.dumps(good))
    shards = sorted((tmp_path / "a").glob("*.safetensors"))
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(CheckpointError, match="in two shards"):
        checkpoints.open(tmp_path / "a")


def test_tied_weights_are_read_once(tmp_path):
    embedding = np.arange(6, dtype=np.float32).reshape(3, 2)
    arrays = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": embedding.copy(),
        "model.layers.0.output.weight": embedding.copy(),
    }
    write(tmp_path / "a", arrays)
    assert checkpoints.open(tmp_path / "a").aliases == {}
    (tmp_path / "a" / "config.json").write_text('{"tie_word_embeddings": true}')
    reader = checkpoints.open(tmp_path / "a")
    assert reader.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in reader.tensors
    np.testing.assert_array_equal(reader.read("lm_head.weight"), embedding.reshape(-1))
    # Tied by the config, but trained apart: both are kept.
    arrays["lm_head.weight"][0, 0] = 9
    write(tmp_path / "b", arrays)
    (tmp_path / "b" / "config.json").write_text('{"tie_word_embeddings": true}')
    assert checkpoints.open(tmp_path / "b").aliases == {}


def test_shards_keep_order_and_size():
    infos = [TensorInfo(str(i), (10,), np.dtype(np.float32)) for i in range(7)]
    shards = plan_shards(infos, 85)
    assert [t.name for s in shards for t in s] == [t.name for t in infos]
    assert [len(s) for s in shards] == [2, 2, 2, 1]
    assert plan_shards(infos, 1) == [[t] for t in infos]


def test_writing_too_little_or_too_much(tmp_path):
    info = [TensorInfo("a", (4,), np.dtype(np.float32))]
    with (
        pytest.raises(CheckpointError, match=r"not fully written: \['a'\]"),
        checkpoints.create(tmp_path / "out", info) as writer,
    ):
        writer.write("a", 0, np.zeros(3, np.float32))
    with (
        pytest.raises(ValueError, match="a: got 5 float32 entries at 0"),
        checkpoints.create(tmp_path / "out", info) as writer,
    ):
        writer.write("a", 0, np.zeros(5, np.float32))
    with (
        pytest.raises(ValueError, match="a: got 4 float64"),
        checkpoints.create(tmp_path / "out", info) as writer,
    ):
        writer.write("a", 0, np.zeros(4))
    assert list(tmp_path.iterdir()) == []


def test_every_dtype_has_a_name():
    assert {np.dtype(d).itemsize for d in DTYPES.values()} == {1, 2, 4, 8}

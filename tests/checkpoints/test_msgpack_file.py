"""flax msgpack: files of flax are read, and flax reads ours, byte for byte the same."""

from pathlib import Path

import flax.serialization
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest

from multitask_jax import checkpoints
from multitask_jax.checkpoints import msgpack_file
from multitask_jax.checkpoints.types import CheckpointError, TensorInfo

DTYPES = list(msgpack_file.DTYPES.values())
SHAPES = [(), (0,), (3,), (4, 0, 2), (2, 3, 5), (1, 70000)]


def _array(shape: tuple[int, ...], dtype: np.dtype, seed: int = 0) -> np.ndarray:
    size = int(np.prod(shape))
    values = np.random.default_rng(seed).integers(
        0, 2 if dtype.kind == "b" else 100, size
    )
    return values.astype(dtype).reshape(shape)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()


def _file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "x.msgpack"
    path.write_bytes(content)
    return path


def _write(
    staging: Path, flat: dict[str, np.ndarray], step: int = 7, **options
) -> Path:
    """Writes arrays in slices of `step` entries, the last ones first."""
    infos = [TensorInfo(name, a.shape, a.dtype) for name, a in flat.items()]
    writer = msgpack_file.create_writer(staging, infos, **options)
    for name, a in reversed(flat.items()):
        for start in reversed(range(0, a.size, step)):
            writer.write(name, start, a.reshape(-1)[start : start + step])
    writer.finish()
    return staging / "flax_model.msgpack"


def _nested(flat: dict[str, np.ndarray]) -> dict:
    return flax.traverse_util.unflatten_dict(
        {tuple(k.split("/")): v for k, v in flat.items()}
    )


ALL = {
    f"params/{d.name}/{i}": _array(s, d, i)
    for d in DTYPES
    for i, s in enumerate(SHAPES)
}


def test_reads_what_flax_writes(tmp_path):
    path = _file(tmp_path, flax.serialization.to_bytes(_nested(ALL)))
    reader = checkpoints.open(path)
    assert reader.format == "msgpack"
    assert set(reader.tensors) == set(ALL)
    for name, a in ALL.items():
        info = reader.tensors[name]
        assert (info.name, info.shape, info.dtype) == (name, a.shape, a.dtype)
        assert _same(reader.read(name).reshape(a.shape), a)
        assert _same(reader.read(name, 1, 4), a.reshape(-1)[1:4])
    reader.close()


def test_writes_the_bytes_that_flax_writes(tmp_path):
    path = _write(tmp_path, ALL, step=30001)
    tree = _nested(ALL)
    # `in_place` keeps the order of the keys, a copy of the tree is sorted.
    assert path.read_bytes() == flax.serialization.msgpack_serialize(
        tree, in_place=True
    )


@pytest.mark.parametrize("size", [*range(0, 24), 250, 251, 252, 65520, 65536])
def test_every_length_of_prefix_is_the_shortest(tmp_path, size):
    a = _array((size,), np.dtype(np.uint8))
    expected = flax.serialization.msgpack_serialize({"k" * 40: a})
    assert _write(tmp_path, {"k" * 40: a}, step=10**6).read_bytes() == expected


def test_flax_restores_what_we_write(tmp_path):
    restored = flax.serialization.msgpack_restore(_write(tmp_path, ALL).read_bytes())
    found = flax.traverse_util.flatten_dict(restored, sep="/")
    assert list(found) == list(ALL)
    assert all(_same(found[name], a) for name, a in ALL.items())


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int64])
def test_chunked_arrays_both_ways(tmp_path, monkeypatch, dtype):
    flat = {
        "a/big": _array((7, 11), np.dtype(dtype)),
        "a/small": _array((4,), np.dtype(dtype)),
        "row": _array((1, 60), np.dtype(dtype), 1),
    }
    ours = _write(tmp_path, flat, step=13, chunk_bytes=64).read_bytes()
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 64)
    theirs = flax.serialization.msgpack_serialize(_nested(flat), in_place=True)
    assert ours == theirs
    reader = msgpack_file.open_reader(tmp_path)
    for name, a in flat.items():
        assert _same(reader.read(name).reshape(a.shape), a)
        for start in range(0, a.size, 5):
            for stop in range(start, min(a.size, start + 40)):
                assert _same(reader.read(name, start, stop), a.reshape(-1)[start:stop])


def test_integers_beyond_float_and_jax_survive(tmp_path):
    flat = {"i": np.array([2**40 + 1, -(2**62)]), "u": np.array([2**64 - 1], np.uint64)}
    reader = msgpack_file.open_reader(_write(tmp_path, flat))
    assert reader.read("i").tolist() == [2**40 + 1, -(2**62)]
    assert reader.read("u").tolist() == [2**64 - 1]


def test_numbers_lists_and_device_arrays(tmp_path):
    tree = {
        **{"step": 7, "rate": 0.5, "on": True, "u": 2**63, "z": 1 + 2j, "empty": {}},
        **{"scalar": np.float32(3), "list": [jnp.ones(2), np.arange(3)], 5: np.ones(1)},
    }
    path = _file(tmp_path, flax.serialization.msgpack_serialize(tree, in_place=True))
    reader = msgpack_file.open_reader(path)
    found = {
        name: reader.read(name).reshape(i.shape) for name, i in reader.tensors.items()
    }
    expected = {
        **{"step": np.int64(7), "rate": np.float64(0.5), "on": np.bool_(True)},
        **{"u": np.uint64(2**63), "z": np.complex128(1 + 2j), "scalar": np.float32(3)},
        **{"list/0": np.ones(2, np.float32), "list/1": np.arange(3), "5": np.ones(1)},
    }
    assert found.keys() == expected.keys()
    assert all(_same(found[name], a) for name, a in expected.items())


def test_a_truncated_file_is_an_error_wherever_it_ends(tmp_path):
    flat = {"a/b": _array((5,), np.dtype(np.float32)), "c": _array((), DTYPES[0])}
    content = flax.serialization.msgpack_serialize({**_nested(flat), "n": 300})
    for end in range(len(content)):
        with pytest.raises(CheckpointError, match=r"x\.msgpack"):
            checkpoints.open(_file(tmp_path, content[:end]))
    with pytest.raises(CheckpointError, match="the tree ends at byte"):
        checkpoints.open(_file(tmp_path, content + b"\0"))


def test_a_flipped_byte_never_crashes(tmp_path):
    content = flax.serialization.msgpack_serialize(
        {"a": {"b": np.arange(3)}, "n": [1.5]}
    )
    path = _file(tmp_path, content)
    refused = 0
    for position in range(len(content)):
        for byte in range(0, 256, 5):
            damaged = bytearray(content)
            damaged[position] = byte
            path.write_bytes(damaged)
            try:
                reader = msgpack_file.open_reader(path)
                for name in reader.tensors:
                    reader.read(name)
            except CheckpointError:
                refused += 1
    assert refused > 0


def _ext(code: int, *triple) -> bytes:
    return msgpack.packb({"w": msgpack.ExtType(code, msgpack.packb(triple))})


def _deep() -> bytes:
    return b"\x81\xa1a" * 5000 + b"\x80"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_ext(1, (1,), "object", b"12345678"), "w: got dtype b'object'"),
        (_ext(1, (1,), "str32", b"1234"), "w: got dtype"),
        (_ext(1, (2,), "float32", b"1234"), "w: float32"),
        (_ext(1, (-1,), "float32", b"1234"), "natural numbers"),
        (_ext(1, (2**40,), "int8", b"1"), "w: int8"),
        (_ext(4, (1,), "float32", b"1234"), "extension type 4"),
        (_ext(42), "extension type 42"),
        (msgpack.packb({"a": {"w": None}}), "a/w: got None"),
        (msgpack.packb({"w": "text"}), "w: got a str"),
        (msgpack.packb({"w": b"text"}), "w: got a bin"),
        (msgpack.packb({b"w": 1}), "bin"),
        (msgpack.packb(1), "dictionary"),
        (b"\x82\xa1a\x01\xa1a\x02", "occurs twice"),
        (b"\x82\xa3a/b\x01\xa1a\x81\xa1b\x02", "two arrays are called 'a/b'"),
        (_deep(), "more than 100 levels"),
        (b"\xc1", "not msgpack"),
        (b"\xdf\xff\xff\xff\xff", "truncated"),
        (b"", "empty"),
        (
            msgpack.packb(
                {"w": {"__msgpack_chunked_array__": True, "shape": {"0": 2}}}
            ),
            "w: a chunked array",
        ),
    ],
)
def test_what_is_no_tree_of_arrays_is_refused(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoints.open(_file(tmp_path, content))
    assert "x.msgpack" in str(error.value)


def test_chunks_that_do_not_fill_the_shape_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 8)
    chunked = flax.serialization._chunk(np.arange(4.0))
    chunked["chunks"].pop("3")
    path = _file(tmp_path, flax.serialization.msgpack_serialize({"w": chunked}))
    with pytest.raises(CheckpointError, match="w: chunks of 3 entries"):
        checkpoints.open(path)


def test_a_directory_holds_one_file(tmp_path):
    content = flax.serialization.to_bytes({"w": np.ones(3, np.float32)})
    (tmp_path / "flax_model.msgpack").write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    assert checkpoints.open(tmp_path).read("w").tolist() == [1, 1, 1]
    (tmp_path / "b.msgpack").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"got 2 \(b\.msgpack, flax_model"):
        checkpoints.open(tmp_path)


def test_flat_names_stay_flat(tmp_path):
    flat = {"model.layers.0.weight": np.ones(2), "model.layers.1.weight": np.zeros(2)}
    restored = flax.serialization.msgpack_restore(_write(tmp_path, flat).read_bytes())
    assert list(restored) == list(flat)


@pytest.mark.parametrize(
    "names",
    [("a", "a/b"), ("a/b", "a"), ("a", "a"), ("a//b",), ("",), ("a/b", "a/b/c/d")],
)
def test_names_that_form_no_tree_are_refused(tmp_path, names):
    infos = [TensorInfo(name, (1,), np.dtype(np.float32)) for name in names]
    with pytest.raises(CheckpointError, match="name"):
        msgpack_file.create_writer(tmp_path, infos)


def test_the_writer_refuses_what_it_cannot_do(tmp_path):
    info = TensorInfo("w", (4,), np.dtype(np.float32))
    with pytest.raises(ValueError, match="max_shard_size"):
        msgpack_file.create_writer(tmp_path, [info], max_shard_size=10)
    with pytest.raises(CheckpointError, match="w: got dtype int4"):
        msgpack_file.create_writer(tmp_path, [info._replace(dtype=np.dtype("int4"))])
    writer = msgpack_file.create_writer(tmp_path, [info], metadata={"a": "b"})
    with pytest.raises(ValueError, match="w: got 1 float64"):
        writer.write("w", 0, np.ones(1))
    with pytest.raises(ValueError, match="within 4"):
        writer.write("w", 3, np.ones(2, np.float32))
    writer.write("w", 0, np.ones(3, np.float32))
    with pytest.raises(CheckpointError, match="not fully written"):
        writer.finish()


def test_created_aside_and_opened_again(tmp_path):
    flat = {"params/w": np.arange(6, dtype=np.float32).reshape(2, 3)}
    infos = [TensorInfo(name, a.shape, a.dtype) for name, a in flat.items()]
    out = tmp_path / "out"
    with checkpoints.create(out, infos, format="msgpack") as writer:
        writer.write("params/w", 0, flat["params/w"].reshape(-1))
    assert _same(checkpoints.open(out).read("params/w").reshape(2, 3), flat["params/w"])
    with (
        pytest.raises(RuntimeError),
        checkpoints.create(tmp_path / "no", infos, format="msgpack"),
    ):
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

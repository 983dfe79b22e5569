import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from multitask_jax.data import egocentric, poses


def shard(clips: int, seed: int = 0, keys=egocentric.MODALITIES) -> dict:
    """Random clips in the format, [C, ...]."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(clips, 64, 9))
    gaze = rng.random((clips, 64, 2)).astype(np.float32)
    gaze[:, 5:9] = np.nan
    depth = rng.uniform(0.5, 9, (clips, 16, 64, 64)).astype(np.float32)
    depth[:, 0, 0, 0] = np.nan
    every = {
        "rgb": rng.integers(0, 256, (clips, 16, 64, 64, 3), np.uint8),
        "depth": depth,
        "camera": poses.relative(poses.from_vector(vectors)).astype(np.float32),
        "gaze": gaze,
    }
    return {key: every[key] for key in keys}


def one(seed: int = 0, **other) -> dict:
    return {key: x[0] for key, x in shard(1, seed).items()} | other


def test_shards_and_single_clips_of_different_coverage(tmp_path):
    whole, few, single = shard(3), shard(2, 1, ("rgb", "gaze")), one(2)
    del single["rgb"]
    egocentric.save_shard(tmp_path / "all" / "MAP01.npz", whole)
    egocentric.save_shard(tmp_path / "rgb_gaze" / "MAP02.npz", few)
    np.savez_compressed(tmp_path / "mine.npz", **single)
    (tmp_path / "notes.txt").write_text("not a clip")
    clips = egocentric.load(tmp_path)
    assert clips.names == [
        *(f"all/MAP01.npz#{i}" for i in range(3)),
        "mine.npz#0",
        "rgb_gaze/MAP02.npz#0",
        "rgb_gaze/MAP02.npz#1",
    ]
    assert clips.group == ["all/MAP01"] * 3 + ["."] + ["rgb_gaze/MAP02"] * 2
    assert clips.present["rgb"].tolist() == [True] * 3 + [False] + [True] * 2
    assert clips.present["camera"].tolist() == [True] * 4 + [False] * 2
    for name, x in clips.arrays.items():
        assert x.shape == (6, *egocentric.SHAPES[name])
        assert x.dtype == egocentric.DTYPES[name]
    np.testing.assert_array_equal(clips.arrays["rgb"][:3], whole["rgb"])
    np.testing.assert_array_equal(clips.arrays["depth"][:3], whole["depth"])
    np.testing.assert_allclose(clips.arrays["camera"][:3], whole["camera"], atol=1e-5)
    np.testing.assert_array_equal(clips.arrays["gaze"][4:], few["gaze"])
    assert not clips.arrays["rgb"][3].any()
    assert not clips.arrays["camera"][4:].any()
    assert np.isnan(clips.arrays["depth"][4:]).all()


def test_a_limit_is_spread_over_the_files(tmp_path):
    for i in range(3):
        egocentric.save_shard(tmp_path / f"{i}.npz", shard(4, i, ("gaze",)))
    clips = egocentric.load(tmp_path, limit=4)
    assert clips.names == ["0.npz#0", "0.npz#3", "1.npz#2", "2.npz#1"]
    every = egocentric.load(tmp_path).arrays["gaze"]
    np.testing.assert_array_equal(clips.arrays["gaze"], every[[0, 3, 6, 9]])
    assert len(egocentric.load(tmp_path, limit=99).names) == 12
    with pytest.raises(ValueError, match="limit: got 0"):
        egocentric.load(tmp_path, limit=0)


def test_what_no_file_has_takes_no_memory(tmp_path):
    """Neither as it is read nor mirrored and joined; what one file has does."""
    for i, keys in enumerate([("gaze",), ("camera", "gaze")]):
        egocentric.save_shard(tmp_path / f"{i}.npz", shard(2, i, keys))
    once = egocentric.load(tmp_path)
    twice = egocentric.joined(once, egocentric.mirrored(once))
    for clips, count in ((once, 4), (twice, 8)):
        for name in ("rgb", "depth"):
            x = clips.arrays[name]
            assert x.shape == (count, *egocentric.SHAPES[name])
            assert x.dtype == egocentric.DTYPES[name]
            assert not any(x.strides), name  # all are one number
            assert not x.flags.writeable
            assert np.isnan(x).all() if name == "depth" else not x.any()
    assert not once.arrays["camera"][:2].any()
    # One that has a modality beside one that lacks it.
    alone = egocentric.load(tmp_path / "0.npz")
    both = egocentric.joined(once, alone)
    np.testing.assert_array_equal(both.arrays["camera"][:4], once.arrays["camera"])
    assert not both.arrays["camera"][4:].any()


def test_cameras_of_any_world_become_relative(tmp_path):
    clip = one()
    world = poses.from_vector(np.array([0.2, 1, 0, -1, 0, 0.3, 5e5, -4e6, 100]))
    moved = world[None] @ clip["camera"].astype(np.float64)
    np.savez(tmp_path / "a.npz", camera=moved)
    found = egocentric.load(tmp_path).arrays["camera"][0]
    np.testing.assert_allclose(found, clip["camera"], atol=1e-5)
    np.testing.assert_allclose(found[0], np.eye(4), atol=1e-15)


def test_half_precision_and_zero_depth(tmp_path):
    clip = one()
    clip["depth"][3] = 0
    np.savez(
        tmp_path / "a.npz",
        **{k: clip[k].astype(np.float16) for k in clip if k != "rgb"},
    )
    clips = egocentric.load(tmp_path)
    assert np.isnan(clips.arrays["depth"][0, 3]).all()
    np.testing.assert_allclose(clips.arrays["depth"][0, 4], clip["depth"][4], rtol=1e-3)
    poses.check(clips.arrays["camera"], tolerance=1e-6)  # rigid again


def test_a_clip_of_which_nothing_is_known_is_not_present(tmp_path):
    clips = shard(2)
    clips["gaze"][1] = np.nan
    clips["depth"][0] = np.nan
    egocentric.save_shard(tmp_path / "a.npz", clips)
    found = egocentric.load(tmp_path).present
    assert found["gaze"].tolist() == [True, False]
    assert found["depth"].tolist() == [False, True]


def test_a_gaze_just_outside_is_on_the_edge(tmp_path):
    clip = one()
    clip["gaze"][0] = [-0.005, 1.005]
    np.savez(tmp_path / "a.npz", gaze=clip["gaze"])
    gaze = egocentric.load(tmp_path).arrays["gaze"][0]
    assert gaze[0].tolist() == [0, 1]


def spoilt(key, place, value):
    x = one()[key].copy()
    x[place] = value
    return {key: x}


BAD = {
    "unknown": ({"audio": np.zeros(3)}, "a.npz, audio: got an unknown name"),
    "pickle": ({"rgb": np.array([{}])}, "a.npz, rgb: got object, expected uint8"),
    "float rgb": ({"rgb": np.zeros((16, 64, 64, 3))}, "got float64, expected uint8"),
    "wide rgb": ({"rgb": np.zeros((16, 64, 64, 3), np.uint16)}, "got uint16"),
    "millimetres": (
        {"depth": np.zeros((16, 64, 64), np.uint16)},
        "got uint16, expected float32 (convert it, to metres",
    ),
    "large rgb": (
        {"rgb": np.zeros((16, 256, 256, 3), np.uint8)},
        "rgb: got the shape [16, 256, 256, 3], expected [16, 64, 64, 3], or [clips, 16",
    ),
    "no clips": ({"gaze": np.zeros((0, 64, 2))}, "got the shape [0, 64, 2]"),
    "negative": (spoilt("depth", (3, 4, 5), -1), "depth[0, 3, 4, 5]: got -1.0"),
    "infinite": (spoilt("depth", (3, 4, 5), np.inf), "depth[0, 3, 4, 5]: got inf"),
    "sheared": (spoilt("camera", (7, 0, 0), 3), "camera[0, 7]: got [["),
    "pixels": (spoilt("gaze", 9, 32), "gaze[0, 9, 0]: got 32.0, expected shares"),
    "half": (
        spoilt("gaze", (9, 1), np.nan),
        "gaze[0, 9, 1]: got nan, expected NaN for",
    ),
    "counts": (
        {"rgb": shard(2)["rgb"], "gaze": shard(3)["gaze"]},
        "got clips by modality {'rgb': 2, 'gaze': 3}",
    ),
    "nothing": ({}, "got clips by modality {}"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_file_and_key_on_reading_and_on_writing(tmp_path, case):
    arrays, expected = BAD[case]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=re.escape(expected)) as e:
        egocentric.load(tmp_path)
    assert str(tmp_path / "a.npz") in str(e.value)
    with pytest.raises(ValueError, match=re.escape(expected)):
        egocentric.save_shard(tmp_path / "new" / "a.npz", arrays)
    assert not (tmp_path / "new").exists()


def damaged(cut, write=np.savez_compressed) -> bytes:
    file = io.BytesIO()
    write(file, **one())
    return cut(bytearray(file.getvalue()))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 and so on",
        damaged(lambda b: b[: len(b) // 2]),
        damaged(lambda b: b[:5000] + b"\0" * 2000 + b[7000:]),
        damaged(lambda b: b.replace(b"NUMPY", b"LUMPY"), np.savez),
    ],
    ids=["empty", "no zip", "cut", "zeros", "magic"],
)
def test_damaged_files_are_named(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz can't be read .*make it again"):
        egocentric.load(tmp_path)


def test_other_zip_files_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(ValueError, match=r"a\.npz can't be read"):
        egocentric.load(tmp_path)


def test_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.npz below it"):
        egocentric.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        egocentric.load(tmp_path / "nowhere")


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    egocentric.save_shard(tmp_path / "elsewhere" / "b.npz", shard(2, 0, ("gaze",)))
    egocentric.save_shard(tmp_path / "clips" / "a.npz", shard(1, 1, ("gaze",)))
    (tmp_path / "clips" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "clips")
    names = ["a.npz#0", "linked/b.npz#0", "linked/b.npz#1"]
    assert egocentric.load(tmp_path / "clips").names == names


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    egocentric.save_shard(path, shard(1))
    before = path.read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        egocentric.save_shard(path, shard(1, 1))
    assert path.read_bytes() == before
    assert len(egocentric.load(tmp_path).names) == 1  # .partial is not read


def test_the_same_clips_are_the_same_bytes(tmp_path):
    for name in ("a.npz", "b.npz"):
        egocentric.save_shard(tmp_path / name, shard(2))
    assert Path(tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with pytest.raises(ValueError, match=r"expected a name in \.npz"):
        egocentric.save_shard(tmp_path / "c.zip", shard(1))


def test_a_mirror_keeps_geometry_and_is_its_own_inverse():
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(2, 64, 3, 3)))[0]
    turn *= np.linalg.det(turn)[..., None, None]
    camera = np.zeros((2, 64, 4, 4), np.float32)
    camera[..., :3, :3], camera[..., 3, 3] = turn, 1
    camera[..., :3, 3] = rng.normal(size=(2, 64, 3))
    arrays = {
        "rgb": rng.integers(0, 256, (2, *egocentric.SHAPES["rgb"]), np.uint8),
        "depth": rng.uniform(1, 9, (2, 16, 64, 64)).astype(np.float32),
        "camera": camera,
        "gaze": rng.random((2, 64, 2), np.float32),
    }
    present = {k: np.array([True, k == "rgb"]) for k in arrays}
    clips = egocentric.Clips(arrays, present, ["a", "b"], ["x", "y"])
    once = egocentric.mirrored(clips)
    poses.check(once.arrays["camera"], "mirrored")
    # A point to the right of the first camera is seen where its mirror image is.
    point = np.array([0.7, -0.2, 3.0, 1.0])
    seen = np.linalg.inv(camera) @ point
    again = np.linalg.inv(once.arrays["camera"]) @ (point * [-1, 1, 1, 1])
    np.testing.assert_allclose(again, seen * [-1, 1, 1, 1], atol=1e-4)
    for name in ("rgb", "depth"):  # a column and its mirror image
        np.testing.assert_array_equal(
            once.arrays[name][1, 3, :, 5], arrays[name][1, 3, :, -6]
        )
    x, y = np.moveaxis(arrays["gaze"], -1, 0)
    np.testing.assert_array_equal(once.arrays["gaze"], np.stack([1 - x, y], -1))
    twice = egocentric.mirrored(once)
    for name, x in arrays.items():
        np.testing.assert_allclose(twice.arrays[name], x, atol=1e-6)
    whole = egocentric.joined(clips, once)
    assert whole.names == ["a", "b", "a/mirrored", "b/mirrored"]
    assert whole.present["gaze"].tolist() == [True, False, True, False]
    np.testing.assert_array_equal(whole.arrays["depth"][2:], once.arrays["depth"])

import contextlib
import json
import re
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multitask_jax.data import egocentric, poses, vizdoom_clips, vizdoom_walkers
from multitask_jax.data import vizdoom_game as doom

EXTRA = "pip install multitask-jax[egocentric]"


def stand(**change) -> np.ndarray:
    """Two places of the eye [2, 4]: one looking north-east, and a changed one."""
    eye = np.array([[3.0, 4, 1.5, 45]] * 2)
    for i, name in enumerate(("east", "north", "up", "left")):
        eye[1, i] += change.get(name, 0)
    return eye


def test_the_first_pose_is_the_identity_and_all_are_rigid():
    x = doom.cameras(stand(east=1, north=-2, up=0.5, left=70))
    np.testing.assert_allclose(x[0], np.eye(4), atol=1e-12)
    poses.check(x, tolerance=1e-9)


def test_axes_are_those_of_opencv():
    """Looking north-east, so that ahead is both east and north."""
    half = 0.5**0.5
    ahead = doom.cameras(stand(east=half, north=half))[1, :3, 3]
    np.testing.assert_allclose(ahead, [0, 0, 1], atol=1e-12)
    right = doom.cameras(stand(east=half, north=-half))[1, :3, 3]
    np.testing.assert_allclose(right, [1, 0, 0], atol=1e-12)
    up = doom.cameras(stand(up=1))[1, :3, 3]
    np.testing.assert_allclose(up, [0, -1, 0], atol=1e-12)


def test_turning_right_turns_the_view_from_z_to_x():
    turned = doom.cameras(stand(left=-90))[1, :3, :3]
    # Columns are where the axes of the second camera point to, in the first one's.
    np.testing.assert_allclose(turned[:, 2], [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(turned[:, 0], [0, 0, -1], atol=1e-12)
    np.testing.assert_allclose(turned[:, 1], [0, 1, 0], atol=1e-12)


@given(st.floats(-720, 720), st.floats(0, 1), st.floats(0, 1))
def test_a_place_in_the_picture_is_a_bearing_and_back(angle, x, y):
    column, row = (256 - 192) / 2 + 192 * x, 192 * y
    place = doom.project(angle, doom.bearing(angle, column, row))
    if min(x, y) > 1e-6 and max(x, y) < 1 - 1e-6:
        np.testing.assert_allclose(place, [x, y], atol=1e-9)


def test_what_is_outside_of_the_picture_is_not_seen():
    left, below = doom.bearing(0, 20, 96), np.array([0, -50])
    for direction in (left, below, np.array([180, 0]), np.full(2, np.nan)):
        assert np.isnan(doom.project(0, direction)).all()


def test_the_gaze_proxy_follows_with_a_lag():
    eye = np.zeros((70, 4))
    eye[:, 3] = 350  # across the wrap at 360
    target = np.full((70, 2), np.nan)
    target[5:] = [0, 0]  # 10 degrees to the left
    target[40:] = [-20, 0]  # 10 degrees to the right
    gaze = doom.gaze_proxy(eye, target)
    assert np.isnan(gaze[:5]).all()
    left, right = 0.5 + doom.FOCAL * np.tan(np.radians([-10, 10]))
    np.testing.assert_allclose(gaze[5:40, 0], left, rtol=1e-9)
    np.testing.assert_allclose(gaze[:, 1][5:], 0.5)
    degrees = np.degrees(np.arctan((gaze[40:, 0] - 0.5) / doom.FOCAL))
    t = np.arange(1, 31) / doom.RATE
    np.testing.assert_allclose(degrees, 10 - 20 * np.exp(-t / doom.LAG), rtol=1e-6)
    assert gaze[-1, 0] == pytest.approx(right, abs=1e-2)
    blind = np.full((70, 2), np.nan)
    assert np.isnan(doom.gaze_proxy(eye, blind)).all()


def test_depth_is_cut_off():
    steps = np.arange(256, dtype=np.uint8)
    depth = doom.metres(steps)
    assert depth.dtype == np.float32
    assert (np.diff(depth[:103]) > 0).all()
    assert (depth[102:] == depth[102]).all()
    assert 22 < depth[102] < 24


def test_a_walker_by_sight_turns_to_the_open_side_and_opens_doors():
    depth = np.full((4, 256), 8.0, np.float32)
    depth[:, :150] = 1.0  # a wall to the left and ahead
    act = vizdoom_walkers.scripted(np.random.default_rng(0))
    actions = np.array([act(vizdoom_walkers.Look(depth, 0.1)) for _ in range(20)])
    assert (actions[5:, 2] > 1).all()
    assert actions[:, 3].sum() == 1  # a second push would close the door
    stuck = [act(vizdoom_walkers.Look(np.full((4, 256), 8.0), 0.0)) for _ in range(40)]
    assert min(abs(action[0]) for action in stuck) == 0  # turns on the spot


def test_no_map_serves_two_data_sets():
    names = [name for names in vizdoom_clips.MAPS.values() for name in names]
    assert len(set(names)) == len(names) == 66
    held_out = {"validation/all", "test/all"}
    assert held_out < set(vizdoom_clips.MAPS)
    for folder in vizdoom_clips.MAPS:
        assert folder.split("/")[1] in vizdoom_clips.COVERAGE


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"maps": {"train": ["MAP01"]}}, "maps: got 'train', expected split/name"),
        ({"maps": {"train/audio": ["MAP01"]}}, "maps: got 'train/audio'"),
        ({"maps": {"a/all": ["MAP01"], "b/all": ["MAP01"]}}, "MAP01'] twice"),
        ({"maps": {"a/all": ["MAP77"]}}, "maps: got ['MAP77'], expected some of E1M1"),
        ({"clips": 5}, "clips: got 5 for 6 data sets of 66 maps, expected one clip"),
        ({"maps": {}}, "clips: got 2000 for 0 data sets"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, arguments, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        vizdoom_clips.record(tmp_path / "clips", **arguments)
    assert not (tmp_path / "clips").exists()


def test_without_vizdoom_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    with pytest.raises(ModuleNotFoundError, match=r"multitask-jax\[egocentric\]"):
        vizdoom_clips.record(tmp_path / "clips")
    assert not (tmp_path / "clips").exists()


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, np.ndarray]:
    """Four clips of one map; the game leaves nothing in the folder that it runs in."""
    pytest.importorskip("vizdoom", reason=EXTRA)
    folder = tmp_path_factory.mktemp("here")
    with contextlib.chdir(folder):
        made = vizdoom_clips.clips_of("MAP10", 4, seed=3)
    assert not list(folder.iterdir())
    return made


def test_clips_are_in_the_format_and_walk(clips, tmp_path):
    egocentric.save_shard(tmp_path / "a.npz", clips)  # checked there
    for name, shape in egocentric.SHAPES.items():
        assert clips[name].shape == (4, *shape)
    assert clips["rgb"].std() > 10
    way = np.linalg.norm(np.diff(clips["camera"][:, :, :3, 3], axis=1), axis=-1).sum(1)
    assert (way > vizdoom_clips.STILL).all()
    assert (way < 15).all()  # metres in 1.8 s
    assert (clips["depth"] < 24).all()
    assert np.isfinite(clips["gaze"]).any()


def test_no_text_is_in_the_picture():
    """It is near, and still: what is near and real moves in 1.8 s of walking.

    Here the fifth walker would be told that it lacks a key, and all after it.
    """
    pytest.importorskip("vizdoom", reason=EXTRA)
    depth = vizdoom_clips.clips_of("MAP09", 5, seed=0)["depth"]
    text = (depth[:, :, 20:30] < 0.4).all(axis=1)
    assert not text.any()


def test_the_same_seed_gives_the_same_clips(clips):
    again = vizdoom_clips.clips_of("MAP10", 2, seed=3)
    other = vizdoom_clips.clips_of("MAP10", 2, seed=4)
    for name, x in again.items():
        np.testing.assert_array_equal(x, clips[name][:2])
        assert not np.array_equal(other[name], x, equal_nan=name != "rgb")


def reprojected(clip, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Depths of frame 0 carried into another frame, and those that are seen there."""
    n, focal = egocentric.SIZE, doom.FOCAL * egocentric.SIZE
    depth = clip["depth"].astype(np.float64)
    row, column = np.mgrid[:n, :n] + 0.5 - n / 2
    points = (
        np.stack([column / focal, row / focal, np.ones((n, n))], -1)
        * depth[0][..., None]
    )
    pose = clip["camera"][last * vizdoom_clips.EVERY].astype(np.float64)
    points = (points - pose[:3, 3]) @ pose[:3, :3]  # into the later camera
    x, y, z = np.moveaxis(points, -1, 0)
    ahead = (z > 0.3) & (depth[0] < depth.max())
    z = np.where(ahead, z, 1)
    u, v = (np.floor(focal * w / z + n / 2).astype(int) for w in (x, y))
    seen = ahead & (u >= 0) & (u < n) & (v >= 0) & (v < n)
    return z[seen], depth[last][v[seen], u[seen]]


def test_depth_and_poses_agree(clips):
    """Points of frame 0, moved by the poses, lie where later frames see them."""
    carried, seen, moved = [], [], []
    for i in range(4):
        clip = {name: x[i] for name, x in clips.items()}
        for last in (4, 8):
            a, b = reprojected(clip, last)
            carried.append(a)
            seen.append(b)
            still = {**clip, "camera": np.tile(np.eye(4), (64, 1, 1))}
            a, b = reprojected(still, last)
            moved.append(np.abs(a - b) / b)
    error = np.abs(np.concatenate(carried) - np.concatenate(seen)) / np.concatenate(
        seen
    )
    assert len(error) > 4000
    assert np.median(error) < 0.06
    assert np.median(np.concatenate(moved)) > 3 * np.median(error)


def test_a_recording_goes_on_and_refuses_other_settings(tmp_path, monkeypatch, capfd):
    pytest.importorskip("vizdoom", reason=EXTRA)
    maps = {"train/rgb_gaze": ["MAP04", "MAP01"], "test/all": ["MAP05"]}
    root = vizdoom_clips.record(tmp_path, clips=4, seed=1, maps=maps)
    assert capfd.readouterr() == ("", "")  # nothing of the game, no bar in a pipe
    files = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.*")}
    assert sorted(files) == [
        "dataset.json",
        "test/all/MAP05.npz",
        "train/rgb_gaze/MAP01.npz",
        "train/rgb_gaze/MAP04.npz",
    ]
    train = egocentric.load(root / "train")
    assert train.group == ["rgb_gaze/MAP01"] + ["rgb_gaze/MAP04"] * 2
    assert not train.present["depth"].any()
    assert egocentric.load(root / "test").present["depth"].all()
    about = json.loads(files["dataset.json"])
    assert about["seed"] == 1
    assert about["maps"] == maps

    (root / "train/rgb_gaze/MAP04.npz").unlink()
    start = doom.started
    begun = []
    monkeypatch.setattr(
        doom, "started", lambda name, **k: begun.append(name) or start(name, **k)
    )
    vizdoom_clips.record(tmp_path, clips=4, seed=1, maps=maps, workers=1)
    assert begun == ["MAP04"]
    for path, content in files.items():
        assert (root / path).read_bytes() == content
    with pytest.raises(ValueError, match=r"dataset\.json: got .* other \['seed'\]"):
        vizdoom_clips.record(tmp_path, clips=4, seed=2, maps=maps)

    # Finished, it needs no ViZDoom, of whatever version it was made.
    about["versions"]["vizdoom"] = "0.1"
    (root / "dataset.json").write_text(json.dumps(about))
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "vizdoom", None)
        vizdoom_clips.record(tmp_path, clips=4, seed=1, maps=maps)
        m.setattr(vizdoom_clips, "RECORDER", 99)
        with pytest.raises(ValueError, match=r"other \['versions'\], .*99"):
            vizdoom_clips.record(tmp_path, clips=4, seed=1, maps=maps)
    (root / "train/rgb_gaze/MAP04.npz").unlink()
    with pytest.raises(ValueError, match=r"other \['versions'\]"):
        vizdoom_clips.record(tmp_path, clips=4, seed=1, maps=maps)
    assert begun == ["MAP04"]


def test_a_map_that_cannot_be_walked_is_named(monkeypatch):
    @contextlib.contextmanager
    def started(name, *, seed):
        yield None

    monkeypatch.setattr(doom, "started", started)
    monkeypatch.setattr(doom, "spots", lambda game: np.array([]))
    with pytest.raises(RuntimeError, match=r"map MAP31: got nothing to pick up.*maps="):
        vizdoom_clips.clips_of("MAP31", 1, seed=0)
    monkeypatch.setattr(doom, "spots", lambda game: np.zeros((1, 2)))
    monkeypatch.setattr(vizdoom_clips, "_walk", lambda *_: [])
    with pytest.raises(RuntimeError, match=r"MAP31: got 0 clips in 20 .* another seed"):
        vizdoom_clips.clips_of("MAP31", 1, seed=0)


def test_few_clips_are_shared_by_the_data_sets():
    every = vizdoom_clips.plan(2000)
    assert sum(every.values()) == 2000
    assert set(every.values()) == {30, 31}
    few = vizdoom_clips.plan(8)
    assert {path.rsplit("/", 1)[0] for path in few} == set(vizdoom_clips.MAPS)
    assert set(few.values()) == {1}


def test_a_map_that_is_not_there_is_named():
    pytest.importorskip("vizdoom", reason=EXTRA)
    with pytest.raises(ValueError, match="map: got 'MAP77', expected one of E1M1 to"):
        vizdoom_clips.clips_of("MAP77", 1, seed=0)

"""First-person clips recorded in ViZDoom: pictures, depth, poses, and a gaze proxy.

    record("clips", clips=2000, seed=0)
    clips = egocentric.load("clips/train")

Walkers wander through the maps of Freedoom, which ViZDoom ships, and 64 tics at a time
are kept, in the format of `multitask_jax.data.egocentric`. Folders are data sets of
different coverage (`COVERAGE`); no map of validation or test is in one for training.
All of it is a reconstruction: EgoM2P trains on people's videos.

*The gaze is a proxy*, not a person's: see `vizdoom_game.gaze_proxy`.
"""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from multitask_jax.data import egocentric
from multitask_jax.data import vizdoom_game as doom
from multitask_jax.data.vizdoom_walkers import WALKERS, Look, Walker

COVERAGE = {
    "all": egocentric.MODALITIES,
    "rgb_depth": ("rgb", "depth"),
    "rgb_camera": ("rgb", "camera"),
    "rgb_gaze": ("rgb", "gaze"),
}
# All maps of Freedoom's second game but the two secret ones, which have few places to
# start from; training has the first game's too.
_OF_GAME_2 = {
    ("train", "all"): (1, 6, 9, 13, 16, 21, 25, 28),
    ("train", "rgb_depth"): (2, 7, 14, 19, 26),
    ("train", "rgb_camera"): (3, 10, 15, 22, 27),
    ("train", "rgb_gaze"): (4, 12, 18, 24, 30),
    ("validation", "all"): (8, 20),
    ("test", "all"): (5, 11, 17, 23, 29),
}
_OF_GAME_1 = [name for name, wad in doom.WADS.items() if wad == "freedoom1.wad"]
MAPS: Mapping[str, Sequence[str]] = {
    f"{split}/{name}": [f"MAP{i:02d}" for i in numbers]
    + (_OF_GAME_1[list(COVERAGE).index(name) :: len(COVERAGE)] * (split == "train"))
    for (split, name), numbers in _OF_GAME_2.items()
}
EVERY = egocentric.SAMPLES // egocentric.FRAMES  # tics a frame
WARM_UP = 20  # tics before a clip, after which the walker stands on its feet and walks
STILL = 0.5  # metres: who walks less in a clip, the way measured along, is left out
EYE_LEVEL = slice(88, 112)  # rows of the picture that a walker goes by
JUMP = 0.5  # metres in a tic, above which it was a teleporter: these are left out too
RECORDER = 3  # counts versions of this file: clips of others differ
ATTEMPTS = 20  # walks for each clip, at most


def record(
    out_dir: str | os.PathLike[str],
    *,
    clips: int = 2000,
    seed: int = 0,
    maps: Mapping[str, Sequence[str]] = MAPS,
    workers: int = 2,
    progress: bool = True,
) -> Path:
    """Records clips: out_dir/SPLIT/NAME/MAP.npz for each map, and out_dir/dataset.json.

    The same seed gives the same files, whatever the number of workers. A shard that is
    there already is kept, so that a recording that was stopped goes on; one that is
    finished needs no ViZDoom.

    Args:
      out_dir: of one recording; made if it is not there.
      clips: in all, as many for each map, give or take one. With fewer clips than maps,
        the data sets share them: one clip each at least.
      seed: of everything.
      maps: names of Freedoom's maps by "split/name", name being one of `COVERAGE`.
      workers: games at once.
      progress: a bar on standard error, if that is a terminal.

    Returns:
      `out_dir`.

    Raises:
      ModuleNotFoundError: ViZDoom is not installed; names the extra.
      ValueError: out_dir holds a recording of other settings, or an argument is wrong.
      RuntimeError: the game could not be started, or a map can't be walked.
    """
    root = Path(out_dir)
    shards = plan(clips, maps)
    about = _about(clips, seed, maps)
    if not all((root / path).exists() for path in ("dataset.json", *shards)):
        doom.package()
        about["versions"]["vizdoom"] = version("vizdoom")
    _settle(root, about)

    def make(path: str) -> None:
        if not (root / path).exists():
            made = clips_of(Path(path).stem, shards[path], seed=seed)
            keep = COVERAGE[Path(path).parent.name]
            egocentric.save_shard(root / path, {key: made[key] for key in keep})

    off = None if progress else True  # None: unless it is a terminal
    with (
        tqdm(total=clips, unit="clip", disable=off) as bar,
        ThreadPoolExecutor(workers) as pool,  # the games are processes of their own
    ):
        for path, _ in zip(shards, pool.map(make, shards), strict=True):
            bar.update(shards[path])
    return root


def plan(clips: int, maps: Mapping[str, Sequence[str]] = MAPS) -> dict[str, int]:
    """How many clips `record` puts into each shard, "split/name/map.npz".

    Raises:
      ValueError: as `record`.
    """
    for folder in maps:
        if folder.count("/") != 1 or folder.split("/")[1] not in COVERAGE:
            raise ValueError(
                f"maps: got {folder!r}, expected split/name with a name of"
                f" {list(COVERAGE)}"
            )
    names = [name for some in maps.values() for name in some]
    if unknown := sorted(set(names) - set(doom.WADS)):
        raise ValueError(f"maps: got {unknown}, expected some of {doom.KNOWN}")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"maps: got {twice} twice, expected each in one data set")
    if clips < len(maps) or not names:
        raise ValueError(
            f"clips: got {clips} for {len(maps)} data sets of {len(names)} maps,"
            " expected one clip of each data set at least"
        )
    # The first map of each data set, the second of each, ...
    rounds = zip_longest(*([f"{k}/{name}.npz" for name in v] for k, v in maps.items()))
    paths = [path for some in rounds for path in some if path is not None]
    each, more = divmod(clips, len(paths))
    counts = {path: each + (i < more) for i, path in enumerate(paths)}
    return {path: count for path, count in counts.items() if count}


def clips_of(name: str, count: int, *, seed: int) -> dict[str, np.ndarray]:
    """Clips of one map, every modality: [count, ...] of `egocentric.SHAPES`.

    Every second walker goes by sight, the others at random. Depths are float16, whose
    steps are far below the engine's.

    Args:
      name: of the map.
      count: clips.
      seed: the clips depend on it, on the map's name and on nothing else.

    Raises:
      ModuleNotFoundError, RuntimeError: as `record`.
      ValueError: there is no such map.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    made: list[dict[str, np.ndarray]] = []
    with doom.started(name, seed=int(rng.integers(1, 2**31))) as game:
        spots = doom.spots(game)
        if not len(spots):
            raise RuntimeError(
                f"map {name}: got nothing to pick up, where walks begin; leave it out"
                " of record(maps=...)"
            )
        for _ in range(ATTEMPTS * count):
            if len(made) == count:
                break
            walker = WALKERS[len(made) % len(WALKERS)](rng)
            spot = spots[rng.integers(len(spots))]
            tics = _walk(game, walker, spot, float(rng.uniform(-180, 180)))
            if tics and _way(tics) > STILL:
                made.append(_clip(tics))
    if len(made) < count:
        raise RuntimeError(
            f"map {name}: got {len(made)} clips in {ATTEMPTS * count} walks, expected"
            f" {count}; take another seed, or leave it out of record(maps=...)"
        )
    return {key: np.stack([clip[key] for clip in made]) for key in made[0]}


def _walk(
    game: Any, walker: Walker, spot: np.ndarray, heading: float
) -> list[doom.Tic]:
    """Tics of a warm-up and a clip; none if the walker left the map, or jumped."""
    doom.put(game, spot, heading)
    tics: list[doom.Tic] = []
    look = Look(np.full((1, doom.WIDTH), np.inf), 0.0)
    for _ in range(WARM_UP + egocentric.SAMPLES):
        found = doom.step(game, walker(look))
        if found is None:
            return []
        moved = float(np.hypot(*(found.eye - tics[-1].eye)[:2])) if tics else 0.0
        if moved > JUMP:
            return []
        look = Look(doom.metres(found.depth[EYE_LEVEL]), moved)
        tics.append(found)
    return tics


def _way(tics: Sequence[doom.Tic]) -> float:
    """Metres walked in the clip."""
    steps = np.diff([tic.eye[:2] for tic in tics[WARM_UP:]], axis=0)
    return float(np.linalg.norm(steps, axis=1).sum())


def _clip(tics: Sequence[doom.Tic]) -> dict[str, np.ndarray]:
    """The format of `egocentric`: the middle of the picture, a third of its size."""
    eye, target = (
        np.array(x) for x in zip(*[(t.eye, t.target) for t in tics], strict=True)
    )
    frames = tics[WARM_UP::EVERY]
    edge = (doom.WIDTH - doom.HEIGHT) // 2
    middle = slice(edge, edge + doom.HEIGHT)
    rgb = np.stack([tic.rgb[:, middle] for tic in frames]).astype(np.uint16)
    parts = rgb.reshape(len(frames), egocentric.SIZE, 3, egocentric.SIZE, 3, 3)
    depth = np.stack([tic.depth[1::3, middle][:, 1::3] for tic in frames])
    return {
        "rgb": ((parts.sum((2, 4)) + 4) // 9).astype(np.uint8),
        "depth": doom.metres(depth).astype(np.float16),
        "camera": doom.cameras(eye[WARM_UP:]).astype(np.float32),
        "gaze": doom.gaze_proxy(eye, target)[WARM_UP:].astype(np.float32),
    }


def _about(clips: int, seed: int, maps: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What dataset.json holds, but for ViZDoom's version.

    All that the arrays depend on, and what they mean.
    """
    return {
        "seed": seed,
        "clips": clips,
        "maps": {folder: list(names) for folder, names in maps.items()},
        "coverage": {name: list(keys) for name, keys in COVERAGE.items()},
        "versions": {"recorder": RECORDER},
        "units": {
            "camera": "metres, camera-to-world, OpenCV axes, relative to the first",
            "depth": "metres along z; the farthest stands for all beyond it",
            "gaze": "a proxy: lagged bearing of the nearest object, x and y in [0, 1]",
        },
        "constants": {
            "samples a second": doom.RATE,
            "samples a frame": EVERY,
            "focal length in widths of the image": doom.FOCAL,
            "map units a metre": doom.UNITS,
            "stretch of heights": doom.STRETCH,
            "metres a step of depth": doom.STEP,
            "metres of step 0": doom.NEAREST,
            "farthest metres": float(doom.metres(np.uint8(255))),
            "seconds of lag of the gaze proxy": doom.LAG,
        },
    }


def _settle(root: Path, about: Mapping[str, Any]) -> None:
    """Writes dataset.json, or finds it as it would be written.

    ViZDoom's version may be any if `about` does not tell one.
    """
    path = root / "dataset.json"
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if "vizdoom" not in about["versions"]:
            found.get("versions", {}).pop("vizdoom", None)
        other = {key for key in about if found.get(key) != about[key]}
    except (ValueError, AttributeError) as e:
        raise ValueError(
            f"{path} can't be read ({e}); expected what record wrote: remove the folder"
        ) from e
    if other:
        expected = {key: about[key] for key in sorted(other)}
        raise ValueError(
            f"{path}: got a recording with other {sorted(other)}, expected {expected};"
            " record to another folder, or remove this one"
        )

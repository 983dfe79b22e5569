"""ViZDoom as a camera that can be walked: what it shows, in metres and degrees.

The world is Doom's, x east, y north, z up; angles are in degrees to the left of east.
The camera is a level pinhole with square pixels, 90 degrees wide, at the walker's eye.
Doom draws heights 1.2 times larger than widths (so do its artists), so that a metre is
32 map units across but 26.7 up.

Depth is that along the optical axis (z): of rays cast at the walls of two maps, no
column has another ratio. The engine's buffer counts steps of 7.14 units; a wall at z
units has floor((z - 5) / 7.14), a floor floor((z - 11) / 7.14). The middle is taken for
both, which leaves errors of up to .2 m. Walls are cut off at step 102 in pictures of
this size, so everything is: 23 m stand for all that is farther.

Legend: T tics (1/35 s), H, W pixels.
"""

import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from multitask_jax.data import poses

RATE = 35  # tics a second
WIDTH, HEIGHT = 256, 192  # of the engine's picture
UNITS = 32.0  # map units a metre, by convention: a walker is 56 units tall
STRETCH = 1.2  # of heights
FOCAL = (WIDTH / 2) / HEIGHT  # in widths of the square picture, cut out of the middle
STEP, NEAREST = 7.14 / UNITS, 11.6 / UNITS  # metres: of the depth buffer, at its 0
FARTHEST = 102  # steps
LAG = 0.1  # seconds, of the gaze proxy
# Freedoom's two games: map -> its file.
WADS = {f"E{i}M{j}": "freedoom1.wad" for i in range(1, 5) for j in range(1, 10)}
WADS |= {f"MAP{i:02d}": "freedoom2.wad" for i in range(1, 33)}
KNOWN = "E1M1 to E4M9 and MAP01 to MAP32"
# Of ViZDoom's categories: not the walker itself, nor smoke, puffs and other effects.
STARTS = frozenset(("Ammo", "Armor", "Health", "Weapon"))  # they lie where one can walk
OBJECTS = STARTS | {"Decoration", "Gibs", "Gore", "Hazard", "Key", "LightSource"}
OBJECTS |= {"Monster", "Powerup", "Vegetation"}
# Two games that start at the same moment in one process can crash it.
_STARTING = threading.Lock()


class Tic(NamedTuple):
    """What the game shows at one tic."""

    rgb: np.ndarray  # [H, W, 3] uint8
    depth: np.ndarray  # [H, W] uint8, steps: see `metres`
    eye: np.ndarray  # [4] metres east, north and up; degrees
    target: np.ndarray  # [2] degrees to the nearest object, as `bearing`; NaN: none


def metres(depth: np.ndarray) -> np.ndarray:
    """Steps of the engine's depth buffer in metres along z, float32."""
    steps = np.minimum(depth, FARTHEST).astype(np.float32)
    return steps * np.float32(STEP) + np.float32(NEAREST)


def package() -> Any:
    """The module vizdoom.

    Raises:
      ModuleNotFoundError: it is not installed; names the extra.
    """
    try:
        import vizdoom
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(
            "recording clips needs the package vizdoom:"
            " pip install 'multitask-jax[egocentric]'"
        ) from e
    return vizdoom


@contextmanager
def started(name: str, *, seed: int) -> Iterator[Any]:
    """A game without window and sound in a map of Freedoom.

    Raises:
      ModuleNotFoundError: as `package`.
      ValueError: there is no such map.
      RuntimeError: the game could not be started.
    """
    if name not in WADS:  # the engine would start another one
        raise ValueError(f"map: got {name!r}, expected one of {KNOWN}")
    vizdoom = package()
    game = vizdoom.DoomGame()
    button, variable = vizdoom.Button, vizdoom.GameVariable
    with tempfile.TemporaryDirectory() as folder:
        game.set_doom_game_path(str(Path(vizdoom.__file__).parent / WADS[name]))
        game.set_doom_config_path(str(Path(folder) / "vizdoom.ini"))
        game.set_doom_map(name)
        game.set_doom_skill(1)
        game.set_seed(seed)
        game.set_mode(vizdoom.Mode.PLAYER)
        game.set_episode_timeout(0)
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_256X192)
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        game.set_depth_buffer_enabled(True)
        game.set_labels_buffer_enabled(True)
        game.set_objects_info_enabled(True)
        for hide in (
            game.set_render_crosshair,
            game.set_render_decals,
            game.set_render_effects_sprites,
            game.set_render_hud,
            game.set_render_messages,
            game.set_render_particles,
            game.set_render_screen_flashes,
            game.set_render_weapon,
        ):
            hide(False)
        game.set_available_buttons(
            [
                button.MOVE_FORWARD_BACKWARD_DELTA,
                button.MOVE_LEFT_RIGHT_DELTA,
                button.TURN_LEFT_RIGHT_DELTA,
                button.USE,
            ]
        )
        game.set_available_game_variables(
            [
                variable.CAMERA_POSITION_X,
                variable.CAMERA_POSITION_Y,
                variable.CAMERA_POSITION_Z,
                variable.CAMERA_ANGLE,
            ]
        )
        game.add_game_args("+sv_cheats 1 -nomusic")
        try:
            with _STARTING:
                game.init()
        except vizdoom.ViZDoomErrorException as e:
            raise RuntimeError(
                f"ViZDoom did not start in map {name} ({e}); try its own examples"
            ) from e
        try:
            _prepare(game)
            yield game
        finally:
            game.close()
            with suppress(OSError):  # empty, made by the engine where it runs
                os.rmdir("_vizdoom")


def spots(game: Any) -> np.ndarray:
    """Places [N, 2] in map units where things to pick up lie, sorted."""
    found = game.get_state().objects
    at = {(o.position_x, o.position_y) for o in found if o.category in STARTS}
    return np.array(sorted(at))


def put(game: Any, spot: np.ndarray, heading: float) -> None:
    """Sets the walker down at a spot [2] (map units) and turns it left by degrees."""
    if game.is_episode_finished():
        game.new_episode()
        _prepare(game)
    game.send_game_command(f"warp {spot[0]} {spot[1]}")
    game.make_action([0.0, 0.0, -heading, 0.0])


def step(game: Any, action: Sequence[float]) -> Tic | None:
    """One tic; None if it ended the map.

    Args:
      game: of `started`.
      action: speeds forward and right (in the engine's numbers: 25 is its walk, about
        9 m/s), degrees to turn right, and whether to push what is ahead (0 or 1).
    """
    game.make_action(list(action))
    if game.is_episode_finished():
        return None
    state = game.get_state()
    east, north, up, angle = state.game_variables
    eye = np.array([east / UNITS, north / UNITS, up * STRETCH / UNITS, angle])
    target = np.full(2, np.nan)
    nearest = np.inf
    for label in state.labels:
        if label.object_category not in OBJECTS:
            continue
        aim = bearing(angle, label.x + label.width / 2, label.y + label.height / 2)
        away = _distance(label, east, north)
        # The engine's picture is wider than the square one: not what is beside that.
        if away < nearest and np.isfinite(project(angle, aim)).all():
            nearest, target = away, aim
    return Tic(state.screen_buffer, state.depth_buffer, eye, target)


def cameras(eye: np.ndarray) -> np.ndarray:
    """Poses in OpenCV's axes, relative to the first: `Tic.eye` [T, 4] -> [T, 4, 4]."""
    angle = np.radians(eye[:, 3])
    c, s, nil = np.cos(angle), np.sin(angle), np.zeros(len(eye))
    right, down, forward = (s, -c, nil), (nil, nil, nil - 1), (c, s, nil)
    out = np.zeros((len(eye), 4, 4))
    out[:, :3, :3] = np.stack([np.stack(v, -1) for v in (right, down, forward)], -1)
    out[:, :3, 3] = eye[:, :3]
    out[:, 3, 3] = 1
    return poses.relative(out)


def gaze_proxy(eye: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Where a gaze would be that follows the nearest object in view: a proxy, [T, 2].

    It follows the object's bearing in the world with a lag, by a filter of first order
    with the time constant `LAG`: it takes some tics to go over to another object, and
    trails one that moves. Where there was no object, it begins at the new one.

    Args:
      eye: [T, 4] of `Tic.eye`.
      target: [T, 2] of `Tic.target`.

    Returns:
      x, y as shares of the square picture; NaN without an object, and outside of it.
    """
    gain = 1 - np.exp(-1 / (RATE * LAG))
    now = np.full(2, np.nan)
    out = []
    for (_, _, _, angle), aim in zip(eye, target, strict=True):
        gap = _wrapped(aim - now)  # NaN unless there is an object now and was before
        now = np.where(np.isnan(gap), aim, now + gain * gap)
        out.append(project(angle, now))
    return np.array(out)


def bearing(angle: float, column: float, row: float) -> np.ndarray:
    """Degrees left of east, and up, [2], of a place in the engine's picture, in pixels.

    Args:
      angle: of the camera.
      column, row: from the upper left corner of the picture.
    """
    x, y = (column - WIDTH / 2) / (WIDTH / 2), (row - HEIGHT / 2) / (WIDTH / 2)
    return np.array(
        [angle - np.degrees(np.arctan(x)), -np.degrees(np.arctan2(y, np.hypot(1, x)))]
    )


def project(angle: float, direction: np.ndarray) -> np.ndarray:
    """x, y [2] in the square picture of a `bearing`; NaN outside of it."""
    right, up = np.radians([_wrapped(angle - direction[0]), direction[1]])
    x, y = np.tan(right), -np.tan(up) / np.cos(right)
    place = 0.5 + FOCAL * np.array([x, y])
    ahead = abs(right) < np.pi / 2 and (place >= 0).all() and (place <= 1).all()
    return place if ahead else np.full(2, np.nan)


def _prepare(game: Any) -> None:
    """Nothing hurts the walker or takes notice of it, and no text is in the picture.

    Who lacks a key is told so across the picture, and across its depths, whatever hides
    messages: so the walker has them all.
    """
    quiet = "show_messages 0", "cl_showsecretmessage 0"
    for command in (*quiet, "god", "notarget", "give keys"):
        game.send_game_command(command)


def _distance(label: Any, east: float, north: float) -> float:
    return np.hypot(label.object_position_x - east, label.object_position_y - north)


def _wrapped(degrees: Any) -> Any:
    return (degrees + 180) % 360 - 180

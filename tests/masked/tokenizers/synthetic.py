"""Synthetic clips: moving shapes, made here, in the units of recorded ones."""

import numpy as np

from multitask_jax.masked.tokenizers import Config


def clips(config: Config, count: int, seed: int = 0) -> np.ndarray:
    """Clips of the configuration's kind; depth and gaze have unknown parts."""
    rng = np.random.default_rng(seed)
    if config.kind == "camera":
        return _cameras(rng, count, config.samples)
    if config.kind == "gaze":
        return _gazes(rng, count, config.samples)
    return _videos(rng, count, config)


def _cameras(rng: np.random.Generator, count: int, samples: int) -> np.ndarray:
    """Walks on a plane, turning about the vertical axis (y), from the identity."""
    turn = np.cumsum(rng.normal(0, 0.02, (count, 1)) * np.ones((1, samples)), axis=1)
    turn -= turn[:, :1]
    pose = np.zeros((count, samples, 4, 4))
    pose[..., 0, 0], pose[..., 0, 2] = np.cos(turn), np.sin(turn)
    pose[..., 2, 0], pose[..., 2, 2] = -np.sin(turn), np.cos(turn)
    pose[..., 1, 1] = pose[..., 3, 3] = 1
    step = 0.1 * np.stack([np.sin(turn), 0 * turn, np.cos(turn)], axis=-1)
    pose[..., :3, 3] = np.cumsum(step, axis=1) - step[:, :1]
    return pose.astype(np.float32)


def _gazes(rng: np.random.Generator, count: int, samples: int) -> np.ndarray:
    start, slope = rng.uniform(0.2, 0.8, (2, count, 1, 2))
    t = np.linspace(0, 1, samples)[None, :, None]
    gaze = start + (slope - start) * t
    gaze[:, : samples // 8] = np.nan
    return gaze.astype(np.float32)


def _videos(rng: np.random.Generator, count: int, config: Config) -> np.ndarray:
    """A bright square that moves over a gradient; far pixels of depth are unknown."""
    f, s = config.frames, config.size
    y, x = np.mgrid[:s, :s] / s
    start, slope = rng.uniform(0.2, 0.8, (2, count, 1, 2))
    centre = start + (slope - start) * np.linspace(0, 1, f)[None, :, None]
    dx = np.abs(x[None, None] - centre[..., 0, None, None])
    dy = np.abs(y[None, None] - centre[..., 1, None, None])
    inside = (dx < 0.2) & (dy < 0.2)
    if config.kind == "depth":
        depth = np.where(inside, 2.0, 3.0 + 10 * y[None, None])
        depth[..., : s // 8, :] = np.nan
        return depth.astype(np.float32)
    back = np.broadcast_to(np.stack([x, y, 1 - x], axis=-1), (count, f, s, s, 3))
    return (255 * np.where(inside[..., None], 0.9, 0.6 * back)).astype(np.uint8)

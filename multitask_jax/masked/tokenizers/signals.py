"""Between the units of data and the signals of networks, about -1 to 1.

    rgb     uint8 [F, H, W, 3]             x / 127.5 - 1
    depth   metres [F, H, W]               log, standardised; NaN is no part of the loss
    camera  camera-to-world [S, 4, 4]      9 numbers, standardised
    gaze    (x, y) in [0, 1], [S, 2]       2 x - 1; NaN is no part of the loss

Decoders always give a number, also where the data had NaN.

Legend: N clips, F frames, H x W pixels, S samples of a trajectory, C channels.
"""

import jax
import jax.numpy as jnp
import numpy as np

from multitask_jax.data import poses
from multitask_jax.masked.tokenizers.quantizers import along_last
from multitask_jax.masked.tokenizers.types import (
    CHANNELS,
    PATCH,
    Config,
    Statistics,
    grid,
)

Array = jax.Array
_NEAREST = 1e-2  # metres: what depth 0 is taken for
_FURTHEST = 4.0  # deviations of log depth: decoders go no further
_STILL = 1e-2  # the least deviation, or a channel that never moves would be all noise
_SAMPLE = 256  # clips that statistics are measured on, or up to twice as many


def data_shape(config: Config) -> tuple[int, ...]:
    """The shape of one clip of data."""
    frame = (config.frames, config.size, config.size)
    return {
        "rgb": (*frame, 3),
        "depth": frame,
        "camera": (config.samples, 4, 4),
        "gaze": (config.samples, 2),
    }[config.kind]


def check(config: Config, x: np.ndarray, where: str) -> None:
    """ValueError unless x are clips [N, ...] of the configuration's kind and sizes."""
    expected = data_shape(config)
    dtype = np.dtype(np.uint8 if config.kind == "rgb" else np.float32)
    if x.ndim != len(expected) + 1 or x.shape[1:] != expected or x.dtype != dtype:
        sizes = ", ".join(map(str, expected))
        raise ValueError(
            f"{where}: got {x.dtype}{list(x.shape)}, expected {dtype}[N, {sizes}],"
            f" clips of {config.kind} by the tokenizer's configuration; convert them,"
            " or set frames, size or samples"
        )


def to_network(config: Config, statistics: Statistics, x: Array) -> tuple[Array, Array]:
    """Signals and what of them is known: [N, ...] -> ([N, ..., C], [N, ..., 1]).

    What is unknown is 0 in a depth; a gaze is then the nearest in time that is known (0
    without any). The mask is float32, 1 where known.
    """
    known = jnp.ones((*x.shape[:2], 1))
    if config.kind == "camera":
        y = poses.to_vector(x)
    elif config.kind == "depth":
        y = jnp.log(jnp.maximum(x, _NEAREST))[..., None]  # NaN stays NaN
    else:
        y = x.astype(jnp.float32)
    if config.is_video:
        known = jnp.ones((*x.shape[:4], 1))
    if config.kind in ("depth", "gaze"):
        known = jnp.all(jnp.isfinite(y), axis=-1, keepdims=True).astype(jnp.float32)
    mean, deviation = (along_last(y.ndim, v) for v in statistics)
    signal = jnp.where(known > 0, (y - mean) / deviation, 0.0)
    return (_held(signal, known) if config.kind == "gaze" else signal), known


def _held(signal: Array, known: Array) -> Array:
    """A trajectory [N, S, C] whose gaps are its nearest samples; known: [N, S, 1]."""
    place = jnp.arange(signal.shape[1])
    away = jnp.abs(place[:, None] - place[None])[None]
    away = jnp.where(known[:, None, :, 0] > 0, away, len(place))
    nearest = jnp.argmin(away, axis=-1)[..., None]
    return jnp.take_along_axis(signal, nearest, axis=1)


def known_tokens(config: Config, x: np.ndarray) -> np.ndarray:
    """Which tokens [N, *G] have any value that is known; a depth's or gaze's may not.

    Args:
      config: of the tokenizer.
      x: clips [N, ...], checked.
    """
    cells = grid(config)
    if config.kind == "gaze":
        valid = np.isfinite(x).all(axis=-1)
        return valid.reshape(len(x), *cells, config.stride).any(axis=-1)
    if config.kind == "depth":
        t, h, w = cells
        valid = np.isfinite(x).reshape(len(x), t, config.temporal, h, PATCH, w, PATCH)
        return valid.any(axis=(2, 4, 6))
    return np.ones((len(x), *cells), bool)


def from_network(config: Config, statistics: Statistics, y: Array) -> Array:
    """The inverse, into the data's shape, units and dtype: [N, ..., C] -> [N, ...]."""
    if config.kind == "depth":
        y = jnp.clip(y, -_FURTHEST, _FURTHEST)
    mean, deviation = (along_last(y.ndim, v) for v in statistics)
    x = y * deviation + mean
    if config.kind == "rgb":
        return jnp.clip(jnp.round(x), 0, 255).astype(jnp.uint8)
    if config.kind == "depth":
        return jnp.exp(x[..., 0])
    if config.kind == "camera":
        # In its own first frame, as the data are.
        return poses.relative(poses.from_vector(x))
    return jnp.clip(x, 0.0, 1.0)


def measure(config: Config, data: np.ndarray) -> Statistics:
    """The statistics of training data; those of rgb and gaze are fixed.

    Args:
      config: of the tokenizer.
      data: clips [N, ...], checked; of many, 256 to 511, evenly spread, are looked at.

    Raises:
      ValueError: there is no finite depth, or a pose with NaN.
    """
    channels = CHANNELS[config.kind]
    if config.kind in ("rgb", "gaze"):
        half = np.full(channels, 127.5 if config.kind == "rgb" else 0.5, np.float32)
        return Statistics(half, half.copy())
    some = data[:: max(1, len(data) // _SAMPLE)]
    raw = Statistics(np.zeros(channels, np.float32), np.ones(channels, np.float32))
    y, known = map(np.asarray, to_network(config, raw, jnp.asarray(some)))
    y = y[known[..., 0] > 0].astype(np.float64)
    if not len(y) or not np.isfinite(y).all():
        raise ValueError(
            f"data: {config.kind} without any finite value, or with NaN where there"
            " must be none; leave such clips out"
        )
    deviation = y.std(axis=0)
    if config.kind == "camera":
        # One for all of the rotation and one for the position: by itself, a height
        # that hardly moves would count like the way that was walked.
        for part in (slice(None, 6), slice(6, None)):
            deviation[part] = np.sqrt(np.mean(deviation[part] ** 2))
    deviation = np.maximum(deviation, _STILL)
    return Statistics(y.mean(axis=0).astype(np.float32), deviation.astype(np.float32))

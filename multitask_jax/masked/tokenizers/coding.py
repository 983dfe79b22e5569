"""A frozen tokenizer at work: clips to tokens, tokens to clips, and how good they are.

Legend: N clips, G the grid of tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from multitask_jax.masked.tokenizers import model, quantizers, signals
from multitask_jax.masked.tokenizers.types import (
    Config,
    Statistics,
    Tokenizer,
    grid,
    vocabulary,
)

Array = jax.Array


def encode(tokenizer: Tokenizer, x: np.ndarray, batch: int = 64) -> np.ndarray:
    """Tokens of clips: [N, ...] in the data's units -> [N, *G] int32.

    Args:
      tokenizer: from `fit` or `load`.
      x: clips of its kind; NaN where depth or gaze is unknown.
      batch: clips at a time; fewer clips go as the next power of two.

    Raises:
      ValueError: clips of other shapes or of another dtype.
    """
    config = tokenizer.config
    signals.check(config, x, "x")
    run = functools.partial(_encode, config, tokenizer.variables, tokenizer.statistics)
    return _in_batches(run, x, batch)


def known(tokenizer: Tokenizer, x: np.ndarray) -> np.ndarray:
    """Which tokens of clips stand for anything known: [N, ...] -> [N, *G] bool.

    A gaze has samples, and a depth pixels, without a value; a token of nothing else is
    no truth to learn.

    Raises:
      ValueError: clips of other shapes or of another dtype.
    """
    signals.check(tokenizer.config, x, "x")
    return signals.known_tokens(tokenizer.config, x)


def decode(tokenizer: Tokenizer, tokens: np.ndarray, batch: int = 64) -> np.ndarray:
    """Clips of tokens: [N, *G] -> [N, ...] in the data's units, without NaN.

    Raises:
      ValueError: tokens of another grid, or that are none of the vocabulary's.
    """
    config, tokens = tokenizer.config, np.asarray(tokens)
    size = vocabulary(config)
    sizes = ", ".join(map(str, grid(config)))
    right = tokens.shape[1:] == grid(config) and tokens.dtype.kind in "iu"
    if not right or (tokens.size and not 0 <= tokens.min() <= tokens.max() < size):
        found = f" from {tokens.min()} to {tokens.max()}" if tokens.size else ""
        raise ValueError(
            f"tokens: got {tokens.dtype}{list(tokens.shape)}{found}, expected integers"
            f" [N, {sizes}] from 0 to {size - 1}, of the same tokenizer's `encode`"
        )
    run = functools.partial(_decode, config, tokenizer.variables, tokenizer.statistics)
    return _in_batches(run, tokens.astype(np.int32), batch)


def decode_mean(
    tokenizer: Tokenizer,
    probabilities: np.ndarray,
    batch: int = 64,
    *,
    draws: int = 0,
    seed: int = 0,
) -> np.ndarray:
    """The mean clip of uncertain tokens, near the one of least squared error.

    Where `decode` of sampled tokens is a possible clip, this is what a model that is
    unsure expects (our addition).

    Args:
      tokenizer: from `fit` or `load`.
      probabilities: [N, *G, K] of each code.
      batch: as in `encode`.
      draws: mean of so many clips, the tokens of each drawn independently; 0: one clip,
        the decoder getting the mean of the codes' vectors, which is as fast as `decode`
        but none of what it was trained on.
      seed: of the draws.

    Returns:
      [N, ...] in the data's units, without NaN; `decode` where one code has all.

    Raises:
      ValueError: probabilities of another grid or vocabulary, or draws below 0.
    """
    config, p = tokenizer.config, np.asarray(probabilities, np.float32)
    expected = *grid(config), vocabulary(config)
    if p.shape[1:] != expected:
        sizes = ", ".join(map(str, expected))
        raise ValueError(
            f"probabilities: got {list(p.shape)}, expected [N, {sizes}], of codes of"
            " this tokenizer"
        )
    if draws < 0:
        raise ValueError(f"draws: got {draws}, expected 0 or more")
    key = jax.random.key(seed)
    run = functools.partial(
        _decode_mean, config, draws, tokenizer.variables, tokenizer.statistics, key
    )
    return _in_batches(run, p, batch)


@functools.partial(jax.jit, static_argnums=0)
def _encode(config: Config, variables: Any, statistics: Statistics, x: Array) -> Array:
    signal, _ = signals.to_network(config, statistics, x)
    encodings = model.encode(config, variables, signal)
    return model.quantize(config, variables, encodings).codes


@functools.partial(jax.jit, static_argnums=0)
def _decode(
    config: Config, variables: Any, statistics: Statistics, tokens: Array
) -> Array:
    values = model.values(config, variables, tokens)
    y = model.decode(config, variables, values)
    return signals.from_network(config, statistics, y)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode_mean(
    config: Config,
    draws: int,
    variables: Any,
    statistics: Statistics,
    key: Array,
    p: Array,
) -> Array:
    if not draws:
        values = p @ model.values(config, variables, jnp.arange(p.shape[-1]))
        y = model.decode(config, variables, values)
        return signals.from_network(config, statistics, y)

    def add(total: Array, key: Array) -> tuple[Array, None]:
        codes = jax.random.categorical(key, jnp.log(p))
        values = model.values(config, variables, codes)
        return total + model.decode(config, variables, values), None

    none = jnp.zeros((len(p), *model.signal_shape(config)))
    # In the network's signal, where depths are logarithms and poses not yet rigid.
    total, _ = jax.lax.scan(add, none, jax.random.split(key, draws))
    return signals.from_network(config, statistics, total / draws)


def _in_batches(
    run: Callable[[np.ndarray], Array], x: np.ndarray, batch: int
) -> np.ndarray:
    """Runs on equal batches, the last one padded by its last clip: one compilation."""
    if not len(x):  # the shape and dtype of nothing, without running anything
        like = jax.eval_shape(run, jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype))
        return np.zeros((0, *like.shape[1:]), like.dtype)
    batch = min(batch, 1 << (len(x) - 1).bit_length())
    out = []
    for start in range(0, len(x), batch):
        part = np.asarray(x[start : start + batch])
        missing = batch - len(part)
        if missing:
            part = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)])
        out.append(np.asarray(run(part))[: batch - missing])
    return np.concatenate(out)


def reconstruction_report(
    tokenizer: Tokenizer, x: np.ndarray, batch: int = 64
) -> dict[str, float]:
    """How well clips survive being tokens.

    Args:
      tokenizer: from `fit` or `load`.
      x: clips that it was not trained on.
      batch: as in `encode`.

    Returns:
      rgb: "psnr" [dB], of the mean squared error over all clips.
      depth: "abs_rel", the mean of |d' - d| / d over pixels of known depth above 0.
      camera: "translation_rmse" [m] and "rotation_error" [degrees], a mean of angles.
      gaze: "rmse" of (x, y) over valid samples, in units of the image's sides.
      All: "used", the share of codes that occur, and "perplexity" of the tokens.
    """
    tokens = encode(tokenizer, x, batch)
    y = decode(tokenizer, tokens, batch)
    counts = np.bincount(tokens.reshape(-1), minlength=vocabulary(tokenizer.config))
    quality = {"rgb": _rgb, "depth": _depth, "camera": _camera, "gaze": _gaze}
    return quality[tokenizer.config.kind](np.asarray(x), y) | {
        "used": float(quantizers.used_share(jnp.asarray(counts))),
        "perplexity": float(quantizers.perplexity(jnp.asarray(counts))),
    }


def _rgb(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    # Clip by clip: float64 copies of all of them may not fit.
    squares = [np.mean((a.astype(np.float64) - b) ** 2) for a, b in zip(x, y)]  # noqa: B905
    return {"psnr": float(10 * np.log10(255**2 / max(np.mean(squares), 1e-9)))}


def _depth(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    known = np.isfinite(x) & (x > 0)
    d = x[known].astype(np.float64)
    return {"abs_rel": float(np.mean(np.abs(y[known] - d) / d))}


def _camera(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    step = (y - x)[..., :3, :].astype(np.float64)
    # |R' - R|_F = 2 sqrt(2) sin(angle / 2): exact for small angles, unlike the trace's.
    chord = np.linalg.norm(step[..., :3], axis=(-2, -1)) / np.sqrt(8)
    angle = np.degrees(2 * np.arcsin(np.clip(chord, 0, 1)))
    square = np.sum(step[..., 3] ** 2, axis=-1)
    return {
        "translation_rmse": float(np.sqrt(square.mean())),
        "rotation_error": float(angle.mean()),
    }


def _gaze(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    valid = np.isfinite(x).all(axis=-1)
    square = np.sum((y[valid].astype(np.float64) - x[valid]) ** 2, axis=-1)
    return {"rmse": float(np.sqrt(square.mean()))}

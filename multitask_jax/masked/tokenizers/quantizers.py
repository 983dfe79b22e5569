"""Vector quantisation: continuous encodings to integer codes and back.

Two ways. A codebook of directions, looked up by cosine and moved by exponential moving
averages ("vq": van den Oord et al. 2017, arXiv 1711.00937, appendix A; Yu et al. 2021,
arXiv 2110.04627), as EgoM2P's trajectories have it; and finite scalar quantisation,
which rounds a few bounded numbers and learns no codebook ("fsq": Mentzer et al. 2023,
arXiv 2309.15505).

Legend: N encodings, D their width, K codes; "..." any leading axes.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Codebook(NamedTuple):
    """K unit vectors, and the moving averages that they are made of; a pytree."""

    codes: Array  # [K, D], of length 1
    counts: Array  # [K]: encodings a batch that chose each code
    sums: Array  # [K, D]: the sum of those encodings


class Quantized(NamedTuple):
    """What a quantiser makes of encodings."""

    values: Array  # [..., D], for the decoder; their gradient is the encodings'
    codes: Array  # [...] int32
    loss: Array  # [], to be added to the reconstruction's


def straight_through(x: Array, quantized: Array) -> Array:
    """The quantised values, with the gradient of the identity in x.

    Exactly `quantized`, not x + (quantized - x), which rounds: decoding codes later
    gives the decoder the very numbers that it was trained on.
    """
    return jax.lax.stop_gradient(quantized) + (x - jax.lax.stop_gradient(x))


def normalize(x: Array) -> Array:
    """x / |x| along the last axis; 0 stays 0, and its gradient finite."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


def init_codebook(key: Array, codes: int, width: int) -> Codebook:
    """Random directions, all of them dead: the first update takes encodings instead."""
    directions = normalize(jax.random.normal(key, (codes, width)))
    return Codebook(directions, jnp.zeros(codes), jnp.zeros((codes, width)))


def vq(codebook: Codebook, encodings: Array, *, commitment: float = 1.0) -> Quantized:
    """The code of highest cosine for each encoding.

    Encodings are put on the unit sphere, too. The loss pulls them to their codes:
    commitment * mean_n |z_n - sg(code_n)|^2; codes follow by `ema_update` alone.

    Args:
      codebook: see `init_codebook`.
      encodings: [..., D].
      commitment: beta of the paper; 1 in EgoM2P.
    """
    z = normalize(encodings)
    cosine = jnp.einsum("...d,kd->...k", jax.lax.stop_gradient(z), codebook.codes)
    codes = jnp.argmax(cosine, axis=-1).astype(jnp.int32)
    values = vq_values(codebook, codes)
    distance = jnp.sum(jnp.square(z - jax.lax.stop_gradient(values)), axis=-1)
    loss = commitment * jnp.mean(distance)
    return Quantized(straight_through(z, values), codes, loss)


def vq_values(codebook: Codebook, codes: Array) -> Array:
    """The vectors of codes: [...] -> [..., D]."""
    return codebook.codes[codes]


def ema_update(
    state: Codebook,
    encodings: Array,
    codes: Array,
    key: Array,
    *,
    decay: float = 0.99,
    dead: float = 0.1,
) -> Codebook:
    """Moves each code to the mean direction of the encodings that chose it.

        counts <- decay counts + (1 - decay) n
        sums   <- decay sums   + (1 - decay) sum of z
        codes  <- sums / |sums|

    A code chosen by less than `dead` times its share N / K, on average, is replaced by
    one of the batch's encodings, and counted as just alive: where encodings still move
    fast, it is replaced at once, again and again, until it is chosen often enough (the
    threshold is our choice).

    Args:
      state: the codebook that chose.
      encodings: [..., D], as given to `vq`.
      codes: [...], which it chose.
      key: of the encodings that replace dead codes.
      decay: of the averages.
      dead: of its share, what a code needs; above 0.
    """
    k, d = state.codes.shape
    z = normalize(jax.lax.stop_gradient(encodings)).reshape(-1, d)
    flat = codes.reshape(-1)
    n = jnp.zeros(k).at[flat].add(1.0)
    total = jnp.zeros((k, d)).at[flat].add(z)
    counts = decay * state.counts + (1 - decay) * n
    sums = decay * state.sums + (1 - decay) * total
    least = dead * len(z) / k
    is_dead = counts <= least
    fresh = z[jax.random.choice(key, len(z), (k,), replace=len(z) < k)]
    sums = jnp.where(is_dead[:, None], least * fresh, sums)
    return Codebook(normalize(sums), jnp.where(is_dead, least, counts), sums)


def fsq(encodings: Array, levels: tuple[int, ...]) -> Quantized:
    """Each of the D = len(levels) numbers, bounded, to the nearest of its levels.

    Values are from -1 to 1, a level L_d being 2 / L_d apart; there is no loss.

    Raises:
      ValueError: encodings of another width than there are levels.
    """
    if encodings.shape[-1] != len(levels):
        raise ValueError(
            f"encodings: got shape {list(encodings.shape)}, expected a last axis of"
            f" {len(levels)}, one number for each of the levels {levels}"
        )
    half = along_last(encodings.ndim, [n // 2 for n in levels])
    bounded = _bound(encodings, levels)
    whole = jnp.round(jax.lax.stop_gradient(bounded))
    digits = (whole + half).astype(jnp.int32)
    basis = along_last(encodings.ndim, _basis(levels)).astype(jnp.int32)
    codes = jnp.sum(digits * basis, axis=-1)
    values = straight_through(bounded, whole) / half
    return Quantized(values, codes, jnp.zeros(()))


def fsq_values(codes: Array, levels: tuple[int, ...]) -> Array:
    """The numbers of codes, by mixed radix: [...] -> [..., D]; the inverse of `fsq`."""
    digits = [codes // b % n for b, n in zip(_basis(levels), levels, strict=True)]
    half = along_last(codes.ndim + 1, [n // 2 for n in levels])
    return (jnp.stack(digits, axis=-1) - half) / half


def check_levels(levels: tuple[int, ...]) -> None:
    """ValueError unless there are levels, 2 to 1000 a number, of int32 codes.

    Of more, `_bound` would let the highest round to one that is none.
    """
    good = levels and all(isinstance(n, int) and 1 < n <= 1000 for n in levels)
    if not good or math.prod(levels) >= 2**31:
        raise ValueError(
            f"levels: got {levels}, expected a tuple of integers from 2 to 1000,"
            " such as (8, 5, 5, 5), with a product below 2^31"
        )


def _bound(z: Array, levels: tuple[int, ...]) -> Array:
    """tanh, scaled and shifted so that rounding gives L_d integers (section 3.1).

    An even number of levels is centred half a step off zero; 0 still maps to 0.
    """
    half = np.array([(n - 1) * (1 + 1e-3) / 2 for n in levels])
    offset = np.array([0.5 if n % 2 == 0 else 0.0 for n in levels])
    half, offset, shift = (
        along_last(z.ndim, v) for v in (half, offset, np.arctanh(offset / half))
    )
    return half * jnp.tanh(z + shift) - offset


def _basis(levels: tuple[int, ...]) -> list[int]:
    """(8, 5, 5) -> [1, 8, 40]: what a step of each digit adds to the code."""
    return [math.prod(levels[:i]) for i in range(len(levels))]


def along_last(ndim: int, values: Array | np.ndarray | list[int]) -> Array:
    """[D] as [1, ..., 1, D]: ranks are not promoted here."""
    return jnp.asarray(values, jnp.float32).reshape((1,) * (ndim - 1) + (-1,))


def code_counts(codes: Array, size: int) -> Array:
    """How often each of `size` codes occurs: [...] -> [size] float32."""
    return jnp.zeros(size).at[codes.reshape(-1)].add(1.0)


def used_share(counts: Array) -> Array:
    """The share of codes that occur at all: [K] -> []."""
    return jnp.mean((counts > 0).astype(jnp.float32))


def perplexity(counts: Array) -> Array:
    """exp of the entropy of codes: K if all are as frequent, 1 if there is one."""
    p = counts / jnp.maximum(jnp.sum(counts), 1)
    return jnp.exp(jnp.sum(jax.scipy.special.entr(p)))

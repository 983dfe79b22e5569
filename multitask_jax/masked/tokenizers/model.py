"""Encoder, quantiser and decoder together, whatever the kind of data.

Legend: B clips, G the grid of tokens, D of an encoding; signals are those of `signals`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from multitask_jax.masked.tokenizers import quantizers, trajectory, video
from multitask_jax.masked.tokenizers.quantizers import Quantized
from multitask_jax.masked.tokenizers.types import CHANNELS, Config, grid

Array = jax.Array


def networks(config: Config) -> tuple[nn.Module, nn.Module]:
    """The encoder, signal -> encodings [B, *G, D], and the decoder, its mirror."""
    sizes: dict[str, Any] = {"width": config.width, "blocks": config.blocks}
    if config.is_video:
        module, sizes["temporal"] = video, config.temporal
    else:
        module = trajectory
        sizes |= {"heads": config.heads, "stride": config.stride}
    return (
        module.Encoder(**sizes, latent=config.encoding_width),
        module.Decoder(**sizes, channels=CHANNELS[config.kind]),
    )


def signal_shape(config: Config) -> tuple[int, ...]:
    """The shape of one clip as the encoder takes it."""
    if config.is_video:
        side = config.size
        return config.frames, side, side, CHANNELS[config.kind]
    return config.samples, CHANNELS[config.kind]


def init(config: Config, key: Array) -> Any:
    """Variables of an untrained tokenizer; see `Tokenizer`."""
    encoder, decoder = networks(config)
    keys = jax.random.split(key, 3)
    signal = jnp.zeros((1, *signal_shape(config)))
    latent = jnp.zeros((1, *grid(config), config.encoding_width))
    variables = {
        "encoder": encoder.init(keys[0], signal)["params"],
        "decoder": decoder.init(keys[1], latent)["params"],
    }
    if config.quantizer == "vq":
        variables["codebook"] = quantizers.init_codebook(
            keys[2], config.codes, config.latent
        )
    return variables


def encode(config: Config, variables: Any, signal: Array) -> Array:
    """The signal's encodings, not yet quantised: [B, *G, D]."""
    return networks(config)[0].apply({"params": variables["encoder"]}, signal)


def quantize(config: Config, variables: Any, encodings: Array) -> Quantized:
    """Codes [B, *G] of encodings, and what the decoder gets in their place."""
    if config.quantizer == "vq":
        return quantizers.vq(variables["codebook"], encodings)
    return quantizers.fsq(encodings, config.levels)


def values(config: Config, variables: Any, codes: Array) -> Array:
    """What the decoder gets for codes: [B, *G] -> [B, *G, D]."""
    if config.quantizer == "vq":
        return quantizers.vq_values(variables["codebook"], codes)
    return quantizers.fsq_values(codes, config.levels)


def decode(config: Config, variables: Any, values: Array) -> Array:
    """The signal of quantised encodings."""
    return networks(config)[1].apply({"params": variables["decoder"]}, values)


def loss(y: Array, signal: Array, known: Array) -> Array:
    """Mean squared error of a reconstruction over what is known: [].

    Args:
      y: [B, ..., C], reconstructed.
      signal: [B, ..., C].
      known: [B, ..., 1], 1 or 0. A batch without anything known has loss 0.
    """
    error = jnp.where(known > 0, jnp.square(y - signal), 0.0)
    return jnp.sum(error) / jnp.maximum(jnp.sum(known) * signal.shape[-1], 1)

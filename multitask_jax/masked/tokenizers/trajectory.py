"""The networks of camera paths and gaze: EgoM2P's temporal VQ-VAE.

Some samples make a token. Blocks see the whole path, in both directions.

Legend: B clips, S samples, R of them a token, L = S / R tokens, C channels, W width, D
of an encoding.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from multitask_jax.layers.transformer import Block
from multitask_jax.masked.modalities import sin_cos

Array = jax.Array


class Blocks(nn.Module):
    """Positions, pre-norm blocks, and the residual tanh MLP: [B, L, W] -> [B, L, W]."""

    blocks: int
    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x + positions, through all blocks; then x + MLP(norm(x))."""
        length, width = x.shape[1:]
        x = x + jnp.asarray(sin_cos(np.arange(length), width))[None]
        for i in range(self.blocks):
            x = Block(width, self.heads, 4 * width, name=f"block_{i}")(x)
        y = nn.LayerNorm(epsilon=1e-6, name="layernorm_mlp")(x)
        y = nn.tanh(nn.Dense(4 * width, name="intermediate")(y))
        return x + nn.Dense(width, name="output")(y)


class Encoder(nn.Module):
    """[B, S, C] -> encodings [B, L, D]."""

    width: int
    blocks: int
    heads: int
    stride: int
    latent: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Conv1d with kernel = stride: a dense layer on R samples; blocks."""
        b, s, c = x.shape
        x = x.reshape(b, s // self.stride, self.stride * c)
        x = nn.Dense(self.width, name="embed")(x)
        x = Blocks(self.blocks, self.heads, name="blocks")(x)
        return nn.Dense(self.latent, name="to_latent")(x)


class Decoder(nn.Module):
    """The mirror of `Encoder`: [B, L, D] -> [B, S, C]."""

    width: int
    blocks: int
    heads: int
    stride: int
    channels: int

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """Blocks, and the transposed convolution, a dense layer to R samples."""
        b, l, _ = z.shape
        x = nn.Dense(self.width, name="from_latent")(z)
        x = Blocks(self.blocks, self.heads, name="blocks")(x)
        x = nn.Dense(self.stride * self.channels, name="unembed")(x)
        return x.reshape(b, l * self.stride, self.channels)

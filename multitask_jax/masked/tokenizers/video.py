"""The networks of RGB and depth video: a small causal 3-D convolutional tokenizer.

A token is `temporal` frames (4, or 1) of 8 x 8 pixels. In time the networks are causal:
token t sees no frame after its own, and frames come from no later token. With
`temporal` = 1 nothing crosses frames at all.

The paper's tokenizer is a large pretrained one; this one is our reconstruction for two
CPU cores, chosen by reconstruction after 40 s of training: patches of a token's size
are embedded by a dense layer, and convolutions work on the grid of tokens, half as
wide as the blocks around them.

Legend: B clips, F frames, H x W pixels, C channels, T = F / temporal, h x w positions,
D of an encoding.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from multitask_jax.masked.tokenizers.types import PATCH

Array = jax.Array


def to_patches(x: Array, t: int, p: int) -> Array:
    """[B, F, H, W, C] -> [B, F / t, H / p, W / p, t p p C]; see `from_patches`."""
    b, f, h, w, c = x.shape
    x = x.reshape(b, f // t, t, h // p, p, w // p, p, c)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(b, f // t, h // p, w // p, t * p * p * c)


def from_patches(x: Array, t: int, p: int) -> Array:
    """The inverse of `to_patches`."""
    b, f, h, w, c = x.shape
    c //= t * p * p
    x = x.reshape(b, f, h, w, t, p, p, c).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(b, f * t, h * p, w * p, c)


class CausalConv(nn.Module):
    """3-D convolution, kernel `taps` x 3 x 3: this moment and those before."""

    taps: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, h, w, W] -> the same: a 2-D convolution a tap, all of them at once.

        A tap of i moments is moved i places along time and added: on a CPU, XLA's 3-D
        and grouped convolutions are slow.
        """
        b, t, h, w, c = x.shape
        flat = x.reshape(b * t, h, w, c)
        taps = nn.Conv(self.taps * c, (3, 3), name="conv")(flat)
        taps = taps.reshape(b, t, h, w, self.taps, c)
        out = taps[..., 0, :]
        for i in range(1, self.taps):
            earlier = taps[:, : t - i, ..., i, :]
            out += jnp.pad(earlier, ((0, 0), (i, 0), (0, 0), (0, 0), (0, 0)))
        return out


class Blocks(nn.Module):
    """Residual blocks with a bottleneck; they begin as the identity."""

    blocks: int
    taps: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, h, w, W] -> the same; He et al. 2016 (arXiv 1603.05027), pre-norm."""
        width = x.shape[-1]
        for i in range(self.blocks):
            y = nn.LayerNorm(epsilon=1e-6, name=f"layernorm_{i}")(x)
            y = nn.Dense(width // 2, name=f"down_{i}")(nn.gelu(y))
            y = CausalConv(self.taps, name=f"conv_{i}")(nn.gelu(y))
            up = nn.Dense(width, kernel_init=nn.initializers.zeros, name=f"up_{i}")
            x = x + up(nn.gelu(y))
        return x


class Encoder(nn.Module):
    """[B, F, H, W, C] -> encodings [B, T, H / 8, W / 8, D]."""

    width: int
    blocks: int
    temporal: int
    latent: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Patches, blocks, encodings."""
        x = nn.Dense(self.width, name="embed")(to_patches(x, self.temporal, PATCH))
        x = Blocks(self.blocks, min(self.temporal, 2), name="blocks")(x)
        x = nn.LayerNorm(epsilon=1e-6, name="layernorm")(x)
        return nn.Dense(self.latent, name="to_latent")(x)


class Decoder(nn.Module):
    """The mirror of `Encoder`: [B, T, H / 8, W / 8, D] -> [B, F, H, W, C]."""

    width: int
    blocks: int
    temporal: int
    channels: int

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """Encodings, blocks, patches."""
        x = nn.Dense(self.width, name="from_latent")(z)
        x = Blocks(self.blocks, min(self.temporal, 2), name="blocks")(x)
        x = nn.LayerNorm(epsilon=1e-6, name="layernorm")(x)
        patch = self.temporal * PATCH * PATCH * self.channels
        return from_patches(nn.Dense(patch, name="unembed")(x), self.temporal, PATCH)

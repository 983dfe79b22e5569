"""EgoM2P: one encoder-decoder over the discrete tokens of several modalities.

Li et al. 2025 (arXiv 2506.07886), built on 4M (Mizrahi et al. 2023, arXiv 2312.06647).
The encoder reads the tokens that are shown; a decoder query is a place, without its
content, and reads the encoder's output and the queries of its own modality. Tokens come
as ids in the joint table and positions in the joint layout of `masked.modalities`.

Legend: B batch, I inputs, O targets, M modalities, L positions, V ids, D width,
H heads, F hidden width.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as Spec

from multitask_jax.layers.attention import attend
from multitask_jax.layers.products import matmul
from multitask_jax.masked.masks import Masks, Slots
from multitask_jax.masked.modalities import (
    Modalities,
    modality_of,
    position_table,
)
from multitask_jax.masked.objective import cross_entropy, modality_mean
from multitask_jax.sharding import Rules

Array = jax.Array
Params = Any
Layout = jax.sharding.NamedSharding | None  # of activations [B, N, D] on a mesh
EPSILON = 1e-6
_INIT = nn.initializers.normal(0.02)
_KERNEL = nn.initializers.xavier_uniform()


class Shape(NamedTuple):
    """Sizes of the transformer."""

    width: int = 128
    heads: int = 4
    encoder_depth: int = 3
    decoder_depth: int = 3
    dtype: str = "float32"  # of products; parameters and softmax are float32
    # Blocks are a loop: one is compiled. Without, they run 15 % faster on a CPU.
    loop: bool = False
    remat: bool = False  # blocks are computed again going back: less memory
    chunk: int | None = None  # of targets, see `objective.cross_entropy`

    @property
    def hidden(self) -> int:
        """SwiGLU's hidden width: 2/3 of 4 D, whole eights."""
        return round(8 * self.width / 3 / 8) * 8


SHAPES = {
    "mini": Shape(64, 2, 1, 1),  # to see that all parts run
    "tiny": Shape(128, 4, 3, 3),
    "small": Shape(256, 8, 6, 6),
    "base": Shape(768, 12, 12, 12, "bfloat16", True, True, chunk=128),  # the paper's
}


class Kernel(nn.Module):
    """A matrix as a parameter of more axes: `ins` are summed over, `outs` made."""

    ins: tuple[int, ...]
    outs: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self) -> Array:
        """[*ins, *outs]."""
        flat = math.prod(self.ins), math.prod(self.outs)

        def init(key: Array) -> Array:
            return _KERNEL(key, flat).reshape(*self.ins, *self.outs)

        return self.param("kernel", init).astype(self.dtype)


class Attention(nn.Module):
    """Queries from x [B, N, D], keys and values from `context` or x; no biases."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, mask: Array, context: Array | None = None) -> Array:
        width = x.shape[-1]
        # Heads are an axis of the kernel, so that a mesh can cut it.
        split = self.heads, width // self.heads

        def parts(name: str, count: int, x: Array) -> list[Array]:
            kernel = Kernel((width,), (count, *split), self.dtype, name=name)()
            each = (kernel[:, i].reshape(width, -1) for i in range(count))
            found = (matmul(rows(x), one) for one in each)
            return [y.reshape(*x.shape[:2], *split) for y in found]

        if context is None:
            q, k, v = parts("qkv", 3, x)
        else:
            (q,), (k, v) = parts("query", 1, x), parts("key_value", 2, context)
        kernel = Kernel(split, (width,), self.dtype, name="output")()
        y = rows(attend(q, k, v, mask).reshape(*x.shape[:2], -1))
        return matmul(y, kernel.reshape(-1, width)).reshape(x.shape)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202); no biases."""

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        both = Kernel((width,), (2, self.hidden), self.dtype, name="gate_up")()
        gate, up = (matmul(rows(x), both[:, i]) for i in range(2))
        down = Kernel((self.hidden,), (width,), self.dtype, name="down")()
        return matmul(nn.silu(gate) * up, down).reshape(x.shape)


def rows(x: Array) -> Array:
    """[B, N, D] -> [B N, D]: a CPU sums gradients over one axis faster than two."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def keep(x: Array, layout: Layout) -> Array:
    """Activations [B, N, D] stay where the batch is: weights come to them.

    Without, a compiler may cut them along D, as the weights are, and sum over devices.
    """
    return x if layout is None else jax.lax.with_sharding_constraint(x, layout)


class Norm(nn.Module):
    """LayerNorm without a bias; `scale_only` of what is standardised already.

    By flax's LayerNorm, of rows too, a step takes 4 % longer on a CPU.
    """

    dtype: Any
    scale_only: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = rows(x) if self.scale_only else standardised(x, self.dtype)
        return (y * scale.astype(self.dtype)[None]).reshape(x.shape)


def standardised(x: Array, dtype: Any) -> Array:
    """Rows of x with mean 0 and variance 1, computed in float32."""
    y = rows(x).astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + EPSILON)
    return y.astype(dtype)


def _norm(shape: Shape, name: str, *, scale_only: bool = False) -> Norm:
    return Norm(shape.dtype, scale_only, name=name)


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and SwiGLU: (x, mask) -> (x, None), as a scan wants."""

    shape: Shape
    layout: Layout = None

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> tuple[Array, None]:
        s = self.shape
        y = _norm(s, "norm_attention")(x)
        x = x + Attention(s.heads, s.dtype, name="attention")(y, mask)
        y = _norm(s, "norm_mlp")(x)
        x = x + SwiGLU(s.hidden, s.dtype, name="mlp")(y)
        return keep(x, self.layout), None


class DecoderBlock(nn.Module):
    """Self-attention within a modality, cross-attention to all inputs, SwiGLU."""

    shape: Shape
    layout: Layout = None

    @nn.compact
    def __call__(
        self, y: Array, own: Array, context: Array, seen: Array
    ) -> tuple[Array, None]:
        # context: of mean 0 and variance 1 already, for all blocks at once
        s = self.shape
        z = _norm(s, "norm_self")(y)
        y = y + Attention(s.heads, s.dtype, name="self_attention")(z, own)
        z = _norm(s, "norm_query")(y)
        c = _norm(s, "norm_context", scale_only=True)(context)
        y = y + Attention(s.heads, s.dtype, name="cross_attention")(z, seen, c)
        z = _norm(s, "norm_mlp")(y)
        y = y + SwiGLU(s.hidden, s.dtype, name="mlp")(z)
        return keep(y, self.layout), None


def _stack(
    block: type[nn.Module], depth: int, shape: Shape, layout: Layout, name: str
) -> nn.Module:
    """Blocks whose parameters have a leading axis of depth."""
    if shape.remat:
        block = nn.remat(block, prevent_cse=False)
    scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=depth,
        unroll=1 if shape.loop else depth,
    )
    return scanned(shape, layout, name=name)


class EgoM2P(nn.Module):
    """Hidden states of targets; `encode`, then `decode`."""

    modalities: Modalities
    shape: Shape
    layout: Layout = None

    def setup(self) -> None:
        s = self.shape
        ids = sum(m.vocabulary for m in self.modalities)
        self.token_embedding = self.param("token_embedding", _INIT, (ids, s.width))
        self.modality_embedding = self.param(
            "modality_embedding", _INIT, (len(self.modalities), s.width)
        )
        self.mask_token = self.param("mask_token", _INIT, (s.width,))
        self.head = self.param("head", _INIT, (s.width, ids))
        self.encoder = _stack(EncoderBlock, s.encoder_depth, s, self.layout, "encoder")
        self.decoder = _stack(DecoderBlock, s.decoder_depth, s, self.layout, "decoder")
        self.encoder_norm = _norm(s, "encoder_norm")
        self.decoder_norm = _norm(s, "decoder_norm")
        self.context = Kernel((s.width,), (s.width,), s.dtype)

    def place(self, position: Array) -> Array:
        """Position and modality as a vector: int32 [B, N] -> [B, N, D]."""
        table = jnp.asarray(position_table(self.modalities, self.shape.width))
        of = jnp.asarray(modality_of(self.modalities))[position]
        # A product, not a gather, whose gradient is a scatter: slow on a CPU.
        one_hot = jax.nn.one_hot(of, len(self.modalities))
        return table[position] + one_hot @ self.modality_embedding

    def encode(self, ids: Array, position: Array, valid: Array) -> Array:
        """What is shown, int32 [B, I] each and bool [B, I] -> the context [B, I, D].

        Empty slots are 0 and stay 0, so that a sample that shows nothing has a context
        of zeros: guidance's unconditional model, which masks that always show something
        do not train.
        """
        place = self.place(position)
        x = jnp.where(valid[..., None], self.token_embedding[ids] + place, 0.0)
        x = keep(x.astype(self.shape.dtype), self.layout)
        mask = valid[:, None, None, :]
        x, _ = self.encoder(x, mask)
        x = matmul(rows(self.encoder_norm(x)), self.context()).reshape(place.shape)
        x += place.astype(self.shape.dtype)
        return keep(jnp.where(valid[..., None], x, 0.0), self.layout)

    def decode(
        self, context: Array, seen: Array, position: Array, valid: Array
    ) -> Array:
        """Context [B, I, D], seen bool [B, I], queries [B, O] -> [B, O, D]."""
        y = self.mask_token[None, None] + self.place(position)
        y = keep(y.astype(self.shape.dtype), self.layout)
        of = jnp.asarray(modality_of(self.modalities))[position]
        own = (of[:, :, None] == of[:, None, :]) & valid[:, None, :]
        alike = standardised(context, self.shape.dtype).reshape(context.shape)
        y, _ = self.decoder(y, own[:, None], alike, seen[:, None, None, :])
        return self.decoder_norm(y)

    def __call__(self, ids: Array, masks: Masks) -> Array:
        """Ids [B, L] and masks of [B, I] and [B, O] -> hidden [B, O, D]."""
        inputs, targets = masks
        shown = jnp.take_along_axis(ids, inputs.position, axis=1)
        context = self.encode(shown, inputs.position, inputs.valid)
        return self.decode(context, inputs.valid, targets.position, targets.valid)


def init(key: Array, modalities: Modalities, shape: Shape) -> Params:
    """Parameters."""
    # Shapes of parameters do not depend on the number of tokens.
    ids = jnp.zeros((1, len(modality_of(modalities))), jnp.int32)
    slots = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    masks = Masks(Slots(*slots), Slots(*slots))
    return EgoM2P(modalities, shape).init(key, ids, masks)["params"]


def attend_alike(params: Params, gain: float = 2.0) -> Params:
    """Keys of all attention begin as its queries: what is alike attends to each other.

    A place then looks at itself and its neighbours in other modalities from the first
    step; from random ones, small models on few clips did not find this in 3,000 steps
    and ignored what they were shown (our choice, no part of the paper). Queries and
    keys are `gain` times as large as they were, logits its square.
    """

    def tie(kernel: Array, query: Array) -> Array:
        return kernel.at[:, :, -2].set(query)  # [depth, D, q k v, heads, d]

    def tied(attention: Params) -> Params:
        if "qkv" in attention:
            kernel = attention["qkv"]["kernel"]
            query = gain * kernel[:, :, 0]
            return {"qkv": {"kernel": tie(kernel.at[:, :, 0].set(query), query)}}
        query = gain * attention["query"]["kernel"]
        kernel = tie(attention["key_value"]["kernel"], query[:, :, 0])
        return {"query": {"kernel": query}, "key_value": {"kernel": kernel}}

    def block(block: Params) -> Params:
        names = ("attention", "self_attention", "cross_attention")
        return {k: v | tied(v) if k in names else v for k, v in block.items()}

    stacks = {name: block(params[name]) for name in ("encoder", "decoder")}
    return {**params, **stacks}


def loss(
    params: Params,
    ids: Array,
    masks: Masks,
    *,
    modalities: Modalities,
    shape: Shape,
    layout: Layout = None,
) -> tuple[Array, dict[str, Array]]:
    """Mean over modalities of the cross-entropy of targets, and each modality's.

    Args:
      params: from `init`.
      ids: int32 [B, L].
      masks: of [B, I] and [B, O].
      modalities, shape: the model's.
      layout: where activations lie on a mesh, see `keep`.
    """
    hidden = EgoM2P(modalities, shape, layout).apply({"params": params}, ids, masks)
    position, valid = masks.targets
    each = cross_entropy(
        hidden,
        params["head"],
        jnp.take_along_axis(ids, position, axis=1),
        jnp.asarray(modality_of(modalities))[position],
        modalities,
        chunk=shape.chunk,
    )
    return modality_mean(each, position, valid, modalities)


def sharding_rules(fsdp: str | None = "fsdp", tensor: str | None = "tensor") -> Rules:
    """Where parameters lie on a mesh, by path; None leaves an axis of a mesh out.

    Megatron's cut: heads and hidden units over `tensor`, the other axis over `fsdp`.
    Works for an optimiser's moments too, whose paths end the same way.
    """
    return (
        (r"(qkv|query|key_value)/kernel$", Spec(None, fsdp, None, tensor, None)),
        (r"output/kernel$", Spec(None, tensor, None, fsdp)),
        (r"gate_up/kernel$", Spec(None, fsdp, None, tensor)),
        (r"down/kernel$", Spec(None, tensor, fsdp)),
        (r"token_embedding$", Spec(tensor, fsdp)),
        (r"head$", Spec(fsdp, tensor)),
        (r"context/kernel$", Spec(fsdp, tensor)),
        (r".*", Spec()),
    )

"""BERT encoders (Devlin et al. 2019, arXiv 1810.04805) as Hugging Face stores them.

The sentence encoders of this family (all-MiniLM-L6-v2 among them) average the last
layer's tokens. `load` and `save` read and write Hugging Face directories; what a
checkpoint holds besides the encoder (pooler, position ids) is carried along untouched.

Legend: B sentences, L tokens, D width, H heads, V vocabulary.
"""

import functools
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from multitask_jax import checkpoints
from multitask_jax.layers.attention import attend
from multitask_jax.layers.products import dot_general, transposed

Array = jax.Array
Params = Mapping[str, Any]


class Shape(NamedTuple):
    """Sizes of an encoder, named as in config.json where it has a name for them.

    `products`: of matrices of weights, one of `layers.products.NAMES`.
    """

    vocab_size: int
    width: int  # hidden_size
    depth: int  # num_hidden_layers
    heads: int  # num_attention_heads
    mlp_width: int  # intermediate_size
    positions: int  # max_position_embeddings
    types: int = 2  # type_vocab_size
    epsilon: float = 1e-12  # layer_norm_eps
    products: str = "float32"


class Layer(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)); [B * L, D] -> [B * L, D].

    `mask`: bool [B, 1, 1, L], which tokens are looked at. Tokens are rows, not [B, L]:
    a CPU sums the gradients of matrices over one axis faster than over two.
    """

    shape: Shape

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        s = self.shape
        b, l = mask.shape[0], mask.shape[-1]
        norm = functools.partial(nn.LayerNorm, s.epsilon, use_fast_variance=False)
        dense = functools.partial(nn.Dense, dot_general=dot_general(s.products))
        q, k, v = (
            dense(s.width, name=name)(x).reshape(b, l, s.heads, -1)
            for name in ("query", "key", "value")
        )
        y = attend(q, k, v, mask).reshape(x.shape)
        y = dense(s.width, name="attention_output")(y)
        x = norm(name="attention_norm")(x + y)
        y = nn.gelu(dense(s.mlp_width, name="intermediate")(x), approximate=False)
        y = dense(s.width, name="output")(y)
        return norm(name="output_norm")(x + y)


class Bert(nn.Module):
    """Token ids [B, L] and mask [B, L] (1 is a token, 0 is padding) -> [B, L, D]."""

    shape: Shape

    @nn.compact
    def __call__(self, ids: Array, mask: Array, types: Array | None = None) -> Array:
        s = self.shape
        if ids.shape[1] > s.positions:
            raise ValueError(
                f"got {ids.shape[1]} tokens a sentence, the encoder has {s.positions}"
                " positions; cut the sentences (max_length of a tokenizer)"
            )
        init = nn.initializers.normal(0.02)
        words = self.param("words", init, (s.vocab_size, s.width))
        positions = self.param("positions", init, (s.positions, s.width))
        kinds = self.param("types", init, (s.types, s.width))
        x = words[ids] + positions[None, : ids.shape[1]]
        x += kinds[:1][None] if types is None else kinds[types]
        x = nn.LayerNorm(s.epsilon, use_fast_variance=False, name="embedding_norm")(x)
        mask = mask[:, None, None, :] > 0
        rows = x.reshape(-1, s.width)
        for i in range(s.depth):
            rows = Layer(s, name=f"layer_{i}")(rows, mask)
        return rows.reshape(x.shape)


def init(key: Array, shape: Shape) -> Any:
    """Random parameters."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return Bert(shape).init(key, ids, ids)["params"]


def embed(params: Params, ids: Array, mask: Array, *, shape: Shape) -> Array:
    """Sentences' embeddings [B, D]: the mean of the last layer's tokens.

    Args:
      params: as `init` and `load` give them.
      ids: [B, L] token ids, padded with anything.
      mask: [B, L], 1 where there is a token.
      shape: sizes of the encoder.
    """
    x = Bert(shape).apply({"params": params}, ids, mask)
    kept = mask[..., None].astype(x.dtype)
    return jnp.sum(x * kept, axis=1) / jnp.maximum(jnp.sum(kept, axis=1), 1)


def rounded(params: Params, *, shape: Shape) -> Any:
    """Parameters with the factors of products rounded, once for many batches.

    For inference: embeddings are the same, gradients would come rounded. Nothing
    changes where `shape.products` is float32.

    Raises:
      ValueError: `shape.products` is none of `layers.products.NAMES`.
    """
    dot_general(shape.products)  # raises

    def round_kernel(path: Any, x: Array) -> Array:
        return x.astype(shape.products) if path[-1].key == "kernel" else x

    return jax.tree_util.tree_map_with_path(round_kernel, params)


# Linen module -> Hugging Face module, within a layer and outside of the layers.
_IN_LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
_EMBEDDINGS = {
    "words": "embeddings.word_embeddings.weight",
    "positions": "embeddings.position_embeddings.weight",
    "types": "embeddings.token_type_embeddings.weight",
}


class Spelling(NamedTuple):
    """How a checkpoint names the encoder's tensors."""

    prefix: str = ""  # "bert." in models with a head
    scale: str = "weight"  # of norms; "gamma" in checkpoints made by TensorFlow
    bias: str = "bias"  # "beta" there


_PLAIN = Spelling()


def _names(shape: Shape, spelling: Spelling) -> dict[tuple[str, ...], str]:
    """Path in the parameters -> Hugging Face name, of every tensor."""
    modules = {("embedding_norm",): "embeddings.LayerNorm"}
    for i in range(shape.depth):
        for name, there in _IN_LAYER.items():
            modules[(f"layer_{i}", name)] = f"encoder.layer.{i}.{there}"
    out: dict[tuple[str, ...], str] = {(k,): v for k, v in _EMBEDDINGS.items()}
    for path, there in modules.items():
        if path[-1].endswith("norm"):
            out[(*path, "scale")] = f"{there}.{spelling.scale}"
            out[(*path, "bias")] = f"{there}.{spelling.bias}"
        else:
            out[(*path, "kernel")] = f"{there}.weight"
            out[(*path, "bias")] = f"{there}.bias"
    return {path: spelling.prefix + name for path, name in out.items()}


def spelling_of(names: Collection[str]) -> Spelling:
    """How a checkpoint with these names spells the encoder's."""
    prefix = "" if _EMBEDDINGS["words"] in names else "bert."
    if f"{prefix}embeddings.LayerNorm.gamma" in names:
        return Spelling(prefix, "gamma", "beta")
    return Spelling(prefix)


def from_hugging_face(
    tensors: Mapping[str, Any], *, shape: Shape
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of the encoder, and what else is in the checkpoint.

    Before/after: {"encoder.layer.0.output.dense.weight": [D, M], "pooler...": x} ->
    {"layer_0": {"output": {"kernel": [M, D]}}}, {"pooler...": x}. Can be jitted.

    Raises:
      ValueError: tensors are missing or of other shapes than the encoder's; names some.
    """
    names = _names(shape, spelling_of(tensors))
    sizes = jax.eval_shape(lambda: init(jax.random.key(0), shape))
    if missing := [n for n in names.values() if n not in tensors]:
        raise ValueError(
            f"not a BERT encoder of {shape.depth} layers: of {len(tensors)} tensors"
            f" {len(missing)} are missing, among them {missing[:3]}"
        )
    params: dict[str, Any] = {}
    for path, name in names.items():
        at, expected = params, sizes
        for key in path[:-1]:
            at, expected = at.setdefault(key, {}), expected[key]
        x = tensors[name]
        if path[-1] == "kernel":
            # As part of a compiled function, `x.T` would cost its products their speed.
            inside = isinstance(x, jax.Array) and x.ndim == 2
            x = transposed(x) if inside else x.T
        if np.shape(x) != (wanted := expected[path[-1]].shape):
            turn = slice(None, None, -1 if path[-1] == "kernel" else 1)
            raise ValueError(
                f"{name}: got shape {np.shape(x)[turn]}, expected"
                f" {wanted[turn]} by the sizes {shape}"
            )
        at[path[-1]] = x
    used = set(names.values())
    return params, {k: x for k, x in tensors.items() if k not in used}


def to_hugging_face(
    params: Params,
    rest: Mapping[str, Any] | None = None,
    *,
    shape: Shape,
    spelling: Spelling = _PLAIN,
) -> dict[str, Any]:
    """The inverse of `from_hugging_face`, bit for bit.

    `spelling`: see `spelling_of`.
    """
    out = dict(rest or {})
    for path, name in _names(shape, spelling).items():
        x: Any = params
        for key in path:
            x = x[key]
        out[name] = x.T if path[-1] == "kernel" else x
    return out


def shape_from_config(config: Mapping[str, Any]) -> Shape:
    """Sizes from the contents of config.json.

    Raises:
      ValueError: another architecture, an option that this encoder has not, or a size
        is missing.
    """
    wanted = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
    }
    for key, value in wanted.items():
        if (got := config.get(key, value)) != value:
            raise ValueError(f"{key} is {got!r}, expected {value!r}")
    keys = {
        "vocab_size": "vocab_size",
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "mlp_width": "intermediate_size",
        "positions": "max_position_embeddings",
        "types": "type_vocab_size",
        "epsilon": "layer_norm_eps",
    }
    if missing := [k for k in keys.values() if k not in config]:
        raise ValueError(f"{missing} missing, needed for an encoder's size")
    return Shape(**{ours: config[theirs] for ours, theirs in keys.items()})


def read_shape(path: str | os.PathLike[str]) -> Shape:
    """Sizes of the encoder in a Hugging Face directory.

    Raises:
      FileNotFoundError: no config.json there.
      ValueError: as `shape_from_config`, or no JSON; names the file.
    """
    file = Path(path) / "config.json"
    try:
        about = json.loads(file.read_text())
        if not isinstance(about, dict):
            raise ValueError(f"got {type(about).__name__}, expected settings by name")
        return shape_from_config(about)
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any], Shape]:
    """Parameters, other tensors and sizes from a Hugging Face directory.

    Raises:
      FileNotFoundError: no config.json there.
      CheckpointError: not a checkpoint, or damaged.
      ValueError: another architecture, or tensors are missing.
    """
    shape = read_shape(path)
    return (*from_hugging_face(checkpoints.read_tensors(path), shape=shape), shape)


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    *,
    like: str | os.PathLike[str],
) -> None:
    """Writes tensors by Hugging Face names, with the config and tokenizer of `like`.

    They are what a merge takes along, `checkpoints.copy_companions`.

    Raises:
      FileExistsError: `path` is there already.
    """
    folder = Path(path)
    folder.mkdir(parents=True)
    checkpoints.copy_companions(Path(like), folder)
    host = {k: np.ascontiguousarray(x) for k, x in tensors.items()}
    save_file(host, folder / "model.safetensors", metadata={"format": "pt"})

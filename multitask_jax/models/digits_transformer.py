"""A small vision transformer for 8 x 8 images, with Hugging Face names on disk.

The architecture is ViT's (Dosovitskiy et al. 2021, arXiv 2010.11929: pre-norm blocks, a
class token, learned positions) at a size that trains in seconds on a CPU. It is
pretrained without labels, as a masked autoencoder (He et al. 2022, arXiv 2111.06377):
the encoder sees some patches only. Unlike theirs the decoder is one linear layer on the
mean token, which is what the tasks' heads read. `save` writes a directory that
`transformers.ViTModel.from_pretrained(path, add_pooling_layer=False)` reads.

Legend: B batch, P patches (16), K of them kept, L = P + 1 tokens (K + 1 while
pretraining), D width, C pixels a patch (4), N images.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from multitask_jax import checkpoints
from multitask_jax.layers.transformer import Block

Array = jax.Array
Params = Mapping[str, Any]
EPSILON = 1e-12  # ViT's


class Shape(NamedTuple):
    """The sizes of a model, all that is needed to rebuild it."""

    width: int = 48
    depth: int = 4
    heads: int = 3
    mlp_width: int = 96
    image_size: int = 8
    patch_size: int = 2

    @property
    def patches(self) -> int:
        """Patches an image is cut into."""
        return (self.image_size // self.patch_size) ** 2


def patchify(images: Array, patch_size: int) -> Array:
    """Cuts images [B, H, W] in [0, 1] into patches [B, P, C] in [-1, 1], row by row."""
    b, h, w = images.shape
    p = patch_size
    x = images.reshape(b, h // p, p, w // p, p)
    return 2 * x.transpose(0, 1, 3, 2, 4).reshape(b, -1, p * p) - 1


class DigitsTransformer(nn.Module):
    """Patches [B, P, C] -> tokens [B, L, D]; of the places kept [B, K], if given."""

    shape: Shape

    @nn.compact
    def __call__(self, patches: Array, kept: Array | None = None) -> Array:
        s = self.shape
        init = nn.initializers.normal(0.02)
        position = self.param("position", init, (s.patches + 1, s.width))
        x = nn.Dense(s.width, name="patch_embedding")(patches) + position[None, 1:]
        if kept is not None:
            x = jnp.take_along_axis(x, kept[..., None], axis=1)
        cls = self.param("cls_token", init, (s.width,)) + position[0]
        x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], axis=1)
        for i in range(s.depth):
            x = Block(s.width, s.heads, s.mlp_width, EPSILON, name=f"layer_{i}")(x)
        return nn.LayerNorm(epsilon=EPSILON, name="layernorm")(x)


class Reconstruction(nn.Module):
    """Predicts all pixels from the mean token of the places kept; -> [B, P, C]."""

    shape: Shape

    @nn.compact
    def __call__(self, patches: Array, kept: Array) -> Array:
        x = DigitsTransformer(self.shape, name="encoder")(patches, kept)
        x = nn.Dense(patches[0].size, name="decoder")(jnp.mean(x, axis=1))
        return x.reshape(patches.shape)


def init_reconstruction(key: Array, shape: Shape) -> Params:
    """Parameters for pretraining; the model itself is their part "encoder"."""
    patches = jnp.zeros((1, shape.patches, shape.patch_size**2))
    kept = jnp.zeros((1, 1), jnp.int32)
    return Reconstruction(shape).init(key, patches, kept)["params"]


def reconstruction_loss(
    params: Params, images: Array, key: Array, *, shape: Shape, visible: float = 0.5
) -> Array:
    """Mean squared error of pixels, given a random share `visible` of the patches."""
    patches = patchify(images, shape.patch_size)
    order = jnp.argsort(jax.random.uniform(key, patches.shape[:2]), axis=1)
    kept = order[:, : max(1, round(visible * shape.patches))]
    out = Reconstruction(shape).apply({"params": params}, patches, kept)
    return jnp.mean((out - patches) ** 2)


def apply(params: Params, images: Array, *, shape: Shape) -> Array:
    """Features of images: [B, 8, 8] -> the mean of the last layer's tokens, [B, D]."""
    patches = patchify(images, shape.patch_size)
    return jnp.mean(DigitsTransformer(shape).apply({"params": params}, patches), axis=1)


class Head(NamedTuple):
    """A task's classifier: logits = features @ kernel + bias."""

    kernel: Any  # [D, classes]
    bias: Any  # [classes]


def class_mean_head(x: np.ndarray, labels: np.ndarray, *, scale: float) -> Head:
    """Nearest class mean as a linear head (Snell et al. 2017, arXiv 1703.05175).

    logits_c = scale (f mu_c - |mu_c|^2 / 2) / s^2, with s^2 the mean squared distance
    of features x [N, D] to the mean of their class. Every class must be in labels [N].
    """
    mean = np.stack([x[labels == c].mean(0) for c in range(labels.max() + 1)])
    scale = scale / np.mean(np.sum((x - mean[labels]) ** 2, axis=-1))
    return Head(scale * mean.T, -scale / 2 * np.sum(mean**2, axis=-1))


def pad_head(head: Head, classes: int) -> Head:
    """Adds classes that never win, so that tasks of all sizes share a program."""
    extra = classes - len(head.bias)
    return Head(
        np.pad(head.kernel, ((0, 0), (0, extra))),
        np.pad(head.bias, (0, extra), constant_values=-1e9),
    )


# Linen module -> Hugging Face module, within a block and outside of the blocks.
_IN_BLOCK = {
    "layernorm_before": "layernorm_before",
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "attention_output": "attention.output.dense",
    "layernorm_after": "layernorm_after",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}
_OUTSIDE = {
    "patch_embedding": "embeddings.patch_embeddings.projection",
    "layernorm": "layernorm",
}
_LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def _names(shape: Shape) -> dict[tuple[str, ...], str]:
    """Path in the parameters -> Hugging Face name, of every tensor."""
    modules = {(name,): there for name, there in _OUTSIDE.items()}
    for i in range(shape.depth):
        for name, there in _IN_BLOCK.items():
            modules[(f"layer_{i}", name)] = f"encoder.layer.{i}.{there}"
    out = {
        ("cls_token",): "embeddings.cls_token",
        ("position",): "embeddings.position_embeddings",
    }
    for path, there in modules.items():
        for leaf in ("scale" if "norm" in path[-1] else "kernel", "bias"):
            out[(*path, leaf)] = f"{there}.{_LEAF[leaf]}"
    return out


def _shape_there(name: str, x: np.ndarray, shape: Shape) -> np.ndarray:
    """Torch's layout: linear [out, in], convolution [out, 1, p, p], leading ones."""
    if name.endswith("projection.weight"):
        return x.T.reshape(-1, 1, shape.patch_size, shape.patch_size)
    if name == "embeddings.cls_token":
        return x[None, None]
    if name == "embeddings.position_embeddings":
        return x[None]
    return x.T


def _shape_here(name: str, x: np.ndarray) -> np.ndarray:
    if name.endswith("projection.weight"):
        return x.reshape(len(x), -1).T
    if name == "embeddings.cls_token":
        return x[0, 0]
    return x[0] if name == "embeddings.position_embeddings" else x.T


def to_hugging_face(params: Params, *, shape: Shape) -> dict[str, np.ndarray]:
    """Parameters as `ViTModel` names and lays them out; exact, see the inverse.

    Before/after: {"layer_0": {"query": {"kernel": [D, D]}}} ->
    {"encoder.layer.0.attention.attention.query.weight": its transpose}.
    """
    out = {}
    for path, name in _names(shape).items():
        x: Any = params
        for key in path:
            x = x[key]
        out[name] = np.ascontiguousarray(_shape_there(name, np.asarray(x), shape))
    return out


def from_hugging_face(
    tensors: Mapping[str, np.ndarray], *, shape: Shape
) -> dict[str, Any]:
    """The inverse of `to_hugging_face`, bit for bit.

    Raises:
      ValueError: tensors are missing or unexpected; names some.
    """
    names = _names(shape)
    missing = set(names.values()) - set(tensors)
    extra = set(tensors) - set(names.values())
    if missing or extra:
        raise ValueError(
            f"tensors do not fit {shape}: missing {sorted(missing)[:5]}, unexpected"
            f" {sorted(extra)[:5]}"
        )
    params: dict[str, Any] = {}
    for path, name in names.items():
        at = params
        for key in path[:-1]:
            at = at.setdefault(key, {})
        x = _shape_here(name, np.asarray(tensors[name]))
        at[path[-1]] = np.ascontiguousarray(x)
    return params


def config_json(shape: Shape) -> dict[str, Any]:
    """The contents of config.json, which `ViTConfig` reads."""
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.mlp_width,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "qkv_bias": True,
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
        "num_channels": 1,
        "dtype": "float32",
    }


def shape_from_config(config: Mapping[str, Any]) -> Shape:
    """The inverse of `config_json`, for the sizes."""
    return Shape(
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_width=config["intermediate_size"],
        image_size=config["image_size"],
        patch_size=config["patch_size"],
    )


def save(path: str | os.PathLike[str], params: Params, *, shape: Shape) -> None:
    """Writes a Hugging Face style directory: config.json, model.safetensors.

    Raises:
      FileExistsError: `path` is there already.
    """
    folder = Path(path)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_json(shape), indent=2) + "\n")
    tensors = to_hugging_face(params, shape=shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Parameters from a directory that `save` or a merge wrote.

    Raises:
      CheckpointError: not a checkpoint, or damaged.
      ValueError: not the tensors that its config.json promises.
    """
    config = json.loads((Path(path) / "config.json").read_text())
    tensors = checkpoints.read_tensors(path)
    return from_hugging_face(tensors, shape=shape_from_config(config))

"""Checkpoints without weights: names, shapes and dtypes, to plan a merge (--dry_run).

A JSON file is one of

    {"model.norm.weight": {"dtype": "BF16", "shape": [8192]}, ...}

as the header of a safetensors file has it (data_offsets and __metadata__ may stay), or
a Hugging Face config.json of Llama, Mistral or Qwen2, from which the names and shapes
follow.
"""

from pathlib import Path
from typing import Any

import numpy as np

from multitask_jax.checkpoints.safetensors_file import DTYPES, NAMES, parse_json
from multitask_jax.checkpoints.types import CheckpointError, TensorInfo

LAYOUTS = ("llama", "mistral", "qwen2")
_BYTES = 100 << 20  # a larger file is no description


def is_format(path: Path) -> bool:
    """Whether `path` is a JSON file (a directory's config.json comes with weights)."""
    return path.suffix == ".json" and path.is_file()


class AbstractReader:
    """The tensors of a model that is not there; reading one is an error."""

    format = "abstract"

    def __init__(self, path: Path):
        self.path = path
        size = path.stat().st_size
        if size > _BYTES:
            raise CheckpointError(
                f"{path}: got {size} bytes, expected a JSON file of names and shapes"
            )
        content = parse_json(path.read_bytes(), path)
        tensors = _llama(content, path) if "model_type" in content else None
        self.tensors = tensors or _header(content, path)
        self.aliases: dict[str, str] = {}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """There is nothing to read.

        Raises:
          CheckpointError: always.
        """
        raise CheckpointError(
            f"{self.path} describes a model without its weights: it serves dry_run"
            " (--dry_run) alone; name the checkpoint itself to merge"
        )

    def close(self) -> None:
        """Nothing is open."""


def _header(content: dict[str, Any], path: Path) -> dict[str, TensorInfo]:
    tensors = {}
    for name, entry in content.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            natural = all(type(n) is int and n >= 0 for n in shape)
        except (KeyError, TypeError):
            natural = False
        if not natural:
            raise CheckpointError(
                f"{path}: {name[:120]!r}: got {str(entry)[:120]}, expected a dtype"
                f" ({', '.join(DTYPES)}) and a shape, like"
                ' {"dtype": "BF16", "shape": [8192, 8192]}'
            )
        tensors[name] = TensorInfo(name, tuple(shape), dtype)
    if not tensors:
        raise CheckpointError(f"{path}: describes no tensor")
    return tensors


def _llama(config: dict[str, Any], path: Path) -> dict[str, TensorInfo]:
    """The decoder of Llama and its relatives, by its config.json."""
    kind = config["model_type"]
    if kind not in LAYOUTS:
        raise CheckpointError(
            f"{path}: got the config of {kind!r}; shapes follow from those of"
            f" {', '.join(LAYOUTS)}. For others list the tensors:"
            ' {"NAME": {"dtype": "BF16", "shape": [...]}, ...}'
        )

    def number(key: str, default: Any = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 1 << 40:
            raise CheckpointError(
                f"{path}: {key}: got {value!r}, expected a positive integer"
            )
        return value

    d, layers = number("hidden_size"), number("num_hidden_layers")
    heads, ffn = number("num_attention_heads"), number("intermediate_size")
    kv_heads, head = (
        number("num_key_value_heads", heads),
        number("head_dim", d // heads),
    )
    if layers > 10_000:
        raise CheckpointError(f"{path}: num_hidden_layers: got {layers}")
    stored = config.get("torch_dtype", config.get("dtype", "float32"))
    names = {dtype.name: dtype for dtype in NAMES}
    if stored not in names:
        raise CheckpointError(f"{path}: got torch_dtype {stored!r}")
    q, kv = heads * head, kv_heads * head
    block = {
        "self_attn.q_proj.weight": (q, d),
        "self_attn.k_proj.weight": (kv, d),
        "self_attn.v_proj.weight": (kv, d),
        "self_attn.o_proj.weight": (d, q),
        "mlp.gate_proj.weight": (ffn, d),
        "mlp.up_proj.weight": (ffn, d),
        "mlp.down_proj.weight": (d, ffn),
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
    }
    if kind == "qwen2":
        sizes = {"q": q, "k": kv, "v": kv}
        block |= {f"self_attn.{x}_proj.bias": (n,) for x, n in sizes.items()}
    shapes = {"model.embed_tokens.weight": (number("vocab_size"), d)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (d,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (number("vocab_size"), d)
    return {n: TensorInfo(n, s, names[stored]) for n, s in shapes.items()}


def open_reader(path: Path) -> AbstractReader:
    """Opens a description of a model.

    Raises:
      CheckpointError: it describes none.
    """
    return AbstractReader(path)

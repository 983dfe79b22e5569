"""config.json of a merged model: how many layers, how many tokens, which token ids."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from multitask_jax.checkpoints.json_file import read_json

# num_hidden_layers, n_layer, num_layers, num_decoder_layers, n_blocks, depth.
_COUNT = re.compile(r"(?:(?:num|n)_(?:\w+_)?(?:layer|block)s?|depth)", re.IGNORECASE)
_TIES = "tie_word_embeddings"
_VOCABULARY = ("vocab_size", "padded_vocab_size")


def read_config(folder: Path) -> dict[str, Any] | None:
    """config.json of a checkpoint's directory, None if it has none."""
    path = folder / "config.json"
    return read_json(path) if path.is_file() else None


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Writes config.json as Hugging Face does."""
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def vocabulary_size(config: dict[str, Any] | None) -> int | None:
    """vocab_size, of the text model if there are several."""
    for part in _parts(config or {}):
        for key in _VOCABULARY:
            if isinstance(part.get(key), int):
                return part[key]
    return None


def set_vocabulary_size(config: dict[str, Any], size: int) -> bool:
    """Changes vocab_size where it is; whether it was found."""
    old = vocabulary_size(config)
    for part in _parts(config):
        for key in _VOCABULARY:
            if old is not None and part.get(key) == old:
                part[key] = size
    return old is not None


def set_layers(config: dict[str, Any], old: int, origins: Sequence[int]) -> list[str]:
    """Changes the number of layers, found by its value, and lists with one entry each.

    Args:
      config: changed in place.
      old: how many layers the model had that the config describes.
      origins: for each layer of the output, which layer of a source it was.

    Returns:
      The keys that were changed.
    """
    changed = []
    for part in _parts(config):
        for key, value in part.items():
            if type(value) is int and value == old and _COUNT.fullmatch(key):
                part[key] = len(origins)
                changed.append(key)
            # layer_types and such: an entry a layer.
            per_layer = isinstance(value, list) and len(value) == old and "layer" in key
            if per_layer and max(origins) < old:
                part[key] = [value[i] for i in origins]
    return changed


def ties_embeddings(config: dict[str, Any] | None) -> bool:
    """Whether tie_word_embeddings is true, of the whole model if it says."""
    said = [p[_TIES] for p in _parts(config or {}) if _TIES in p]
    return bool(said) and said[0] is True


def untie_embeddings(config: dict[str, Any]) -> None:
    """The head is stored on its own: loaders must not replace it by the embedding."""
    for part in _parts(config):
        if _TIES in part:
            part[_TIES] = False


def take_token_ids(config: dict[str, Any], other: dict[str, Any]) -> None:
    """bos_token_id and such go with the tokenizer."""
    for key in list(config):
        if key.endswith("_token_id") and key in other:
            config[key] = other[key]


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), dict):
            yield config[key]

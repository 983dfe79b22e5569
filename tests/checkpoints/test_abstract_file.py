"""Checkpoints without weights."""

import json

import ml_dtypes
import numpy as np
import pytest

from multitask_jax import checkpoints
from multitask_jax.checkpoints import CheckpointError, TensorInfo

LLAMA = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
}


def described(folder, content):
    path = folder / "model.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_names_and_shapes_but_no_weights(tmp_path):
    path = described(
        tmp_path,
        {
            "__metadata__": {"format": "pt"},
            "w": {"dtype": "BF16", "shape": [4, 3], "data_offsets": [0, 24]},
            "scale": {"dtype": "F32", "shape": []},
        },
    )
    reader = checkpoints.open(path)
    assert reader.tensors == {
        "w": TensorInfo("w", (4, 3), np.dtype(ml_dtypes.bfloat16)),
        "scale": TensorInfo("scale", (), np.dtype(np.float32)),
    }
    with pytest.raises(CheckpointError, match=r"without its weights.*--dry_run"):
        reader.read("w")


def test_llama_2_70b_by_its_config(tmp_path):
    tensors = checkpoints.open(described(tmp_path, LLAMA)).tensors
    assert len(tensors) == 723
    assert sum(t.size for t in tensors.values()) == 68_976_648_192  # as published
    assert tensors["model.layers.79.self_attn.k_proj.weight"].shape == (1024, 8192)
    assert {t.dtype.name for t in tensors.values()} == {"bfloat16"}


def test_qwen_2_ties_its_head_and_has_biases(tmp_path):
    config = {
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    tensors = checkpoints.open(described(tmp_path, config)).tensors
    assert "lm_head.weight" not in tensors
    assert tensors["model.layers.0.self_attn.k_proj.bias"].shape == (128,)
    # Qwen2.5-0.5B: 0.49 B parameters.
    assert sum(t.size for t in tensors.values()) == 494_032_768


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ({}, "describes no tensor"),
        ({"w": {"dtype": "BF17", "shape": [1]}}, "'w': got .*BF17"),
        ({"w": {"dtype": "BF16", "shape": [-1]}}, "'w': got"),
        ({"w": {"dtype": "BF16", "shape": [True]}}, "'w': got"),
        ({"w": {"dtype": ["BF16"], "shape": [1]}}, "'w': got"),
        ({"w": [1]}, "'w': got"),
        ({"model_type": "mamba"}, "config of 'mamba'; .* llama, mistral, qwen2"),
        ({**LLAMA, "hidden_size": None}, "hidden_size: got None"),
        ({**LLAMA, "num_hidden_layers": 10**6}, "num_hidden_layers: got 1000000"),
        ({**LLAMA, "torch_dtype": "int3"}, "torch_dtype 'int3'"),
    ],
)
def test_what_describes_no_model_is_refused(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoints.open(described(tmp_path, content))

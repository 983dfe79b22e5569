"""Small checkpoints by Llama's names, made into mixtures and back."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

from experiments import upcycle

D, H = 6, 10
LLAMA = {
    "self_attn.q_proj.weight": (D, D),
    "mlp.gate_proj.weight": (H, D),
    "mlp.up_proj.weight": (H, D),
    "mlp.down_proj.weight": (D, H),
    "input_layernorm.weight": (D,),
}


def llama(path, seed):
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (20, D)}
    for i in range(2):
        shapes |= {f"model.layers.{i}.{name}": s for name, s in LLAMA.items()}
    tensors = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    about = {"model_type": "llama", "hidden_size": D}
    (path / "config.json").write_text(json.dumps(about))
    return tensors


def run(output, **options):
    return upcycle.run(upcycle.Config(output=str(output), progress=False, **options))


def read(path):
    return load_file(path / "model.safetensors")


def convert(folder, dtype):
    """The model there, in another dtype."""
    tensors = {n: x.astype(dtype) for n, x in read(folder).items()}
    save_file(tensors, folder / "model.safetensors")

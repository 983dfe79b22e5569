"""Tokenizers: clips of each modality become integer codes, and come back.

config = tokenizers.Config("depth")
tokenizer, history = tokenizers.fit(config, depth, key=key, steps=1000, batch=16)
tokens = tokenizers.encode(tokenizer, depth)  # [N, 4, 8, 8]
again = tokenizers.decode(tokenizer, tokens)  # [N, 16, 64, 64] metres
tokenizers.save(tokenizer, "tokenizers/depth")
"""

from multitask_jax.masked.tokenizers import quantizers
from multitask_jax.masked.tokenizers.coding import (
    decode,
    decode_mean,
    encode,
    known,
    reconstruction_report,
)
from multitask_jax.masked.tokenizers.files import load, save
from multitask_jax.masked.tokenizers.fitting import fit
from multitask_jax.masked.tokenizers.types import (
    Config,
    Statistics,
    Tokenizer,
    grid,
    vocabulary,
)

__all__ = [
    "Config",
    "Statistics",
    "Tokenizer",
    "decode",
    "decode_mean",
    "encode",
    "fit",
    "grid",
    "known",
    "load",
    "quantizers",
    "reconstruction_report",
    "save",
    "vocabulary",
]

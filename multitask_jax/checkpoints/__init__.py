"""Checkpoints as lazy tensors: `open(path)` reads slices, `create(path)` writes them.

Formats: safetensors (file, shards, Hugging Face directories), Orbax, flax msgpack; with
`open(path, base=...)` also PEFT LoRA adapters and deltas, which change a base.
Nothing here unpickles anything.
"""

from multitask_jax.checkpoints.directory import (
    Writer,
    attach,
    check_output,
    copy_companions,
    create,
    is_change,
    open,
    read_tensors,
)
from multitask_jax.checkpoints.types import CheckpointError, Reader, TensorInfo

__all__ = [
    "CheckpointError",
    "Reader",
    "TensorInfo",
    "Writer",
    "attach",
    "check_output",
    "copy_companions",
    "create",
    "is_change",
    "open",
    "read_tensors",
]

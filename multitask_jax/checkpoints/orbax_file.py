"""Orbax checkpoints: slices on the host to merge, whole trees on devices to use.

Orbax itself loads whole trees, and integers through JAX, so that it serves `restore`
only; reading and writing slices go to the arrays beneath.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from multitask_jax.checkpoints.orbax_reader import (
    STEP,
    OrbaxReader,
    find_item,
    open_reader,
    reason,
)
from multitask_jax.checkpoints.orbax_writer import create_writer
from multitask_jax.checkpoints.types import CheckpointError

__all__ = ["create_writer", "open_reader", "restore"]


def restore(path: str | os.PathLike[str], abstract_tree: Any) -> Any:
    """Loads a whole tree, every array born with its sharding.

    Args:
      path: an Orbax checkpoint, a step, or an item in one.
      abstract_tree: the tree with `jax.ShapeDtypeStruct(shape, dtype, sharding=...)`
        leaves, as from `jax.eval_shape`, or arrays; dtypes are cast to.

    Raises:
      CheckpointError: damaged, or another tree or other shapes than asked for.
    """
    from orbax.checkpoint import v1 as ocp

    # Checked here: the errors name the leaf, and Orbax leaves tasks behind on its own.
    reader = open_reader(Path(path).expanduser().absolute())
    _check_target(reader, abstract_tree)
    reader.close()
    root, name = find_item(reader.path), "AUTO"
    if not (root / STEP).exists() and (root.parent / STEP).exists():
        root, name = root.parent, root.name
    try:
        return ocp.load(root, abstract_tree, checkpointable_name=name)
    except (ValueError, KeyError, OSError, RuntimeError) as e:
        raise CheckpointError(f"{path}: {reason(e)}") from e


def _check_target(reader: OrbaxReader, tree: Any) -> None:
    import jax

    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    alone = sorted(leaves.keys() ^ reader.tensors.keys())
    if alone:
        some = ", ".join(
            f"{a} ({'target' if a in leaves else 'checkpoint'})" for a in alone[:5]
        )
        raise CheckpointError(
            f"{reader.path}: {len(alone)} leaves are only in the target or only in the"
            f" checkpoint: {some}"
        )
    for name, leaf in leaves.items():
        shape, stored = np.shape(leaf), reader.tensors[name].shape
        dtype = getattr(leaf, "dtype", None)
        if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
            continue  # stored as the words of its keys
        if shape != stored:
            raise CheckpointError(
                f"{reader.path}: {name}: the checkpoint has shape {stored}, the target"
                f" {shape}"
            )
        sharding = getattr(leaf, "sharding", None)
        try:
            if sharding is not None:
                sharding.shard_shape(shape)
        except ValueError as e:
            raise CheckpointError(f"{reader.path}: {name}: {e}") from None

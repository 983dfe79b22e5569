"""What the tests of Orbax checkpoints share: trees, and every way to save them."""

import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp_v0
from orbax.checkpoint import v1 as ocp

from multitask_jax import checkpoints
from multitask_jax.checkpoints.types import TensorInfo


def array(shape: tuple[int, ...], dtype: np.dtype, seed: int = 0) -> np.ndarray:
    size = math.prod(shape)
    values = np.random.default_rng(seed).integers(0, 100, size)
    return (values % 2 if dtype.kind == "b" else values).astype(dtype).reshape(shape)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()


def tensor_infos(flat: dict[str, np.ndarray]) -> list[TensorInfo]:
    return [TensorInfo(name, a.shape, a.dtype) for name, a in flat.items()]


def fill(writer, flat: dict[str, np.ndarray], step: int) -> None:
    """Writes slices of `step` entries, the last ones first."""
    for name, a in reversed(flat.items()):
        for start in reversed(range(0, a.size, step)):
            writer.write(name, start, a.reshape(-1)[start : start + step])


def write(path: Path, flat: dict[str, np.ndarray], step: int = 77, **options) -> Path:
    with checkpoints.create(
        path, tensor_infos(flat), format="orbax", **options
    ) as writer:
        fill(writer, flat, step)
    return path


def by_path(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in leaves}


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh(
        (4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )


def sharding(*axes) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec(*axes))


def train_tree() -> dict:
    """A train state's tree: sharded parameters, lists, host integers, numbers."""
    kernel = np.arange(16 * 8, dtype=np.float32).reshape(16, 8)
    kernel = jax.device_put(kernel, sharding("x", "y"))
    columns = jax.device_put(jnp.arange(64.0).reshape(2, 32), sharding(None, "x"))
    return {
        "params": {
            "dense": {"kernel": kernel, "bias": jnp.ones(8, jnp.bfloat16)},
            "blocks": [columns, jnp.float32(3)],
        },
        "opt_state": ({"mu": kernel * 2}, None, {}),
        "count": np.arange(5) + 2**40 + 1,
        "step": 7,
    }


def _save_v1(path: Path) -> None:
    ocp.save(path, train_tree())


def _save_standard(path: Path) -> None:
    with ocp_v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, train_tree())


def _save_pytree(path: Path, **options) -> None:
    with ocp_v0.PyTreeCheckpointer(**options) as checkpointer:
        checkpointer.save(path, train_tree())


def _save_zarr(path: Path) -> None:
    _save_pytree(path, use_ocdbt=False, use_zarr3=False)


def _save_zarr3(path: Path) -> None:
    _save_pytree(path, use_ocdbt=True, use_zarr3=True)


def _save_step(path: Path) -> None:
    with ocp_v0.CheckpointManager(path.parent / "run") as manager:
        manager.save(3, args=ocp_v0.args.StandardSave(train_tree()))
    (path.parent / "run" / "3").rename(path)


SAVERS = [
    *(_save_v1, _save_standard, _save_pytree, _save_zarr, _save_zarr3, _save_step)
]


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)

"""Meshes, and rules on leaf paths that become shardings. The one place that makes them.

Works the same on TPU, GPU and simulated CPU devices.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from multitask_jax import tree as trees

Rules = Sequence[tuple[str, PartitionSpec]]


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of named axes over the first devices, {"data": 2, "model": 4} for 8.

    Axes are of type Auto: under JAX's default, Explicit, a gather or a sort over a
    sharded axis fails.

    Raises:
      ValueError: there are fewer devices than the axes ask for.
    """
    devices = jax.devices() if devices is None else list(devices)
    needed = math.prod(axes.values())
    if needed > len(devices):
        raise ValueError(
            f"the mesh {dict(axes)} needs {needed} devices, got {len(devices)}; on a"
            " CPU jax.config.update('jax_num_cpu_devices', N) simulates them"
        )
    grid = np.asarray(devices[:needed]).reshape(tuple(axes.values()))
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def largest_axis(shape: Sequence[int], mesh: Mesh, name: str) -> PartitionSpec:
    """Shards the largest axis that `name`'s size divides; replicates if there is none.

    Before/after: (32000, 1280) on {"model": 8} -> P("model", None).
    """
    size = mesh.shape[name]
    fits = [i for i, n in enumerate(shape) if n and n % size == 0]
    if not fits:
        return PartitionSpec()
    axis = max(fits, key=lambda i: shape[i])
    return PartitionSpec(*(name if i == axis else None for i in range(len(shape))))


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """A NamedSharding for each leaf (arrays or ShapeDtypeStructs).

    Args:
      tree: the pytree.
      mesh: where to.
      rules: (regex on the path, spec), the first match counts; without rules each leaf
        is sharded by `largest_axis` over the mesh's last axis.

    Raises:
      ValueError: a leaf that no rule matches, or whose axis the mesh does not divide;
        names it.
    """
    specs: dict[str, NamedSharding] = {}
    for path, leaf in trees.flatten(tree).items():
        shape = np.shape(leaf)
        if rules is None:
            spec = largest_axis(shape, mesh, mesh.axis_names[-1])
        else:
            spec = _first_match(path, rules)
            _check_divides(path, shape, spec, mesh)
        specs[path] = NamedSharding(mesh, spec)
    return trees.unflatten(tree, specs)


def shard_tree(tree: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """The tree's arrays on the mesh, sharded as `tree_shardings` says."""
    return jax.device_put(tree, tree_shardings(tree, mesh, rules))


def _first_match(path: str, rules: Rules) -> PartitionSpec:
    for pattern, spec in rules:
        if re.search(pattern, path):
            return spec
    raise ValueError(
        f"{path}: no sharding rule matches; add ({path!r}, PartitionSpec()) or a last"
        " rule ('.*', PartitionSpec()) to replicate the rest"
    )


def _check_divides(
    path: str, shape: Sequence[int], spec: PartitionSpec, mesh: Mesh
) -> None:
    if len(spec) > len(shape):
        raise ValueError(f"{path}: got {spec} for the shape {tuple(shape)}")
    for size, names in zip(shape, spec, strict=False):
        names = (names,) if isinstance(names, str) else (names or ())
        parts = math.prod(mesh.shape[n] for n in names)
        if size % parts:
            raise ValueError(
                f"{path}: axis of {size} in shape {tuple(shape)} can't be cut in"
                f" {parts} for {spec} on the mesh {dict(mesh.shape)}"
            )

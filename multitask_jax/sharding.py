"""Meshes, and rules on leaf paths that become shardings. The one place that makes them.

Works the same on TPU, GPU and simulated CPU devices.
"""

import contextlib
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


def host_mesh(axes: Mapping[str, int], *, simulate: bool = False) -> Mesh:
    """`make_mesh` of this process's devices; a CPU simulates them.

    Args:
      axes: names and sizes, as `parse_axes` gives them.
      simulate: CPU devices even where there are accelerators, to compile alone.

    Raises:
      ValueError: there are fewer devices than the axes ask for.
    """
    count = math.prod(axes.values())
    # If JAX has started it is too late, and `make_mesh` tells if there are too few.
    with contextlib.suppress(RuntimeError):
        if jax.config.jax_num_cpu_devices < count:
            jax.config.update("jax_num_cpu_devices", count)
    backend = "cpu" if simulate else None
    return make_mesh(axes, jax.local_devices(backend=backend))


def largest_axis(
    shape: Sequence[int], mesh: Mesh, name: str | tuple[str, ...]
) -> PartitionSpec:
    """Shards the largest axis that `name`'s size divides; replicates if there is none.

    Before/after: (32000, 1280) on {"model": 8} -> P("model", None). `name` may be
    several mesh axes, which then cut one axis of the array together.
    """
    names = (name,) if isinstance(name, str) else name
    size = math.prod(mesh.shape[n] for n in names)
    fits = [i for i, n in enumerate(shape) if n and n % size == 0]
    if not fits:
        return PartitionSpec()
    axis = max(fits, key=lambda i: shape[i])
    return PartitionSpec(*(name if i == axis else None for i in range(len(shape))))


def leaf_spec(
    path: str, shape: Sequence[int], mesh: Mesh, rules: Rules | None = None
) -> PartitionSpec:
    """Where a leaf lies: by the first rule that matches its path, or by default.

    By default its largest axis that all devices divide is cut over all of them; if
    there is none, over the mesh's last axes, or last axis; or else each device has it
    all. Before/after: (8, 6) on {"data": 2, "model": 4} -> P(("data", "model"), None);
    (4, 6) -> P("model", None); (3,) -> P().

    Raises:
      ValueError: a leaf that no rule matches, or whose axis the mesh does not divide;
        names it.
    """
    if rules is not None:
        spec = _first_match(path, rules)
        _check_divides(path, shape, spec, mesh)
        return spec
    for i in range(len(mesh.axis_names)):
        names = mesh.axis_names[i:]
        spec = largest_axis(shape, mesh, names if len(names) > 1 else names[0])
        if spec:
            return spec
    return PartitionSpec()


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """A NamedSharding for each leaf (arrays or ShapeDtypeStructs).

    Args:
      tree: the pytree.
      mesh: where to.
      rules: (regex on the path, spec), the first match counts; without rules as
        `leaf_spec` has it: the largest axis that the devices divide.

    Raises:
      ValueError: a leaf that no rule matches, or whose axis the mesh does not divide;
        names it.
    """
    specs = {
        path: NamedSharding(mesh, leaf_spec(path, np.shape(leaf), mesh, rules))
        for path, leaf in trees.flatten(tree).items()
    }
    return trees.unflatten(tree, specs)


def shard_tree(tree: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """The tree's arrays on the mesh, sharded as `tree_shardings` says."""
    return jax.device_put(tree, tree_shardings(tree, mesh, rules))


def parse_axes(text: str) -> dict[str, int]:
    """A mesh in words, before/after: "data=2,model=4" -> {"data": 2, "model": 4}.

    Raises:
      ValueError: it is not such a list.
    """
    out: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (x.strip() for x in part.partition("="))
        if not name.isidentifier() or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"mesh: got {text!r}, expected axes and their sizes, like model=8 or"
                " data=2,model=4"
            )
        if name in out:
            raise ValueError(f"mesh: got the axis {name} twice in {text!r}")
        out[name] = int(size)
    return out


def parse_rules(text: str) -> list[tuple[str, PartitionSpec]]:
    """Rules in words: REGEX=SPEC;REGEX=SPEC, a SPEC listing a mesh axis per axis.

    Before/after: "embed=data+model,None;norm=" ->
    [("embed", P(("data", "model"), None)), ("norm", P())].

    Raises:
      ValueError: a rule without =, a regex that is none, or no name of an axis.
    """
    rules = []
    for rule in filter(None, (r.strip() for r in text.split(";"))):
        pattern, equals, spec = (x.strip() for x in rule.rpartition("="))
        axes = [a.strip() for a in spec.split(",")] if spec else []
        parts = [a.split("+") for a in axes]
        named = all(n.isidentifier() for names in parts for n in names)
        if not equals or not pattern or not named:
            raise ValueError(
                f"sharding rules: got {rule!r}, expected REGEX=SPEC, like"
                " mlp.*weight=model,None (an axis of the mesh for each axis of the"
                " tensor, a+b for two, None for none; nothing replicates)"
            )
        try:
            re.compile(pattern)
        except re.error as e:
            raise ValueError(f"sharding rules: {pattern!r} is no regex: {e}") from None
        entries = [p[0] if len(p) == 1 else tuple(p) for p in parts]
        spec = PartitionSpec(*(None if e == "None" else e for e in entries))
        rules.append((pattern, spec))
    return rules


def _first_match(path: str, rules: Rules) -> PartitionSpec:
    for pattern, spec in rules:
        if re.search(pattern, path):
            return spec
    raise ValueError(
        f"{path}: no sharding rule matches; add ({path!r}, PartitionSpec()) or a last"
        " rule ('.*', PartitionSpec()) to replicate the rest"
    )


def names_in(spec: PartitionSpec) -> list[str]:
    """The mesh axes that cut an array, before/after: P(("a", "b"), None) -> a, b."""
    parts = [(p,) if isinstance(p, str) else (p or ()) for p in spec]
    return [name for part in parts for name in part]


def _check_divides(
    path: str, shape: Sequence[int], spec: PartitionSpec, mesh: Mesh
) -> None:
    if len(spec) > len(shape):
        raise ValueError(f"{path}: got {spec} for the shape {tuple(shape)}")
    unknown = [n for n in names_in(spec) if n not in mesh.shape]
    if unknown:
        raise ValueError(
            f"{path}: {spec} names the axis {unknown[0]}, but the mesh has"
            f" {', '.join(mesh.axis_names)}"
        )
    if len(set(names_in(spec))) < len(names_in(spec)):
        raise ValueError(f"{path}: {spec} names an axis of the mesh twice")
    for size, names in zip(shape, spec, strict=False):
        names = (names,) if isinstance(names, str) else (names or ())
        parts = math.prod(mesh.shape[n] for n in names)
        if size % parts:
            raise ValueError(
                f"{path}: axis of {size} in shape {tuple(shape)} can't be cut in"
                f" {parts} for {spec} on the mesh {dict(mesh.shape)}"
            )

"""What a program that was compiled without arrays costs a device of its mesh."""

import math
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp

_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1}


def placed(shapes: Any, where: Any) -> Any:
    """Abstract arrays with shardings, to lower a program for; both of one structure."""
    return jax.tree.map(
        lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, where
    )


def device_bytes(tree: Any) -> int:
    """Bytes of one device's part of the floating arrays of a `placed` tree."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(x.dtype, jnp.floating)
    )


def collectives(text: str) -> dict[str, tuple[int, float]]:
    """Times and bytes of each kind of collective in a compiled program."""
    times: Counter[str] = Counter()
    size: Counter[str] = Counter()
    kinds = "all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute"
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        times[kind] += 1
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            entries = math.prod(int(n) for n in dims.split(",") if n)
            size[kind] += _BYTES.get(dtype, 4) * entries
    return {kind: (times[kind], size[kind]) for kind in sorted(times)}

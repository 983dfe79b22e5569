"""Experts: feed-forward networks with a leading expert axis on every parameter.

An expert is a function (params, x, linear) -> y. It says what is multiplied by what;
`linear(x, layer)`, which a dispatcher supplies, says which expert's weights which row
meets. So there is one definition of each expert for every dispatcher.

Legend: E experts, D width, H hidden width.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Linear = Callable[[Array, Any], Array]  # (x, {"kernel", "bias"?}) -> y
Expert = Callable[[Any, Array, Linear], Array]


def mlp(params: Any, x: Array, linear: Linear) -> Array:
    """down(gelu(up(x))), the GELU by tanh."""
    return linear(jax.nn.gelu(linear(x, params["up"])), params["down"])


def mlp_gelu(params: Any, x: Array, linear: Linear) -> Array:
    """down(gelu(up(x))), the exact GELU, as `layers.transformer.Block` and BERT."""
    up = jax.nn.gelu(linear(x, params["up"]), approximate=False)
    return linear(up, params["down"])


def mlp_relu(params: Any, x: Array, linear: Linear) -> Array:
    """down(relu(up(x)))."""
    return linear(jax.nn.relu(linear(x, params["up"])), params["down"])


def swiglu(params: Any, x: Array, linear: Linear) -> Array:
    """down(silu(gate(x)) up(x)) (Shazeer 2020, arXiv 2002.05202)."""
    gated = jax.nn.silu(linear(x, params["gate"])) * linear(x, params["up"])
    return linear(gated, params["down"])


EXPERTS: dict[str, Expert] = {
    "mlp": mlp,
    "gelu": mlp_gelu,
    "relu": mlp_relu,
    "swiglu": swiglu,
}


def named(kind: str) -> Expert:
    """Of `EXPERTS`; ValueError with the names if there is none."""
    if kind not in EXPERTS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(EXPERTS)}")
    return EXPERTS[kind]


def init(
    key: Array,
    kind: str,
    *,
    experts: int,
    width: int,
    hidden: int,
    bias: bool = True,
) -> Any:
    """Parameters of E experts of `EXPERTS`, such as {"up": {"kernel": [E, D, H]}, ...}.

    Kernels are LeCun normal by each expert's own fan-in, biases zero.

    Raises:
      ValueError: there is no such kind.
    """
    named(kind)
    names = ("gate", "up", "down") if kind == "swiglu" else ("up", "down")
    params = {}
    for name, k in zip(names, jax.random.split(key, len(names)), strict=True):
        rows, columns = (hidden, width) if name == "down" else (width, hidden)
        kernel = jax.random.normal(k, (experts, rows, columns)) * rows**-0.5
        params[name] = {"kernel": kernel}
        if bias:
            params[name]["bias"] = jnp.zeros((experts, columns))
    return params


def count(params: Any) -> int:
    """E: the leading axis that all leaves share.

    Raises:
      ValueError: they have different ones.
    """
    sizes = {x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(params)}
    if len(sizes) != 1:
        raise ValueError(
            f"experts: got leading axes {sorted(sizes)}, expected one number of experts"
        )
    return sizes.pop()

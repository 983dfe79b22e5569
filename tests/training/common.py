"""A small regression; `noisy_loss` draws from its key, which takes long to compile."""

import jax
import jax.numpy as jnp
import numpy as np

from multitask_jax.training import sampling

N, D, H = 96, 6, 16


def params():
    rng = np.random.default_rng(3)
    first, last = rng.normal(size=(D, H)) / D**0.5, rng.normal(size=(H, 1)) / H**0.5
    return {
        "layers_0": {
            "kernel": jnp.asarray(first, jnp.float32),
            "bias": jnp.asarray(np.zeros(H, np.float32)),
        },
        "head": {"kernel": jnp.asarray(last, jnp.float32)},
    }


def data():
    x = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
    return x, np.sin(x.sum(1, keepdims=True))


def batch_at(step, size=16):
    x, y = data()
    rows = sampling.epoch_indices(N, size, step, seed=5)
    return {"x": x[rows], "y": y[rows]}


def apply(params, x):
    hidden = jnp.tanh(
        x @ params["layers_0"]["kernel"] + params["layers_0"]["bias"][None]
    )
    return hidden @ params["head"]["kernel"]


def loss_fn(params, batch, key):
    error = apply(params, batch["x"]) - batch["y"]
    return jnp.mean(error**2), {"absolute": jnp.mean(jnp.abs(error))}


def noisy_loss(params, batch, key):
    noise = 0.1 * jax.random.uniform(key, batch["x"].shape)
    return loss_fn(params, {"x": batch["x"] + noise, "y": batch["y"]}, key)


@jax.jit
def evaluate(params):
    x, y = data()
    # Highest early on, so that the best must outlive what comes after it.
    return {"score": jnp.mean((apply(params, x) - y) ** 2)}


def same_bits(a, b):
    """Whether two trees have the same structure, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = map(jnp.asarray, (x, y))
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(
            np.asarray(x).reshape(-1).view(np.uint8),
            np.asarray(y).reshape(-1).view(np.uint8),
        )
    return True

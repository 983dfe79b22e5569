"""Captured Gram matrices are X^T X, whatever the model looks like."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax import merging
from multitask_jax.layers import products

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def gram(x):
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return x.T @ x


def close(got, want, axes, batch=()):
    assert (got.axes, got.batch) == (axes, batch)
    np.testing.assert_allclose(got.matrix, want, rtol=1e-4, atol=1e-3)


def test_torch_orientation_and_ragged_batches():
    params = {
        "fc.weight": normal(7, 5),
        "fc.bias": normal(7),
        "out.weight": normal(2, 7),
    }

    def apply(p, x):
        h = jax.nn.relu(x @ p["fc.weight"].T + p["fc.bias"][None])
        return jnp.einsum("bi,oi->bo", h, p["out.weight"])

    x = normal(10, 5)
    got = merging.gram_matrices(apply, params, [x[:4], x[4:8], x[8:]])
    assert set(got) == {"fc.weight", "out.weight"}
    hidden = np.maximum(x @ params["fc.weight"].T + params["fc.bias"], 0)
    close(got["fc.weight"], gram(x), (1,))
    close(got["out.weight"], gram(hidden), (1,))


def test_products_in_bfloat16_are_looked_into():
    params = {"up": normal(5, 7), "down": normal(7, 3)}

    def apply(p, x):
        return products.product(jnp.tanh(products.product(x, p["up"])), p["down"])

    x = normal(64, 5)
    found = merging.gram_matrices(apply, params, [x])
    exact = merging.gram_matrices(
        lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, [x]
    )
    for name, got in found.items():
        assert got.axes == (0,)
        want = exact[name].matrix
        size = np.sqrt(np.outer(np.diag(want), np.diag(want)))
        assert np.all(np.abs(got.matrix - want) < 2e-2 * size)
    # Of what the product is given: rounded.
    low = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    close(found["up"], low.T @ low, (0,))


def real(inputs):
    return inputs["mask"].reshape(-1)


def network(p, inputs):
    h = jax.nn.gelu(inputs["x"] @ p["first"])
    return h @ p["second"]


def test_rows_that_are_padding_do_not_count():
    """Grams are then means over what is real, whatever stands behind it."""
    params = {"first": normal(5, 7), "second": normal(7, 3)}
    x, mask = normal(4, 6, 5), np.arange(6)[None] < np.array([6, 2, 3, 1])[:, None]
    got = merging.gram_matrices(network, params, [{"x": x, "mask": mask}], rows=real)
    x0 = x[mask]
    hidden = np.asarray(jax.nn.gelu(x0 @ params["first"]))
    close(got["first"], gram(x0) / len(x0), (0,))
    close(got["second"], gram(hidden) / len(x0), (0,))
    more = np.concatenate([np.where(mask[..., None], x, 9.0), normal(4, 2, 5)], axis=1)
    longer = {"x": more, "mask": np.pad(mask, ((0, 0), (0, 2)))}
    parts = [{k: v[i : i + 2] for k, v in longer.items()} for i in (0, 2)]
    again = merging.gram_matrices(network, params, parts, rows=real)
    for name in params:
        np.testing.assert_allclose(
            got[name].matrix, again[name].matrix, rtol=1e-4, atol=1e-5
        )
    with pytest.raises(ValueError, match=r"rows: got weights \[23\] for a dense"):
        merging.gram_matrices(
            network, params, [{"x": x, "mask": mask}], rows=lambda i: real(i)[:23]
        )


def test_only_what_is_asked_for_is_there():
    params = {"first": normal(5, 7), "second": normal(7, 3)}
    inputs = [{"x": normal(4, 6, 5)}]
    every = merging.gram_matrices(network, params, inputs)
    some = merging.gram_matrices(network, params, inputs, only=["second"])
    assert set(some) == {"second"}
    np.testing.assert_allclose(some["second"].matrix, every["second"].matrix, rtol=1e-6)


def test_square_weights_are_not_guessed():
    params = {"a": normal(4, 4), "b": normal(4, 4)}
    got = merging.gram_matrices(
        lambda p, x: (x @ p["a"]) @ p["b"].T, params, [normal(3, 4)]
    )
    assert (got["a"].axes, got["b"].axes) == ((0,), (1,))


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.remat(nn.Dense)(6, name="first")(x))
        self.sow("intermediates", "hidden", x)
        return nn.Dense(3, dtype=jnp.bfloat16, name="second")(x)


def test_flax_mlp():
    model, x = Mlp(), normal(9, 5)
    variables = model.init(jax.random.key(0), x)
    got = merging.gram_matrices(model.apply, {"params": variables["params"]}, [x])
    _, seen = model.apply(variables, x, mutable="intermediates")
    close(got["params/first/kernel"], gram(x), (0,))
    hidden = seen["intermediates"]["hidden"][0].astype(jnp.bfloat16)
    close(got["params/second/kernel"], gram(hidden), (0,))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8, name="embed")(tokens)
        x = nn.LayerNorm(name="norm")(x)
        return nn.MultiHeadDotProductAttention(2, name="attention")(x, x)


def test_flax_attention_block():
    model, tokens = Attention(), RNG.integers(0, 11, (3, 5))
    params = model.init(jax.random.key(0), tokens)["params"]
    apply = lambda p, x: model.apply({"params": p}, x)  # noqa: E731
    got = merging.gram_matrices(apply, params, [tokens])
    x = nn.LayerNorm().apply(
        {"params": params["norm"]}, params["embed"]["embedding"][tokens]
    )
    names = {f"attention/{n}/kernel" for n in ("query", "key", "value", "out")}
    assert set(got) == names
    for name in ("query", "key", "value"):
        close(got[f"attention/{name}/kernel"], gram(x), (0,))
    # [heads, width, out]: two axes are contracted, checked through the output.
    out = got["attention/out/kernel"]
    assert out.axes == (0, 1)
    kernel, bias = (
        params["attention"]["out"]["kernel"],
        params["attention"]["out"]["bias"],
    )
    y = np.asarray(apply(params, tokens)) - np.asarray(bias)
    w = np.asarray(kernel).reshape(8, 8)
    np.testing.assert_allclose(w.T @ out.matrix @ w, gram(y), rtol=1e-3, atol=1e-4)
    found = merging.dense_leaves(apply, params, tokens)
    assert set(found.axes) == names
    assert "gather" in found.averaged["embed/embedding"]
    assert found.order[0] == "embed/embedding"
    assert found.order[-1] == "attention/out/bias"


def test_axes_split_and_merged_by_reshapes():
    """A torch projection [heads * width, in], used by heads, and merged inputs."""
    params = {"q": normal(6, 4), "o": normal(5, 6)}

    def apply(p, x):  # x [B, 4]
        q = p["q"].reshape(2, 3, 4)
        h = jnp.einsum("bi,hwi->bwh", x, q)
        o = p["o"].reshape(5, 2, 3)
        return jnp.einsum("bwh,ohw->bo", h, o)

    x = normal(8, 4)
    got = merging.gram_matrices(apply, params, [x])
    close(got["q"], gram(x), (1,))
    close(got["o"], gram(x @ params["q"].T), (1,))  # columns in the leaf's order


def test_scanned_layers_get_a_matrix_each():
    params = {"stack": normal(3, 4, 4), "shared": normal(4, 4)}

    def apply(p, x):
        def layer(x, w):
            return jnp.tanh(x @ w) @ p["shared"], None

        return jax.lax.scan(layer, x, p["stack"])[0]

    x = normal(6, 4)
    got = merging.gram_matrices(apply, params, [x])
    inputs, inner, h = [], 0, x
    for w in params["stack"]:
        inputs.append(gram(h))
        h = np.tanh(h @ w)
        inner = inner + gram(h)
        h = h @ params["shared"]
    close(got["stack"], np.stack(inputs), (1,), (0,))
    close(got["shared"], inner, (0,))
    merged = merging.merge(
        merging.regmean(), params, [params, params], statistics=[got, got]
    )
    for k in params:
        np.testing.assert_array_equal(merged[k], params[k])


def test_experts_are_a_batch():
    params = {"experts": normal(3, 4, 5)}
    x = normal(3, 7, 4)
    got = merging.gram_matrices(
        lambda p, x: jnp.einsum("bed,edf->bef", x, p["experts"]),
        params,
        [x.swapaxes(0, 1)],
    )
    close(got["experts"], np.stack([gram(e) for e in x]), (1,), (0,))


def test_what_is_averaged_and_why():
    params = {
        "tied": normal(9, 4),
        "half": normal(4, 4),
        "conv": normal(3, 4, 4),
        "a": normal(4, 2),
        "b": normal(2, 4),
        "loop": normal(4, 4),
        "unused": normal(4, 4),
        "norm": normal(4),
    }

    def apply(p, tokens):
        x = p["tied"][tokens] * p["norm"][None, None]
        x = x[..., :2] @ p["half"][:2]
        x = jax.lax.conv_general_dilated(
            x, p["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        x = x @ (p["a"] @ p["b"])
        x = jax.lax.fori_loop(0, 2, lambda i, x: x @ p["loop"], x)
        x = jax.lax.while_loop(lambda x: x.sum() > 1e9, lambda x: x @ p["loop"], x)
        return x @ p["tied"].T

    found = merging.dense_leaves(apply, params, RNG.integers(0, 9, (2, 5)))
    assert found.axes == {}
    reasons = {
        "tied": "gather",
        "half": "slice",
        "conv": "conv_general_dilated",
        "a": "dot_general",
        "b": "dot_general",
        "loop": "while",
        "unused": "not used",
        "norm": "used by",
    }
    assert set(found.averaged) == set(reasons)
    for path, reason in reasons.items():
        assert reason in found.averaged[path], (path, found.averaged[path])
    with pytest.raises(ValueError, match="multiplies its inputs with no parameter"):
        merging.gram_matrices(apply, params, [RNG.integers(0, 9, (2, 5))])
    with pytest.raises(ValueError, match="no batches"):
        merging.gram_matrices(apply, params, [])


def test_leaves_used_twice():
    params = {"twice": normal(4, 4), "both": normal(4, 4)}

    def apply(p, x):
        x = (x @ p["twice"]) @ p["twice"]
        return (x @ p["both"]) @ p["both"].T

    x = normal(5, 4)
    found = merging.dense_leaves(apply, params, x)
    assert found.axes == {"twice": (0,)}
    assert "different axes" in found.averaged["both"]
    got = merging.gram_matrices(apply, params, [x])
    close(got["twice"], gram(x) + gram(x @ params["twice"]), (0,))

"""WEMoE: task arithmetic at the start, the right expert for an example in the end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from multitask_jax import merging

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def block(p, x):
    """Tokens [B, L, 4] through a dense layer, a torch-oriented MLP and a head."""
    x = x @ p["in"]
    h = jax.nn.relu(x @ p["mlp"]["fc1.weight"].T + p["mlp"]["fc1.bias"][None, None])
    return (x + h @ p["mlp"]["fc2.weight"].T).mean(axis=1) @ p["head"]


def parameters():
    mlp = {
        "fc1.weight": normal(8, 5),
        "fc1.bias": normal(8),
        "fc2.weight": normal(5, 8),
    }
    return {"in": normal(4, 5), "mlp": mlp, "head": normal(5, 3)}


@pytest.fixture(scope="module")
def models():
    base = parameters()
    return base, [
        jax.tree.map(lambda x: x + 0.3 * normal(*x.shape), base) for _ in "ab"
    ]


@pytest.mark.parametrize("router_layers", [1, 2])
def test_starts_near_task_arithmetic(models, router_layers):
    base, tuned = models
    x = normal(6, 7, 4)
    moe = merging.wemoe_init(
        KEY, block, base, tuned, x, mlp_pattern="mlp/", router_layers=router_layers
    )
    assert set(moe.routers) == {"mlp/"}
    assert [w.shape for w, _ in moe.routers["mlp/"]][-1] == (5, 2)
    zeros = jax.tree.map(lambda v: jnp.zeros_like(v) if v.ndim == 2 else v, moe.routers)
    got = merging.wemoe_apply(block, moe._replace(routers=zeros), x)
    want = block(merging.merge(merging.task_arithmetic(scale=0.3), base, tuned), x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    routing = merging.wemoe_routing(block, moe, x)["mlp/"]
    assert routing.shape == (6, 2)
    np.testing.assert_allclose(routing, np.full((6, 2), 0.3), atol=0.1)


def test_each_example_has_its_own_weights(models):
    """Against the definition, with hand-made routers."""
    base, tuned = models
    x = normal(3, 7, 4)
    moe = merging.wemoe_init(KEY, block, base, tuned, x, mlp_pattern="mlp/")
    (w1, b1), (w2, b2) = router = ((normal(5, 5), normal(5)), (normal(5, 2), normal(2)))
    moe = moe._replace(routers={"mlp/": router})
    got = jax.jit(lambda m, x: merging.wemoe_apply(block, m, x))(moe, x)
    shared = merging.merge(merging.task_arithmetic(scale=0.3), base, tuned)
    shared = jax.tree.map(np.asarray, shared)
    for i in range(len(x)):
        h = x[i] @ shared["in"]
        w = (np.maximum(h @ w1 + b1, 0) @ w2 + b2).mean(axis=0)
        mlp = {
            k: v + sum(w[t] * (tuned[t]["mlp"][k] - v) for t in range(2))
            for k, v in base["mlp"].items()
        }
        want = block(shared | {"mlp": mlp}, x[i : i + 1])[0]
        np.testing.assert_allclose(got[i], want, rtol=1e-3, atol=1e-4)


def test_routes_to_the_right_expert():
    """Domains apart; the other domain's expert gets in the way of one's own."""
    base = {
        "in": np.eye(4, dtype=np.float32),
        "mlp": {"w": np.zeros((4, 2), np.float32)},
    }
    own, other = [3.0, 0.0], [0.0, 2.0]  # logits: sure of class 0, or in doubt
    tuned = [
        base | {"mlp": {"w": np.float32([own, own, other, other])}},
        base | {"mlp": {"w": np.float32([other, other, own, own])}},
    ]
    apply = lambda p, x: (x @ p["in"]) @ p["mlp"]["w"]  # noqa: E731

    def draw(domain, n=32):
        x = np.zeros((n, 4), np.float32)
        x[:, 2 * domain : 2 * domain + 2] = 0.5 + RNG.random((n, 2))
        return x

    moe = merging.wemoe_init(KEY, apply, base, tuned, draw(0), mlp_pattern="^mlp/")
    batches = [[draw(t), draw(t, 9)] for t in range(2)]
    moe, entropy = merging.wemoe_fit(
        apply, moe, batches, steps=150, optimiser=optax.adam(0.02)
    )
    assert entropy.shape == (150,)
    assert entropy[-1] < 0.2 * entropy[0]
    for t in range(2):
        fresh = draw(t)
        routing = np.asarray(merging.wemoe_routing(apply, moe, fresh)["mlp/"])
        assert (routing[:, t] > routing[:, 1 - t] + 0.3).all()
        logits = merging.wemoe_apply(apply, moe, fresh)
        assert (jnp.argmax(logits, axis=1) == 0).all()
    # No static merge of the two can: their changes cancel for both domains.
    still = merging.merge(merging.task_arithmetic(scale=0.3), base, tuned)
    assert np.abs(np.diff(apply(still, draw(0)), axis=1)).max() < 2


def stack(p, x):
    for i in range(2):
        x = jnp.tanh(x @ p[f"block_{i}"]["mlp"]["up"])
    return x


def test_a_router_sees_what_routed_mlps_before_it_made():
    base = {f"block_{i}": {"mlp": {"up": normal(4, 4)}} for i in range(2)}
    tuned = [jax.tree.map(lambda v: v + normal(*v.shape), base) for _ in range(2)]
    x = normal(5, 4)
    moe = merging.wemoe_init(
        KEY, stack, base, tuned, x, mlp_pattern=r"block_\d+/mlp/", router_layers=1
    )
    assert sorted(moe.routers) == ["block_0/mlp/", "block_1/mlp/"]
    routing = merging.wemoe_routing(stack, moe, x)
    h = x
    for i in range(2):
        ((w, b),) = moe.routers[f"block_{i}/mlp/"]
        want = h @ np.asarray(w) + np.asarray(b)
        np.testing.assert_allclose(
            routing[f"block_{i}/mlp/"], want, rtol=1e-4, atol=1e-5
        )
        ups = [m[f"block_{i}"]["mlp"]["up"] for m in (base, *tuned)]
        mixed = ups[0] + sum(
            want[:, t, None, None] * (ups[t + 1] - ups[0]) for t in range(2)
        )
        h = np.tanh(np.einsum("bi,bij->bj", h, mixed))


def test_what_it_cannot_route(models):
    base, tuned = models
    x = normal(2, 7, 4)
    with pytest.raises(ValueError, match="matches none"):
        merging.wemoe_init(KEY, block, base, tuned, x, mlp_pattern="ffn")
    with pytest.raises(ValueError, match="router_layers: got 3"):
        merging.wemoe_init(
            KEY, block, base, tuned, x, mlp_pattern="mlp/", router_layers=3
        )

    def normed(p, x):
        return (x * p["mlp/norm"][None]) @ p["mlp/w"]

    flat = {"mlp/norm": normal(4), "mlp/w": normal(4, 3), "idle/w": normal(3)}
    with pytest.raises(ValueError, match=r"mlp/norm is used by .* before the first"):
        merging.wemoe_init(KEY, normed, flat, [flat], normal(2, 4), mlp_pattern="mlp/")
    with pytest.raises(ValueError, match=r"no product with the leaves of .*idle/"):
        merging.wemoe_init(KEY, normed, flat, [flat], normal(2, 4), mlp_pattern="idle/")
    moe = merging.wemoe_init(
        KEY, normed, flat, [flat], normal(2, 4), mlp_pattern="mlp/w"
    )
    with pytest.raises(ValueError, match="batches of 2 tasks for 1 models"):
        merging.wemoe_fit(normed, moe, [[normal(2, 4)]] * 2)
    with pytest.raises(ValueError, match="an iterator, which runs out"):
        merging.wemoe_fit(normed, moe, [iter([normal(2, 4)])])
    with pytest.raises(ValueError, match="got one batch"):
        merging.wemoe_fit(normed, moe, [normal(2, 4)])
    with pytest.raises(ValueError, match="steps: got -1"):
        merging.wemoe_fit(normed, moe, [[normal(2, 4)]], steps=-1)

"""Dense trees to experts and back, on a transformer block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax import merging, moe, tree
from multitask_jax.layers.moe import MoE
from multitask_jax.layers.transformer import Block
from multitask_jax.moe import upcycling

D, H = 8, 12
PATTERN = r"(?P<block>layer_\d+)/(?P<leaf>(intermediate|output)/\w+)"
# What stands between block and leaf is "/" here and "/attention_" there.
MIXED = r"(?P<block>layer_\d)/(?:attention_)?(?P<leaf>output/\w+)"
RENAME = {"intermediate": "up", "output": "down"}
DENSE = Block(D, 2, H)


def dense_params(seed):
    x = jnp.zeros((1, 3, D))
    keys = jax.random.split(jax.random.key(seed), 2)
    init = jax.jit(DENSE.init)
    return {f"layer_{i}": init(k, x)["params"] for i, k in enumerate(keys)}


def sparse(**options):
    return Block(D, 2, H, mlp=MoE(hidden=H, kind="gelu", **options))


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(9), (2, 3, D))


def gates(count):
    return upcycling.random_gates(
        jax.random.key(1), {"layer_0": D, "layer_1": D}, count
    )


@pytest.mark.parametrize("k", [1, 2, 4])
def test_sparse_upcycling_gives_the_dense_models_output(x, k):
    """All experts are copies, and weights over the chosen ones sum to 1."""
    params = dense_params(0)
    up = upcycling.upcycle(
        [params] * 4, params, pattern=PATTERN, gates=gates(4), rename=RENAME
    )
    model = sparse(experts=4, k=k, normalize="after_topk", dispatch="everyone")
    for layer in params:
        found = jax.jit(model.apply)({"params": up[layer]}, x)
        expected = jax.jit(DENSE.apply)({"params": params[layer]}, x)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_split_is_the_inverse():
    models = [dense_params(s) for s in range(3)]
    given = gates(3)
    up = upcycling.upcycle(
        models, models[0], pattern=PATTERN, gates=given, rename=RENAME
    )
    dense, found = upcycling.split(up, rename=RENAME)
    for e, (back, model) in enumerate(zip(dense, models, strict=True)):
        for path, y in tree.flatten(back).items():
            mlp = "intermediate" in path or "/output" in path
            wanted = tree.flatten(model if mlp else models[0])[path]
            np.testing.assert_array_equal(y, wanted, err_msg=f"{e} {path}")
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), found, given))


@pytest.mark.parametrize("name", ["ties", "task_arithmetic", "linear"])
def test_to_dense_merges_the_experts_alone(name):
    """As merging does; what they share is not multiplied by their number."""
    base, *models = (dense_params(s) for s in range(4))
    up = upcycling.upcycle(
        models, models[0], pattern=PATTERN, gates=gates(3), rename=RENAME
    )
    options = {"density": 0.4} if name == "ties" else {}
    merge = functools.partial(merging.merge, merging.METHODS[name](**options))
    given = {} if name == "linear" else {"base": base}
    to_dense = functools.partial(upcycling.to_dense, merge=merge, rename=RENAME)
    found = tree.flatten(jax.jit(to_dense)(up, **given))
    flat = [tree.flatten(m) for m in (base, *models)]
    own = upcycling.mlp_leaves(list(flat[0]), PATTERN)
    origin, *experts = ({p: f[p] for p in own} for f in flat)
    merged = jax.jit(merge)(origin, experts)
    assert found.keys() == flat[0].keys()
    for path, x in found.items():
        wanted = merged[path] if path in own else flat[1][path]
        np.testing.assert_array_equal(x, wanted, err_msg=path)
    first = next(iter(own))
    lacking = tree.nest({p: x for p, x in flat[0].items() if p != first})
    with pytest.raises(ValueError, match="base: it has no"):
        to_dense(up, base=lacking)


def test_the_gate_from_means_sends_tokens_to_the_nearest_mean():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(3, D)).astype(np.float32) * 2
    x = np.repeat(means, 50, axis=0) + rng.normal(size=(150, D)).astype(np.float32)
    # Each of D dimensions has variance 1, so that their sum s^2 is D.
    gate = upcycling.gate_from_means(jnp.asarray(means), variance=float(D))
    routing = moe.route(moe.gate_logits(gate, jnp.asarray(x)), k=1)
    nearest = np.linalg.norm(x[:, None] - means[None], axis=-1).argmin(axis=1)
    np.testing.assert_array_equal(routing.experts[:, 0], nearest)
    # The softmax is the posterior of Gaussians of variance 1 around the means.
    distance = np.sum((x[:, None] - means[None]) ** 2, axis=-1)
    p = jax.nn.softmax(-distance / 2, axis=1)
    np.testing.assert_allclose(routing.probabilities, p, rtol=1e-3, atol=1e-5)


def test_means_far_from_zero_make_a_gate_of_small_numbers():
    """The common part would make biases of thousands, and lose what means differ by."""
    rng = np.random.default_rng(0)
    means = np.float32(50 + 0.1 * rng.normal(size=(3, D)))
    gate = jax.jit(upcycling.gate_from_means)(means, 0.01 * D)
    x = means[:, None] + 0.1 * rng.normal(size=(3, 20, D)).astype(np.float32)
    distance = np.sum((np.float64(x)[:, :, None] - means[None, None]) ** 2, axis=-1)
    found = jax.nn.softmax(moe.gate_logits(gate, jnp.asarray(x)), axis=-1)
    expected = jax.nn.softmax(jnp.asarray(-distance / 2 / 0.01), axis=-1)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert np.abs(gate["kernel"]).max() < 50


def tokens_of(means, spread, count=200):
    rng = np.random.default_rng(0)
    return [m + spread * rng.normal(size=(count, len(m))) for m in means]


def share_sent_home(gate, data):
    each = []
    for e, x in enumerate(data):
        routing = moe.route(moe.gate_logits(gate, jnp.asarray(x, jnp.float32)), k=1)
        each.append(np.mean(routing.experts == e))
    return np.array(each)


@pytest.mark.parametrize(
    "means",
    [
        # A large common part: without care, one expert gets all.
        [(10, 10, 10, 10.3, 9.7, 10), (10, 10, 10, 9.7, 10.3, 10.2)],
        [(10, 10, 11, 10), (10, 11, 10, 10), (11, 10, 10, 10.5)],
        # None at all, or next to none along their difference: nothing to project out.
        [(1, 0.5, 0), (-1, -0.5, 0)],
        [(1.05, 1.05, 1.05), (-0.95, -0.95, -0.95)],
    ],
)
def test_a_gate_without_bias_tells_means_of_a_large_common_part_apart(means):
    means = np.array(means)
    data = tokens_of(means, 0.3)
    gate = upcycling.gate_without_bias(means, 0.3**2 * means.shape[1])
    assert gate.keys() == {"kernel"}
    nearest = [
        np.mean(np.linalg.norm(x[:, None] - means[None], axis=-1).argmin(axis=1) == e)
        for e, x in enumerate(data)
    ]
    # Next to what a bias would bring.
    assert (share_sent_home(gate, data) > np.array(nearest) - 0.12).all()


def test_means_that_differ_along_their_common_part_alone_are_refused():
    means = np.array([[10.0, 10, 10], [12, 12, 12.1]])
    with pytest.raises(ValueError, match="Use a layout whose gate has a bias"):
        upcycling.gate_without_bias(means, 0.3**2 * 3)
    with pytest.raises(ValueError, match="by 0 across"):
        upcycling.gate_without_bias(np.ones((2, 3)), 1.0)


def seeded(paths, seed):
    rng = np.random.default_rng(seed)
    return tree.nest({p: jnp.asarray(rng.normal(size=(D, D))) for p in paths})


@pytest.mark.parametrize(
    ("pattern", "between", "rename"),
    [
        (r"(?P<block>moe_\d+)/(?P<leaf>(gate|up|down)/kernel)", "/", None),
        (r"(?P<block>moe_\d+)/mlp/(?P<leaf>(gate|up|down)/kernel)", "/mlp/", None),
        (
            r"(?P<block>a/moe_\d+)/ffn/x/(?P<leaf>(gate|up|down)/kernel)",
            "/ffn/x/",
            {"up": "wide", "gate": "up"},
        ),
    ],
)
def test_paths_come_back_and_a_dense_swiglu_is_no_router(pattern, between, rename):
    """Of a tree with a SwiGLU that does not become experts, and whose gate is its own.

    The paths that the pattern's blocks have are made from the pattern itself.
    """
    block = "a/moe_1" if "a/" in pattern else "moe_1"
    paths = [f"{block}{between}{n}/kernel" for n in ("gate", "up", "down")]
    paths += [f"layer_0/mlp/{n}/kernel" for n in ("gate", "up", "down")]
    models = [seeded(paths, s) for s in range(2)]
    gate = {block: {"kernel": jnp.zeros((D, 2))}}
    up = upcycling.upcycle(
        models, models[0], pattern=pattern, gates=gate, rename=rename
    )
    dense, found = upcycling.split(up, rename=rename, between=between)
    assert list(found) == [block]
    for back, model in zip(dense, models, strict=True):
        flat = tree.flatten(back)
        assert flat.keys() == set(paths)
        for path, x in flat.items():
            wanted = tree.flatten(model if block in path else models[0])[path]
            np.testing.assert_array_equal(x, wanted, err_msg=path)


def test_shared_experts_have_no_dense_model():
    tokens = jnp.zeros((3, D))
    layer = MoE(experts=2, hidden=H, shared_hidden=H)
    params = jax.jit(layer.init)(jax.random.key(0), tokens)["params"]
    with pytest.raises(ValueError, match=r"mlp/shared_\w+/.* that all tokens share"):
        upcycling.split({"layer_0": {"mlp": params}})
    beside = {name: params[name] for name in ("experts", "gate")}
    elsewhere = {"shared_bottom": {"kernel": jnp.zeros(D)}}  # no expert
    dense, _ = upcycling.split({"layer_0": {"mlp": beside}} | elsewhere)
    assert "shared_bottom" in dense[0]
    beside["gate"] = {"kernel": jnp.zeros((D, 1))}  # the other expert: of all tokens
    with pytest.raises(ValueError, match="got a gate of 1 for 2 experts"):
        upcycling.split({"layer_0": {"mlp": beside}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": r"(?P<block>layer)"}, "expected groups"),
        ({"pattern": r"(?P<block>x)(?P<leaf>y)"}, "matches none of"),
        ({"pattern": "("}, "not a regex"),
        ({"gates": {}}, "none for"),
        ({"gates": gates(2) | {"layer_7": {}}}, r"got some for \['layer_7'\]"),
        ({"rename": {"intermediate": "x", "output": "x"}}, "would come back as"),
        ({"pattern": MIXED}, "between block and leaf"),
        ({"models": [{"layer_0": {"query": jnp.zeros(3)}}]}, "models differ"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    params = dense_params(0)
    options = {"models": [params] * 2, "pattern": PATTERN, "gates": gates(2)} | change
    with pytest.raises(ValueError, match=message):
        upcycling.upcycle(options.pop("models"), params, **options)


def test_a_tree_without_experts_is_refused():
    with pytest.raises(ValueError, match="got no experts"):
        upcycling.split(dense_params(0))

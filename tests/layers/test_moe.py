import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax import moe, sharding, tree
from multitask_jax.layers.moe import ONE_BY_ONE, MMoE, MoE, sum_of
from multitask_jax.layers.transformer import Block

D = 8


def init(layer, *inputs):
    return jax.jit(layer.init)(jax.random.key(1), *inputs)["params"]


def apply(layer, params, *inputs, **options):
    """Compiled as a whole: eagerly each operation would be on its own."""
    return jax.jit(lambda p, x: layer.apply({"params": p}, *x, **options))(
        params, inputs
    )


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(0), (2, 5, D))


@pytest.mark.parametrize("dispatch", ["everyone", "capacity", "grouped", "dropless"])
def test_the_layer_is_the_functions(x, dispatch):
    layer = MoE(experts=4, hidden=6, k=2, kind="swiglu", dispatch=dispatch, factor=4)
    params = init(layer, x)
    tokens = x.reshape(-1, D)
    routing = moe.route(moe.gate_logits(params["gate"], tokens), k=2)
    expected = jax.jit(
        lambda p: moe.everyone(moe.EXPERTS["swiglu"], p, tokens, routing)
    )(params["experts"])
    y, sown = apply(layer, params, x, mutable="moe")
    np.testing.assert_allclose(y.reshape(-1, D), expected.y, rtol=1e-4, atol=1e-5)
    balance = moe.losses.load_balance(routing)
    np.testing.assert_allclose(sum_of(sown, "load_balance"), balance, rtol=1e-6)


def test_scalezeros_layer_adds_a_shared_expert(x):
    layer = MoE(experts=8, hidden=6, k=1, kind="swiglu", shared_hidden=4 * D)
    params = init(layer, x)
    assert params["shared_up"]["kernel"].shape == (D, 4 * D)
    none = params | {"experts": jax.tree.map(jnp.zeros_like, params["experts"])}
    up = jax.nn.gelu(x @ params["shared_up"]["kernel"])
    expected = up @ params["shared_down"]["kernel"]
    found = apply(layer, none, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert apply(layer, params, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_hard_routing_is_a_network_of_its_own_for_each_task(x):
    """H-M2oE: changing task 1's expert leaves task 0's tokens as they were."""
    layer = MoE(experts=2, hidden=6, route="hard", dispatch="dropless")
    ids = jnp.array([0, 1])[:, None]
    params = init(layer, x, ids)
    assert "gate" not in params
    other = jax.tree.map(lambda p: p.at[1].add(1.0), params)
    before = apply(layer, params, x, ids)
    after = apply(layer, other, x, ids)
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() > 0.1
    with pytest.raises(ValueError, match="needs ids"):
        layer.apply({"params": params}, x)


@pytest.mark.parametrize("task", [0, 1])
def test_hard_routing_drops_nobody_when_all_are_of_one_task(x, task):
    """By default, too: a batch of one task is an ordinary one."""
    layer = MoE(experts=2, hidden=6, route="hard")
    ids = jnp.full((*x.shape[:-2], 1), task)
    params = init(layer, x, ids)
    y, sown = apply(layer, params, x, ids, mutable="moe")
    assert sum_of(sown, "dropped") == 0
    for name in ("load_balance", "importance", "router_z"):  # there is no gate
        with pytest.raises(ValueError, match="hard routes have no gate"):
            sum_of(sown, name)
    _, sown = apply(layer, params, x, ids.at[0].set(2), mutable="moe")
    assert sum_of(sown, "unserved") == 0.5  # one of two sequences
    one = jax.tree.map(lambda p: p[task], params["experts"])
    up = jax.nn.gelu(x @ one["up"]["kernel"] + one["up"]["bias"][None, None])
    expected = up @ one["down"]["kernel"] + one["down"]["bias"][None, None]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"k": 2}, {"normalize": "after_topk"}, {"noise": 0.1}]
)
def test_a_hard_route_takes_no_options_of_gates(x, options):
    layer = MoE(experts=2, hidden=6, route="hard", **options)
    with pytest.raises(ValueError, match="kind='hard': got"):
        layer.init(jax.random.key(0), x, jnp.zeros((2, 1), int))


def test_many_experts_are_one_product(x):
    """However many, there is one program of each room."""
    products = {}
    for e in (ONE_BY_ONE, ONE_BY_ONE + 1):
        layer = MoE(experts=e, hidden=6)
        params = init(layer, x)
        run = jax.jit(lambda p, layer=layer: layer.apply({"params": p}, x))
        products[e] = run.lower(params).as_text().count("stablehlo.dot_general")
    few, many = products.values()
    assert many == 3  # of the gate, up and down
    if jax.default_backend() == "cpu":
        assert few == 1 + 2 * ONE_BY_ONE


def test_ids_have_the_axes_of_tokens(x):
    layer = MoE(experts=2, hidden=6, route="hard")
    with pytest.raises(ValueError, match=r"ids: got \[2\] for tokens"):
        layer.init(jax.random.key(0), x, jnp.array([0, 1]))


def test_noise_only_where_there_is_a_key(x):
    layer = MoE(experts=4, hidden=6, noise=5.0)
    params = init(layer, x)
    plain = apply(layer, params, x)
    np.testing.assert_array_equal(plain, apply(layer, params, x))
    noisy = jax.jit(lambda p, k: layer.apply({"params": p}, x, rngs={"gate": k}))
    assert (noisy(params, jax.random.key(2)) != plain).any()


def test_it_drops_into_the_transformer_block(x):
    block = Block(D, 2, 16, mlp=MoE(experts=4, hidden=16, k=2, dispatch="dropless"))
    params = init(block, x)

    @jax.jit
    def loss(params):
        y, sown = block.apply({"params": params}, x, mutable="moe")
        return jnp.mean(y**2) + 0.01 * sum_of(sown, "load_balance")

    gradient = tree.flatten(jax.jit(jax.grad(loss))(params))
    assert {"mlp/gate/kernel", "mlp/experts/up/kernel"} <= set(gradient)
    assert all(np.abs(g).max() > 0 for p, g in gradient.items() if "mlp" in p)
    step = jax.jit(
        lambda p: jax.tree.map(lambda p, g: p - 0.1 * g, p, jax.grad(loss)(p))
    )
    assert loss(step(params)) < loss(params)


def test_unknown_names_and_forgotten_losses_are_named(x):
    with pytest.raises(ValueError, match="expected everyone, capacity"):
        MoE(experts=2, hidden=4, dispatch="sparse").init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="mutable='moe'"):
        sum_of({}, "router_z")


def test_what_init_gives_can_be_applied(x):
    """With all of its collections: each layer's loss is there once."""
    layer = MoE(experts=4, hidden=6)
    variables = jax.jit(layer.init)(jax.random.key(1), x)
    _, sown = jax.jit(lambda v: layer.apply(v, x, mutable="moe"))(variables)
    _, alone = apply(layer, variables["params"], x, mutable="moe")
    for name in ("load_balance", "router_z"):
        assert sum_of(sown, name) == sum_of(alone, name)


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_expert_choice_has_the_room_that_it_takes(x, dispatch):
    layer = MoE(experts=5, hidden=6, k=2, route="expert_choice", dispatch=dispatch)
    params = init(layer, x)
    reference = layer.clone(dispatch="everyone")
    y, expected = (apply(each, params, x) for each in (layer, reference))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    text = jax.jit(lambda p: layer.apply({"params": p}, x)).lower(params).as_text()
    assert f"tensor<5x4x{D}xf32>" in text  # 2 x 10 tokens over 5 experts
    assert f"tensor<5x10x{D}xf32>" not in text


def test_experts_on_several_devices(x):
    """The same layer with a mesh: outputs and gradients; and what is dropped."""
    mesh = sharding.make_mesh({"data": 2, "expert": 4})
    x = jnp.concatenate([x, x, x, x])  # 40 tokens, 5 a device
    layer = MoE(experts=4, hidden=6, k=2, factor=4, shared_hidden=8)
    apart = layer.clone(dispatch="expert_parallel", mesh=mesh)
    params = init(apart, x[:1, :1])  # one token is enough to begin with

    @functools.partial(jax.jit, static_argnums=0)
    def graded(layer, params, x):
        def loss(params):
            y, sown = layer.apply({"params": params}, x, mutable="moe")
            return jnp.sum(jnp.sin(y)) + sum_of(sown, "load_balance"), sown

        return jax.value_and_grad(loss, has_aux=True)(params)

    placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P(("data", "expert"))))
    (expected, _), slopes = graded(layer, params, x)
    (found, sown), apart_slopes = graded(apart, params, placed)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert sum_of(sown, "dropped") == 0
    chex.assert_trees_all_close(apart_slopes, slopes, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="needs mesh="):
        apply(apart.clone(mesh=None), params, x)
    (_, few), _ = graded(apart.clone(factor=0.5), params, placed)
    assert 0 < sum_of(few, "dropped") < 1


def test_expert_choice_on_several_devices(x):
    mesh = sharding.make_mesh({"expert": 4})
    x = jnp.concatenate([x, x, x, x])
    layer = MoE(experts=4, hidden=6, k=2, route="expert_choice", dispatch="everyone")
    params = init(layer, x)
    apart = layer.clone(dispatch="expert_parallel", mesh=mesh)
    found, sown = apply(apart, params, x, mutable="moe")
    np.testing.assert_allclose(found, apply(layer, params, x), rtol=1e-4, atol=1e-5)
    assert sum_of(sown, "dropped") == 0


def test_a_gate_a_task_mixes_the_same_experts(x):
    """MMoE by hand, and where tasks' gates are one, outputs are."""
    layer = MMoE(tasks=3, experts=4, hidden=6)
    params = init(layer, x)
    y, sown = apply(layer, params, x, mutable="moe")
    assert y.shape == (3, *x.shape)
    tokens = x.reshape(-1, D)
    for t in range(3):
        gate = {"kernel": params["gates"][t]}
        routing = moe.route(moe.gate_logits(gate, tokens), kind="soft")
        expected = moe.everyone(moe.EXPERTS["mlp"], params["experts"], tokens, routing)
        np.testing.assert_allclose(
            y[t].reshape(-1, D), expected.y, rtol=1e-4, atol=1e-5
        )
    assert 0 <= sum_of(sown, "specialisation") <= 1
    same = params | {"gates": jnp.broadcast_to(params["gates"][:1], (3, D, 4))}
    y, sown = apply(layer, same, x, mutable="moe")
    np.testing.assert_array_equal(y[0], y[2])
    both = moe.route(moe.gate_logits({"kernel": same["gates"][0]}, tokens), kind="soft")
    balance = moe.losses.load_balance(both, weighted=True)
    np.testing.assert_allclose(sum_of(sown, "load_balance"), balance, rtol=1e-6)
    np.testing.assert_allclose(sum_of(sown, "specialisation"), 0, atol=1e-6)


def test_gates_of_tasks_have_a_bias_and_inputs_of_their_own(x):
    """softmax(raw W + b), while experts read x."""
    layer = MMoE(tasks=2, experts=4, hidden=6, gate_bias=True)
    raw = jax.random.normal(jax.random.key(2), (*x.shape[:-1], 3))
    params = init(layer, x, raw)
    assert params["gates"].shape == (2, 3, 4)
    assert not params["gates_bias"].any()
    params["gates_bias"] = jnp.arange(8.0).reshape(2, 4)
    y = apply(layer, params, x, raw)
    tokens = x.reshape(-1, D)
    for t in range(2):
        gate = {"kernel": params["gates"][t], "bias": params["gates_bias"][t]}
        routing = moe.route(moe.gate_logits(gate, raw.reshape(-1, 3)), kind="soft")
        expected = moe.everyone(moe.EXPERTS["mlp"], params["experts"], tokens, routing)
        np.testing.assert_allclose(
            y[t].reshape(-1, D), expected.y, rtol=1e-4, atol=1e-5
        )
    with pytest.raises(ValueError, match=r"gate_inputs: got \[1, 5, 3\] for tokens"):
        layer.apply({"params": params}, x, raw[:1])


def test_tasks_of_tokens_tell_the_specialisation(x):
    """1 where each task has experts of its own; through a block as well."""
    ids = jnp.array([0, 1])[:, None]
    layer = MoE(experts=2, hidden=6, tasks=2)
    params = init(layer, x, ids)
    _, sown = apply(layer, params, x, ids, mutable="moe")
    routing = moe.route(moe.gate_logits(params["gate"], x.reshape(-1, D)))
    expected = moe.losses.statistics(
        routing, tasks=jnp.repeat(jnp.arange(2), 5), task_count=2
    )
    np.testing.assert_allclose(
        sum_of(sown, "specialisation"), expected["specialisation"], rtol=1e-5, atol=1e-6
    )
    block = Block(D, 2, 16, mlp=MoE(experts=2, hidden=6, route="hard", tasks=2))
    params = init(block, x, ids)
    _, sown = apply(block, params, x, ids, mutable="moe")
    np.testing.assert_allclose(sum_of(sown, "specialisation"), 1, rtol=1e-6)
    with pytest.raises(ValueError, match="tasks=2 needs ids"):
        apply(layer, init(layer, x, ids), x)
    soft = MoE(experts=2, hidden=6, route="soft", tasks=2)
    params = init(soft, x, ids)
    params["gate"]["kernel"] = jnp.eye(D, 2) * 20  # by the first two features
    turned = jnp.where(ids[..., None] == 0, jnp.eye(D)[0], jnp.eye(D)[1])
    _, sown = apply(soft, params, jnp.broadcast_to(turned, x.shape), ids, mutable="moe")
    np.testing.assert_allclose(sum_of(sown, "specialisation"), 1, atol=1e-3)
    with pytest.raises(ValueError, match="there is none"):
        init(Block(D, 2, 16), x, ids)


@pytest.mark.parametrize(
    "layer", [MoE(experts=2, hidden=3), MMoE(tasks=2, experts=2, hidden=3)]
)
def test_unknown_kinds_of_experts_are_named(layer):
    """When parameters are made, and where there are some."""
    x = jnp.ones((2, D))
    params = jax.jit(layer.init)(jax.random.key(0), x)
    other = layer.copy(kind="silu")
    for run in (
        lambda: other.init(jax.random.key(0), x),
        lambda: other.apply(params, x),
    ):
        with pytest.raises(
            ValueError, match=r"kind: got 'silu', expected one of mlp, "
        ):
            run()

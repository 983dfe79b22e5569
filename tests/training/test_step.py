import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from multitask_jax.sharding import make_mesh
from multitask_jax.training import adamw, decayed, init_state, make_step, whole
from tests.training.common import batch_at, loss_fn, params, same_bits


def train(step, state, steps=5, size=16):
    metrics = None
    for s in range(steps):
        state, metrics = step(state, batch_at(s, size))
    return state, metrics


def test_one_step_of_gradient_descent_by_hand():
    def loss(w, x, key):
        return jnp.sum(w["w"] ** 2) * x, {}

    optimizer = optax.sgd(0.25)
    state = init_state({"w": jnp.array([3.0, 4.0])}, optimizer, jax.random.key(0))
    state, metrics = make_step(loss, optimizer)(state, jnp.float32(0.5))
    # grad = 2 w x = w, so w <- 0.75 w; its norm is 5 and the loss 12.5.
    np.testing.assert_allclose(state.params["w"], [2.25, 3.0])
    assert int(state.step) == 1
    assert metrics == {"loss": 12.5, "gradient_norm": 5.0}


def test_keys_differ_by_step_and_follow_from_state():
    def loss(w, x, key):
        return w * 0, {"draw": jax.random.uniform(key)}

    optimizer = optax.sgd(1.0)
    step = make_step(loss, optimizer)
    draws = []
    for _ in range(2):
        state = init_state(jnp.float32(1), optimizer, jax.random.key(9))
        for _ in range(3):
            state, metrics = step(state, 0)
            draws.append(float(metrics["draw"]))
    assert draws[:3] == draws[3:]
    assert len(set(draws)) == 3


def test_the_callers_parameters_survive_donation():
    start = params()
    optimizer = optax.adam(1e-2)
    key = jax.random.key(0)
    state = init_state(start, optimizer, key)
    first, _ = train(make_step(loss_fn, optimizer), state)
    assert state.params["head"]["kernel"].is_deleted()  # given to the step
    again = init_state(start, optimizer, key)  # nothing of the caller's was
    assert same_bits(train(make_step(loss_fn, optimizer), again)[0], first)


def test_one_trace_a_shape_of_batch():
    start = {"scale": jnp.asarray(0.5)}
    assert start["scale"].weak_type  # which no longer is so after a step

    def loss(p, batch, key):
        return jnp.mean((p["scale"] * batch["x"]) ** 2), {}

    optimizer = optax.adam(1e-2)
    step = make_step(loss, optimizer)
    state, _ = train(step, init_state(start, optimizer, jax.random.key(0)))
    for size in (8, 16, 8):  # buckets of lengths: each is traced once
        state, _ = step(state, batch_at(0, size))
    assert step.traced == [{"x": (n, 6), "y": (n, 1)} for n in (16, 8)]


def test_one_program_where_some_leaves_are_committed_to_a_device():
    """As restored ones are; all that a step returns is."""
    start = params()
    start["head"] = jax.device_put(start["head"], jax.devices()[0])
    optimizer = optax.adam(1e-2)
    step = make_step(loss_fn, optimizer)
    state = step.place_state(init_state(start, optimizer, jax.random.key(0)))
    train(step, state)
    assert step.run._cache_size() == 1
    # Leaves that the caller cut over a mesh are the caller's.
    cut = jax.sharding.NamedSharding(make_mesh({"data": 8}), P("data", None))
    mixed = {"a": jax.device_put(jnp.ones((8, 2)), cut), "b": jnp.ones(3)}
    state = step.place_state(init_state(mixed, optimizer, jax.random.key(0)))
    assert state.params["a"].sharding == cut
    assert not state.params["b"].committed


@pytest.mark.parametrize(
    ("axes", "batch_axis", "rules"),
    [
        ({"data": 8}, "data", None),
        (
            {"data": 2, "model": 4},
            ("data", "model"),
            [("head", P("model")), ("kernel", P(None, "model")), (".", P())],
        ),
    ],
)
def test_a_mesh_equals_one_device_to_rounding(axes, batch_axis, rules):
    optimizer = optax.adam(1e-2)
    start = params()
    alone, expected = train(
        make_step(loss_fn, optimizer),
        init_state(start, optimizer, jax.random.key(0)),
        size=24,
    )
    mesh = make_mesh(axes)
    how = {} if rules is None else {"rules": rules}
    step = make_step(loss_fn, optimizer, mesh=mesh, batch_axis=batch_axis, **how)
    state = step.place_state(init_state(start, optimizer, jax.random.key(0)))
    text = step.lower(state, batch_at(0, 24)).compile().as_text()
    assert "all-reduce" in text
    assert "f32[3,6]" in text  # a device's share of the 24 examples
    assert "f32[24,6]" not in text
    state, metrics = train(step, state, size=24)
    assert len(step.traced) == 1
    assert state.params["head"]["kernel"].sharding.is_equivalent_to(
        jax.NamedSharding(mesh, P("model", None) if rules else P()), 2
    )
    moment = state.opt_state[0].mu["layers_0"]["kernel"]
    assert moment.sharding.is_equivalent_to(
        jax.NamedSharding(mesh, P(None, "model") if rules else P()), 2
    )
    for a, b in zip(
        jax.tree.leaves((alone.params, expected)),
        jax.tree.leaves((state.params, dict(metrics))),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_batches_that_do_not_fit_the_mesh_are_refused():
    optimizer = optax.sgd(1.0)
    step = make_step(loss_fn, optimizer, mesh=make_mesh({"data": 8}))
    state = init_state(params(), optimizer, jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"batch: x has shape \(12, 6\).*multiple of 8"
    ):
        step(state, batch_at(0, 12))
    with pytest.raises(ValueError, match=r"batch_axis: got 'rows'.*has data"):
        make_step(loss_fn, optimizer, mesh=make_mesh({"data": 8}), batch_axis="rows")


@pytest.mark.parametrize("metrics", [{"loss": 1.0}, {"each": jnp.ones(3)}])
def test_metrics_that_are_refused(metrics):
    optimizer = optax.sgd(1.0)
    step = make_step(lambda p, b, k: (jnp.sum(p), metrics), optimizer)
    with pytest.raises(ValueError, match="the loss's metric"):
        step(init_state(jnp.ones(2), optimizer, jax.random.key(0)), 0)


@pytest.mark.parametrize("mesh", [None, {"data": 8}])
def test_frozen_leaves_stay_and_have_no_optimiser_state(mesh):
    start = params()
    optimizer = adamw(1e-2, steps=5)
    step = make_step(loss_fn, optimizer, mesh=mesh and make_mesh(mesh))
    state = init_state(start, optimizer, jax.random.key(0), exclude="layers_0/kernel")
    sizes = [x.size for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sorted(sizes) == sorted(2 * [16, 16])  # mu and nu of bias and head alone
    if mesh is None:
        assert state.frozen["layers_0"]["kernel"] is start["layers_0"]["kernel"]
    state = step.place_state(state)
    state, metrics = train(step, state)
    after = whole(state)
    assert same_bits(after["layers_0"]["kernel"], start["layers_0"]["kernel"])
    assert jnp.any(after["layers_0"]["bias"] != start["layers_0"]["bias"])
    assert jnp.any(after["head"]["kernel"] != start["head"]["kernel"])
    assert jax.tree.structure(after) == jax.tree.structure(start)

    # The same as gradient descent on the trained leaves alone; so is the norm.
    def alone(p, batch, key):
        layer = {"kernel": start["layers_0"]["kernel"], "bias": p["bias"]}
        return loss_fn({"layers_0": layer, "head": p["head"]}, batch, key)

    few = {"bias": start["layers_0"]["bias"], "head": start["head"]}
    few, expected = train(
        make_step(alone, optimizer), init_state(few, optimizer, jax.random.key(0))
    )
    np.testing.assert_allclose(few.params["bias"], after["layers_0"]["bias"], rtol=1e-4)
    np.testing.assert_allclose(
        expected["gradient_norm"], metrics["gradient_norm"], rtol=1e-5
    )


def test_states_that_are_refused():
    optimizer = optax.sgd(1.0)
    with pytest.raises(ValueError, match="exclude='layer_1' matches none"):
        init_state(params(), optimizer, jax.random.key(0), exclude="layer_1")
    with pytest.raises(ValueError, match="freeze all 3 leaves"):
        init_state(params(), optimizer, jax.random.key(0), exclude=".")
    with pytest.raises(ValueError, match="ids: can't train int32"):
        init_state({"ids": jnp.arange(3)}, optimizer, jax.random.key(0))


def test_adamw_decays_matrices_only():
    tree = {
        "dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
        "layer_norm": {"weight": jnp.ones((1, 2))},
        "scanned": {"bias": jnp.ones((3, 2)), "rescaled": jnp.ones((2, 2))},
    }
    assert decayed(tree) == {
        "dense": {"kernel": True, "bias": False},
        "layer_norm": {"weight": False},
        "scanned": {"bias": False, "rescaled": True},
    }
    optimizer = adamw(0.5, steps=10, warmup=0.1, weight_decay=0.1)
    state = optimizer.init(tree)
    zero = jax.tree.map(jnp.zeros_like, tree)
    rates = []
    update = jax.jit(optimizer.update)
    for _ in range(11):
        updates, state = update(zero, state, tree)
        assert not jnp.any(updates["dense"]["bias"])
        rates.append(float(updates["dense"]["kernel"][0, 0]) / -0.1)
    # Up to 0.5 in one step, then half a cosine down to 0 over nine.
    cosine = 0.25 * (1 + np.cos(np.pi * np.arange(10) / 9))
    np.testing.assert_allclose(rates, [0.0, *cosine], atol=1e-6)


def test_adamw_clips_and_checks():
    tree = {"w": jnp.ones((2, 2))}
    optimizer = adamw(1.0, steps=4, warmup=0, clip=1e-12, eps=1.0, weight_decay=0)
    updates, _ = jax.jit(optimizer.update)(
        {"w": 1e6 * jnp.ones((2, 2))}, optimizer.init(tree), tree
    )
    assert 0 < float(jnp.abs(updates["w"]).max()) < 1e-11
    with pytest.raises(ValueError, match=r"warmup=1\.5"):
        adamw(1.0, steps=4, warmup=1.5)

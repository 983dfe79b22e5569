"""What every gate owes every dispatcher."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax import moe, sharding
from tests.merging.common import BRIEFLY

N, D, H, E = 48, 6, 10, 4  # tokens, width, hidden width, experts
GATES = {
    "top_1": {"k": 1},
    "top_2": {"k": 2},
    "top_2 after": {"k": 2, "normalize": "after_topk"},
    "top_2 noisy": {"k": 2, "noise": 0.3, "key": jax.random.key(5)},
    "expert_choice": {"kind": "expert_choice", "k": 2},
    "soft": {"kind": "soft"},
    "hard": {"kind": "hard", "experts": E},
    "top_1 shared": {"k": 1, "shared": 1},
    "expert_choice shared": {"kind": "expert_choice", "shared": 2},
    "hard shared": {"kind": "hard", "experts": E, "shared": 1},
}
DISPATCHERS = {
    "capacity": functools.partial(moe.capacity, factor=float(E)),  # nothing is dropped
    "by weight": functools.partial(moe.capacity, factor=float(E), priority="weight"),
    "grouped": moe.grouped,
    "dropless": functools.partial(moe.dropless, factors=(1.25,)),
    "one by one": functools.partial(moe.capacity, factor=float(E), one_by_one=True),
}
# Each gate with the ways to dispatch; variants of these with two gates.
PAIRS = [
    (gate, name)
    for gate in GATES
    for name in DISPATCHERS
    if name in ("capacity", "dropless", "grouped")
    or gate in ("top_2", "expert_choice shared")
]


REFERENCE = jax.jit(
    lambda params, x, routing: moe.everyone(moe.EXPERTS["swiglu"], params, x, routing).y
)


@pytest.fixture(params=sorted(GATES))
def gate(request):
    return GATES[request.param]


def made(gate: dict[str, Any], kind: str = "swiglu") -> tuple[Any, Any, jax.Array]:
    """A gate's kernel, experts, tokens."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (N, D))
    kernel = moe.init_gate(keys[1], D, E, stddev=1.0)
    count = E + gate.get("shared", 0)
    params = moe.experts.init(keys[2], kind, experts=count, width=D, hidden=H)
    params = jax.tree.map(
        lambda p: p + 0.1 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), params
    )
    return kernel, params, x


def routed(gate: dict[str, Any], kernel: Any, x: jax.Array) -> moe.Routing:
    if gate.get("kind") == "hard":
        return moe.route(jnp.arange(len(x)) % E, **gate)
    return moe.route(moe.gate_logits(kernel, x), **gate)


def out(serve: Any, gate: dict[str, Any], kernel: Any, params: Any, x: Any) -> Any:
    return serve(moe.EXPERTS["swiglu"], params, x, routed(gate, kernel, x))


@pytest.mark.parametrize(("given", "name"), PAIRS)
def test_values_and_gradients_are_the_references(given, name):
    gate = GATES[given]

    def loss(serve, *arrays):
        y = out(serve, gate, *arrays).y
        return jnp.sum(jnp.sin(y) * jnp.arange(D)[None]), y

    graded = jax.jit(
        jax.value_and_grad(loss, (1, 2, 3), has_aux=True),
        static_argnums=0,
        compiler_options=BRIEFLY,
    )
    arrays = made(gate)
    (_, expected), expected_grad = graded(moe.everyone, *arrays)
    (_, y), grad = graded(DISPATCHERS[name], *arrays)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(expected_grad), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def every_way(params: Any, x: Any, routing: moe.Routing) -> dict[str, moe.Served]:
    """All dispatchers in one program."""
    ways = {"everyone": moe.everyone} | DISPATCHERS
    return {n: f(moe.EXPERTS["swiglu"], params, x, routing) for n, f in ways.items()}


def test_eager_gates_are_jitted_ones(gate):
    kernel, params, x = made(gate)
    routing = routed(gate, kernel, x)
    jitted = jax.jit(functools.partial(routed, gate))(kernel, x)
    np.testing.assert_array_equal(routing.experts, jitted.experts)
    np.testing.assert_allclose(routing.weights, jitted.weights, rtol=1e-5)
    y = moe.everyone(moe.EXPERTS["swiglu"], params, x, routing).y
    np.testing.assert_allclose(y, REFERENCE(params, x, jitted), rtol=1e-5, atol=1e-5)


def test_eager_dispatchers_are_jitted_ones(gate):
    kernel, params, x = made(gate)
    routing = routed(gate, kernel, x)
    jitted = jax.jit(every_way, compiler_options=BRIEFLY)(params, x, routing)
    for name, eager in every_way(params, x, routing).items():
        np.testing.assert_allclose(eager.y, jitted[name].y, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(eager.kept, jitted[name].kept)


def test_permuted_tokens_give_permuted_outputs(gate):
    """Tokens go through the gate again, but where it looks at their places."""
    kernel, params, x = made(gate)
    order = np.random.default_rng(0).permutation(N)
    routing = routed(gate, kernel, x)
    turned = jax.tree.map(lambda a: a[order], routing)
    if gate.get("kind") != "hard" and "noise" not in gate:
        again = routed(gate, kernel, x[order])
        np.testing.assert_array_equal(again.experts, turned.experts)
        np.testing.assert_allclose(again.weights, turned.weights, rtol=1e-6)
        turned = again
    serve = jax.jit(every_way, compiler_options=BRIEFLY)
    here, there = serve(params, x, routing), serve(params, x[order], turned)
    for name, served in here.items():
        np.testing.assert_allclose(
            served.y[order], there[name].y, rtol=1e-5, atol=1e-5, err_msg=name
        )


def test_slots_are_filled_as_the_gate_says(gate):
    kernel, _, x = made(gate)
    routing = routed(gate, kernel, x)
    count, shared = E + gate.get("shared", 0), gate.get("shared", 0)
    filled = np.asarray(routing.experts) < count
    kind, k = gate.get("kind", "top_k"), gate.get("k", 1)
    per_token = {"top_k": k, "soft": E, "hard": 1}.get(kind)
    if per_token is not None:
        assert (filled.sum(axis=1) == per_token + shared).all()
    else:  # experts take equally many instead
        taken = np.bincount(routing.experts[filled], minlength=count)
        assert (taken[:E] == k * N // E).all()
    # Nobody meets a token twice, and empty slots weigh nothing.
    for row, ok in zip(np.asarray(routing.experts), filled, strict=True):
        assert len(set(row[ok])) == ok.sum()
    assert not np.asarray(routing.weights)[~filled].any()


def test_dropped_slots_are_counted_and_give_nothing(gate):
    kernel, params, x = made(gate)
    routing = routed(gate, kernel, x)
    count = E + gate.get("shared", 0)
    room = 5
    served = jax.jit(
        lambda r: moe.capacity(moe.EXPERTS["swiglu"], params, x, r, room=room)
    )(routing)
    experts, kept = np.asarray(routing.experts), np.asarray(served.kept)
    wanted = np.bincount(experts[experts < count], minlength=count)
    got = np.bincount(experts[kept], minlength=count)
    np.testing.assert_array_equal(got[:E], np.minimum(wanted[:E], room))
    np.testing.assert_array_equal(got[E:], wanted[E:])  # shared ones serve all
    only = dataclasses.replace(routing, weights=jnp.where(kept, routing.weights, 0))
    expected = REFERENCE(params, x, only)
    np.testing.assert_allclose(served.y, expected, rtol=1e-5, atol=1e-5)
    found = moe.losses.statistics(routing, served.kept)["dropped"]
    filled = (np.asarray(routing.weights) > 0) & (experts < E)
    np.testing.assert_allclose(found, (filled & ~kept).sum() / filled.sum(), rtol=1e-6)


@pytest.mark.parametrize(
    ("priority", "dropped"),
    [("position", [(3, 1)]), ("weight", [(2, 0)])],
)
def test_who_is_dropped_goes_by_priority(priority, dropped):
    """First choices and earlier tokens stay, or the heaviest."""
    _, params, x = made({"k": 2})
    routing = routed({"k": 2}, {"kernel": jnp.ones((x.shape[1], E))}, x[:4])
    experts = jnp.array([[0, 1], [2, 0], [0, 3], [1, 0]])
    weights = jnp.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]])
    served = jax.jit(
        lambda r: moe.capacity(
            moe.EXPERTS["swiglu"], params, x[:4], r, room=3, priority=priority
        )
    )(dataclasses.replace(routing, experts=experts, weights=weights))
    assert list(zip(*np.nonzero(~np.asarray(served.kept)), strict=True)) == dropped


def test_the_gate_learns(gate):
    """Also at k = 1, but not where weights are normalised over the chosen one."""
    if gate.get("kind") == "hard":
        pytest.skip("there is no gate")
    kernel, params, x = made(gate)

    def gradient(kernel, gate):
        def loss(kernel):
            return jnp.sum(out(moe.everyone, gate, kernel, params, x).y ** 2)

        return jax.jit(jax.grad(loss), compiler_options=BRIEFLY)(kernel)["kernel"]

    assert np.abs(gradient(kernel, gate)).max() > 1e-3
    if gate == GATES["top_1"]:
        assert not gradient(kernel, gate | {"normalize": "after_topk"}).any()


@pytest.mark.parametrize("given", sorted(GATES))
@pytest.mark.parametrize("axes", [{"data": 2, "expert": 4}, {"data": 4, "expert": 2}])
def test_experts_on_devices_are_the_reference(given, axes):
    gate = GATES[given]
    kernel, params, x = made(gate)
    mesh = sharding.make_mesh(axes)

    def loss(serve, params, x, routing):
        y = serve(moe.EXPERTS["swiglu"], params, x, routing).y
        return jnp.sum(jnp.sin(y) * jnp.arange(D)[None]), y

    parallel = functools.partial(moe.expert_parallel, mesh=mesh, factor=float(E))
    graded = jax.jit(
        jax.value_and_grad(loss, (1, 2, 3), has_aux=True, allow_int=True),
        static_argnums=0,
    )
    routing = routed(gate, kernel, x)
    (_, expected), grads = graded(moe.everyone, params, x, routing)
    tokens = jax.NamedSharding(mesh, jax.P(tuple(axes)))
    cut = jax.P() if gate.get("shared") else jax.P("expert")
    placed = (
        jax.device_put(params, jax.NamedSharding(mesh, cut)),
        jax.device_put(x, tokens),
        jax.device_put(routing, tokens),
    )
    (_, y), sharded = graded(parallel, *placed)
    assert y.sharding.is_equivalent_to(tokens, 2)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(sharded), strict=True):
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", ["top_2", "hard shared"])
def test_devices_drop_what_capacity_drops_of_their_tokens(given):
    gate, room = GATES[given], 2  # less than an equal share
    kernel, params, x = made(gate)
    mesh = sharding.make_mesh({"expert": 4})
    routing = routed(gate, kernel, x)
    serve = moe.EXPERTS["swiglu"], params
    found = jax.jit(
        lambda x, r: moe.expert_parallel(*serve, x, r, mesh=mesh, room=room)
    )(x, routing)
    parts = [slice(i * N // 4, (i + 1) * N // 4) for i in range(4)]
    alone = jax.jit(lambda x, r: moe.capacity(*serve, x, r, room=room))
    each = [alone(x[p], jax.tree.map(lambda a, p=p: a[p], routing)) for p in parts]
    np.testing.assert_array_equal(found.kept, jnp.concatenate([s.kept for s in each]))
    assert not found.kept.all()
    expected = jnp.concatenate([s.y for s in each])
    np.testing.assert_allclose(found.y, expected, rtol=1e-5, atol=1e-5)


def test_expert_parallel_program_moves_tokens_only():
    mesh = sharding.make_mesh({"expert": 4})
    kernel, params, x = made({})
    routing = routed({}, kernel, x)
    serve = jax.jit(
        lambda p, x, r: moe.expert_parallel(moe.EXPERTS["swiglu"], p, x, r, mesh=mesh).y
    )
    tokens = jax.NamedSharding(mesh, jax.P("expert"))
    text = (
        serve.lower(*(jax.device_put(a, tokens) for a in (params, x, routing)))
        .compile()
        .as_text()
    )
    assert text.count(" all-to-all(") == 2
    assert not any(c in text for c in ("all-gather(", "all-reduce("))


def test_rows_move_without_scatters():
    """The derivative of moving rows is a gather: no scatter of [rows, width]."""
    kernel, params, x = made({"k": 2})
    routing = routed({"k": 2}, kernel, x)

    def loss(x, params):
        serve = DISPATCHERS["one by one"]
        return jnp.sum(serve(moe.EXPERTS["swiglu"], params, x, routing).y)

    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, params).as_text()
    for line in text.splitlines():
        if "stablehlo.scatter" in line:
            assert f"x{D}xf32" not in line, line


@pytest.mark.parametrize("name", ["capacity", "dropless"])
def test_shared_experts_take_no_room_from_others(name):
    """By default: beside a shared expert the others' buffers are what they were."""
    x, sizes = made({})[2], []
    for shared in (0, 1):
        gate = {"kind": "hard", "experts": E, "shared": shared}
        params = made(gate)[1]
        serve = functools.partial(getattr(moe, name), moe.EXPERTS["swiglu"], params)
        routing = routed(gate, None, x)
        served = jax.jit(serve)(x, routing)
        assert served.kept.all()
        np.testing.assert_allclose(
            served.y, REFERENCE(params, x, routing), rtol=1e-5, atol=1e-5
        )
        text = jax.jit(serve).lower(x, routing).as_text()
        sizes.append({int(n) for n in re.findall(rf"tensor<{E}x(\d+)x{D}xf32>", text)})
    assert sizes[0] == sizes[1] != set()


@pytest.mark.parametrize("busiest", [12, 13, 20, 30, 48])
def test_dropless_serves_all_however_uneven(busiest):
    """Rooms are 13, 15, 18, 24 and 48: an equal share is 12."""
    _, params, x = made({})
    ids = np.arange(N) % E
    ids[:busiest] = 0
    routing = moe.route(jnp.asarray(ids), kind="hard", experts=E)
    serve = jax.jit(lambda x, r: moe.dropless(moe.EXPERTS["swiglu"], params, x, r))
    served = serve(x, routing)
    assert served.kept.all()
    np.testing.assert_allclose(
        served.y, REFERENCE(params, x, routing), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["everyone", "expert_parallel", *DISPATCHERS])
@pytest.mark.parametrize("compiled", [False, True])
def test_other_numbers_of_experts_are_refused(name, compiled):
    """Fewer than the gate has, and shared ones that the routing knows nothing of."""
    mesh = sharding.make_mesh({"expert": 4})
    others = {
        "everyone": moe.everyone,
        "expert_parallel": functools.partial(moe.expert_parallel, mesh=mesh),
    }
    serve = functools.partial((others | DISPATCHERS)[name], moe.EXPERTS["swiglu"])
    serve = jax.jit(serve) if compiled else serve
    kernel, params, x = made({})
    few = jax.tree.map(lambda p: p[:-1], params)
    more = jax.tree.map(lambda p: jnp.concatenate([p, p[:1]]), params)
    plain, shared = (routed({"k": 2, "shared": s}, kernel, x) for s in (0, 1))
    with pytest.raises(ValueError, match=f"got {E - 1} experts for a gate of {E}"):
        serve(few, x, plain)
    with pytest.raises(ValueError, match="and 0 shared ones: route with shared=1"):
        serve(more, x, plain)
    with pytest.raises(ValueError, match="and 1 shared ones: route with shared=0"):
        serve(params, x, shared)


def test_one_by_one_stacks_gradients_once():
    """Of experts and rows: no gradient is padded to all experts and added up."""
    kernel, params, x = made({"k": 2})
    routing = routed({"k": 2}, kernel, x)

    def loss(params, x):
        serve = functools.partial(moe.capacity, one_by_one=True)
        return jnp.sum(serve(moe.EXPERTS["swiglu"], params, x, routing).y)

    text = jax.jit(jax.grad(loss, (0, 1))).lower(params, x).as_text()
    assert "stablehlo.dot_general" in text
    assert "stablehlo.pad" not in text

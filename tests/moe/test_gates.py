import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax import moe

LOGITS = jnp.log(jnp.array([[1.0, 2.0, 5.0], [4.0, 3.0, 1.0]]) / 8)


def test_top_k_takes_the_best_with_the_softmax_of_all():
    routing = moe.route(LOGITS, k=2)
    np.testing.assert_array_equal(routing.experts, [[2, 1], [0, 1]])
    np.testing.assert_allclose(
        routing.weights, [[5 / 8, 2 / 8], [4 / 8, 3 / 8]], rtol=1e-6
    )


def test_after_topk_normalises_over_the_chosen():
    routing = moe.route(LOGITS, k=2, normalize="after_topk")
    np.testing.assert_allclose(
        routing.weights, [[5 / 7, 2 / 7], [4 / 7, 3 / 7]], rtol=1e-6
    )


def test_expert_choice_fills_every_expert():
    logits = jnp.array([[3.0, 1.0], [2.0, 1.5], [1.0, 0.0], [0.0, 5.0]])
    routing = moe.route(logits, kind="expert_choice", k=1)
    p = jax.nn.softmax(logits, axis=1)
    # Expert 0 prefers tokens 2 (p = .73) and 0 (.88); expert 1 tokens 3 and 1.
    np.testing.assert_array_equal(routing.experts, [[0, 2], [2, 1], [0, 2], [2, 1]])
    np.testing.assert_allclose(
        routing.weights, [[p[0, 0], 0], [0, p[1, 1]], [p[2, 0], 0], [0, p[3, 1]]]
    )


def test_shared_experts_come_after_the_routed_ones_and_serve_all():
    routing = moe.route(LOGITS, k=1, shared=2)
    np.testing.assert_array_equal(routing.experts, [[2, 3, 4], [0, 3, 4]])
    np.testing.assert_array_equal(routing.weights[:, 1:], np.ones((2, 2)))


def test_hard_goes_by_id_and_an_unknown_id_is_served_by_nobody():
    route = functools.partial(moe.route, kind="hard", experts=2, shared=1)
    routing = jax.jit(route)(jnp.array([1, 0, 7]))
    np.testing.assert_array_equal(routing.experts, [[1, 2], [0, 2], [3, 2]])
    np.testing.assert_array_equal(routing.weights, [[1, 1], [1, 1], [0, 1]])


@pytest.mark.parametrize("ids", [[0, 1, 2], [-1, 0, 1]])
def test_unknown_ids_are_refused_where_they_are_known(ids):
    def route(ids):
        return moe.route(ids, kind="hard", experts=2).experts

    ids = jnp.array(ids)
    with pytest.raises(
        ValueError, match=rf"from {ids[0]} to {ids[2]}, expected 0 to 1"
    ):
        route(ids)
    with pytest.raises(ValueError, match="expected 0 to 1"):
        jax.jit(lambda: route(ids))()  # a constant
    assert (jax.jit(route)(ids) == 2).sum() == 1
    assert route(ids[:0]).shape == (0, 1)


def test_gates_of_several_tasks_are_one_vmap():
    """MMoE: sum_e softmax(W_t x)_e expert_e(x) for each task t."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (5, 4))
    gates = {"kernel": jax.random.normal(keys[1], (2, 4, 3))}
    params = moe.experts.init(keys[2], "mlp", experts=3, width=4, hidden=8)

    def task(gate):
        routing = moe.route(moe.gate_logits(gate, x), kind="soft")
        return moe.everyone(moe.EXPERTS["mlp"], params, x, routing).y

    found = jax.jit(jax.vmap(task))(gates)
    for t in range(2):
        g = jax.nn.softmax(x @ gates["kernel"][t], axis=1)
        up = np.einsum("nd,edh->enh", x, params["up"]["kernel"])
        each = np.einsum("enh,ehd->end", jax.nn.gelu(up), params["down"]["kernel"])
        expected = np.einsum("ne,end->nd", g, each)
        np.testing.assert_allclose(found[t], expected, rtol=1e-4, atol=1e-5)


def test_noise_moves_the_choice_and_follows_the_key():
    logits = jnp.zeros((200, 4))
    a, b, again = (
        moe.route(logits, noise=1.0, key=jax.random.key(k)).experts for k in (0, 1, 0)
    )
    np.testing.assert_array_equal(a, again)
    assert (a != b).any()
    assert np.bincount(a[:, 0], minlength=4).min() > 20


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (LOGITS, {"k": 4}, "k from 1 to 3"),
        (LOGITS, {"kind": "topk"}, "expected top_k, expert_choice, soft or hard"),
        (LOGITS, {"normalize": "after"}, "before_topk or after_topk"),
        (LOGITS, {"noise": 1.0}, "needs a key"),
        (LOGITS[0], {}, r"expected logits \[N, E\]"),
        (jnp.arange(3), {"kind": "hard"}, "the number of experts"),
        (LOGITS, {"kind": "hard", "experts": 3}, "integer ids"),
        (LOGITS, {"kind": "soft", "k": 2}, "got k, expected noise, key"),
        (LOGITS, {"kind": "soft", "normalize": "after"}, "got normalize"),
        (
            LOGITS,
            {"kind": "expert_choice", "normalize": "after_topk"},
            "got normalize, expected k, noise, key",
        ),
        *(
            (jnp.arange(3), {"kind": "hard", "experts": 3} | options, "none of them")
            for options in (
                {"k": 1},
                {"normalize": "before_topk"},
                {"noise": 0.1},
                {"key": jax.random.key(0)},
            )
        ),
    ],
)
def test_wrong_options_are_named(scores, options, message):
    with pytest.raises(ValueError, match=message):
        moe.route(scores, **options)

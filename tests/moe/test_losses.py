"""Losses and statistics against numbers worked out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax import moe
from multitask_jax.moe import losses


def certain(ids, experts=2):
    """Tokens that go to these experts without doubt."""
    return moe.route(
        jnp.where(jax.nn.one_hot(jnp.array(ids), experts) > 0, 50.0, -50.0)
    )


def test_balanced_routing_has_loss_one_and_one_expert_has_e():
    assert losses.load_balance(certain([0, 1, 0, 1])) == pytest.approx(1)
    assert losses.load_balance(certain([0, 0, 0, 0])) == pytest.approx(2)


def test_load_balance_of_soft_gates_counts_weights():
    logits = jnp.tile(jnp.array([[2.0, 0.0]]), (4, 1))
    share = float(jax.nn.softmax(logits[0])[0])

    def balance(z, weighted):
        return losses.load_balance(moe.route(z, kind="soft"), weighted=weighted)

    assert balance(logits, False) == pytest.approx(1)
    assert balance(logits, True) == pytest.approx(2 * (share**2 + (1 - share) ** 2))
    gradient = jax.grad(balance)(logits, True)
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 1] < 0).all()


def test_load_balance_pushes_the_gate_towards_balance():
    logits = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.0]])
    gradient = jax.grad(lambda z: losses.load_balance(moe.route(z)))(logits)
    assert (gradient[:, 0] > 0).all()  # less of the expert that has all
    assert (gradient[:, 1] < 0).all()


def test_router_z_is_the_squared_log_partition():
    logits = jnp.log(jnp.array([[1.0, 3.0], [0.5, 0.5]]))
    expected = (np.log(4.0) ** 2 + 0.0) / 2
    assert losses.router_z(moe.route(logits)) == pytest.approx(expected, rel=1e-6)


def test_importance_is_the_squared_variation_of_weights():
    routing = moe.route(jnp.log(jnp.array([[0.75, 0.25], [0.75, 0.25]])), kind="soft")
    # Sums of weights 1.5 and .5: mean 1, variance .25.
    assert losses.importance(routing) == pytest.approx(0.25, rel=1e-5)


def test_mutual_information_of_tasks_and_experts():
    tasks = jnp.array([0, 0, 1, 1])
    apart = losses.mutual_information(certain([0, 0, 1, 1]), tasks, count=2)
    alike = losses.mutual_information(certain([0, 1, 0, 1]), tasks, count=2)
    # p(t, e) = 1/2, 0; 1/4, 1/4: I = 1/2 log(4/3) + 1/4 log(2/3) + 1/4 log 2
    partly = losses.mutual_information(certain([0, 0, 0, 1]), tasks, count=2)
    expected = 0.5 * np.log(4 / 3) + 0.25 * np.log(2 / 3) + 0.25 * np.log(2)
    assert apart == pytest.approx(np.log(2), rel=1e-5)
    assert alike == pytest.approx(0, abs=1e-6)
    assert partly == pytest.approx(expected, rel=1e-5)


def test_soft_gates_inform_by_their_weights():
    logits = jnp.log(jnp.array([[0.75, 0.25], [0.25, 0.75]]))
    routing, tasks = moe.route(logits, kind="soft"), jnp.array([0, 1])
    slots = losses.mutual_information(routing, tasks, count=2)
    assert slots == pytest.approx(0, abs=1e-6)  # every token fills every slot
    found = losses.mutual_information(routing, tasks, count=2, weighted=True)
    expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert found == pytest.approx(expected, rel=1e-5)
    # Weights need not sum to 1: of half of them the information is the same.
    half = dataclasses.replace(routing, weights=routing.weights * 0.1)
    small = losses.mutual_information(half, tasks, count=2, weighted=True)
    assert small == pytest.approx(expected, rel=1e-5)
    one = moe.route(jnp.array([[9.0, -9.0], [9.0, -9.0]]), kind="soft")
    load = losses.statistics(one, weighted=True)["load/max"]
    assert load == pytest.approx(2, rel=1e-4)
    assert losses.statistics(one)["load/max"] == pytest.approx(1)


def test_statistics_are_scalars_by_name():
    routing = certain([0, 0, 0, 1])
    kept = jnp.array([[True], [True], [False], [True]])
    found = losses.statistics(
        routing, kept, tasks=jnp.array([0, 0, 0, 1]), task_count=2
    )
    assert all(jnp.ndim(x) == 0 for x in found.values())
    assert found["load/0"] == pytest.approx(0.75)
    assert found["load/max"] == pytest.approx(1.5)
    assert found["dropped"] == pytest.approx(0.25)
    assert found["unserved"] == pytest.approx(0.25)
    assert found["tasks/unknown"] == 0
    assert found["entropy/token"] == pytest.approx(0, abs=1e-6)
    p = np.array([0.75, 0.25])
    mean = -(p * np.log(p)).sum() / np.log(2)
    assert found["entropy/mean"] == pytest.approx(mean, rel=1e-5)
    assert found["specialisation"] == pytest.approx(mean, rel=1e-5)  # I = H(expert)


def test_unknown_ids_are_counted_under_jit():
    """1 to T in place of 0 to T - 1: half of the tokens have no expert, and no task."""

    @jax.jit
    def told(ids):
        routing = moe.route(ids, kind="hard", experts=2, shared=1)
        return losses.statistics(routing, tasks=ids, task_count=2)

    found = told(jnp.array([1, 2, 1, 2]))
    assert found["unserved"] == found["tasks/unknown"] == 0.5
    assert found["specialisation"] == 0  # of one task
    found = told(jnp.array([0, 1, 0, 1]))
    assert found["unserved"] == found["tasks/unknown"] == 0
    assert found["specialisation"] == pytest.approx(1)


@pytest.mark.parametrize("unknown", [2, -1])
def test_unknown_tasks_are_refused_where_they_are_known(unknown):
    with pytest.raises(ValueError, match=r"tasks: got ids .*, expected 0 to 1"):
        losses.statistics(certain([0, 1]), tasks=jnp.array([0, unknown]), task_count=2)


def test_tasks_need_their_number():
    with pytest.raises(ValueError, match="task_count"):
        losses.statistics(certain([0]), tasks=jnp.array([0]))

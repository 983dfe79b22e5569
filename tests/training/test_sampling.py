import collections

import numpy as np
import pytest

from multitask_jax.training import sampling

SIZES = (100, 400, 2500)


def counts(sampler, steps, **options):
    found = collections.Counter(sampler(SIZES, s, **options).task for s in range(steps))
    return np.array([found[t] for t in range(len(SIZES))])


def test_round_robin_counts_exactly():
    turns = [sampling.round_robin(SIZES, s) for s in range(7)]
    assert [t.task for t in turns] == [0, 1, 2, 0, 1, 2, 0]
    assert [t.visit for t in turns] == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1.0, [1 / 30, 4 / 30, 25 / 30]),
        (2.0, [10 / 80, 20 / 80, 50 / 80]),  # roots of the sizes
        (np.inf, [1 / 3, 1 / 3, 1 / 3]),
        (0.01, [0, 0, 1]),
    ],
)
def test_temperatures_shares(temperature, expected):
    shares = sampling.probabilities(SIZES, temperature=temperature)
    np.testing.assert_allclose(shares, expected, atol=1e-12)
    steps = 6000
    found = counts(sampling.temperature, steps, temperature=temperature, seed=1)
    likely = np.array(expected) > 1e-9
    assert not found[~likely].any()
    wanted = steps * np.array(expected)[likely]
    # 13.8: what chi-square with 2 degrees of freedom exceeds one time in 1000.
    assert np.sum((found[likely] - wanted) ** 2 / wanted) < 13.8


def test_proportional_is_temperature_one():
    for s in range(200):
        assert sampling.proportional(SIZES, s, seed=4) == sampling.temperature(
            SIZES, s, seed=4, temperature=1.0
        )


def test_turns_do_not_depend_on_what_was_asked_before():
    def turn(step):
        return sampling.temperature(SIZES, step, seed=7)

    steps = range(3000)
    forward = [turn(s) for s in steps]
    for memo in (sampling._tasks, sampling._turns_of, sampling._turns_before):
        memo.cache_clear()
    shuffled = np.random.default_rng(0).permutation(3000)
    assert {int(s): turn(int(s)) for s in shuffled} == dict(enumerate(forward))
    # `visit` counts the task's earlier turns, across blocks of draws.
    seen = collections.Counter()
    for task, visit in forward:
        assert visit == seen[task]
        seen[task] += 1
    assert [t.task for t in forward] != [
        sampling.temperature(SIZES, s, seed=8).task for s in steps
    ]


def test_draws_of_neighbouring_steps_are_independent():
    tasks = np.array([sampling.temperature(SIZES, s, seed=2).task for s in range(6000)])
    shares = np.array(sampling.probabilities(SIZES, temperature=2.0))
    found = np.zeros((3, 3))
    np.add.at(found, (tasks[:-1], tasks[1:]), 1)
    wanted = np.outer(shares, shares) * found.sum()
    # 26.1: what chi-square with 8 degrees of freedom exceeds one time in 1000.
    assert np.sum((found - wanted) ** 2 / wanted) < 26.1


@pytest.mark.parametrize(("n", "batch"), [(10, 5), (10, 4), (7, 3), (3, 8), (1, 1)])
def test_every_example_once_an_epoch(n, batch):
    steps = 3 * n
    stream = np.concatenate(
        [sampling.epoch_indices(n, batch, s, seed=1) for s in range(steps)]
    )
    epochs = stream.reshape(-1, n)
    np.testing.assert_array_equal(
        np.sort(epochs), np.tile(np.arange(n), (3 * batch, 1))
    )
    if n > 5:
        assert len({tuple(e) for e in epochs}) == len(epochs)  # shuffled anew
        other = [sampling.epoch_indices(n, batch, s, seed=2) for s in range(steps)]
        assert not np.array_equal(np.concatenate(other), stream)


def test_indices_do_not_depend_on_history():
    last = sampling.epoch_indices(50, 8, 99, seed=3)
    sampling._permutation.cache_clear()
    for s in (99, 0, 99, 98):
        found = sampling.epoch_indices(50, 8, s, seed=3)
        assert np.array_equal(found, last) == (s == 99)
        found[:] = -1  # the caller's own


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"sizes: got \[\]"):
        sampling.round_robin([], 0)
    with pytest.raises(ValueError, match=r"sizes: got \[3, 0\]"):
        sampling.proportional([3, 0], 0)
    with pytest.raises(ValueError, match="step: got -1"):
        sampling.proportional([3], -1)
    with pytest.raises(ValueError, match="temperature: got 0"):
        sampling.temperature([3], 0, temperature=0)
    with pytest.raises(ValueError, match="batch: got 0"):
        sampling.epoch_indices(3, 0, 0, seed=0)

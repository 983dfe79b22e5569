"""Random masks: repeatable, independent, and of the share they say."""

import itertools

import numpy as np
import pytest
from scipy import stats

from multitask_jax import merging, tree
from multitask_jax.merging.random import path_seed, uniform
from tests.merging.common import assert_same_bits, make_models


def test_random_masks_depend_on_seed_path_and_position_alone():
    base, models = make_models(2)
    leaves = tree.flatten(base)
    flat = [tree.flatten(m) for m in models]
    method = merging.dare(density=0.5, seed=7)
    one = merging.merge(method, leaves, flat)
    backwards = lambda x: dict(reversed(x.items()))  # noqa: E731
    two = merging.merge(method, backwards(leaves), [backwards(m) for m in flat])
    assert_same_bits(
        dict(one), dict(sorted(two.items(), key=lambda i: list(one).index(i[0])))
    )
    alone = {"embed": leaves["embed"]}
    three = merging.merge(method, alone, [{"embed": m["embed"]} for m in flat])
    assert_same_bits({"embed": one["embed"]}, three)
    other = merging.merge(merging.dare(density=0.5, seed=8), leaves, flat)
    assert not np.array_equal(one["embed"], other["embed"])


def test_dare_keeps_the_share_it_says_and_the_mean():
    base = {"w": np.zeros((1000, 1000), np.float32)}
    model = {"w": np.ones((1000, 1000), np.float32)}
    for density in (0.1, 0.5, 0.9):
        out = merging.merge(merging.dare(density=density), base, [model])["w"]
        kept = np.mean(np.asarray(out) != 0)
        assert abs(kept - density) < 0.002
        assert abs(float(np.mean(out)) - 1) < 0.02
        # Neighbours, rows and models are independent.
        mask = (np.asarray(out) != 0).astype(np.float64) - kept
        for shifted in (np.roll(mask, 1, 0), np.roll(mask, 1, 1), mask.T):
            assert abs(np.mean(mask * shifted)) < 0.001
    two = merging.merge(merging.dare(density=0.5), base, [model, model])["w"]
    assert abs(np.mean(np.asarray(two) == 4) - 0.25) < 0.002


def numbers(path="w", seed=0, model=0, offset=(0, 0), count=1 << 18):
    """A stretch of the generator."""
    return np.asarray(
        uniform((count,), seed=path_seed(path, seed), model=model, offset=offset)
    )


STREAMS = {
    "start": {},
    "model": {"model": 1},
    "tenth model": {"model": 10},
    "seed": {"seed": 1},
    "path": {"path": "encoder/layers/0/kernel"},
    "across 2**32": {"offset": (0, 2**32 - (1 << 17))},
    "far away": {"offset": (7, 123)},
}


@pytest.mark.parametrize("name", STREAMS)
def test_numbers_are_uniform(name):
    """At level 1e-4 each, for fixed seeds: a broken mixer fails by far."""
    u = numbers(**STREAMS[name])
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-4
    # Cells of runs of three, as in the serial test of order 3.
    cells = (u[: len(u) // 3 * 3].reshape(-1, 3) * 16).astype(int)
    counts = np.bincount(cells @ [256, 16, 1], minlength=4096)
    assert stats.chisquare(counts).pvalue > 1e-4
    # Low bits too: 24 bits of each number count.
    low = (u * 2**24).astype(np.int64) & 255
    assert stats.chisquare(np.bincount(low, minlength=256)).pvalue > 1e-4
    # Runs above and below the median.
    above = u > np.median(u)
    runs = 1 + np.count_nonzero(above[1:] != above[:-1])
    assert abs(runs - len(u) / 2) < 4 * np.sqrt(len(u)) / 2
    # No correlation at the distances of rows and chunks.
    for lag in (1, 2, 3, 64, 1000, 1024, 4096, 1 << 16):
        r = np.corrcoef(u[:-lag], u[lag:])[0, 1]
        assert abs(r) < 4.5 / np.sqrt(len(u) - lag), lag


def test_streams_do_not_depend_on_each_other():
    streams = {name: numbers(**where) for name, where in STREAMS.items()}
    for a, b in itertools.combinations(streams, 2):
        r = np.corrcoef(streams[a], streams[b])[0, 1]
        assert abs(r) < 4.5 / np.sqrt(1 << 18), (a, b)


def test_a_chunk_is_a_part_of_the_whole():
    whole = numbers(count=5000)
    np.testing.assert_array_equal(
        numbers(offset=(0, 1234), count=100), whole[1234:1334]
    )

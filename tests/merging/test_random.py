"""Random masks: repeatable, independent, and of the share they say."""

import numpy as np

from multitask_jax import merging, tree
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

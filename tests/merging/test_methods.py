"""Methods on numbers worked out by hand, and where other tools break."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax import merging
from multitask_jax.merging import sparsify
from multitask_jax.merging.statistics import part_of
from tests.merging.common import load, make_models, merged, save, stream


def merged_taus(method, taus, **kwargs):
    """The merged task vector of task vectors, from a base of zeros."""
    taus = [np.asarray(t, np.float32) for t in taus]
    return np.asarray(merged(method, np.zeros_like(taus[0]), taus, **kwargs))


# -- Breadcrumbs


def test_breadcrumbs_drops_both_ends():
    tau = np.array([5, -4, 3, -2, 1, 0.5, 0.25, 0.125, 0.1, 0.05], np.float32)
    out = merged_taus(merging.breadcrumbs(gamma=0.2, density=0.5), [tau])
    np.testing.assert_array_equal(out, np.where([0, 0, 1, 1, 1, 1, 1, 0, 0, 0], tau, 0))


@pytest.mark.parametrize("gamma", [0.0, 0.01])
def test_breadcrumbs_without_outliers_to_drop(gamma):
    """int(gamma n) = 0: mergekit zeroes the whole tensor."""
    tau = np.array([4.0, 3, 2, 1], np.float32)
    out = merged_taus(merging.breadcrumbs(gamma=gamma, density=0.5), [tau])
    np.testing.assert_array_equal(out, [4, 3, 0, 0])


def test_breadcrumbs_of_equal_magnitudes_keeps_them():
    tau = np.array([1.0, -1] * 10, np.float32)
    out = merged_taus(merging.breadcrumbs(gamma=0.2, density=0.5), [tau])
    np.testing.assert_array_equal(out, tau)


SPARSE = {
    "ties": merging.ties(density=0.2, trim_scope="tensor", zero_sign="positive"),
    "magnitude_prune": merging.magnitude_prune(density=0.2),
    "breadcrumbs": merging.breadcrumbs(density=0.2, gamma=0.3),
    "breadcrumbs_ties": merging.breadcrumbs_ties(density=0.2, gamma=0.3),
    "sce": merging.sce(topk=0.2),
}


@pytest.mark.parametrize("name", sorted(SPARSE))
def test_tensors_too_small_for_their_density_keep_one_entry(name, tmp_path):
    """int(density n) = 0, for a scalar and a small bias: mergekit stops."""
    base = {"scale": np.float32(0), "bias": np.zeros(3, np.float32)}
    models = [
        {"scale": np.float32(1 + t), "bias": np.float32([1 + 2 * t, 0.5, 0])}
        for t in range(2)
    ]
    base, *models = jax.tree.map(np.asarray, [base, *models])
    out = merged(SPARSE[name], base, models)
    assert out["scale"] > 0
    assert out["bias"][0] > 0
    np.testing.assert_array_equal(out["bias"][1:], 0)
    streamed = stream(tmp_path, SPARSE[name], base, models)
    np.testing.assert_allclose(streamed["bias"], out["bias"], rtol=1e-6)


def test_shares_are_checked():
    with pytest.raises(ValueError, match=r"gamma: got 1.0, expected .*\[0, 1\)"):
        merging.breadcrumbs(gamma=1.0)
    with pytest.raises(ValueError, match="gamma: got 2 for 3 models"):
        merged_taus(merging.breadcrumbs(gamma=(0.1, 0.2)), [np.ones(4)] * 3)
    with pytest.raises(ValueError, match=r"topk: got 0, expected .*\(0, 1\]"):
        merging.sce(topk=0)
    with pytest.raises(ValueError, match=r"epsilon: got 0\.15 with density 0\.9"):
        merging.della(density=0.9)
    with pytest.raises(ValueError, match="tall_lambda: got 2 for 3 models"):
        merged_taus(merging.consensus(tall_lambda=(0.4, 0.5)), [np.ones(4)] * 3)
    with pytest.raises(ValueError, match="task: got 2, expected 0 to 1"):
        merged_taus(merging.tall_masks(task=2), [np.ones(4)] * 2)


# -- DELLA


def test_della_probabilities_go_by_rank_in_a_row():
    tau = jnp.array([[3.0, -1, 2], [0, 0, -5]])
    p = sparsify.keep_probabilities(tau, 0.5, 0.2)
    np.testing.assert_allclose(p, [[0.7, 0.3, 0.5], [0.3, 0.5, 0.7]], atol=1e-7)


@pytest.mark.parametrize("shape", [(6, 1), (1,), (), (0, 1)])
def test_della_on_rows_of_one_entry(shape, tmp_path):
    """mergekit fails on [n, 1]: no ranks to spread the probability over."""
    p = sparsify.keep_probabilities(jnp.ones(shape), 0.5, 0.15)
    np.testing.assert_array_equal(p, np.full(shape, 0.5, np.float32))
    base = {"w": np.zeros(shape, np.float32), "other": np.zeros((2, 3), np.float32)}
    model = jax.tree.map(lambda x: x + np.float32(1), base)
    model = jax.tree.map(np.asarray, model)
    out = merged(merging.della(), base, [model])
    assert set(np.unique(out["w"])) <= {0, 2}
    streamed = stream(tmp_path, merging.della(), base, [model])
    np.testing.assert_array_equal(streamed["w"], out["w"])


def test_della_keeps_large_entries_more_often():
    rng = np.random.default_rng(0)
    tau = rng.standard_normal((400, 500)).astype(np.float32)
    out = merged_taus(merging.della(density=0.4, epsilon=0.3, rescale="none"), [tau])
    kept = out != 0
    order = np.argsort(np.abs(tau), axis=1)
    by_rank = np.take_along_axis(kept, order, axis=1).mean(axis=0)
    want = 0.1 + 0.6 * np.arange(500) / 499
    # 400 coins a rank: no further than 5 standard deviations, on average under 1.
    error = (by_rank - want) / np.sqrt(want * (1 - want) / 400)
    assert np.abs(error).max() < 5
    assert 0.9 < np.std(error) < 1.1
    # Divided by its probability, an entry keeps its expectation.
    out = merged_taus(merging.della(density=0.4, epsilon=0.3), [tau])
    np.testing.assert_allclose(out.sum(), tau.sum(), atol=5 * np.sqrt(out.size / 0.3))


# -- spheres


@pytest.mark.parametrize(
    "method",
    [
        merging.nuslerp(),
        merging.nuslerp(flatten=False),
        merging.multislerp(),
        merging.karcher(space="task_vectors"),
    ],
)
def test_opposite_vectors_do_not_vanish(method):
    v = np.random.default_rng(1).standard_normal((3, 50)).astype(np.float32)
    out = merged_taus(method, [v, -v], weights=(0.6, 0.4))
    np.testing.assert_allclose(out, v, atol=1e-5)  # the nearer end, with the mean norm


def test_karcher_of_three_axes():
    out = merged_taus(merging.karcher(space="task_vectors"), 2 * np.eye(3))
    np.testing.assert_allclose(out, np.full(3, 2 / np.sqrt(3)), rtol=1e-6)


def test_karcher_mean_balances_the_logarithms():
    """At the mean, the weighted logarithms of the models sum to zero."""
    rng = np.random.default_rng(2)
    vectors = [rng.standard_normal(20) + 1 for _ in range(4)]
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    out = merged_taus(
        merging.karcher(max_iter=30, space="task_vectors"), vectors, weights=weights
    )
    m = out / np.linalg.norm(out)
    pull = np.zeros(20)
    for w, v in zip(weights, vectors, strict=True):
        u = v / np.linalg.norm(v)
        angle = np.arccos(u @ m)
        pull += w * angle / np.sin(angle) * (u - (u @ m) * m)
    np.testing.assert_allclose(pull, 0, atol=2e-6)
    norms = [np.linalg.norm(v) for v in vectors]
    np.testing.assert_allclose(np.linalg.norm(out), weights @ norms, rtol=1e-6)


def test_nuslerp_quarter_of_a_right_angle():
    out = merged_taus(merging.nuslerp(), [[2.0, 0], [0, 2]], weights=(3, 1))
    angle = np.pi / 8
    np.testing.assert_allclose(out, [2 * np.cos(angle), 2 * np.sin(angle)], rtol=1e-6)


# -- the rest


def test_nearswap_limits_the_step():
    out = merged_taus(merging.nearswap(t=0.5), [[2.0, -0.25, -1, 0]])
    np.testing.assert_allclose(out, [0.5, -0.25, -0.5, 0])


def test_magmax_takes_the_largest_and_the_last_of_a_tie():
    out = merged_taus(merging.magmax(), [[1.0, -2, 0], [-1, 1, 0.5]])
    np.testing.assert_array_equal(out, [-1, -2, 0.5])


def test_ramplus_raises_unique_changes():
    taus = [[1.0, 1, 4, 0], [3, 1, 0, 0]]  # two shared; model 0 has one of its own
    out = merged_taus(merging.ramplus(r=0.1, alpha=5.0), taus)
    np.testing.assert_allclose(out, [2, 1, 4 * (1 + 0.1 * 2), 0], rtol=1e-6)
    out = merged_taus(merging.ramplus(r=0.1, alpha=0.5), taus)
    np.testing.assert_allclose(out[2], 4 * 1.05, rtol=1e-6)


def test_sce_by_hand():
    # Variances 4, 1, 0, 0.25; the half of the three that vary is one entry.
    taus = [[3.0, 1, 2, 0.5], [-1, -1, 2, -0.5]]
    out = merged_taus(merging.sce(topk=0.5), taus)
    np.testing.assert_allclose(out, [3, 0, 0, 0], rtol=1e-6)


def test_consensus_by_hand():
    taus = [[1.0, 1, 0, 1], [1, 0, 0, -3]]
    # |tau_t| > |tau - tau_t|: both, the first alone, none, the second alone.
    sums = np.array([2.0, 1, 0, -2], np.float32)
    for k, mask in ((1, [1, 1, 0, 1]), (2, [1, 0, 0, 0])):
        out = merged_taus(merging.consensus(tall_lambda=0.9, k=k, scale=1), taus)
        np.testing.assert_array_equal(out, np.where(mask, sums, 0))
    out = merged_taus(merging.tall_masks(tall_lambda=0.9, task=1), taus)
    np.testing.assert_array_equal(out, [2, 0, 0, -2])


@pytest.mark.parametrize("name", ["magmax", "karcher", "breadcrumbs", "ram", "sce"])
def test_a_model_listed_twice_counts_twice(name, tmp_path):
    """mergekit drops it silently."""
    base, models = make_models(2, rows=8, blocks=1)
    method = merging.METHODS[name]()
    twice = merged(method, base, [models[0], models[0], models[1]])
    base_path = save(tmp_path / "base", base)
    first, second = (save(tmp_path / f"m{t}", m) for t, m in enumerate(models))
    merging.merge_checkpoints(
        method,
        base_path,
        [first, first, second],
        tmp_path / "out",
        progress=False,
        report_files=False,
    )
    got = load(tmp_path / "out")
    np.testing.assert_allclose(got["embed"], twice["embed"], atol=2e-6)
    if name == "karcher":
        once = merged(method, base, models, weights=(2, 1))
        np.testing.assert_allclose(once["embed"], twice["embed"], atol=2e-6)


def test_part_of_counts_exactly():
    for n in (0, 1, 9, 10, 65535, 65536, 10**6, 2**31, 70 * 10**9):
        for share, want in ((1.0, n), (0.5, n // 2), (0.3, n * 3 // 10)):
            high, low = part_of((np.int32(n >> 16), np.int32(n & 0xFFFF)), share)
            got = (int(high) << 16) + int(low)
            assert abs(got - want) <= n >> 32 if share == 0.3 else got == want


def test_float64_stays_float64(tmp_path):
    names = ("ram", "ramplus", "magmax", "nearswap", "karcher", "multislerp", "della")
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        base = {"w": rng.standard_normal((8, 16))}
        models = [{"w": base["w"] + 1e-2 * rng.standard_normal((8, 16))}] * 2
        for name in names:
            method = merging.METHODS[name]()
            out = merged(method, base, models[: method.models])
            assert out["w"].dtype == np.float64
            got = stream(tmp_path / name, method, base, models[: method.models])
            assert got["w"].dtype == np.float64
            np.testing.assert_allclose(got["w"], out["w"], rtol=1e-13)


def test_breadcrumbs_that_keep_nothing_of_a_small_tensor():
    """int(density n) = 0: one entry stays, or none as in mergekit."""
    base = {"w": np.zeros(4, np.float32)}
    model = {"w": np.array([1, 2, 3, 4], np.float32)}
    for at_least in (0, 1):
        method = merging.breadcrumbs(density=0.2, gamma=0.0, at_least=at_least)
        out = merged(method, base, [model])["w"]
        np.testing.assert_array_equal(out, [0, 0, 0, 4 * at_least])

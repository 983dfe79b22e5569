"""What results may depend on: the numbers, and nothing of how they are computed."""

import itertools
import math
import os
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import pytest

from multitask_jax import checkpoints, merging, sharding, tree
from multitask_jax.merging import streaming
from multitask_jax.merging.exact import ExactSum
from multitask_jax.merging.plan import plan_merge
from multitask_jax.merging.streaming import Stream
from multitask_jax.merging.totals import SumTotal
from tests.merging.common import assert_same_bits, make_models, save, stream

pytestmark = pytest.mark.optimised

# -- the order of threads --------------------------------------------------------------


@pytest.mark.parametrize(
    ("terms", "want"),
    [
        ([1e16, 1.0, -1e16], 1.0),
        ([1.0, 1e300, 1e-300, -1e300, -1.0], 1e-300),
        ([5e-324, 1.0, -1.0], 5e-324),
        ([1e308, 1e308, -1e308, -1e308], 0.0),
        ([0.1] * 10, 1.0),
        ([math.inf, 1.0, -1.0], math.inf),
        ([math.inf, -math.inf, 1.0], math.nan),
        ([math.inf, math.nan], math.nan),
        ([-1e308, -1e308, 1.0], -math.inf),
    ],
)
def test_sums_do_not_depend_on_order(terms, want):
    orders = itertools.islice(itertools.permutations(terms), 200)
    sums = {repr(float(ExactSum(order))) for order in orders}
    assert sums == {repr(want)}


def test_totals_do_not_depend_on_which_thread_is_first():
    chunks = [1e16, 1.0, -1e16, 3.0]
    results = set()
    for order in itertools.permutations(chunks):
        total = SumTotal(lambda c: (c, 2 * c), "sum", np.dtype(np.float64))
        for c in order:
            total.add(c)
        results.add(total.result())
    assert results == {(4.0, 8.0)}


class Unsteady:
    """A reader that takes its time, so that chunks end in another order every time."""

    def __init__(self, reader, rng):
        self._reader, self._rng = reader, rng
        self.path, self.format = reader.path, reader.format
        self.tensors, self.aliases = reader.tensors, reader.aliases

    def read(self, name, start=0, stop=None):
        time.sleep(self._rng.random() * 2e-3)
        return self._reader.read(name, start, stop)


class Collected:
    """A writer into memory."""

    def __init__(self, plan):
        self.arrays = {t.name: np.zeros(t.size, t.dtype) for t in plan.outputs}

    def write(self, name, start, flat):
        self.arrays[name][start : start + len(flat)] = flat


STATISTICAL = {
    "slerp": (merging.slerp(t=0.3), 2),
    "model_stock": (merging.model_stock(), 3),
    "dare l1": (merging.dare(density=0.3, rescale="l1"), 3),
    "sce": (merging.sce(topk=0.4), 3),
    "norm rule": (merging.with_lines(merging.linear(), alpha="norm", beta=0.5), 3),
}


@pytest.mark.parametrize("name", STATISTICAL)
def test_threads_do_not_change_a_bit(tmp_path, monkeypatch, name):
    method, count = STATISTICAL[name]
    monkeypatch.setattr(streaming, "CHUNK", 1 << 12)  # so that there are many
    rng = np.random.default_rng(0)
    base = {f"block_{i}/w": rng.standard_normal((60, 500)) for i in range(2)}
    # Of all sizes: sums whose rounding depends on the order.
    models = [
        {k: x + rng.standard_normal(x.shape) ** 9 for k, x in base.items()}
        for _ in range(count)
    ]
    base, models = jax.tree.map(lambda x: x.astype(np.float32), (base, models))
    readers = [checkpoints.open(save(tmp_path / "b", base))]
    readers += [
        checkpoints.open(save(tmp_path / f"m{t}", m)) for t, m in enumerate(models)
    ]
    plan = plan_merge(method, readers[0], readers[1:])
    programs, first = None, None
    for threads in (1, 2, 7, 7):
        unsteady = [Unsteady(r, np.random.default_rng(threads)) for r in readers]
        run = Stream(
            method, plan, unsteady, (1.0,) * count, programs=programs, threads=threads
        )
        programs = run.programs
        out = Collected(plan)
        run.run(out)
        first = first or out.arrays
        for path, x in out.arrays.items():
            assert x.tobytes() == first[path].tobytes(), (threads, path)


def test_cores_do_not_change_a_bit_of_a_sum():
    """XLA's own reductions, and dot products, depend on how many cores share them."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    script = """
import os, sys
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[: int(sys.argv[1])])
import jax, numpy as np
from multitask_jax.merging.statistics import chunk_sum
f = jax.jit(lambda x: chunk_sum(abs(x) - x * x))
for n in (1 << 16, 70_001):
    x = np.random.default_rng(0).standard_normal(n).astype(np.float32) ** 3
    print(np.float32(f(x)).tobytes().hex())
"""
    run = [
        subprocess.run(
            [sys.executable, "-c", script, n],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for n in ("1", "99")
    ]
    assert run[0] == run[1]
    assert len(run[0].split()) == 2


def test_sums_of_chunks_are_near_the_exact_sum():
    for n in (1, 511, 512, 513, 4097, 1 << 18):
        x = np.random.default_rng(n).standard_normal(n).astype(np.float32)
        got = float(merging.statistics.chunk_sum(jax.numpy.asarray(x)))
        assert abs(got - math.fsum(x)) <= 1e-6 * np.abs(x).sum(), n


# -- bfloat16 against float32 ----------------------------------------------------------

ELEMENTWISE = {
    "task_arithmetic": merging.task_arithmetic(scale=0.4),
    "ties": merging.ties(density=0.3),
    "dare": merging.dare(density=0.3, seed=3),
    "breadcrumbs": merging.breadcrumbs(density=0.5, gamma=0.05),
}
U = 2.0**-8  # half a unit in the last place of bfloat16, relative


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_bfloat16_is_one_rounding_from_float32(name):
    """Stored in bfloat16, a merge is the float32 merge of the same inputs, rounded."""
    base, models = make_models(3, ml_dtypes.bfloat16, rows=20, blocks=0)
    wide = jax.tree.map(lambda x: x.astype(np.float32), (base, models))
    merge = jax.jit(lambda b, m: merging.merge(ELEMENTWISE[name], b, m))
    narrow, whole = tree.flatten(merge(base, models)), tree.flatten(merge(*wide))
    largest = 0.0
    for path, x in whole.items():
        x = np.asarray(x)
        assert narrow[path].dtype == ml_dtypes.bfloat16
        got = np.asarray(narrow[path]).astype(np.float32)
        # To nearest, ties to even: so at most half a unit in the last place away.
        np.testing.assert_array_equal(got, x.astype(ml_dtypes.bfloat16).astype("f4"))
        off, size = np.abs(got - x), np.abs(x)
        assert (off <= U * size + 2.0**-126).all()
        largest = max(largest, (off / np.maximum(size, 1e-30)).max(initial=0))
    assert largest > U / 2  # the bound is not idle


def test_bfloat16_copies_of_float32_models():
    """|M' - M| <= u (|1 - lambda sum w| |theta_0| + |lambda| sum |w_t theta_t| + |M'|).

    M of models in float32, M' of their bfloat16 copies, where both keep the same
    entries. Where they do not, |tau| is as near to a threshold as rounding moves both.
    """
    base, models = make_models(3, rows=40, blocks=0)
    base, models = base["embed"], [m["embed"] for m in models]
    copies = [x.astype(ml_dtypes.bfloat16) for x in (base, *models)]
    scale, density = 0.7, 0.3
    for method in (
        merging.task_arithmetic(scale=scale),
        merging.magnitude_prune(density=density, scale=scale),
    ):
        whole = np.asarray(merging.merge(method, base, models), np.float64)
        narrow = merging.merge(method, copies[0], copies[1:])
        narrow = np.asarray(narrow).astype(np.float64)
        bound = abs(1 - 3 * scale) * np.abs(base) + np.abs(narrow)
        bound = U * (bound + scale * sum(map(np.abs, models)))
        agree = np.ones(base.shape, bool)
        if method.transforms[0].trims:
            # Kept models leave theta_0 as well as theta_t to be rounded.
            bound = U * (np.abs(base) + np.abs(narrow))
            bound = bound + U * scale * sum(np.abs(m) + np.abs(base) for m in models)
            for m, copy in zip(models, copies[1:], strict=True):
                kept = _kept(base, m, density)
                other = _kept(copies[0].astype("f4"), copy.astype("f4"), density)
                differ = kept[0] != other[0]
                agree &= ~differ
                near = U * (np.abs(m) + np.abs(base)) + abs(kept[1] - other[1])
                size = np.abs(m - base)
                assert (np.abs(size - kept[1]) <= near)[differ].all()
                assert 0 < differ.mean() < 0.05
        assert (np.abs(narrow - whole) <= bound + 1e-6)[agree].all()


def _kept(base, model, density):
    """Which entries are among the largest changes, and the smallest of them."""
    size = np.abs(model - base)
    threshold = np.sort(size, axis=None)[-max(1, int(size.size * density))]
    return size >= threshold, threshold


# -- values that methods trip over -----------------------------------------------------


def adversarial():
    """A base and three models whose every leaf is a trap, in rows for 8 devices."""
    rng = np.random.default_rng(0)
    shape = (3, 32, 8)
    signs = np.where(rng.random(shape) < 0.5, -1, 1).astype(np.float32)
    few = rng.choice(np.float32([0, 0.25, -0.25, 0.5, -0.5, 1]), shape)
    cancel = np.stack([few[0], -few[0], few[2] * 0])
    denormal = signs * np.float32(2.0**-126) * rng.random(shape, np.float32)
    zero, one = np.zeros(shape[1:], np.float32), np.ones(shape[1:], np.float32)
    base = {
        "equal": one,
        "ties": np.concatenate([np.float32(rng.integers(-4, 4, (32, 8))), one]),
        "huge": zero,
        "small": np.concatenate([zero, np.copysign(zero, signs[0]), one]),
    }
    deltas = {
        "equal": signs * np.float32(0.125),
        "ties": np.concatenate([few, cancel], axis=1),
        "huge": signs * np.float32(5e37),
        "small": np.concatenate([denormal, 0 * signs, 0 * signs], axis=1),
    }
    models = [{k: base[k] + d[t] for k, d in deltas.items()} for t in range(3)]
    models[0]["small"][32:64] = -base["small"][32:64]  # -0 for +0 and the reverse
    return base, models


TRAPPED = {
    "task_arithmetic": merging.task_arithmetic(scale=0.5),
    "ties model": merging.ties(density=0.4, scale=0.5),
    "ties tensor": merging.ties(density=0.4, trim_scope="tensor", scale=0.5),
    "dare": merging.dare(density=0.5, scale=0.25, seed=1),
    "magnitude_prune": merging.magnitude_prune(density=0.4, scale=0.5),
    "breadcrumbs": merging.breadcrumbs(density=0.5, gamma=0.1, scale=0.5),
}


@pytest.mark.parametrize("name", TRAPPED)
def test_adversarial_values(tmp_path, name):
    """Eager, jitted, streamed and sharded over 8 devices: the same bits, all finite."""
    base, models = adversarial()

    def merge(b, m):
        return merging.merge(TRAPPED[name], b, m)

    jitted = jax.jit(merge)(base, models)
    for path, x in jitted.items():
        assert np.isfinite(x).all(), path
    assert_same_bits(jitted, merge(base, models))
    assert_same_bits(jitted, stream(tmp_path, TRAPPED[name], base, models))
    mesh = sharding.make_mesh({"model": 8})
    shardings = sharding.tree_shardings(base, mesh)
    assert not any(s.is_fully_replicated for s in shardings.values())
    on_mesh = jax.jit(
        merge, in_shardings=(shardings, [shardings] * 3), out_shardings=shardings
    )(base, models)
    assert_same_bits(jitted, on_mesh)
    _check_traps(name, base, models, {k: np.asarray(v) for k, v in jitted.items()})


def _check_traps(name, base, models, out):
    """What must come out, whatever the bits."""
    taus = {k: np.stack([m[k] - base[k] for m in models]) for k in base}
    # XLA flushes subnormal float32 to zero on a CPU, in every way to compute; what did
    # not change stays.
    np.testing.assert_array_equal(out["small"][:64], 0)
    np.testing.assert_array_equal(out["small"][64:], 1)
    if name == "task_arithmetic":
        half = np.float32(0.5) * taus["ties"].sum(0)
        np.testing.assert_array_equal(out["ties"], base["ties"] + half)
        np.testing.assert_array_equal(out["ties"][32:], base["ties"][32:])
    if name in ("ties tensor", "magnitude_prune", "breadcrumbs"):
        # All magnitudes tie with the threshold: every entry is kept.
        total = taus["equal"].sum(0)
        if name == "ties tensor":
            agree = np.sign(taus["equal"]) == np.sign(total)
            total = (taus["equal"] * agree).sum(0) / np.maximum(agree.sum(0), 1)
        half = np.float32(0.5) * total
        np.testing.assert_array_equal(out["equal"], base["equal"] + half)


@pytest.mark.parametrize("shape", [(7,), (21,), (3, 5), (2, 9), (4, 3, 7)])
def test_counts_of_enormous_leaves_are_cut_before_they_overflow(shape):
    """As if an int32 held numbers below 8."""
    parts = merging.statistics._partial_counts(np.ones(shape, bool), most=8)
    assert max(map(int, parts)) < 8
    assert sum(map(int, parts)) == np.prod(shape)

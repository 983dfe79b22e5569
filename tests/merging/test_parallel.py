"""Tensors that are merged whole: small ones side by side, large ones alone."""

import threading

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from threadpoolctl import threadpool_info

from multitask_jax import merging
from multitask_jax.merging import parallel, plan
from tests.merging.common import merged

SHAPES = {"a": (4, 6), "b": (5, 5), "large": (12, 9), "c": (6, 4), "d": (3,)}


def blas_threads():
    import scipy.linalg  # noqa: F401

    return {p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"}


def test_large_items_never_meet_others():
    running, seen, lock = set(), [], threading.Lock()
    meeting = threading.Barrier(2, timeout=30)

    def work(i):
        with lock:
            running.add(i)
            seen.append((i, frozenset(running), blas_threads()))
        if i < 10:
            meeting.wait()  # small ones come in twos
        with lock:
            running.discard(i)

    parallel.large_alone(work, [0, 30, 1, 2, 40, 3], 2, lambda i: i > 10)
    assert [i for i, *_ in seen][:2] == [30, 40]
    assert sorted(i for i, *_ in seen) == [0, 1, 2, 3, 30, 40]
    for i, beside, blas in seen:
        assert i < 10 or beside == {i}
        assert i > 10 or blas == {1}


@pytest.mark.parametrize("bad", [0, 30])
def test_an_error_in_either_part_stops_and_lifts_the_limit(bad):
    before, done = blas_threads(), []

    def work(i):
        if i == bad:
            raise OSError("disk full")
        done.append(i)

    with pytest.raises(OSError, match="disk full"):
        parallel.large_alone(work, [30, 0, 1], 1, lambda i: i > 10)
    assert 1 not in done
    assert blas_threads() == before


def test_the_limit_is_lifted_by_the_last_to_leave():
    before = blas_threads()
    first, second = parallel.one_blas_thread(), parallel.one_blas_thread()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert blas_threads() == {1}
    second.__exit__(None, None, None)
    assert blas_threads() == before


@pytest.mark.parametrize("method", ["iso_c", "tsv_m", "knots"])
def test_merges_from_disk_do_not_depend_on_threads(tmp_path, monkeypatch, method):
    monkeypatch.setattr(plan, "_LARGE", 40)
    rng = np.random.default_rng(0)
    base, *models = (
        {k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}
        for _ in range(4)
    )
    for name, x in zip("0123", (base, *models), strict=True):
        save_file(x, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{n}.safetensors" for n in "0123"]
    found = []
    for threads in (1, 3):
        out = tmp_path / f"out{threads}"
        merging.merge_checkpoints(
            getattr(merging, method)(), paths[0], paths[1:], out,
            threads=threads, progress=False,
        )  # fmt: skip
        found.append(load_file(out / "model.safetensors"))
    expected = jax.device_get(merged(getattr(merging, method)(), base, models))
    for name in SHAPES:
        assert found[0][name].tobytes() == found[1][name].tobytes()
        np.testing.assert_allclose(found[0][name], expected[name], rtol=1e-4, atol=1e-4)

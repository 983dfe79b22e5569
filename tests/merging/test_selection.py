import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from multitask_jax.merging import selection, statistics
from multitask_jax.merging.selection import LARGEST, Bracket, Selection, keys_of

# Few sizes: JAX compiles for each.
values = hnp.arrays(
    np.float32,
    st.sampled_from([1, 2, 3, 10, 37, 60]),
    elements=st.floats(-4, 4, width=32, allow_subnormal=False)
    | st.sampled_from([0.0, -0.0, 1.5, 3e38]),
)


chunk_sum = jax.jit(statistics.chunk_sum)


@jax.jit
def kth_magnitude(parts, k):
    (found,) = statistics.kth_magnitudes([parts], [k])
    return found


@given(values, st.data())
def test_kth_magnitude_as_sorted(x, data):
    k = data.draw(st.integers(1, len(x)))
    want = np.sort(np.abs(x))[len(x) - k]
    halves = [x[: len(x) // 2], x[len(x) // 2 :]]
    assert selection.kth_largest(halves, k) == want
    assert kth_magnitude(halves, statistics.split(k)) == want


def test_ranks_that_are_known_when_traced():
    x = np.float32([0.5, -3.0, 0.0, 2.0, -2.0])
    groups, ks = [[x[:2], x[2:]], [x], []], [2, 5, 1]
    assert list(statistics.kth_magnitudes(groups, ks)) == [2.0, 0.0, 0.0]


def run(x: np.ndarray, k: int, start: Bracket | None, step: int) -> tuple[int, int]:
    """The key, and how many passes it took."""
    keys = keys_of(x)
    chosen = Selection(k, start)
    for passes in range(1, 9):
        for i in range(0, len(keys), step):
            chosen.add(keys[i : i + step])
        found = chosen.result()
        if found is not None:
            return found, passes
    raise AssertionError("no end")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["normal", "sparse", "rounded", "wide"])
def test_any_bracket_finds_the_same_key_in_bounded_memory(kind, seed, monkeypatch):
    monkeypatch.setattr(selection, "_LIMIT", 500)
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 20000))
    x = rng.standard_normal(n).astype(np.float32)
    if kind == "sparse":
        x[rng.random(n) < 0.9] = 0
    elif kind == "rounded":
        x = np.round(2 * x)
    elif kind == "wide":
        x = x * (10.0 ** rng.integers(-30, 30, n)).astype(np.float32)
    k = int(rng.integers(1, n + 1))
    want = int(np.sort(keys_of(x))[n - k])
    centre = int(keys_of(x)[rng.integers(n)])
    width = int(rng.integers(0, 1 << 20))
    around = Bracket(max(0, centre - width), min(LARGEST, centre + width), centre)
    for start in (None, Bracket(), around, Bracket(LARGEST, LARGEST, LARGEST)):
        found, passes = run(x, k, start, 777)
        assert found == want
        assert passes <= 4


def test_a_good_bracket_needs_one_pass_and_few_keys():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(1 << 20).astype(np.float32)
    sample = keys_of(x[:: 1 << 4]).reshape(-1, 64)
    start = selection.bracket(sample, 0.2)
    k = int(0.2 * len(x)) + 1
    chosen = Selection(k, start)
    chosen.add(keys_of(x))
    assert sum(map(len, chosen._inside)) < len(x) // 10
    assert chosen.result() == int(np.sort(keys_of(x))[len(x) - k])


def test_rank_out_of_range():
    with pytest.raises(ValueError, match="got k = 0"):
        Selection(0)
    with pytest.raises(ValueError, match=r"got k = 4, expected 1\.\.3"):
        statistics.kth_magnitudes([[jnp.ones(3)]], [4])


def test_counts_beyond_int32():
    high, low = statistics.split(5 * 10**9)
    assert high * 2**16 + low == 5 * 10**9
    assert bool(statistics.at_least((2, 0), (1, 65535)))
    assert not bool(statistics.at_least((1, 65534), (1, 65535)))
    ones = jax.ShapeDtypeStruct((1 << 18, 1 << 15), jnp.bool_)  # 2**33 entries
    shape = jax.eval_shape(lambda x: statistics.count([x]), ones)
    assert all(s.dtype == jnp.int32 for s in shape)
    high, low = statistics.count([jnp.ones((300, 700), bool)] * 2)
    assert int(high) * 2**16 + int(low) == 420000
    assert int(low) < 2**16


@given(
    hnp.arrays(
        np.float32,
        st.sampled_from([0, 1, 7, 511, 512, 513, 3000]),
        elements=st.floats(-1, 1, width=32),
    )
)
def test_chunk_sum(x):
    np.testing.assert_allclose(chunk_sum(x), x.astype(np.float64).sum(), atol=1e-3)


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 20)),
        elements=st.sampled_from([0.0, -0.0, 1e-40, 0.5, -0.5, 1.5, 3e38]),
    )
)
def test_row_ranks_as_a_stable_argsort(x):
    sizes = np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, np.abs(x))
    want = np.argsort(np.argsort(sizes, axis=-1, kind="stable"), axis=-1)
    got = selection.row_ranks(x)
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got, want)


def test_row_ranks_of_long_rows():
    x = np.random.default_rng(0).standard_normal((1, (1 << 16) + 5), np.float32)
    got = selection.row_ranks(x)
    assert got.dtype == np.uint32
    order = np.argsort(np.abs(x[0]), kind="stable")
    np.testing.assert_array_equal(got[0][order], np.arange(x.size))


@pytest.mark.parametrize("columns", [256, 700, 1 << 12])
def test_row_ranks_of_16_bit_models(columns):
    # 32 bits hold few enough bits of these that they alone misplace some.
    rng = np.random.default_rng(0)
    base = rng.standard_normal((64, columns), np.float32) * np.float32(0.01)
    model = base + rng.standard_normal(base.shape, np.float32) * np.float32(0.001)
    stored = [x.astype(ml_dtypes.bfloat16).astype(np.float32) for x in (base, model)]
    x = stored[1] - stored[0]
    x[:, :2] = x[:, 2:4] * np.float32(1 + 2**-23)  # equal but for the last bits
    want = np.argsort(np.argsort(np.abs(x), kind="stable"), kind="stable")
    np.testing.assert_array_equal(selection.row_ranks(x), want)


def test_row_ranks_in_32_bits_sort_few_rows_again(monkeypatch):
    # All entries of 8 bits: no row of 64 is sorted by integers of 64 bits.
    again = []
    order = selection._order
    monkeypatch.setattr(
        selection, "_order", lambda keys: again.append(len(keys)) or order(keys)
    )
    x = np.random.default_rng(0).standard_normal((64, 1024), np.float32)
    selection.row_ranks(x.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert again == [0]
    selection.row_ranks(x)  # float32: all at once
    assert again == [0, 64]

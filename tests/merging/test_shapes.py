"""Any shapes and dtypes: streamed as in memory, and each leaf as on its own."""

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from multitask_jax import merging
from tests.merging.common import assert_same_bits, load, save

pytestmark = pytest.mark.optimised

dtypes = st.sampled_from(
    [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.bool_, np.uint8]
)
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)


@st.composite
def models(draw, count):
    """Models of the same names, shapes and dtypes, with one float leaf at least."""
    layout = draw(
        st.dictionaries(
            st.text("ab.", min_size=1, max_size=4),
            st.tuples(shapes, dtypes),
            max_size=4,
        )
    )
    layout["w"] = ((3, 2), np.float32)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))

    def value(shape, dtype):
        # Few different values: sums that cancel and magnitudes that tie are common.
        return np.asarray(rng.integers(-3, 4, shape) / 2).astype(dtype)

    return [{k: value(*v) for k, v in layout.items()} for _ in range(count)]


METHODS = {
    "ties": merging.ties(density=0.4),
    "ties tensor": merging.ties(density=0.4, trim_scope="tensor"),
    "dare_ties": merging.dare_ties(density=0.6),
    "linear": merging.linear(),
    "task_arithmetic": merging.task_arithmetic(scale=0.3),
}


@pytest.mark.parametrize("name", sorted(METHODS))
@settings(max_examples=12)
@given(data=st.data())
def test_streamed_as_in_memory(tmp_path_factory, name, data):
    base, *others = data.draw(models(3))
    folder = tmp_path_factory.mktemp("any")
    paths = [save(folder / f"{i}", m) for i, m in enumerate([base, *others])]
    merging.merge_checkpoints(
        METHODS[name],
        paths[0],
        paths[1:],
        folder / "out",
        report_files=False,
        progress=False,
    )
    out = load(folder / "out")
    floats = {k for k, v in base.items() if v.dtype.kind in "fV"}
    want = jax.jit(lambda b, m: merging.merge(METHODS[name], b, m))(
        {k: base[k] for k in floats}, [{k: m[k] for k in floats} for m in others]
    )
    assert_same_bits({k: out[k] for k in floats}, want)
    for k in base.keys() - floats:  # integers never pass through JAX
        np.testing.assert_array_equal(out[k], base[k])
        assert out[k].dtype == base[k].dtype


@given(
    hnp.arrays(
        np.float32,
        st.sampled_from([1, 2, 9, 40]),  # JAX compiles for each size
        elements=st.floats(-2, 2, width=16),
    ),
    st.floats(0.01, 1),
)
@settings(max_examples=50)
def test_trim_keeps_what_the_paper_says(x, density):
    base = {"w": np.zeros_like(x)}
    method = merging.chain(merging.trim(density=density))
    out = np.asarray(merging.merge(method, base, [{"w": x}])["w"])
    d = len(x)
    threshold = np.sort(np.abs(x))[d - min(d, int(d * density) + 1)]
    np.testing.assert_array_equal(out, np.where(np.abs(x) >= threshold, x, 0))

import numpy as np
import pytest

from multitask_jax.masked import modalities as mods
from tests.masked.common import LENGTHS, MODALITIES


def random_tokens(rng, count=3):
    return {
        m.name: rng.integers(0, m.vocabulary, (count, *m.grid)).astype(np.int32)
        for m in MODALITIES
    }


def test_ids_are_of_their_own_modality_and_come_back():
    tokens = random_tokens(np.random.default_rng(0))
    ids, present = mods.flatten(MODALITIES, tokens)
    assert ids.shape == (3, sum(LENGTHS))
    assert present.all()
    np.testing.assert_array_equal(
        mods.modality_of_id(MODALITIES)[ids],
        np.tile(mods.modality_of(MODALITIES), (3, 1)),
    )
    for name, codes in mods.unflatten(MODALITIES, ids).items():
        np.testing.assert_array_equal(codes, tokens[name])


def test_what_is_missing_is_marked():
    tokens = random_tokens(np.random.default_rng(0))
    del tokens["depth"]
    ids, present = mods.flatten(MODALITIES, tokens)
    np.testing.assert_array_equal(present, [[True, False, True, True]] * 3)
    assert (mods.modality_of_id(MODALITIES)[ids[:, 24:36]] == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sound": np.zeros((3, 2))}, "sound.*expected some of rgb, depth"),
        ({"gaze": np.zeros((3, 5), int)}, r"gaze: got shape \(3, 5\), expected \(3, 4"),
        ({"gaze": np.full((3, 4), 3)}, "gaze: got codes from 3 to 3, expected 0 to 2"),
        ({"gaze": np.zeros((2, 4), int)}, "gaze"),
    ],
)
def test_tokens_that_do_not_fit_are_told(change, message):
    tokens = random_tokens(np.random.default_rng(0)) | change
    with pytest.raises(ValueError, match=message):
        mods.flatten(MODALITIES, tokens)
    with pytest.raises(ValueError, match="no tokens"):
        mods.flatten(MODALITIES, {})


def test_sin_cos_positions():
    table = mods.sin_cos(np.arange(50), 16)
    np.testing.assert_allclose((table**2).sum(1), 8, rtol=1e-6)  # sin^2 + cos^2
    # The product of two places depends on their distance alone.
    product = table @ table.T
    np.testing.assert_allclose(np.diag(product, 7), product[0, 7], rtol=1e-5)
    with pytest.raises(ValueError, match="even"):
        mods.sin_cos(np.arange(3), 5)


def test_waves_that_fit_a_span_tell_neighbours_apart():
    """As cosines of their vectors do: .98 by waves up to 10,000 places long."""
    fits, long = mods.sin_cos(np.arange(8), 42, 8), mods.sin_cos(np.arange(8), 42)
    for table, least, most in ((fits, 0.0, 0.6), (long, 0.9, 1.0)):
        np.testing.assert_allclose((table**2).sum(1), 21, rtol=1e-6)
        alike = (table @ table.T / 21)[~np.eye(8, dtype=bool)].max()
        assert least < alike < most
    # The fastest wave turns its sign at every place, the slowest one over the span.
    np.testing.assert_allclose(fits[:, 21], (-1.0) ** np.arange(8), atol=1e-6)
    np.testing.assert_allclose(fits[:, -1], np.cos(np.pi * np.arange(8) / 8), atol=1e-6)


def test_every_place_of_a_grid_differs_and_axes_have_features_of_their_own():
    table = mods.position_table(MODALITIES, 20)
    assert table.shape == (sum(LENGTHS), 20)
    rgb = table[:24].reshape(2, 3, 4, 20)
    assert len(np.unique(rgb.reshape(24, 20), axis=0)) == 24
    np.testing.assert_array_equal(rgb[0, 0, 0, :8], rgb[0, 2, 3, :8])  # time alone
    np.testing.assert_array_equal(rgb[0, 1, 0, 8:14], rgb[1, 1, 3, 8:14])  # height
    np.testing.assert_array_equal(rgb[0, 0, 2, 14:], rgb[1, 2, 2, 14:])  # width


def test_what_happens_at_once_is_alike_in_all_modalities():
    """A trajectory's place is nearest to the frames of its moment, wherever in them."""
    modalities = (mods.Modality("rgb", (4, 3, 3), 9), mods.Modality("gaze", (8,), 9))
    table = mods.position_table(modalities, 24)
    rgb, gaze = table[:36].reshape(4, 9, 24), table[36:]
    alike = np.einsum("td,fsd->tfs", gaze, rgb)
    np.testing.assert_allclose(alike, np.broadcast_to(alike[..., :1], alike.shape))
    np.testing.assert_array_equal(
        alike[..., 0].argmax(axis=1), [0, 0, 1, 1, 2, 2, 3, 3]
    )
    np.testing.assert_array_equal(gaze[:, 8:], 0)


def test_positions_are_those_of_the_named_in_their_order():
    names = [m.name for m in MODALITIES]
    of = mods.modality_of(MODALITIES)
    every = mods.positions(MODALITIES, names)
    np.testing.assert_array_equal(every, np.arange(len(of)))
    some = mods.positions(MODALITIES, [names[2], names[0]])
    expected = [np.flatnonzero(of == 2), np.flatnonzero(of == 0)]
    np.testing.assert_array_equal(some, np.concatenate(expected))
    assert mods.positions(MODALITIES, []).shape == (0,)
    with pytest.raises(ValueError, match="each once"):
        mods.positions(MODALITIES, [names[0]] * 2)

"""Tokens in batches of like length: every row once, padded with nothing in the mask."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from multitask_jax.data import tokens


def made(lengths, sentences=1):
    return tokens.Encoded(
        [
            tuple(np.arange(1, n + 1, dtype=np.int32) + s for s in range(sentences))
            for n in lengths
        ]
    )


@hypothesis.given(
    st.lists(st.integers(1, 130), min_size=1, max_size=40), st.integers(1, 9)
)
def test_in_order_has_every_row_once(lengths, size):
    encoded = made(lengths)
    batches = tokens.in_order(encoded, size)
    rows = np.concatenate([b.rows for b in batches])
    np.testing.assert_array_equal(np.sort(rows[rows >= 0]), np.arange(len(lengths)))
    for batch in batches:
        assert batch.ids.shape == (size, 1, batch.ids.shape[-1])
        assert batch.ids.shape[-1] in tokens.BUCKETS
        for row, ids, mask in zip(*batch, strict=True):
            count = lengths[row] if row >= 0 else 0
            assert mask.sum() == count
            np.testing.assert_array_equal(ids[0, :count], np.arange(1, count + 1))
            assert not ids[0, count:].any()


@hypothesis.given(st.permutations(range(11)), st.integers(1, 9))
def test_values_come_back_in_the_order_of_rows(lengths, size):
    batches = tokens.in_order(made([n + 1 for n in lengths]), size)
    sums = [b.mask.sum(axis=(1, 2)) for b in batches]
    np.testing.assert_array_equal(tokens.by_row(batches, sums), np.add(lengths, 1))


def test_buckets_keep_the_number_of_shapes_small():
    lengths = list(range(1, 200))
    shapes = {b.ids.shape for b in tokens.in_order(made(lengths), 8)}
    assert len(shapes) <= sum(b <= 256 for b in tokens.BUCKETS)
    padded = tokens.pad(made([5, 20]), np.array([0, 1]), buckets=(32,))
    assert padded.ids.shape == (2, 1, 32)
    # Longer than all buckets: as long as it is, never cut.
    assert tokens.pad(made([40]), np.array([0]), buckets=(32,)).ids.shape[-1] == 40


def test_pairs_share_a_length():
    batch = tokens.pad(
        tokens.Encoded([(np.ones(3, np.int32), np.ones(30, np.int32))]), np.array([0])
    )
    assert batch.ids.shape == (1, 2, 32)
    np.testing.assert_array_equal(batch.mask.sum(-1), [[3, 30]])


@hypothesis.given(st.integers(1, 200), st.integers(1, 16), st.integers(0, 5))
def test_an_epoch_is_a_permutation(rows, size, epoch):
    lengths = np.random.default_rng(rows).integers(1, 60, rows)
    order = tokens.shuffled(lengths, size, seed=3, epoch=epoch)
    assert order.shape == (tokens.steps_an_epoch(rows, size), size)
    if rows >= size:
        assert len(np.unique(order)) == order.size
    np.testing.assert_array_equal(
        order, tokens.shuffled(lengths, size, seed=3, epoch=epoch)
    )


def test_epochs_differ_and_batches_are_of_like_length():
    lengths = np.random.default_rng(0).integers(4, 60, 512)
    first, second = (tokens.shuffled(lengths, 16, seed=0, epoch=e) for e in (0, 1))
    assert (first != second).any()
    within = np.mean(np.std(lengths[first], axis=1))
    assert within < np.std(lengths) / 3


def test_encode_needs_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: not there"):
        tokens.encode(tmp_path, [("a",)])

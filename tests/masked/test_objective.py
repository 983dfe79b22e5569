import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax.masked.modalities import first_ids, modality_of
from multitask_jax.masked.objective import cross_entropy, modality_mean
from tests.masked.common import MODALITIES

VOCABULARY = sum(m.vocabulary for m in MODALITIES)


def case():
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((3, 8, 5), np.float32)
    head = rng.standard_normal((5, VOCABULARY), np.float32)
    of = rng.integers(0, 4, (3, 8))
    sizes = np.array([m.vocabulary for m in MODALITIES])
    codes = rng.integers(0, sizes[of])
    return hidden, head, (codes + first_ids(MODALITIES)[of]).astype(np.int32), of


def test_cross_entropy_is_among_the_ids_of_the_own_modality():
    hidden, head, ids, of = case()
    found = cross_entropy(hidden, head, ids, of, MODALITIES)
    first = first_ids(MODALITIES)
    for b, o in np.ndindex(ids.shape):
        m = of[b, o]
        mine = slice(first[m], first[m] + MODALITIES[m].vocabulary)
        logits = hidden[b, o] @ head[:, mine]
        expected = np.log(np.exp(logits).sum()) - logits[ids[b, o] - first[m]]
        np.testing.assert_allclose(found[b, o], expected, rtol=1e-4)


def test_chunks_change_neither_loss_nor_gradient():
    hidden, head, ids, of = case()

    def total(head, chunk):
        return cross_entropy(hidden, head, ids, of, MODALITIES, chunk=chunk).sum()

    grad = jax.jit(jax.value_and_grad(total), static_argnums=1)
    for chunk in (2, 8):
        a, b = grad(head, None), grad(head, chunk)
        np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
        np.testing.assert_allclose(a[1], b[1], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="got 3, expected a divisor of 8"):
        total(head, 3)


def test_modalities_count_alike_and_one_without_targets_adds_nothing():
    of = modality_of(MODALITIES)
    position = jnp.array([[0, 1, 2, 24, 36], [3, 4, 25, 5, 6]])
    valid = jnp.array([[True] * 5, [True, True, True, False, False]])
    values = jnp.array([[1.0, 1, 1, 6, 9], [1, 1, 8, 100, 100]])
    mean, each = modality_mean(values, position, valid, MODALITIES)
    assert of[36] == 2
    assert {k: float(v) for k, v in each.items()} == {
        "rgb": 1, "depth": 7, "camera": 9, "gaze": 0
    }  # fmt: skip
    assert float(mean) == 17 / 4

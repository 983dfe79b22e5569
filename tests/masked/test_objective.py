import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax.masked.modalities import first_ids, modality_of
from multitask_jax.masked.objective import cross_entropy, modality_mean
from tests.masked.common import MODALITIES

# As usual: videos have one size of vocabulary, trajectories another.
PAIRS = tuple(
    m._replace(vocabulary=v) for m, v in zip(MODALITIES, (9, 9, 4, 4), strict=True)
)


def case(modalities=MODALITIES):
    rng = np.random.default_rng(0)
    sizes = np.array([m.vocabulary for m in modalities])
    hidden = rng.standard_normal((3, 8, 5), np.float32)
    head = rng.standard_normal((5, sizes.sum()), np.float32)
    of = rng.integers(0, 4, (3, 8))
    codes = rng.integers(0, sizes[of])
    return hidden, head, (codes + first_ids(modalities)[of]).astype(np.int32), of


@pytest.mark.parametrize("modalities", [MODALITIES, PAIRS])
def test_cross_entropy_is_among_the_ids_of_the_own_modality(modalities):
    hidden, head, ids, of = case(modalities)
    found = cross_entropy(hidden, head, ids, of, modalities)
    first = first_ids(modalities)
    for b, o in np.ndindex(ids.shape):
        m = of[b, o]
        mine = slice(first[m], first[m] + modalities[m].vocabulary)
        logits = hidden[b, o] @ head[:, mine]
        expected = np.log(np.exp(logits).sum()) - logits[ids[b, o] - first[m]]
        np.testing.assert_allclose(found[b, o], expected, rtol=1e-4)


@pytest.mark.parametrize("modalities", [MODALITIES, PAIRS])
def test_chunks_change_neither_loss_nor_gradient(modalities):
    hidden, head, ids, of = case(modalities)

    def total(head, hidden, chunk):
        return cross_entropy(hidden, head, ids, of, modalities, chunk=chunk).sum()

    grad = jax.jit(jax.value_and_grad(total, (0, 1)), static_argnums=2)
    whole = grad(head, hidden, None)
    for chunk in (2, 4):
        cut = grad(head, hidden, chunk)
        np.testing.assert_allclose(whole[0], cut[0], rtol=1e-6)
        for a, b in zip(whole[1], cut[1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="got 3, expected a divisor of 8"):
        total(head, hidden, 3)


def test_modalities_count_alike_and_one_without_targets_adds_nothing():
    of = modality_of(MODALITIES)
    position = jnp.array([[0, 1, 2, 24, 36], [3, 4, 25, 5, 6]])
    valid = jnp.array([[True] * 5, [True, True, True, False, False]])
    values = jnp.array([[1.0, 1, 1, 6, 9], [1, 1, 8, 100, 100]])
    mean, each = modality_mean(values, position, valid, MODALITIES)
    assert of[36] == 2
    assert np.isnan(each.pop("gaze"))  # nothing is known of it
    assert {k: float(v) for k, v in each.items()} == {"rgb": 1, "depth": 7, "camera": 9}
    assert float(mean) == 17 / 4

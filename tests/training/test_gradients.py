import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax.training import gradients


def quadratic(centre):
    """Half the squared distance to a centre: the gradient is params - centre."""
    return lambda p: sum(
        0.5 * jnp.sum((x - c) ** 2)
        for x, c in zip(jax.tree.leaves(p), jax.tree.leaves(centre), strict=True)
    )


ORIGIN = {"embed": jnp.zeros(1), "layers_0": {"w": jnp.zeros(1)}}


def at(a, b):
    return quadratic({"embed": -jnp.array([a]), "layers_0": {"w": -jnp.array([b])}})


def cosines(losses, p):
    return jax.jit(lambda p: gradients.gradient_cosines(losses, p))(p)


def test_cosines_of_quadratic_losses_by_hand():
    # Gradients (3, 4), (-4, 3), (-3, -4): orthogonal, opposite.
    found = cosines([at(3.0, 4.0), at(-4.0, 3.0), at(-3.0, -4.0)], ORIGIN)
    np.testing.assert_allclose(found.norms, [5, 5, 5])
    np.testing.assert_allclose(
        found.cosines, [[1, 0, -1], [0, 1, 0], [-1, 0, 1]], atol=1e-7
    )
    assert found.conflict == pytest.approx(1 / 3)


def test_a_cosine_between():
    found = cosines([at(1.0, 0.0), at(1.0, 1.0)], ORIGIN)
    assert found.cosines[0, 1] == pytest.approx(0.5**0.5)
    np.testing.assert_allclose(found.norms, [1, 2**0.5], rtol=1e-6)
    assert found.conflict == 0


def test_a_gradient_of_zero_agrees_with_none():
    found = cosines([at(0.0, 0.0), at(1.0, 2.0)], ORIGIN)
    np.testing.assert_allclose(found.cosines, [[0, 0], [0, 1]], atol=1e-7)
    assert found.conflict == 0


def test_groups_and_depth():
    g = gradients.task_gradients([at(1.0, 2.0), at(1.0, -2.0)], ORIGIN)
    found = jax.jit(
        lambda g: gradients.agreement_by_group(
            g, lambda paths: gradients.by_depth(paths, block_pattern="layers_{i}/")
        )
    )(g)
    assert sorted(found) == ["embed", "layers_/0"]
    assert found["embed"].cosines[0, 1] == 1
    assert found["layers_/0"].cosines[0, 1] == -1
    assert found["layers_/0"].conflict == 1
    np.testing.assert_allclose(found["layers_/0"].norms, [2, 2])
    # Squares of norms add up over groups.
    total = sum(f.norms**2 for f in found.values())
    np.testing.assert_allclose(
        total, jax.jit(gradients.agreement)(g).norms ** 2, rtol=1e-6
    )


def test_depth_by_names():
    paths = ["embed/kernel", "encoder/layers_2/mlp/w", "encoder/layers_4/mlp/w"]
    assert list(gradients.by_depth(paths).values()) == [
        "embed",
        "encoder/layers_/0",
        "encoder/layers_/1",
    ]


def test_small_numbers_in_bfloat16_and_under_jit():
    g = [jnp.full(4096, 1.0, jnp.bfloat16), jnp.full(4096, 1.0, jnp.bfloat16)]
    found = jax.jit(gradients.agreement)(g)
    assert found.norms[0] == 64  # a sum of 4096 ones stays at 256 in bfloat16
    assert found.cosines[0, 1] == 1


def test_what_is_refused():
    with pytest.raises(ValueError, match="got 1 gradients"):
        cosines([at(1.0, 1.0)], ORIGIN)
    with pytest.raises(ValueError, match="got 0 gradients"):
        gradients.agreement([])
    with pytest.raises(ValueError, match="got 2 gradients"):
        gradients.agreement([{}, {}])

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from multitask_jax import tree
from multitask_jax.models import digits_transformer as vit

SHAPE = vit.Shape(width=12, depth=3, heads=2, mlp_width=20)


@pytest.fixture(scope="module")
def pretraining() -> vit.Params:
    return vit.init_reconstruction(jax.random.key(0), SHAPE)


@pytest.fixture(scope="module")
def params(pretraining: vit.Params) -> vit.Params:
    """The encoder, with every leaf random, so that a mix-up can't go unnoticed."""
    leaves, treedef = jax.tree.flatten(pretraining["encoder"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [
        jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, drawn)


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.uniform(jax.random.key(2), (5, 8, 8))


def test_patches_are_in_row_major_order() -> None:
    image = jnp.arange(16.0).reshape(1, 4, 4)
    patches = (vit.patchify(image, 2) + 1) / 2
    np.testing.assert_array_equal(patches[0, 1], [2, 3, 6, 7])
    np.testing.assert_array_equal(patches[0, 2], [8, 9, 12, 13])


def test_features(params: vit.Params, images: jax.Array) -> None:
    x = vit.apply(params, images, shape=SHAPE)
    assert x.shape == (5, SHAPE.width)
    assert x.dtype == jnp.float32
    alone = vit.apply(params, images[3:4], shape=SHAPE)
    np.testing.assert_allclose(x[3:4], alone, rtol=1e-4, atol=1e-5)


def test_places_that_are_not_kept_are_not_seen(
    params: vit.Params, images: jax.Array
) -> None:
    patches = vit.patchify(images, 2)
    kept = jnp.tile(jnp.array([7, 2]), (5, 1))
    model = vit.DigitsTransformer(SHAPE)
    tokens = model.apply({"params": params}, patches, kept)
    assert tokens.shape == (5, 3, SHAPE.width)
    other = patches.at[:, 5].add(1.0)
    again = model.apply({"params": params}, other, kept)
    np.testing.assert_array_equal(tokens, again)
    seen = model.apply({"params": params}, patches.at[:, 7].add(1.0), kept)
    assert not np.allclose(tokens, seen)
    # Each place keeps its position embedding: in another order, the same tokens.
    swapped = model.apply({"params": params}, patches, kept[:, ::-1])
    np.testing.assert_allclose(swapped[:, 1], tokens[:, 2], rtol=1e-4, atol=1e-4)


def test_pretraining_learns(pretraining: vit.Params) -> None:
    image = jnp.linspace(0, 1, 64).reshape(1, 8, 8)
    images = jnp.concatenate([image, 1 - image, image.transpose(0, 2, 1)])
    optimiser = optax.adam(3e-3)

    @jax.jit
    def step(params, state, key):
        loss, gradient = jax.value_and_grad(vit.reconstruction_loss)(
            params, images, key, shape=SHAPE
        )
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    params, state, losses = pretraining, optimiser.init(pretraining), []
    for key in jax.random.split(jax.random.key(3), 60):
        params, state, loss = step(params, state, key)
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_round_trip_is_exact(params: vit.Params) -> None:
    there = vit.to_hugging_face(params, shape=SHAPE)
    back = vit.from_hugging_face(there, shape=SHAPE)
    jax.tree.map(np.testing.assert_array_equal, params, back)
    assert jax.tree.structure(jax.device_get(params)) == jax.tree.structure(back)
    size = sum(x.size for x in jax.tree.leaves(params))
    assert sum(x.size for x in there.values()) == size


def test_names_and_layout_are_torch(params: vit.Params) -> None:
    there = vit.to_hugging_face(params, shape=SHAPE)
    width = SHAPE.width
    assert there["embeddings.cls_token"].shape == (1, 1, width)
    assert there["embeddings.position_embeddings"].shape == (1, 17, width)
    projection = there["embeddings.patch_embeddings.projection.weight"]
    assert projection.shape == (width, 1, 2, 2)
    kernel = params["patch_embedding"]["kernel"]  # pixels of a patch, row by row
    np.testing.assert_array_equal(projection[:, 0, 1, 0], kernel[2])
    query = there["encoder.layer.1.attention.attention.query.weight"]
    np.testing.assert_array_equal(query, params["layer_1"]["query"]["kernel"].T)
    assert there["encoder.layer.2.intermediate.dense.weight"].shape == (20, width)


def test_depths_agree_here_and_there(params: vit.Params) -> None:
    """LiNeS must see the same blocks in memory and on disk."""
    count = []
    for names in (tree.flatten(params), vit.to_hugging_face(params, shape=SHAPE)):
        depths = tree.block_depths(list(names))
        indices = [-1 if d is None else d.index for d in depths.values()]
        assert {d.count for d in depths.values() if d} == {SHAPE.depth}
        count.append(np.bincount(np.array(indices) + 1).tolist())
    assert count[0] == count[1] == [6, 16, 16, 16]


def test_saves_and_loads(params: vit.Params, tmp_path: Path) -> None:
    vit.save(tmp_path / "model", params, shape=SHAPE)
    back = vit.load(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, params, back)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert stored["layernorm.weight"].shape == (SHAPE.width,)
    with pytest.raises(FileExistsError):
        vit.save(tmp_path / "model", params, shape=SHAPE)


def test_config_round_trip() -> None:
    config = vit.config_json(SHAPE)
    assert config["hidden_size"] % config["num_attention_heads"] == 0
    assert vit.shape_from_config(config) == SHAPE


def test_wrong_tensors_are_named(params: vit.Params) -> None:
    there = vit.to_hugging_face(params, shape=SHAPE)
    there["pooler.dense.bias"] = there.pop("layernorm.bias")
    with pytest.raises(ValueError, match=r"missing.*layernorm.bias.*pooler"):
        vit.from_hugging_face(there, shape=SHAPE)


def test_head_answers_with_the_nearest_class_mean() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 20)
    x = rng.normal(size=(60, 4)).astype(np.float32) + 2 * np.eye(4)[labels]
    head = vit.pad_head(vit.class_mean_head(x, labels, scale=5.0), 6)
    means = np.stack([x[labels == c].mean(0) for c in range(3)])
    nearest = np.argmin(np.sum((x[:, None] - means[None]) ** 2, axis=-1), axis=1)
    logits = x @ head.kernel + head.bias[None]
    assert logits.shape == (60, 6)
    np.testing.assert_array_equal(np.argmax(logits, axis=1), nearest)

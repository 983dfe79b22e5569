import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax.masked.tokenizers import (
    Config,
    grid,
    model,
    quantizers,
    video,
    vocabulary,
)
from tests.merging.common import BRIEFLY

SMALL = {"width": 8, "blocks": 1, "size": 16}


@functools.cache
def _dependence(temporal):
    """Which tokens change with a frame, [F, T], and which frames with a token, [T, F].

    Another clip takes the frame's place, or another encoding the token's.
    """
    config = Config("depth", temporal=temporal, **SMALL)
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (2, *model.signal_shape(config)))
    z = jax.random.normal(keys[1], (2, *grid(config), config.encoding_width))

    def changes(f, x):  # f: [B, T, ...] -> [B, F, ...]; -> [T, F]
        swapped = jnp.eye(x.shape[1], dtype=bool).reshape(-1, x.shape[1], 1, 1, 1)
        y = f(jnp.concatenate([x[:1], jnp.where(swapped, x[1:], x[:1])]))
        # More than rounding, which may differ from row to row of a batch.
        return jnp.max(jnp.abs(y[1:] - y[:1]), axis=(2, 3, 4)) > 1e-5

    def run(x, z):
        # Blocks begin as the identity; as after some training, they do not stay so.
        noise = jax.random.normal(jax.random.key(2), (64,))
        variables = jax.tree.map(
            lambda p: p + 0.3 * jnp.resize(noise, p.shape), model.init(config, keys[2])
        )
        return (
            changes(lambda x: model.encode(config, variables, x), x),
            changes(lambda z: model.decode(config, variables, z), z),
        )

    return [np.asarray(c) for c in jax.jit(run).lower(x, z).compile(BRIEFLY)(x, z)]


def test_a_token_sees_its_frames_and_earlier_ones_only():
    seen, shown = _dependence(4)
    frame, moment = np.arange(16)[:, None], np.arange(4)[None]
    later = frame > 4 * moment + 3
    assert not (seen & later).any()
    assert not (shown.T & (frame < 4 * moment)).any()
    # And does use them: its own four, and those of the token before.
    near = (frame >= 4 * (moment - 1)) & ~later
    assert seen[near].all()


def test_nothing_crosses_frames_of_the_per_frame_tokenizer():
    for depends in _dependence(1):
        np.testing.assert_array_equal(depends, np.eye(16, dtype=bool))


def test_patches_are_a_rearrangement_and_come_back():
    x = jnp.arange(2 * 8 * 16 * 8 * 3.0).reshape(2, 8, 16, 8, 3)
    patches = video.to_patches(x, 4, 4)
    assert patches.shape == (2, 2, 4, 2, 4 * 4 * 4 * 3)
    np.testing.assert_array_equal(video.from_patches(patches, 4, 4), x)
    block = x[1, 4:8, 4:8, 4:8].reshape(-1)
    np.testing.assert_array_equal(patches[1, 1, 1, 1], block)


def test_a_causal_convolution_is_laxs():
    x = jax.random.normal(jax.random.key(0), (2, 4, 5, 4, 6))
    layer = video.CausalConv(3)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 6, 3, 6))  # [.., C, taps, C']
    flat = {"kernel": kernel.reshape(3, 3, 6, 18), "bias": jnp.zeros(18)}

    def expected(x):
        # Tap i is i moments ago; lax's last is now.
        return jax.lax.conv_general_dilated(
            x,
            kernel.transpose(3, 0, 1, 2, 4)[::-1],
            (1, 1, 1),
            [(2, 0), (1, 1), (1, 1)],
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )

    np.testing.assert_allclose(
        jax.jit(layer.apply)({"params": {"conv": flat}}, x),
        jax.jit(expected)(x),
        atol=1e-4,
    )


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 16)])
def test_what_is_unknown_has_no_part_in_the_loss(shape):
    keys = jax.random.split(jax.random.key(0), 4)
    x, y, noise = (jax.random.normal(k, (*shape, 2)) for k in keys[:3])
    known = (jax.random.uniform(keys[3], (*shape, 1)) < 0.6).astype(jnp.float32)
    run = jax.jit(jax.value_and_grad(model.loss))
    value, gradient = run(y, x, known)
    other, _ = run(y + noise * (1 - known), x - 3 * noise * (1 - known), known)
    np.testing.assert_allclose(value, other, rtol=1e-6)
    assert not np.asarray(gradient * (1 - known)).any()
    nothing, gradient = run(y, x, jnp.zeros_like(known))
    assert nothing == 0
    assert not np.asarray(gradient).any()


def test_the_loss_is_the_mean_over_the_known_alone():
    x = jax.random.normal(jax.random.key(0), (1, 10, 2))
    y = jax.random.normal(jax.random.key(1), (1, 10, 2))
    known = jnp.arange(10).reshape(1, 10, 1) < 4
    np.testing.assert_allclose(
        model.loss(y, x, known.astype(jnp.float32)),
        np.mean(np.square(y - x)[:, :4]),
        rtol=1e-5,
    )


def test_the_video_loss_is_the_mean_square():
    x = jax.random.normal(jax.random.key(0), (1, 4, 8, 8, 3))
    known = jnp.ones((1, 4, 8, 8, 1))
    run = jax.jit(model.loss)
    assert run(x, x, known) == 0
    np.testing.assert_allclose(run(x + 0.5, x, known), 0.25, rtol=1e-3)


@pytest.mark.parametrize("kind", ["rgb", "depth", "camera", "gaze"])
@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
def test_shapes_of_all_kinds(kind, quantizer):
    config = Config(kind, quantizer=quantizer)
    assert grid(config) == ((4, 8, 8) if config.is_video else (8,))

    def run(key, signal):
        variables = model.init(config, key)
        encodings = model.encode(config, variables, signal)
        quantized = model.quantize(config, variables, encodings)
        again = model.values(config, variables, quantized.codes)
        return quantized, again, model.decode(config, variables, quantized.values)

    signal = jax.ShapeDtypeStruct((3, *model.signal_shape(config)), jnp.float32)
    quantized, again, y = jax.eval_shape(run, jax.random.key(0), signal)
    assert y.shape == signal.shape
    assert quantized.codes.shape == (3, *grid(config))
    assert again.shape == quantized.values.shape


def test_the_papers_trajectory_tokenizer_can_be_asked_for():
    config = Config(
        "gaze", width=768, blocks=12, heads=12, samples=60, stride=2, codes=256
    )
    assert grid(config) == (30,)
    assert vocabulary(config) == 256
    shapes = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    blocks = shapes["encoder"]["blocks"]
    kernel = blocks["block_11"]["intermediate"]["kernel"]
    assert kernel.shape == (768, 3072)
    assert shapes["codebook"].codes.shape == (256, 32)


def test_per_frame_tokens():
    assert grid(Config("rgb", temporal=1)) == (16, 8, 8)


def test_the_vocabulary_of_levels_is_their_product():
    assert vocabulary(Config("rgb", quantizer="fsq", levels=(7, 5, 5))) == 175
    assert quantizers.fsq_values(jnp.int32(174), (7, 5, 5)).shape == (3,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "sound"}, "kind: got 'sound', expected one of rgb, depth"),
        ({"kind": "rgb", "size": 60}, "size: got 60, expected a multiple of 8"),
        ({"kind": "rgb", "frames": 6}, "frames: got 6, expected a multiple of 4"),
        ({"kind": "rgb", "temporal": 2}, "temporal: got 2, expected 4 or 1"),
        ({"kind": "gaze", "samples": 9}, "samples: got 9, expected a multiple of 8"),
        ({"kind": "gaze", "width": 30}, "width: got 30, expected a multiple of 4"),
        ({"kind": "gaze", "codes": -1}, "codes: got -1, expected a positive"),
        ({"kind": "gaze", "quantizer": "pq"}, "quantizer: got 'pq', expected vq or"),
        ({"kind": "rgb", "levels": (8, 1)}, r"levels: got \(8, 1\)"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)

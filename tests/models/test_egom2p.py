import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax import sharding, training
from multitask_jax import tree as trees
from multitask_jax.masked.masks import Masks, Slots, dirichlet_masks
from multitask_jax.masked.modalities import flatten, modality_of, positions
from multitask_jax.models import egom2p, egom2p_generation
from tests.masked.common import MODALITIES
from tests.masked.test_modalities import random_tokens
from tests.merging.common import BRIEFLY

SHAPE = egom2p.Shape(width=16, heads=2, encoder_depth=2, decoder_depth=2)
INPUTS, TARGETS = 20, 16


@functools.cache
def params():
    init = functools.partial(egom2p.init, modalities=MODALITIES, shape=SHAPE)
    return jax.jit(init, compiler_options=BRIEFLY)(jax.random.key(0))


@functools.partial(jax.jit, compiler_options=BRIEFLY)
def hidden(params, ids, masks):
    return egom2p.EgoM2P(MODALITIES, SHAPE).apply({"params": params}, ids, masks)


@functools.partial(jax.jit, compiler_options=BRIEFLY)
def value_and_grad(params, ids, masks):
    loss = functools.partial(egom2p.loss, modalities=MODALITIES, shape=SHAPE)
    return jax.value_and_grad(loss, has_aux=True)(params, ids, masks)


def batch(count=4, present=(True, True, True, True)):
    ids, _ = flatten(MODALITIES, random_tokens(np.random.default_rng(0), count))
    present = jnp.array(present)
    draw = jax.vmap(
        lambda k: dirichlet_masks(
            k, present, MODALITIES, inputs=INPUTS, targets=TARGETS, alphas=(10.0,)
        )
    )
    return jnp.array(ids), jax.jit(draw)(jax.random.split(jax.random.key(1), count))


def test_targets_are_not_read_nor_anything_that_is_not_shown():
    ids, masks = batch()
    shown = np.zeros(ids.shape, bool)
    for row, (position, valid) in enumerate(zip(*masks.inputs, strict=True)):
        shown[row, np.asarray(position)[np.asarray(valid)]] = True
    first = {0: 0, 1: 11, 2: 18, 3: 23}
    blank = np.vectorize(first.get)(modality_of(MODALITIES))
    changed = jnp.where(shown, ids, jnp.asarray(blank))
    assert (changed != ids).any()
    np.testing.assert_array_equal(
        hidden(params(), ids, masks), hidden(params(), changed, masks)
    )
    other = ids.at[0].set(jnp.where(shown[0], jnp.asarray(blank), ids[0]))
    out = np.asarray(hidden(params(), other, masks) - hidden(params(), ids, masks))
    assert np.abs(out[0]).max() > 1e-6
    np.testing.assert_array_equal(out[1:], 0)  # nor other samples


@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_keys_begin_as_queries_and_nothing_else_changes(gain):
    before, after = (
        trees.flatten(p) for p in (params(), egom2p.attend_alike(params(), gain))
    )
    changed = {k for k in before if (before[k] != after[k]).any()}
    own = [f"{k}/qkv/kernel" for k in ("encoder/attention", "decoder/self_attention")]
    cross, query = (
        f"decoder/cross_attention/{k}/kernel" for k in ("key_value", "query")
    )
    assert changed == {*own, cross} | ({query} if gain != 1 else set())
    for name in own:
        old, new = (np.moveaxis(np.asarray(p[name]), 2, 0) for p in (before, after))
        np.testing.assert_array_equal(new, [gain * old[0], gain * old[0], old[2]])
    np.testing.assert_array_equal(after[query], gain * before[query])
    key, value = np.moveaxis(np.asarray(after[cross]), 2, 0)
    np.testing.assert_array_equal(key, after[query][:, :, 0])
    np.testing.assert_array_equal(value, before[cross][:, :, 1])


def test_decoder_attends_within_a_modality_and_to_all_inputs():
    """A query moves by another query of its modality, and by no other's."""
    ids, _ = batch(1)

    def slots(*positions, size):
        valid = np.arange(size) < len(positions)
        full = np.zeros(size, np.int32)
        full[: len(positions)] = positions
        return Slots(jnp.array(full[None]), jnp.array(valid[None]))

    shown = slots(3, 30, 40, size=INPUTS)  # rgb, depth, camera

    def out(*targets, inputs=shown):
        masks = Masks(inputs, slots(*targets, size=TARGETS))
        return np.asarray(hidden(params(), ids, masks))[0, : len(targets)]

    alone = out(0, 1)
    with_depth = out(0, 1, 24, 25)
    np.testing.assert_allclose(with_depth[:2], alone, atol=1e-6)
    with_rgb = out(0, 1, 2)
    assert np.abs(with_rgb[:2] - alone).max() > 1e-5
    less = out(0, 1, inputs=slots(3, 30, size=INPUTS))  # without the camera's token
    assert np.abs(less - alone).max() > 1e-5


def test_a_missing_modality_gets_no_gradient_and_no_loss():
    ids, masks = batch(present=(True, False, True, False))
    (loss, each), gradient = value_and_grad(params(), ids, masks)
    assert np.isnan(each["depth"])  # unknown, not 0
    assert np.isnan(each["gaze"])
    assert np.isfinite(loss)
    assert float(each["rgb"]) > 0
    for of in (slice(11, 18), slice(23, 26)):
        np.testing.assert_array_equal(gradient["token_embedding"][of], 0)
        np.testing.assert_array_equal(gradient["head"][:, of], 0)
    np.testing.assert_array_equal(gradient["modality_embedding"][jnp.array([1, 3])], 0)


def test_nothing_shown_is_a_context_of_zeros():
    ids, masks = batch()
    nothing = masks.inputs._replace(valid=jnp.zeros_like(masks.inputs.valid))
    a = hidden(params(), ids, Masks(nothing, masks.targets))
    b = hidden(params(), jnp.roll(ids, 1, axis=0), Masks(nothing, masks.targets))
    assert np.isfinite(a).all()
    np.testing.assert_array_equal(a, b)


def test_the_first_loss_is_that_of_guessing_and_gradients_are_finite():
    ids, masks = batch(32)
    (_, each), gradient = value_and_grad(params(), ids, masks)
    for m in MODALITIES:
        assert float(each[m.name]) == pytest.approx(np.log(m.vocabulary), rel=0.05)
    for path, g in trees.flatten(gradient).items():
        assert np.isfinite(g).all(), path
        assert np.abs(g).max() > 0, path


def test_a_step_on_a_mesh_is_that_of_one_device():
    ids, masks = batch(8)

    def loss_of(params, batch, key):
        ids, masks = batch
        return egom2p.loss(params, ids, masks, modalities=MODALITIES, shape=shape)

    shape = SHAPE._replace(loop=True, remat=True, chunk=4)
    # Vocabularies of 26 ids: the tensor axis cuts them, fsdp the width.
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    optimizer = training.adamw(1e-2, steps=10, warmup=0.0)
    rules = egom2p.sharding_rules()
    on_mesh = {"mesh": mesh, "rules": rules, "batch_axis": ("data", "fsdp")}
    out = []
    for options in ({}, on_mesh):
        step = training.make_step(loss_of, optimizer, **options)
        state = training.init_state(params(), optimizer, jax.random.key(0))
        state = step.place_state(state)
        state, metrics = step(state, (ids, masks))
        out.append((jax.device_get(state.params), jax.device_get(metrics)))
    (alone, metrics), (cut, metrics_cut) = out
    for name in metrics:
        np.testing.assert_allclose(metrics[name], metrics_cut[name], rtol=1e-4)
    # Adam's first step is a sign: compare where the gradient is no rounding.
    for path, x in trees.flatten(alone).items():
        close = np.isclose(x, trees.flatten(cut)[path], atol=1e-4)
        assert close.mean() > 0.99, path


def test_generation_is_one_call_that_its_key_repeats():
    tokens = random_tokens(np.random.default_rng(0), 3)

    def make(seed, **settings):
        return egom2p_generation.generate(
            params(),
            {"rgb": tokens["rgb"], "gaze": tokens["gaze"]},
            {"camera": 3, "depth": 2},
            modalities=MODALITIES,
            shape=SHAPE,
            key=jax.random.key(seed),
            **settings,
        )

    a, again, b = (
        make(0, temperature=1.0),
        make(0, temperature=1.0),
        make(1, temperature=1.0),
    )
    assert {k: v.shape for k, v in a.items()} == {
        "camera": (3, 6),
        "depth": (3, 2, 3, 2),
    }
    for name in a:
        np.testing.assert_array_equal(a[name], again[name])
        assert (a[name] != b[name]).any()
        assert 0 <= a[name].min() <= a[name].max() < 7
    guided = make(0, temperature=1.0, guidance=4.0)
    assert any((guided[name] != a[name]).any() for name in a)


def test_other_numbers_of_sampling_compile_nothing_anew():
    """Only whether there is a temperature, a p and a guidance makes another program."""
    tokens = random_tokens(np.random.default_rng(0), 3)

    def programs(**sampling):
        egom2p_generation.generate(
            params(), {"rgb": tokens["rgb"]}, {"camera": 2}, modalities=MODALITIES,
            shape=SHAPE, key=jax.random.key(0), **sampling,
        )  # fmt: skip
        return egom2p_generation._generate._cache_size()

    first = programs(temperature=1.0, p=0.9)
    assert programs(temperature=0.5, p=0.9) == first
    assert programs(temperature=2, p=0.1) == first
    assert programs(temperature=1.0, p=1.0) == first + 1
    assert programs(temperature=1.0, p=1.0, guidance=2.0) == first + 2
    assert programs(temperature=0.1, p=1.0, guidance=0.5) == first + 2


def test_training_learns_what_there_is_to_learn():
    """Depth is a function of RGB at its place; other clips are made right, too."""
    train, new = (random_tokens(np.random.default_rng(i), 32) for i in range(2))
    for tokens in (train, new):
        tokens["depth"] = (tokens["rgb"][:, :, :, ::2] % 7).astype(np.int32)
    ids = jnp.array(flatten(MODALITIES, train)[0])
    shape = egom2p.Shape(width=32, heads=4, encoder_depth=1, decoder_depth=1)
    steps = 100
    optimizer = training.adamw(1e-2, steps=steps)
    masks = Masks(
        Slots(jnp.tile(jnp.arange(24), (32, 1)), jnp.ones((32, 24), bool)),
        Slots(jnp.tile(jnp.arange(24, 36), (32, 1)), jnp.ones((32, 12), bool)),
    )

    def loss(params):
        return egom2p.loss(params, ids, masks, modalities=MODALITIES, shape=shape)[0]

    @jax.jit
    def step(params, state):
        value, g = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(g, state, params)
        return jax.tree.map(jnp.add, params, updates), state, value

    init = functools.partial(egom2p.init, modalities=MODALITIES, shape=shape)
    trained = egom2p.attend_alike(jax.jit(init)(jax.random.key(0)))
    trained["token_embedding"] *= 40  # as large as places
    state, losses = optimizer.init(trained), []
    for _ in range(steps):
        trained, state, value = step(trained, state)
        losses.append(value)
    assert losses[0] > 0.4  # log(7) / 4: three modalities have no targets
    assert losses[-1] < 0.05
    made = egom2p_generation.generate(
        trained,
        {"rgb": new["rgb"]},
        {"depth": 1},  # as it was trained
        modalities=MODALITIES,
        shape=shape,
        key=jax.random.key(0),
    )
    assert (made["depth"] == new["depth"]).mean() > 0.9


def test_sizes():
    assert egom2p.SHAPES["base"].hidden == 2048  # 2/3 of 4 x 768
    paper = tuple(
        m._replace(grid=grid, vocabulary=v)
        for m, grid, v in zip(
            MODALITIES, [(5, 32, 32)] * 2 + [(30,)] * 2, [64_000] * 2 + [256] * 2,
            strict=True,
        )
    )  # fmt: skip
    abstract = jax.eval_shape(
        functools.partial(egom2p.init, modalities=paper, shape=egom2p.SHAPES["base"]),
        jax.random.key(0),
    )
    count = sum(x.size for x in jax.tree.leaves(abstract))
    assert 350e6 < count < 450e6  # "about 400 M with embeddings"


def test_probabilities_are_those_that_one_step_of_generation_has():
    """Sampled in one step at a high temperature or read off: the same likeliest ids."""
    codes = random_tokens(np.random.default_rng(2), 3)
    given = {"rgb": codes["rgb"], "gaze": codes["gaze"]}
    tell = functools.partial(
        egom2p_generation.probabilities, params(), modalities=MODALITIES, shape=SHAPE
    )
    found = tell(given, ["camera", "depth"])
    sizes = {m.name: (m.grid, m.vocabulary) for m in MODALITIES}
    assert set(found) == {"camera", "depth"}
    for name, p in found.items():
        grid, vocabulary = sizes[name]
        assert p.shape == (3, *grid, vocabulary)
        np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=1e-5)
        made = egom2p_generation.generate(
            params(), given, {name: 1}, modalities=MODALITIES, shape=SHAPE,
            key=jax.random.key(0), temperature=0,
        )  # fmt: skip
        np.testing.assert_array_equal(made[name], p.argmax(axis=-1))
    # Targets are asked for in no order, and do not tell each other.
    alone = tell(given, ["depth"])
    np.testing.assert_allclose(alone["depth"], found["depth"], atol=1e-6)
    with pytest.raises(ValueError, match="each once"):
        tell(given, ["rgb"])


def test_tokens_that_say_nothing_are_not_shown():
    """Not known: their codes change nothing; known: they do."""
    codes = random_tokens(np.random.default_rng(2), 3)
    other = {k: x.copy() for k, x in codes.items()}
    other["gaze"][:, 1:] = (other["gaze"][:, 1:] + 1) % 3
    ids, _ = flatten(MODALITIES, codes)
    all_, some = np.ones(ids.shape, bool), np.ones(ids.shape, bool)
    some[:, positions(MODALITIES, ["gaze"])[1:]] = False
    settings = {"modalities": MODALITIES, "shape": SHAPE}
    loud = {**params(), "token_embedding": 50 * params()["token_embedding"]}
    loud["head"] = 50 * loud["head"]

    def believed(codes, **known):
        given = {"rgb": codes["rgb"], "gaze": codes["gaze"]}
        p = egom2p_generation.probabilities(loud, given, ["depth"], **settings, **known)
        return p["depth"]

    def sampled(codes, **known):
        return egom2p_generation.generate(
            loud, {"gaze": codes["gaze"]}, {"depth": 2}, key=jax.random.key(0),
            temperature=1.0, p=1.0, **settings, **known,
        )["depth"]  # fmt: skip

    for make in (believed, sampled):
        np.testing.assert_array_equal(make(codes), make(codes, known=all_))
        assert (make(codes) != make(other)).any()
        hidden = make(codes, known=some)
        np.testing.assert_array_equal(hidden, make(other, known=some))
        assert (hidden != make(codes)).any()
        with pytest.raises(ValueError, match=r"known: got bool\[3, 1\], expected bool"):
            make(codes, known=some[:, :1])


def test_products_in_bfloat16_change_little():
    """The paper's precision: parameters and their gradients stay in float32."""
    ids, masks = batch(8)
    (loss, _), slopes = value_and_grad(params(), ids, masks)
    shape = SHAPE._replace(dtype="bfloat16")
    coarse = functools.partial(egom2p.loss, modalities=MODALITIES, shape=shape)
    graded = jax.jit(jax.value_and_grad(coarse, has_aux=True), compiler_options=BRIEFLY)
    (found, _), rough = graded(params(), ids, masks)
    assert found.dtype == jnp.float32
    assert float(found) == pytest.approx(float(loss), rel=1e-2)
    a, b = (
        np.concatenate([np.ravel(g) for g in jax.tree.leaves(x)])
        for x in (slopes, rough)
    )
    assert b.dtype == np.float32
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from multitask_jax.masked import decoding
from multitask_jax.masked.modalities import first_ids, flatten, modality_of
from tests.masked.common import MODALITIES
from tests.masked.test_modalities import random_tokens

VOCABULARY = sum(m.vocabulary for m in MODALITIES)
TARGETS = (("camera", 3), ("depth", 2))


def count_shown(ids, position, shown, query, valid):
    """A "model" whose likeliest code is the number of tokens shown, modulo 5."""
    code = shown.sum(axis=1) % 5
    first = jnp.asarray(first_ids(MODALITIES))[jnp.asarray(modality_of(MODALITIES))]
    wanted = first[query] + code[:, None]
    return 50.0 * jax.nn.one_hot(wanted, VOCABULARY)


@functools.cache
def run(model=count_shown, **settings):
    settings = {"targets": TARGETS, "guidance": 1.0} | settings
    inner = functools.partial(
        decoding.generate,
        model,
        modalities=MODALITIES,
        inputs=("rgb",),
        targets=dict(settings["targets"]),
        how=decoding.sampling(temperature=0, guidance=settings["guidance"]),
    )
    return jax.jit(inner)


def tokens(count=3):
    return flatten(MODALITIES, random_tokens(np.random.default_rng(0), count))


def test_each_group_sees_what_was_decoded_before():
    ids, present = tokens()
    out = np.asarray(run()(ids, present, jax.random.key(0)))
    camera, depth = out[:, 36:42] - 18, out[:, 24:36] - 11
    for row in range(3):
        # 24 tokens shown, then 2 more a step; then 30, and 6 more.
        assert sorted(camera[row]) == sorted([24 % 5] * 2 + [26 % 5] * 2 + [28 % 5] * 2)
        assert sorted(depth[row]) == sorted([30 % 5] * 6 + [36 % 5] * 6)
    # Which tokens come first differs between samples, and with the key.
    assert len(np.unique(depth, axis=0)) > 1
    other = np.asarray(run()(ids, present, jax.random.key(1)))
    assert (other != out).any()
    again = np.asarray(run()(ids, present, jax.random.key(0)))
    np.testing.assert_array_equal(again, out)


def test_inputs_stay_and_a_missing_input_is_not_shown():
    ids, present = tokens()
    present[1, 0] = False
    out = np.asarray(run()(ids, present, jax.random.key(0)))
    np.testing.assert_array_equal(out[:, :24], ids[:, :24])
    assert sorted(out[1, 36:42] - 18) == [0, 0, 2, 2, 4, 4]  # none of rgb's 24 shown


def test_truth_of_the_targets_is_never_read():
    ids, present = tokens()
    other = ids.copy()
    other[:, 24:42] = np.concatenate([np.full((3, 12), 11), np.full((3, 6), 18)], 1)

    def reads_all(ids, position, shown, query, valid):
        weight = jnp.sum(jnp.where(shown, ids * (position + 1), 0), axis=1)
        noise = jnp.sin(
            weight[:, None, None] * jnp.arange(1.0, VOCABULARY + 1)[None, None]
        )
        return jnp.tile(noise, (1, query.shape[1], 1))

    inner = run(reads_all)
    for a, b in zip(
        inner(ids, present, jax.random.key(0)),
        inner(other, present, jax.random.key(0)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_guidance_is_linear_in_the_two_logits():
    """u + s (c - u): with c one code up where inputs are seen, s decides who wins."""
    ids, present = tokens()
    first = first_ids(MODALITIES)[2]

    def model(ids, position, shown, query, valid):
        seen = jnp.any(shown & (position < 24), axis=1)[:, None, None]
        hot = (jnp.arange(VOCABULARY) - first)[None, None]
        # Given rgb, code 1 leads by 1 over code 2; without it, by 3.
        c = jnp.where(hot == 1, 1.0, 0.0) - 9.0 * ((hot != 1) & (hot != 2))
        u = jnp.where(hot == 1, 3.0, 0.0) - 9.0 * ((hot != 1) & (hot != 2))
        return jnp.tile(jnp.where(seen, c, u), (1, query.shape[1], 1))

    for guidance, code in ((1.0, 1), (1.4, 1), (1.6, 2)):  # 3 + s (1 - 3) < 0: s > 1.5
        out = run(model, targets=(("camera", 2),), guidance=guidance)
        out = np.asarray(out(ids, present, jax.random.key(0)))
        assert (out[:, 36:42] - first == code).all()


def test_schedules_cover_each_target_once_in_groups_of_equal_size():
    schedule = decoding.make_schedule(MODALITIES, ["rgb"], {"camera": 4, "depth": 5})
    assert schedule.slot.shape == (9, 3)
    used = schedule.slot[schedule.valid]
    np.testing.assert_array_equal(np.sort(used), np.arange(24, 24 + 6 + 12))
    sizes = schedule.valid.sum(axis=1)
    assert sizes[:4].tolist() == [2, 2, 1, 1]
    assert sizes[4:].tolist() == [3, 3, 2, 2, 2]


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(["linear", "cosine"]))
def test_steps_of_a_schedule_have_a_token_each_and_cover_all(length, steps, kind):
    steps = min(steps, length)
    sizes = decoding.group_sizes(length, steps, kind)
    assert len(sizes) == steps
    assert sizes.sum() == length
    assert sizes.min() >= 1


def test_a_cosine_schedule_begins_with_few():
    # 64 (1 - cos(pi s / 8)): 4.9, 18.7, 39.5, 64.
    assert decoding.group_sizes(64, 4, "cosine").tolist() == [5, 14, 21, 24]
    with pytest.raises(ValueError, match="expected linear or cosine"):
        decoding.group_sizes(64, 4, "square")


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (("rgb",), {}, "no targets"),
        (("rgb",), {"rgb": 2}, "each once"),
        (("rgb",), {"sound": 2}, "sound"),
        (("rgb",), {"gaze": 5}, "steps of gaze: got 5, expected 1 to 4"),
        ((), {"gaze": 0}, "got 0"),
    ],
)
def test_schedules_that_cannot_be_are_told(inputs, targets, message):
    with pytest.raises(ValueError, match=message):
        decoding.make_schedule(MODALITIES, inputs, targets)


@functools.cache
def nucleus(p):
    return jax.jit(lambda logits: decoding.top_p(logits, p))


@given(
    st.lists(st.floats(-8, 8, width=32), min_size=9, max_size=9, unique=True),
    st.sampled_from([0.1, 0.5, 0.8, 0.97]),
)
@example([0.0, 1, 2, 3, 1.5, 1.25, 0.5, 0.25, 1e-8], 0.97)  # the first and last alike
def test_top_p_keeps_the_fewest_that_reach_p(logits, p):
    kept = np.isfinite(nucleus(p)(jnp.array(logits, jnp.float32)))
    q = np.exp(np.array(logits) - np.max(logits))
    q /= q.sum()
    order = np.argsort(-q)
    below = np.cumsum(q[order])
    count = int(kept.sum())
    # Those kept are the likeliest; they reach p, and without the last they do not
    # (to rounding, and the halving's 2^-24 of the largest). What is as likely as the
    # last, in float32, is kept with it.
    assert set(np.flatnonzero(kept)) == set(order[:count].tolist())
    assert below[count - 1] >= p - 1e-5
    likelier = int(np.sum(q > q[order[count - 1]] * (1 + 1e-6)))
    assert likelier == 0 or below[likelier - 1] < p + 1e-5


def test_samples_follow_the_probabilities():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))

    @jax.jit
    def drawn(how):
        return decoding.sample(jax.random.key(0), jnp.tile(logits, (4000, 1)), how)

    def draw(temperature, p):
        return drawn(decoding.sampling(temperature, p))

    found = np.bincount(draw(1.0, 1.0), minlength=4) / 4000
    np.testing.assert_allclose(found, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    found = np.bincount(draw(1.0, 0.7), minlength=4) / 4000
    np.testing.assert_allclose(found, [0.625, 0.375, 0, 0], atol=0.03)
    assert (draw(0.01, 0.8) == 0).all()
    assert (draw(0, 0.8) == 0).all()


@pytest.mark.parametrize(("t", "p"), [(-1, 0.5), (float("nan"), 0.5), (1, 0), (1, 2)])
def test_sampling_that_cannot_be_is_told(t, p):
    with pytest.raises(ValueError, match=f"got temperature {t} and p {p}; expected 0"):
        decoding.sampling(t, p)

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multitask_jax.masked.budgets import dirichlet_budgets
from multitask_jax.masked.masks import dirichlet_masks, uniform_masks
from multitask_jax.masked.modalities import modality_of
from tests.masked.common import LENGTHS, MODALITIES

INPUTS, TARGETS = 20, 15
OF = modality_of(MODALITIES)
SAMPLES = 64


@functools.cache
def sampler(kind):
    """SAMPLES masks by one program, whatever the key and what is present."""
    one = {"dirichlet": dirichlet_masks, "uniform": uniform_masks}[kind]

    @jax.jit
    def run(key, present):
        keys = jax.random.split(key, SAMPLES)
        return jax.vmap(
            lambda k: one(k, present, MODALITIES, inputs=INPUTS, targets=TARGETS)
        )(keys)

    return run


@functools.cache
def budget_sampler(lengths=tuple(LENGTHS), **options):
    one = functools.partial(dirichlet_budgets, inputs=INPUTS, targets=TARGETS)

    @jax.jit
    def run(key, present):
        return jax.vmap(lambda k: one(k, jnp.array(lengths), present, **options))(
            jax.random.split(key, SAMPLES)
        )

    return run


PRESENT = st.lists(st.booleans(), min_size=4, max_size=4).filter(any)
SEEDS = st.integers(0, 2**31 - 1)


@pytest.mark.parametrize("kind", ["dirichlet", "uniform"])
@given(seed=SEEDS, present=PRESENT)
def test_masks_are_disjoint_within_slots_and_of_what_is_present(kind, seed, present):
    masks = sampler(kind)(jax.random.key(seed), jnp.array(present))
    taken = np.zeros((SAMPLES, len(OF)), int)
    for slots in masks:
        position, valid = map(np.asarray, slots)
        i, _ = np.nonzero(valid)
        np.add.at(taken, (i, position[valid]), 1)
    assert taken.max() <= 1  # disjoint, each token once
    assert not taken[:, ~np.array(present)[OF]].any()  # nothing of what is missing
    for slots in masks:
        valid = np.asarray(slots.valid)
        assert (np.diff(valid.astype(int), axis=1) <= 0).all()  # a run, then none
        assert (np.asarray(slots.position)[~valid] == 0).all()


@given(seed=SEEDS, present=PRESENT)
def test_budgets_sum_to_what_is_asked_where_lengths_allow(seed, present):
    there = np.array(present)
    budgets = budget_sampler(lengths=(99,) * 4)(jax.random.key(seed), there)
    np.testing.assert_array_equal(budgets.inputs.sum(axis=1), INPUTS)
    np.testing.assert_array_equal(budgets.targets.sum(axis=1), TARGETS)
    clamped = budget_sampler()(jax.random.key(seed), there)
    lengths = np.array(LENGTHS)
    # The same draws, cut by the length, and by what the inputs leave; of a modality
    # that is alone, and where all would be shown, some is left to ask for.
    shown = np.minimum(budgets.inputs, lengths)
    whole = ~(there & (shown < lengths)).any(axis=1) | (there.sum() == 1)
    left = np.minimum(TARGETS, lengths // 2)
    shown = np.minimum(shown, lengths - whole[:, None] * left)
    np.testing.assert_array_equal(clamped.inputs, shown)
    np.testing.assert_array_equal(
        clamped.targets, np.minimum(budgets.targets, lengths - shown)
    )
    for b in (*budgets, *clamped):
        assert (np.asarray(b)[:, ~there] == 0).all()
        assert (np.asarray(b) >= 0).all()


@pytest.mark.parametrize("focus", [0.0, 1.0])
@given(seed=SEEDS, present=PRESENT)
def test_filled_targets_take_what_others_have_no_room_for(focus, seed, present):
    there, lengths = np.array(present), np.array(LENGTHS)
    key = jax.random.key(seed)
    cut = budget_sampler(focus=focus)(key, there)
    filled = budget_sampler(focus=focus, fill=True)(key, there)
    np.testing.assert_array_equal(filled.inputs, cut.inputs)
    shown, asked = map(np.asarray, filled)
    assert (asked >= cut.targets).all()
    assert (asked <= lengths - shown).all()
    assert (asked.sum(axis=1) <= TARGETS).all()
    wanted = there & ~((focus > 0) & (shown > 0)) if there.sum() > 1 else there
    room = np.where(wanted, lengths - shown, 0).sum(axis=1)
    missing = np.minimum(room, TARGETS) - asked.sum(axis=1)
    assert (missing < len(lengths)).all()  # whole tokens
    assert not asked[~np.broadcast_to(wanted, asked.shape)].any()


def test_masks_follow_the_budgets_of_their_key():
    present = jnp.array([True, True, False, True])
    key = jax.random.key(3)
    masks = sampler("dirichlet")(key, present)
    draw = jax.jit(
        lambda key: dirichlet_budgets(
            jax.random.split(key)[0], jnp.array(LENGTHS), present, inputs=INPUTS,
            targets=TARGETS,
        )
    )  # fmt: skip
    keys = jax.random.split(key, SAMPLES)
    for i in range(0, SAMPLES, 16):
        budgets = draw(keys[i])
        for slots, budget in zip(masks, budgets, strict=True):
            of = OF[np.asarray(slots.position[i])[np.asarray(slots.valid[i])]]
            np.testing.assert_array_equal(np.bincount(of, minlength=4), budget)


def test_alpha_goes_from_one_modality_to_equal_shares():
    """E[max share]: near 1 for alpha .01, near 1 / M for large ones."""

    @functools.partial(jax.jit, static_argnums=1)
    def largest(key, alpha):
        one = functools.partial(
            dirichlet_budgets,
            lengths=jnp.full((4,), 10_000),
            present=jnp.ones(4, bool),
            inputs=1000,
            targets=1000,
            alphas=(alpha,),
        )
        return jax.vmap(one)(jax.random.split(key, 500)).inputs.max(axis=1).mean()

    key = jax.random.key(0)
    assert largest(key, 0.01) > 970
    assert 250 < largest(key, 1000.0) < 275
    # For alpha 1 (uniform on the simplex) it is (1 + 1/2 + 1/3 + 1/4) / 4 = .5208.
    assert largest(key, 1.0) == pytest.approx(521, abs=25)


def test_every_modality_and_every_token_is_as_likely_as_its_siblings():
    key, present = jax.random.key(0), jnp.ones(4, bool)
    counts = np.zeros(len(OF))
    for i in range(40):
        masks = sampler("dirichlet")(jax.random.fold_in(key, i), present)
        counts += np.bincount(
            np.asarray(masks.inputs.position)[np.asarray(masks.inputs.valid)],
            minlength=len(OF),
        )
    for m in range(4):
        mine = counts[m == OF]
        # 2,560 draws; a token's share has a spread of about 4 % of itself.
        np.testing.assert_allclose(mine / mine.mean(), 1, atol=0.2)


def test_uniform_masks_take_all_of_the_budget():
    masks = sampler("uniform")(jax.random.key(0), jnp.ones(4, bool))
    assert masks.inputs.valid.all()
    assert masks.targets.valid.all()
    few = sampler("uniform")(jax.random.key(0), jnp.array([False, True, True, False]))
    # Of 12 + 6 that would all be shown, half are asked for.
    np.testing.assert_array_equal(few.inputs.valid.sum(axis=1), 9)
    np.testing.assert_array_equal(few.targets.valid.sum(axis=1), 9)


@pytest.mark.parametrize("focus", [0.0, 0.75])
@pytest.mark.parametrize("alone", range(4))
def test_a_clip_of_one_modality_teaches_something(alone, focus):
    """Also where there are as many slots as it has tokens."""
    present = np.arange(4) == alone
    one = functools.partial(
        dirichlet_budgets, inputs=LENGTHS[0], targets=TARGETS, focus=focus, fill=True
    )
    keys = jax.random.split(jax.random.key(0), SAMPLES)
    draw = jax.jit(jax.vmap(lambda k: one(k, jnp.array(LENGTHS), jnp.array(present))))
    shown, asked = map(np.asarray, draw(keys))
    assert (shown[:, alone] > 0).all()
    assert (asked[:, alone] > 0).all()
    assert (shown + asked <= np.array(LENGTHS)).all()


def test_a_clip_that_could_be_shown_whole_teaches_something():
    present = np.array([False, False, True, True])
    one = functools.partial(
        dirichlet_budgets, inputs=10 * sum(LENGTHS), targets=TARGETS, fill=True
    )
    keys = jax.random.split(jax.random.key(0), SAMPLES)
    draw = jax.jit(jax.vmap(lambda k: one(k, jnp.array(LENGTHS), jnp.array(present))))
    shown, asked = map(np.asarray, draw(keys))
    assert (shown.sum(axis=1) > 0).all()
    assert (asked.sum(axis=1) > 0).all()
    assert (shown + asked <= np.array(LENGTHS) * present).all()


def test_tokens_that_say_nothing_are_neither_shown_nor_asked():
    masks = sampler("dirichlet")(jax.random.key(0), jnp.ones(4, bool))
    known = np.random.default_rng(0).random((SAMPLES, len(OF))) < 0.5
    for slots, before in zip(masks.of_known(known), masks, strict=True):
        position = np.asarray(before.position)
        expected = np.asarray(before.valid) & np.take_along_axis(known, position, 1)
        np.testing.assert_array_equal(slots.valid, expected)
        np.testing.assert_array_equal(slots.position, position)
        assert 0 < expected.sum() < np.asarray(before.valid).sum()


@given(seed=SEEDS, present=PRESENT)
def test_focused_samples_show_one_modality_and_ask_for_others(seed, present):
    there = np.array(present)
    budgets = budget_sampler(focus=1.0)(jax.random.key(seed), there)
    shown, asked = map(np.asarray, budgets)
    assert not shown[:, ~there].any()
    assert not asked[:, ~there].any()
    if there.sum() > 1:
        assert ((shown > 0).sum(axis=1) == 1).all()
        assert not (asked * (shown > 0)).any()
        assert (asked.sum(axis=1) > 0).all()
    else:  # nothing else to ask for: as without focus
        assert ((shown > 0) == there).all()


def test_focus_is_a_share_of_samples_and_the_shown_are_drawn_by_length():
    every = jnp.ones(4, bool)
    shown = np.concatenate(
        [budget_sampler(focus=1.0)(jax.random.key(i), every).inputs for i in range(60)]
    )
    share = (shown > 0).mean(axis=0)
    n = len(shown)
    expected = np.array(LENGTHS) / sum(LENGTHS)
    error = 4 * np.sqrt(expected * (1 - expected) / n)
    assert (abs(share - expected) < error).all()
    # Half of the samples, and those of the other half whose Dirichlet is as narrow.
    few, none = (
        np.concatenate(
            [
                np.asarray((b.targets > 0) & (b.inputs > 0)).any(axis=1)
                for b in (
                    budget_sampler(focus=f)(jax.random.key(i), every) for i in range(60)
                )
            ]
        ).mean()
        for f in (0.5, 0.0)
    )
    assert few == pytest.approx(none / 2, abs=4 * np.sqrt(none / n))

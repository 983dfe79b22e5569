"""Which tokens a sample shows and which it asks for, in arrays of a fixed size.

Budgets differ from sample to sample, shapes must not: both sets are gathered to the
front of N slots, with a mask of the slots that hold a token. Written for one sample;
callers `vmap`.

Legend: M modalities, L positions, I input slots, O target slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from multitask_jax.masked.budgets import ALPHAS, Budgets, dirichlet_budgets
from multitask_jax.masked.modalities import Modalities, lengths, modality_of, starts

Array = jax.Array


class Slots(NamedTuple):
    """Positions, those of empty slots being 0."""

    position: Array  # int32 [I] or [O]
    valid: Array  # bool, the same shape


class Masks(NamedTuple):
    """What is shown and what is asked for; disjoint."""

    inputs: Slots
    targets: Slots

    def of_known(self, known: Array) -> "Masks":
        """Without tokens that say nothing: known is bool [L] (or [B, L] of a batch)."""

        def some(slots: Slots) -> Slots:
            there = jnp.take_along_axis(known, slots.position, axis=-1)
            return slots._replace(valid=slots.valid & there)

        return Masks(some(self.inputs), some(self.targets))


def masks_of(
    key: Array, budgets: Budgets, modalities: Modalities, *, inputs: int, targets: int
) -> Masks:
    """A random subset of each modality: the first b_in are shown, the next b_out asked.

    Args:
      key: of this sample.
      budgets: [M] each; in all no more than there are slots.
      modalities: lengths and order.
      inputs, targets: slots, I and O.
    """
    order = _permuted(key, modalities)
    of = modality_of(modalities)
    rank = np.arange(len(of), dtype=np.int32) - starts(modalities)[of]
    shown = rank < budgets.inputs[of]
    asked = ~shown & (rank < (budgets.inputs + budgets.targets)[of])
    return Masks(_gather(order, shown, inputs), _gather(order, asked, targets))


def dirichlet_masks(
    key: Array,
    present: Array,
    modalities: Modalities,
    *,
    inputs: int,
    targets: int,
    alphas: tuple[float, ...] = ALPHAS,
    focus: float = 0.0,
    fill: bool = False,
) -> Masks:
    """Budgets by `dirichlet_budgets`, then `masks_of` them; present: bool [M]."""
    key_budget, key_mask = jax.random.split(key)
    budgets = dirichlet_budgets(
        key_budget,
        jnp.asarray(lengths(modalities)),
        present,
        inputs=inputs,
        targets=targets,
        alphas=alphas,
        focus=focus,
        fill=fill,
    )
    return masks_of(key_mask, budgets, modalities, inputs=inputs, targets=targets)


def uniform_masks(
    key: Array, present: Array, modalities: Modalities, *, inputs: int, targets: int
) -> Masks:
    """The plain alternative: any token of what is present is as likely as another."""
    of = modality_of(modalities)
    bits = jax.random.bits(key, (len(of),), jnp.uint32) >> 1
    order = jnp.argsort(jnp.where(present[of], bits, jnp.uint32(2**31)))
    place, there = np.arange(len(of)), jnp.sum(present * lengths(modalities))
    # Where all of it would be shown, some is left to ask for.
    left = jnp.where(there <= inputs, jnp.minimum(targets, there // 2), 0)
    shown = place < jnp.minimum(inputs, there - left)
    asked = ~shown & (place < jnp.minimum(inputs + targets, there))
    return Masks(_gather(order, shown, inputs), _gather(order, asked, targets))


def _permuted(key: Array, modalities: Modalities) -> Array:
    """Positions [L], shuffled within each modality; one sort for all of them."""
    of = modality_of(modalities)
    room = 32 - (len(modalities) - 1).bit_length()
    bits = jax.random.bits(key, (len(of),), jnp.uint32)
    if room < 32:
        bits = (bits >> (32 - room)) | (of.astype(np.uint32) << room)
    return jnp.argsort(bits)


def _gather(order: Array, chosen: Array, slots: int) -> Slots:
    """Those of `order` [L] that are chosen [L], in the first of so many slots."""
    # A token's slot is the number of those chosen before it; others fall off the end.
    slot = jnp.where(chosen, jnp.cumsum(chosen) - 1, slots)
    position = jnp.zeros((slots,), jnp.int32).at[slot].set(order, mode="drop")
    return Slots(position, jnp.arange(slots) < jnp.sum(chosen))

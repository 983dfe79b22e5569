"""How many tokens of each modality a sample shows, and how many it asks for.

Random budgets as in 4M (Mizrahi et al. 2023, arXiv 2312.06647) and EgoM2P (arXiv
2506.07886), written for one sample; callers `vmap`.

Legend: M modalities, A Dirichlets, N tokens in all.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
ALPHAS = (0.01, 0.1, 1.0, 10.0)


class Budgets(NamedTuple):
    """Tokens of each modality; int32 [M] each."""

    inputs: Array
    targets: Array


def dirichlet_budgets(
    key: Array,
    lengths: Array,
    present: Array,
    *,
    inputs: int,
    targets: int,
    alphas: tuple[float, ...] = ALPHAS,
    focus: float = 0.0,
    fill: bool = False,
) -> Budgets:
    """Shares p ~ Dir(alpha) of the modalities that are present, as whole tokens.

    One of the alphas is drawn, uniformly, for inputs and targets alike: small ones give
    nearly all tokens to one modality, large ones equal shares. floor(p N), the few that
    are left over go to the largest share of fresh draws, and no modality gets more than
    it has; of targets, than its inputs leave.

    Args:
      key: of this sample.
      lengths: int32 [M], tokens of a whole modality.
      present: bool [M]; what is missing gets nothing.
      inputs, targets: N of each, before a modality's length cuts them.
      alphas: [A], of the symmetric Dirichlets.
      focus: chance that a sample shows one modality alone, drawn by its length, and
        asks for others only, as generation does. Without, about one in six does; 4M
        mixes more in, EgoM2P does not.
      fill: what is asked of a modality beyond its length is asked of the others, in
        proportion to what they have left: targets sum to N (less M at most) where there
        are as many. Our choice, for modalities of very different lengths; without, most
        slots are empty whenever a short one is asked.
    """
    key_alpha, key_in, key_out, key_one = jax.random.split(key, 4)
    alpha = jax.random.choice(key_alpha, jnp.array(alphas, jnp.float32))
    given, wanted = _focused(key_one, lengths, present, focus)
    shown = jnp.minimum(_shares(key_in, alpha, given, inputs), lengths)
    # Of one that is alone, and where all would be shown, some is left to ask for: it
    # would teach nothing.
    nothing = ~jnp.any(wanted & (shown < lengths)) | (jnp.sum(present) == 1)
    left = jnp.where(nothing, jnp.minimum(targets, lengths // 2), 0)
    shown = jnp.minimum(shown, lengths - left)
    room = jnp.where(wanted, lengths - shown, 0)
    asked = jnp.minimum(_shares(key_out, alpha, wanted, targets), room)
    if fill:
        room, left = room - asked, targets - asked.sum()
        asked += room * left // jnp.maximum(jnp.maximum(room.sum(), left), 1)
    return Budgets(shown, asked)


def _focused(
    key: Array, lengths: Array, present: Array, focus: float
) -> tuple[Array, Array]:
    """What may be shown and what asked for, bool [M] each."""
    if not focus:
        return present, present
    key, key_one = jax.random.split(key)
    drawn = jax.random.categorical(key_one, jnp.where(present, jnp.log(lengths), -1e9))
    one = jnp.arange(len(present)) == drawn
    now = jax.random.bernoulli(key, focus) & (jnp.sum(present) > 1)
    return jnp.where(now, one, present), jnp.where(now, present & ~one, present)


def _shares(key: Array, alpha: Array, present: Array, count: int) -> Array:
    """floor(p N) and the rest by fresh draws; sums to N if anything is present."""
    m = len(present)
    # Row 0 is p; a fresh draw a row for the tokens left over, fewer than M. Shares of
    # a small alpha underflow, their logarithms do not.
    log = jax.random.loggamma(key, alpha, (m + 1, m))
    log = jnp.where(present[None], log, -jnp.inf)
    p = jnp.where(present, jax.nn.softmax(log[0]), 0.0)
    whole = jnp.floor(p * count).astype(jnp.int32)
    left = count - whole.sum()
    largest = jax.nn.one_hot(jnp.argmax(log[1:], axis=1), m, dtype=jnp.int32)
    extra = jnp.sum(largest * (jnp.arange(m) < left)[:, None], axis=0)
    return jnp.where(present, whole + extra, 0)

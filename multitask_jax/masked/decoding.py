"""Generation by random-order autoregression (ROAR): any modalities from any others.

A target's tokens are decoded in random groups, each in parallel; what is decoded is
shown to the encoder from then on (EgoM2P; 4M, Mizrahi et al. 2023, arXiv 2312.06647).
All steps of all targets are one `lax.scan`, and samples have slots of a fixed size.

Legend: B batch, L positions, S steps, Q queries of a step, N slots (inputs and
targets), V ids, M modalities.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from multitask_jax.masked.modalities import (
    Modalities,
    first_ids,
    indices,
    modality_of,
    positions,
)
from multitask_jax.masked.objective import own_ids

Array = jax.Array
# ids [B, N], positions [B, N], shown [B, N], queries [B, Q], valid [B, Q] -> [B, Q, V]
Logits = Callable[[Array, Array, Array, Array, Array], Array]


Kind = Literal["linear", "cosine"]


class Schedule(NamedTuple):
    """Which slots each step decodes; the same for all samples."""

    slot: np.ndarray  # int32 [S, Q], 0 where there is none
    valid: np.ndarray  # bool [S, Q]


class Sampling(NamedTuple):
    """How ids are drawn. Numbers may be traced, so that one program serves them all.

    None leaves a part out, which is another program.
    """

    temperature: Any  # of the logits; None takes the likeliest
    p: Any  # of `top_p`; None keeps all
    guidance: Any  # see `generate`; None is without


def sampling(
    temperature: float = 0.01, p: float = 0.8, guidance: float = 1.0
) -> Sampling:
    """Of numbers: a temperature of 0, a p of 1 and a guidance of 1 leave it out.

    Defaults are EgoM2P's, but for its guidance of 2.

    Raises:
      ValueError: a temperature below 0 or p outside of (0, 1].
    """
    if not temperature >= 0 or not 0 < p <= 1:
        raise ValueError(
            f"got temperature {temperature} and p {p}; expected 0 or more, and a share"
            " above 0, at most 1"
        )
    return Sampling(
        float(temperature) if temperature != 0 else None,
        float(p) if p != 1 else None,
        float(guidance) if guidance != 1 else None,
    )


def group_sizes(length: int, steps: int, kind: Kind = "linear") -> np.ndarray:
    """Tokens of each step, at least one: int [steps].

    linear: as many in each, to one (EgoM2P). cosine: few at first, when little is
    known; cos(pi s / 2 S) of all are left after step s (MaskGIT, Chang et al. 2022,
    arXiv 2202.04200, section 3.3).

    Raises:
      ValueError: another kind.
    """
    if kind == "linear":
        return np.array([len(a) for a in np.array_split(np.arange(length), steps)])
    if kind != "cosine":
        raise ValueError(f"schedule: got {kind!r}, expected linear or cosine")
    s = np.arange(steps + 1)
    done = np.rint(length * (1 - np.cos(np.pi * s / (2 * steps)))).astype(int)
    done = np.clip(done, s, length - steps + s)  # one a step at least
    return np.diff(done)


def make_schedule(
    modalities: Modalities,
    inputs: Sequence[str],
    targets: Mapping[str, int],
    kind: Kind = "linear",
) -> Schedule:
    """Each target in its number of steps, in order.

    Slots are those of the inputs, then those of each target in its order.

    Args:
      modalities: of the model.
      inputs: names of what is given.
      targets: name -> steps, at least 1 and at most its tokens.
      kind: as for `group_sizes`.

    Raises:
      ValueError: unknown names, a name among both, no target, or steps out of range.
    """
    indices(modalities, [*inputs, *targets])
    if not targets:
        raise ValueError("generate: got no targets; name one at least")
    by_name = {m.name: m for m in modalities}
    at = sum(by_name[name].length for name in inputs)
    groups: list[np.ndarray] = []
    for name, steps in targets.items():
        length = by_name[name].length
        if not 1 <= steps <= length:
            raise ValueError(
                f"steps of {name}: got {steps}, expected 1 to {length}, its tokens"
            )
        ends = np.cumsum(group_sizes(length, steps, kind))[:-1]
        groups += np.split(np.arange(at, at + length), ends)
        at += length
    most = max(map(len, groups))
    slot = np.zeros((len(groups), most), np.int32)
    valid = np.zeros((len(groups), most), bool)
    for i, group in enumerate(groups):
        slot[i, : len(group)], valid[i, : len(group)] = group, True
    return Schedule(slot, valid)


def top_p(logits: Array, p: Any) -> Array:
    """Keeps the fewest ids whose probabilities sum to p or more; others become -inf.

    Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751). Without a sort, which is
    slow: the lowest probability that is kept is found by halving, to 2^-24 of the
    largest; ids equally likely are kept or dropped together.

    Args:
      logits: [..., V].
      p: in (0, 1).
    """
    q = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        enough = jnp.sum(jnp.where(q >= middle, q, 0.0), axis=-1, keepdims=True) >= p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    high = jnp.max(q, axis=-1, keepdims=True)
    low, _ = jax.lax.fori_loop(0, 24, halve, (jnp.zeros_like(high), high))
    # The likeliest is enough alone where its probability is p or more.
    low = jnp.where(high >= p, high, low)
    return jnp.where(q >= low, logits, -jnp.inf)


def sample(key: Array, logits: Array, how: Sampling) -> Array:
    """An id of each [..., V] -> int32 [...]; its guidance is not looked at."""
    if how.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    kept = logits / how.temperature
    if how.p is not None:
        kept = top_p(kept, how.p)
    return jax.random.categorical(key, kept, axis=-1).astype(jnp.int32)


def generate(
    logits_of: Logits,
    ids: Array,
    present: Array,
    key: Array,
    *,
    modalities: Modalities,
    inputs: tuple[str, ...],
    targets: Mapping[str, int],
    how: Sampling,
    schedule: Kind = "linear",
) -> Array:
    """Fills in the targets' ids, given the inputs'; int32 [B, L].

    A sample that lacks an input, or some of it, is decoded from what it has. The key
    tells the order and the samples.

    Args:
      logits_of: the model, see `Logits`; all ids of all modalities.
      ids: int32 [B, L]; other ids than the inputs' are not read.
      present: bool [B, M] by modality, or [B, L] by position.
      key: one for the batch.
      modalities: of the model.
      inputs: names of what is given.
      targets: name -> steps; decoded in their order, later ones given earlier ones.
      how: how ids are drawn, from `sampling`. Its guidance is s of l = u + s (c - u),
        with c the logits given inputs and targets decoded so far and u those given the
        latter alone (Ho and Salimans 2022, arXiv 2207.12598); without, it costs half.
      schedule: sizes of a target's steps, see `group_sizes`.

    Raises:
      ValueError: as `make_schedule`.
    """
    plan = make_schedule(modalities, inputs, targets, schedule)
    of = modality_of(modalities)
    b = len(ids)
    key_order, key_steps = jax.random.split(key)
    if present.shape[-1] == len(modalities):
        present = present[:, of]
    # Slot -> position: inputs as they are, each target in an order of the sample's own.
    given = positions(modalities, inputs)
    orders = [
        jax.random.permutation(
            k,
            jnp.tile(positions(modalities, [name]), (b, 1)),
            axis=1,
            independent=True,
        )
        for k, name in zip(
            jax.random.split(key_order, len(targets)), targets, strict=True
        )
    ]
    position = jnp.concatenate([jnp.tile(given, (b, 1)), *orders], axis=1)
    is_input = np.arange(position.shape[1])[None] < len(given)
    shown = is_input & jnp.take_along_axis(present, position, axis=1)

    def logits_at(ids: Array, shown: Array, query: Array, valid: Array) -> Array:
        at = jnp.take_along_axis(ids, position, axis=1)
        if how.guidance is None:
            return logits_of(at, position, shown, query, valid)

        def twice(x: Array) -> Array:
            return jnp.concatenate([x, x])

        # Both in one pass, the one given the targets alone behind the other.
        both = logits_of(
            twice(at),
            twice(position),
            jnp.concatenate([shown, shown & ~is_input]),
            twice(query),
            twice(valid),
        )
        c, u = jnp.split(both, 2)
        return u + how.guidance * (c - u)

    def step(carry: tuple[Array, Array], xs: Any) -> tuple[tuple[Array, Array], None]:
        ids, shown = carry
        slot, valid, key = xs
        query = position[:, slot]
        logits = logits_at(ids, shown, query, jnp.tile(valid, (b, 1)))
        logits = own_ids(logits, jnp.asarray(of)[query], modalities)
        drawn = sample(key, logits, how)
        # Empty queries go to a place past the end, which drops them.
        rows = jnp.arange(b)[:, None]
        ids = ids.at[rows, jnp.where(valid, query, ids.shape[1])].set(
            drawn, mode="drop"
        )
        shown = shown.at[:, jnp.where(valid, slot, shown.shape[1])].set(
            True, mode="drop"
        )
        return (ids, shown), None

    # What is not given starts as its modality's first code: never read, always valid.
    known = np.isin(np.arange(len(of)), given)[None]
    ids = jnp.where(known, ids, jnp.asarray(first_ids(modalities)[of])[None])
    keys = jax.random.split(key_steps, len(plan.slot))
    (ids, _), _ = jax.lax.scan(step, (ids, shown), (*plan, keys))
    return ids

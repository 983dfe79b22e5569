"""What EgoM2P makes of a clip: tokens that fit each other, or beliefs about each.

Legend: B batch, N tokens shown, Q queries, L positions.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from multitask_jax.masked import decoding
from multitask_jax.masked.modalities import (
    Modalities,
    first_ids,
    flatten,
    indices,
    lengths,
    positions,
    unflatten,
)
from multitask_jax.masked.objective import logits_of
from multitask_jax.models.egom2p import EgoM2P, Params, Shape

Array = jax.Array


def logits(
    params: Params,
    ids: Array,
    position: Array,
    shown: Array,
    query: Array,
    valid: Array,
    *,
    modalities: Modalities,
    shape: Shape,
) -> Array:
    """Logits of queries [B, Q] given tokens [B, N], as `masked.decoding.Logits`."""

    def both(model: EgoM2P) -> Array:
        context = model.encode(ids, position, shown)
        return model.decode(context, shown, query, valid)

    hidden = EgoM2P(modalities, shape).apply({"params": params}, method=both)
    return logits_of(hidden, params["head"])


@functools.partial(
    jax.jit, static_argnames=("modalities", "shape", "inputs", "targets", "schedule")
)
def _generate(
    params: Params,
    ids: Array,
    present: Array,
    key: Array,
    *,
    modalities: Modalities,
    shape: Shape,
    targets: tuple[tuple[str, int], ...],
    **settings: Any,
) -> Array:
    model = functools.partial(logits, params, modalities=modalities, shape=shape)
    return decoding.generate(
        model, ids, present, key, modalities=modalities, targets=dict(targets),
        **settings,
    )  # fmt: skip


def generate(
    params: Params,
    inputs: Mapping[str, np.ndarray],
    targets: Mapping[str, int],
    *,
    modalities: Modalities,
    shape: Shape,
    key: Array,
    known: np.ndarray | None = None,
    temperature: float = 0.01,
    p: float = 0.8,
    guidance: float = 1.0,
    schedule: decoding.Kind = "linear",
) -> dict[str, np.ndarray]:
    """Any modalities from any others, in one compiled loop.

    Other numbers of temperature, p and guidance compile nothing anew, but for a
    temperature of 0, a p of 1 and a guidance of 1.

    Args:
      params: of the model.
      inputs: codes of what is given by name, int32 [B, *grid].
      targets: name -> steps of parallel decoding; later ones see earlier ones.
      modalities, shape: of the model.
      key: one for the batch.
      known: bool [B, L] by position; inputs' tokens that are not are not shown. All
        are if not given.
      temperature, p, guidance: see `masked.decoding.sampling`.
      schedule: see `masked.decoding.group_sizes`.

    Returns:
      Codes of the targets by name, int32 [B, *grid].

    Raises:
      ValueError: names, steps or codes that the model does not have, `known` of another
        shape, or numbers out of range.
    """
    ids, present = _given(modalities, inputs, known)
    how = decoding.sampling(temperature, p, guidance)
    out = _generate(
        params, ids, present, key, how=how, modalities=modalities, shape=shape,
        inputs=tuple(inputs), targets=tuple(targets.items()), schedule=schedule,
    )  # fmt: skip
    found = unflatten(modalities, np.asarray(out))
    return {name: found[name] for name in targets}


def _given(
    modalities: Modalities,
    inputs: Mapping[str, np.ndarray],
    known: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [B, L] and which of them there are [B, L]."""
    ids, present = flatten(modalities, inputs)
    present = np.repeat(present, lengths(modalities), axis=1)
    if known is None:
        return ids, present
    if np.shape(known) != ids.shape or np.asarray(known).dtype != bool:
        raise ValueError(
            f"known: got {np.asarray(known).dtype}{list(np.shape(known))}, expected"
            f" bool{list(ids.shape)}, of all modalities' positions"
        )
    return ids, present & known


@functools.partial(
    jax.jit, static_argnames=("modalities", "shape", "inputs", "targets")
)
def _probabilities(
    params: Params,
    ids: Array,
    present: Array,
    *,
    modalities: Modalities,
    shape: Shape,
    inputs: tuple[str, ...],
    targets: tuple[str, ...],
) -> dict[str, Array]:
    given, asked = (
        jnp.tile(positions(modalities, names), (len(ids), 1))
        for names in (inputs, targets)
    )
    every = logits(
        params,
        jnp.take_along_axis(ids, given, axis=1),
        given,
        jnp.take_along_axis(present, given, axis=1),
        asked,
        jnp.ones(asked.shape, bool),
        modalities=modalities,
        shape=shape,
    )
    found, at = {}, 0
    for i in indices(modalities, targets):
        m, first = modalities[i], first_ids(modalities)[i]
        own = every[:, at : at + m.length, first : first + m.vocabulary]
        p = jax.nn.softmax(own, axis=-1)
        found[m.name] = p.reshape(len(p), *m.grid, m.vocabulary)
        at += m.length
    return found


def probabilities(
    params: Params,
    inputs: Mapping[str, np.ndarray],
    targets: Sequence[str],
    *,
    modalities: Modalities,
    shape: Shape,
    known: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """What the model believes of each token of the targets, given the inputs alone.

    In one pass, where `generate` draws tokens that fit each other in several. For
    `tokenizers.decode_mean`.

    Args:
      params: of the model.
      inputs: codes of what is given by name, int32 [B, *grid].
      targets: names.
      modalities, shape: of the model.
      known: as `generate` has it.

    Returns:
      Probabilities of codes by name, float32 [B, *grid, vocabulary].

    Raises:
      ValueError: names or codes that the model does not have, one that is both, or
        `known` of another shape.
    """
    indices(modalities, [*inputs, *targets])
    ids, present = _given(modalities, inputs, known)
    found = _probabilities(
        params, ids, present, modalities=modalities, shape=shape,
        inputs=tuple(inputs), targets=tuple(targets),
    )  # fmt: skip
    return {name: np.asarray(p) for name, p in found.items()}

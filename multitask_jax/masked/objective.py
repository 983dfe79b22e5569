"""The loss of masked modelling: a cross-entropy a modality, and their plain mean.

Legend: B batch, O targets, M modalities, V ids, D width.
"""

import jax
import jax.numpy as jnp

from multitask_jax.layers.products import matmul
from multitask_jax.masked.modalities import (
    Modalities,
    first_ids,
    modality_of,
    modality_of_id,
)

Array = jax.Array
OUTSIDE = -1e9  # the logit of another modality's id


def own_ids(logits: Array, modality: Array, modalities: Modalities) -> Array:
    """Logits [..., V] of tokens of a modality [...]: other modalities' ids rule out."""
    of = jnp.asarray(modality_of_id(modalities))
    mine = jnp.expand_dims(of, range(modality.ndim)) == modality[..., None]
    return jnp.where(mine, logits, OUTSIDE)


def cross_entropy(
    hidden: Array,
    head: Array,
    ids: Array,
    modality: Array,
    modalities: Modalities,
    *,
    chunk: int | None = None,
) -> Array:
    """-log p(id) of each target among its modality's ids; float32 [B, O].

    Args:
      hidden: [B, O, D], what the decoder says of each target.
      head: [D, V].
      ids: int32 [B, O], the truth.
      modality: int32 [B, O], of each target.
      modalities: all of them.
      chunk: targets of a sample at a time, so that logits [B, O, V] are never whole: a
        large vocabulary's memory for a second product going back. Must divide O.
    """
    if chunk is None or chunk >= ids.shape[1]:
        return _by_vocabulary(hidden, head, ids, modality, modalities)

    def loss_of(hidden: Array, ids: Array, modality: Array) -> Array:
        logits = logits_of(hidden, head)
        return _minus_log(own_ids(logits, modality, modalities), ids)

    if ids.shape[1] % chunk:
        raise ValueError(f"chunk: got {chunk}, expected a divisor of {ids.shape[1]}")

    def cut(x: Array) -> Array:
        b, o, *rest = x.shape
        return jnp.moveaxis(x.reshape(b, o // chunk, chunk, *rest), 1, 0)

    parts = jax.lax.map(
        lambda part: jax.checkpoint(loss_of)(*part),
        (cut(hidden), cut(ids), cut(modality)),
    )
    return jnp.moveaxis(parts, 0, 1).reshape(ids.shape)


def logits_of(hidden: Array, head: Array) -> Array:
    """[..., D] @ [D, V] -> float32 [..., V]."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    found = matmul(rows, head.astype(hidden.dtype), jnp.float32)
    return found.reshape(*hidden.shape[:-1], -1)


def _by_vocabulary(
    hidden: Array, head: Array, ids: Array, modality: Array, modalities: Modalities
) -> Array:
    """The same by products of as many columns as one modality has ids.

    A target's hidden state stands in its modality's part of a row of n D, whose product
    with the heads of all n modalities of one vocabulary, below each other, is that with
    its own: as many operations as with all V columns, but a fraction of the logits.
    """
    first = first_ids(modalities)
    local = ids - jnp.asarray(first)[modality]
    out = jnp.zeros(ids.shape, jnp.float32)
    for size in sorted({m.vocabulary for m in modalities}):
        members = [i for i, m in enumerate(modalities) if m.vocabulary == size]
        mine = modality[..., None] == jnp.array(members)[None, None]  # [B, O, n]
        wide = jnp.where(mine[..., None], hidden[:, :, None], 0)
        own = [head[:, first[i] : first[i] + size] for i in members]
        heads = jnp.concatenate(own).astype(hidden.dtype)  # [n D, size]
        logits = logits_of(wide.reshape(*ids.shape, -1), heads)
        each = _minus_log(logits, local)
        out = jnp.where(jnp.any(mine, axis=-1), each, out)
    return out


def _minus_log(logits: Array, ids: Array) -> Array:
    """-log softmax(logits [B, O, V]) at ids [B, O]."""
    # Picked by comparison: a gather's gradient is a scatter, slow on a CPU.
    every = jnp.arange(logits.shape[-1])[None, None]
    right = jnp.sum(jnp.where(every == ids[..., None], logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - right


def modality_mean(
    values: Array, position: Array, valid: Array, modalities: Modalities
) -> tuple[Array, dict[str, Array]]:
    """Mean over the modalities of the mean over a modality's targets in the batch.

    One without targets adds 0 and stays in the denominator (EgoM2P, as 4M).

    Args:
      values: [B, O], a loss of each target.
      position: int32 [B, O], of each target.
      valid: bool [B, O].
      modalities: M of them.

    Returns:
      The mean [], and {name: its modality's mean []}, NaN of one without targets.
    """
    of = jnp.asarray(modality_of(modalities))[position]
    total, means = jnp.float32(0), {}
    for i, m in enumerate(modalities):
        mine = valid & (of == i)
        mean = jnp.sum(jnp.where(mine, values, 0.0)) / jnp.maximum(jnp.sum(mine), 1)
        total += mean
        means[m.name] = jnp.where(jnp.any(mine), mean, jnp.nan)
    return total / len(modalities), means

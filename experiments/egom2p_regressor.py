"""Specialists to compare EgoM2P with: one regressor a task, of the same size.

The same encoder and decoder read the same tokens of the given modality; instead of
codes it predicts the target's signal itself (a patch of pixels or some samples of a
trajectory a place) by least squares, on clips that have both.

Legend: N clips, B batch, Q places of the target, P numbers of a place's signal.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments import egom2p_training as training
from experiments.egom2p_evaluation import Task, rows_in_batches
from experiments.egom2p_tokens import Tokens
from experiments.egom2p_training import Settings, task_masks
from multitask_jax.masked import modalities as mods
from multitask_jax.masked.masks import Masks, Slots
from multitask_jax.masked.modalities import Modalities
from multitask_jax.masked.tokenizers import (
    Config,
    Statistics,
    Tokenizer,
    signals,
    video,
)
from multitask_jax.masked.tokenizers.types import CHANNELS, PATCH
from multitask_jax.models.egom2p import EgoM2P, Shape

Array = jax.Array


class Pairs(NamedTuple):
    """Clips that have both modalities of a task."""

    ids: np.ndarray  # int32 [N, L]
    known: np.ndarray  # bool [N, L]: the token stands for something known
    truth: np.ndarray  # [N, ...] of the target, in the data's units

    def at(self, rows: np.ndarray) -> "Pairs":
        """Some of the clips."""
        return Pairs(self.ids[rows], self.known[rows], self.truth[rows])


class Regressor(nn.Module):
    """Ids [B, L] and masks -> signals of the places asked for [B, Q, P]."""

    modalities: Modalities
    shape: Shape
    numbers: int  # P

    @nn.compact
    def __call__(self, ids: Array, masks: Masks) -> Array:
        """Standardised, as `signals.to_network` has them."""
        hidden = EgoM2P(self.modalities, self.shape, name="trunk")(ids, masks)
        return nn.Dense(self.numbers, kernel_init=nn.initializers.zeros, name="signal")(
            hidden
        )


class Trained(NamedTuple):
    """A regressor and what it needs to predict."""

    params: Any
    modalities: Modalities
    shape: Shape
    task: Task
    tokenizer: Tokenizer  # of the target: units and the grid of its places
    history: list[dict[str, float]]


def patches(config: Config, signal: Array) -> Array:
    """Signals [N, ..., C] by place: [N, Q, P]."""
    if config.is_video:
        signal = video.to_patches(signal, config.temporal, PATCH)
        return signal.reshape(len(signal), -1, signal.shape[-1])
    return signal.reshape(len(signal), -1, config.stride * signal.shape[-1])


def signal_of(config: Config, x: Array) -> Array:
    """The inverse of `patches`."""
    if config.is_video:
        side = config.size // PATCH
        x = x.reshape(len(x), config.frames // config.temporal, side, side, -1)
        return video.from_patches(x, config.temporal, PATCH)
    return x.reshape(len(x), config.samples, -1)


def loss_fn(
    net: Regressor, config: Config, statistics: Statistics, settings: Settings
) -> Callable[[Any, Pairs, Array], tuple[Array, dict[str, Array]]]:
    """(params, batch, key) -> (mean squared error of standardised signals, {})."""

    def loss(params: Any, batch: Pairs, key: Array) -> tuple[Array, dict[str, Array]]:
        masks = task_masks(key, len(batch.ids), net.modalities, settings)
        masks = masks._replace(inputs=masks.of_known(batch.known).inputs)
        signal, known = signals.to_network(config, statistics, batch.truth)
        known = jnp.broadcast_to(known, signal.shape)
        wanted = mods.indices(net.modalities, settings.task)[1]
        place = masks.targets.position - int(mods.starts(net.modalities)[wanted])
        place = jnp.maximum(place, 0)  # of empty slots, which have no weight
        truth, weight = (
            jnp.take_along_axis(patches(config, x), place[..., None], axis=1)
            for x in (signal, known)
        )
        weight = weight * masks.targets.valid[..., None]
        y = net.apply({"params": params}, batch.ids, masks)
        error = jnp.sum(jnp.square(y - truth) * weight)
        return error / jnp.maximum(jnp.sum(weight), 1), {}

    return loss


def fit(
    train: Pairs,
    validation: Pairs,
    task: Task,
    modalities: Modalities,
    tokenizer: Tokenizer,
    shape: Shape,
    settings: Settings,
    *,
    start: Callable[[Any], Any],
    workdir: Path,
    progress: bool = True,
) -> Trained:
    """Trains a regressor, as `egom2p_training.pretrain` does; the best on validation.

    Args:
      train, validation: clips.
      task: what from what.
      modalities: of the tokens.
      tokenizer: of the target.
      shape, settings: of the run; its task is set here.
      start: what is made of the trunk's random parameters first.
      workdir: of checkpoints.
      progress: a bar.
    """
    settings = dataclasses.replace(settings, task=(task.given, task.wanted))
    config = tokenizer.config
    net = Regressor(modalities, shape, _numbers(config))
    one = Slots(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))
    key = jax.random.key(settings.seed)
    params = jax.jit(net.init)(key, train.ids[:1], Masks(one, one))["params"]
    params = {**params, "trunk": start(params["trunk"])}
    loss = loss_fn(net, config, tokenizer.statistics, settings)
    judge = jax.jit(loss)
    some = validation.at(training.spread(len(validation.ids), 64))

    def evaluate(params: Any) -> dict[str, Array]:
        value, _ = judge(params, some, jax.random.key(0))
        return {"score": -value, "loss": value}

    found = training.fit(
        loss,
        params,
        training.batches(train, settings.batch, settings.seed),
        evaluate,
        settings,
        about={**dataclasses.asdict(settings), **shape._asdict()},
        workdir=workdir,
        progress=progress,
    )
    return Trained(found.params, modalities, shape, task, tokenizer, found.history)


def predict(model: Trained, tokens: Tokens, batch: int = 16) -> np.ndarray:
    """The target of clips from all known tokens of what is given, in data's units."""
    count, out = len(tokens.ids), []
    for rows in rows_in_batches(count, batch):
        made = _predict(
            model.modalities, model.shape, model.task, model.tokenizer.config,
            model.params, model.tokenizer.statistics, tokens.ids[rows],
            tokens.known[rows],
        )  # fmt: skip
        out.append(np.asarray(made))
    return np.concatenate(out)[:count]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _predict(
    modalities: Modalities,
    shape: Shape,
    task: Task,
    config: Config,
    params: Any,
    statistics: Statistics,
    ids: Array,
    known: Array,
) -> Array:
    given, wanted = (
        jnp.tile(mods.positions(modalities, [name]), (len(ids), 1))
        for name in (task.given, task.wanted)
    )
    slots = (
        Slots(given, jnp.take_along_axis(known, given, axis=1)),
        Slots(wanted, jnp.ones(wanted.shape, bool)),
    )
    net = Regressor(modalities, shape, _numbers(config))
    y = net.apply({"params": params}, ids, Masks(*slots))
    return signals.from_network(config, statistics, signal_of(config, y))


def _numbers(config: Config) -> int:
    """P."""
    place = config.temporal * PATCH**2 if config.is_video else config.stride
    return CHANNELS[config.kind] * place

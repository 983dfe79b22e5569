"""Cross-validated training of `mtmt`: all folds at once, one program for all seeds.

Legend: N people, F features, A arms, O outcomes, K folds, n rows of a fold's part,
B people of a batch.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from multitask_jax.data.uplift import Trial
from multitask_jax.models.uplift_baselines import Learner, boosting, observed
from multitask_jax.training import adamw

# People of a fold whose outcomes are predicted at a time: that takes the memory of a
# training step of half as many, whatever the table's length.
BLOCK = 2048


class Folds(NamedTuple):
    """Rows of each fold's three parts, of one size in all folds."""

    train: np.ndarray  # [K, n]
    validation: np.ndarray  # [K, n]
    test: np.ndarray  # [K, n]; the last row may be there twice, to make sizes equal


class Scale(NamedTuple):
    """Mean and spread of outcomes among the rows that are trained on; [K, O] each."""

    mean: Any
    spread: Any


def make_folds(arm: np.ndarray, count: int, seed: int, validation: float) -> Folds:
    """K folds with the arms in equal shares; K = 1 trains on everyone but validation.

    Raises:
      ValueError: too few people for so many folds.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(arm))
    order = order[np.argsort(arm[order], kind="stable")]
    fold = np.empty(len(arm), int)
    fold[order] = np.arange(len(arm)) % count
    parts: list[tuple[np.ndarray, ...]] = []
    for k in range(count):
        test = np.flatnonzero(fold == k)
        rest = rng.permutation(np.flatnonzero(fold != k) if count > 1 else test)
        cut = round(validation * len(rest))
        parts.append((rest[cut:], rest[:cut], test))
    sizes = [min(len(p[i]) for p in parts) for i in range(2)]
    if min(sizes) < 1:
        raise ValueError(f"got {len(arm)} people for {count} folds; expected more")
    longest = max(len(p[2]) for p in parts)
    tests = [np.resize(p[2], longest) for p in parts]
    for p, t in zip(parts, tests, strict=True):
        t[len(p[2]) :] = p[2][-1]
    return Folds(
        np.stack([p[0][: sizes[0]] for p in parts]),
        np.stack([p[1][: sizes[1]] for p in parts]),
        np.stack(tests),
    )


def fold_of(folds: Folds, people: int) -> np.ndarray:
    """Which fold tests each person [N]."""
    out = np.empty(people, int)
    for k, rows in enumerate(folds.test):
        out[rows] = k
    return out


def scale_of(y: np.ndarray, rows: np.ndarray) -> Scale:
    """Of outcomes [N, O] among rows [K, n]."""
    seen = y[rows]
    spread = seen.std(axis=1)
    return Scale(seen.mean(axis=1), np.where(spread > 0, spread, 1.0))


class Trainer(NamedTuple):
    """Compiled functions for a learner; all have a leading axis of folds."""

    start: Callable[..., Any]  # keys [K] -> state
    epoch: Callable[..., Any]  # (state, keys, data, rows, ...) -> (state, losses)
    predict: Callable[..., Any]  # (state, x [K, n, F]) -> [K, n, A, O]
    traced: list[str]  # a name for each time that one of them was traced


class State(NamedTuple):
    """Of one fold."""

    params: Any
    opt_state: Any
    best: Any  # parameters of the best epoch on validation rows
    loss: jax.Array  # [] there


class Data(NamedTuple):
    """The experiment on the device, outcomes not standardised."""

    x: jax.Array  # [N, F]
    arm: jax.Array  # [N]
    y: jax.Array  # [N, O]


def in_blocks(predict: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`predict` of features [n, F] -> [n, A, O], at most `BLOCK` people at a time."""
    count = -(-len(x) // BLOCK)
    size = -(-len(x) // count)
    filled = jnp.pad(x, ((0, count * size - len(x)), (0, 0)))
    found = jax.lax.map(predict, filled.reshape(count, size, x.shape[1]))
    return found.reshape(count * size, *found.shape[2:])[: len(x)]


def make_trainer(
    learner: Learner, features: int, *, rate: float, epochs: int, rows: int, batch: int
) -> Trainer:
    """AdamW (decay 1e-3, cosine to a hundredth of the peak), best epoch kept.

    Args:
      learner: from `uplift_baselines`.
      features: F.
      rate: the peak.
      epochs: in all, for the schedule.
      rows: of a fold's training part.
      batch: B; rows that are left over wait for the next epoch's order.
    """
    batch = min(batch, rows)
    steps = rows // batch
    optimizer = adamw(
        rate, steps=epochs * steps, end=rate / 100, weight_decay=1e-3, clip=1.0
    )
    traced: list[str] = []

    def start(key: jax.Array) -> State:
        traced.append("start")
        params = learner.init(key, features)
        return State(params, optimizer.init(params), params, jnp.float32(math.inf))

    def epoch(
        state: State,
        key: jax.Array,
        data: Data,
        train: jax.Array,
        validation: jax.Array,
        scale: Scale,
    ) -> tuple[State, tuple[jax.Array, jax.Array]]:
        traced.append("epoch")

        def batch_of(rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            y = (data.y[rows] - scale.mean[None]) / scale.spread[None]
            return data.x[rows], data.arm[rows], y

        def step(carry: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
            params, opt_state = carry
            loss, gradient = jax.value_and_grad(learner.loss)(params, *batch_of(rows))
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        order = jax.random.permutation(key, train)[: steps * batch]
        (params, opt_state), losses = jax.lax.scan(
            step, (state.params, state.opt_state), order.reshape(steps, batch)
        )
        x, arm, y = batch_of(validation)
        found = in_blocks(functools.partial(learner.predict, params), x)
        error = jnp.mean((observed(found, arm) - y) ** 2)
        better = error < state.loss
        best = jax.tree.map(
            lambda new, old: jnp.where(better, new, old), params, state.best
        )
        least = jnp.where(better, error, state.loss)  # a NaN is not better
        state = State(params, opt_state, best, least)
        return state, (jnp.mean(losses), error)

    def predict(state: State, x: jax.Array, scale: Scale) -> jax.Array:
        traced.append("predict")
        found = in_blocks(functools.partial(learner.predict, state.best), x)
        return scale.mean[None, None] + scale.spread[None, None] * found

    return Trainer(
        jax.jit(jax.vmap(start)),
        jax.jit(jax.vmap(epoch, in_axes=(0, 0, None, 0, 0, 0)), donate_argnums=0),
        jax.jit(jax.vmap(predict)),
        traced,
    )


def fit(
    trainer: Trainer,
    trial: Trial,
    folds: Folds,
    *,
    epochs: int,
    seed: int,
    each: Callable[[int, Mapping[str, float]], None],
) -> tuple[State, Scale]:
    """Trains on all folds; `each` gets an epoch's number and mean losses.

    Raises:
      FloatingPointError: a fold's validation error was never finite.
    """
    count = len(folds.train)
    scale = Scale(
        *(jnp.asarray(s, jnp.float32) for s in scale_of(trial.y, folds.train))
    )
    data = Data(jnp.asarray(trial.x), jnp.asarray(trial.arm), jnp.asarray(trial.y))
    train, validation = jnp.asarray(folds.train), jnp.asarray(folds.validation)
    key = jax.random.key(seed)
    state = trainer.start(jax.random.split(jax.random.fold_in(key, 0), count))
    lost = 0
    for i in range(epochs):
        keys = jax.random.split(jax.random.fold_in(key, i + 1), count)
        state, (losses, errors) = trainer.epoch(
            state, keys, data, train, validation, scale
        )
        lost += not np.isfinite(errors).all()
        each(i, {"loss": float(losses.mean()), "validation": float(errors.mean())})
    if not np.isfinite(state.loss).all():
        raise FloatingPointError(
            "the validation error was never finite: training diverged; lower --rate"
        )
    if lost:
        print(
            f"training diverged: {lost} of {epochs} epochs without a validation error;"
            " the best epochs before are kept; a lower --rate may help"
        )
    return state, scale


def out_of_fold(
    trainer: Trainer, state: State, scale: Scale, trial: Trial, folds: Folds
) -> np.ndarray:
    """Each person's expected outcomes [N, A, O], by the model that did not see them."""
    found = trainer.predict(state, jnp.asarray(trial.x[folds.test]), scale)
    out = np.zeros((len(trial.arm), *found.shape[2:]), np.float32)
    out[folds.test.reshape(-1)] = np.asarray(found).reshape(-1, *found.shape[2:])
    return out


def boosted_out_of_fold(
    name: str, trial: Trial, folds: Folds, *, seed: int
) -> np.ndarray:
    """The same by gradient boosting, which has its validation rows to train on, too."""
    out = np.zeros((len(trial.arm), len(trial.arms), len(trial.outcomes)), np.float32)
    for train, validation, test in zip(*folds, strict=True):
        rows = np.concatenate([train, validation])
        part = trial.x[rows], trial.arm[rows], trial.y[rows]
        out[test] = boosting(
            name,
            part,
            trial.x[test],
            arms=len(trial.arms),
            binary=trial.binary,
            seed=seed,
        )
    return out

"""The loop around a step: progress, metrics, validation, checkpoints.

A run that is killed, at any point, and started again gives the same result, bit for
bit, as one that was not: a step depends on the state and the batch, the batch on the
step's number, and what is logged, when, on that number, too. Not the time it takes.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from multitask_jax.training import saving
from multitask_jax.training.saving import Best
from multitask_jax.training.state import TrainState, join, whole
from multitask_jax.training.step import OURS, Step
from multitask_jax.training.writers import Writer


class FitResult(NamedTuple):
    """What training made."""

    state: TrainState  # after the last step
    best: Best | None  # the best on validation, all its leaves; None without eval_fn
    history: list[dict[str, float]]  # what was written: "step" and metrics by name
    waiting: float  # of the time of the steps done here, as `fit` tells


def fit(
    step: Step,
    state: TrainState,
    batches: Callable[[int], Any],
    *,
    steps: int,
    workdir: str | os.PathLike[str] | None = None,
    config: Mapping[str, Any] | None = None,
    eval_fn: Callable[[Any], Mapping[str, Any]] | None = None,
    eval_every: int | None = None,
    best_by: str | None = None,
    checkpoint_every: int | None = None,
    log_every: int = 100,
    writer: Writer | None = None,
    progress: bool = True,
) -> FitResult:
    """Trains until `steps` steps are done, from the newest checkpoint if there is one.

    Metrics stay on the device until they are written: every `log_every` steps, and
    where there is an evaluation or a checkpoint. A record has their means over the
    steps since the one before, and the evaluation's values as "eval/NAME". Steps in
    which a metric of the loss is NaN do not count for it; NaN in all, it is left out.

    The writer, not the history, gets "waiting", too: the share of the steps' time, that
    of evaluations and checkpoints left out, in which the host made batches and placed
    them on the mesh. No device waits longer for them, and less where it was behind.

    Args:
      step: from `make_step`.
      state: from `init_state`; it is used up.
      batches: step -> batch, of arrays that nobody changes later; a pure function, so
        that there is no stream to save.
      steps: in all, those of an earlier run included.
      workdir: where checkpoints/ lies; without it, nothing is saved or resumed.
      config: what else the run depends on (numbers, strings): a checkpoint with
        another one is refused.
      eval_fn: all parameters -> scalars by name. It must not keep the parameters: the
        next step takes their memory.
      eval_every: steps between evaluations; there is always one after the last step.
      best_by: the scalar whose highest value is the best; not needed if there is one.
      checkpoint_every: the same for checkpoints.
      log_every: the same for records.
      writer: what records go to.
      progress: a bar on standard error, if that is a terminal.

    Raises:
      ValueError: a checkpoint of another run or beyond `steps`; an interval below 1;
        no scalar to choose the best by.
      FloatingPointError: the loss is not finite; nothing of it was saved.
    """
    for name, every in (
        ("eval_every", eval_every),
        ("checkpoint_every", checkpoint_every),
        ("log_every", log_every),
    ):
        if every is not None and every < 1:
            raise ValueError(f"{name}: got {every}, expected at least 1")
    state = step.place_state(state)
    history: list[dict[str, float]] = []
    best: Best | None = None
    if workdir is not None:
        folder = Path(workdir) / "checkpoints"
        about = saving.fingerprint(state, config)
        if (found := saving.latest(folder)) is not None:
            state, best, history = saving.restore(found, state, about)
    start = int(state.step)
    if start > steps:
        raise ValueError(f"the state has done {start} steps already, steps is {steps}")
    if writer is not None:
        writer.rewind(start)

    def due(every: int | None, done: int) -> bool:
        return done == steps or (every is not None and done % every == 0)

    pending: list[Mapping[str, jax.Array]] = []
    making = steps_making = steps_took = 0.0  # seconds
    since = time.perf_counter()
    off = None if progress else True  # None: unless it is a terminal
    with tqdm(total=steps, initial=start, unit="step", disable=off) as bar:
        for done in range(start + 1, steps + 1):
            begun = time.perf_counter()
            batch = step.place_batch(batches(done - 1))
            making += time.perf_counter() - begun
            state, metrics = step(state, batch)
            del batch  # its memory, before the next one is made
            if done == start + 1:  # compiling is no training
                jax.block_until_ready(metrics)
                making, since = 0.0, time.perf_counter()
            pending.append(metrics)
            bar.update()
            evaluates = eval_fn is not None and due(eval_every, done)
            saves = workdir is not None and due(checkpoint_every, done)
            if not (evaluates or saves or due(log_every, done)):
                continue
            record = _means(pending, done)  # waits for the device
            took = time.perf_counter() - since
            pending = []
            if evaluates:
                values = {k: float(v) for k, v in eval_fn(whole(state)).items()}
                record |= {f"eval/{name}": value for name, value in values.items()}
                value = values[_criterion(values, best_by)]
                # A NaN is never the best. The copy outlives the next step.
                if value > (-math.inf if best is None else best.value):
                    best = Best(jax.tree.map(jnp.copy, state.params), done, value)
            bar.set_postfix(loss=f"{record['loss']:.4g}", refresh=False)
            history.append({"step": done, **record})
            if writer is not None:
                writer.write(done, {**record, "waiting": making / max(took, 1e-9)})
            if saves:
                saving.save(folder, saving.Saved(state, best, history), about)
            steps_making, steps_took = steps_making + making, steps_took + took
            making, since = 0.0, time.perf_counter()
    if best is not None:
        best = best._replace(params=join(best.params, state.frozen))
    waiting = steps_making / steps_took if steps_took else 0.0
    return FitResult(state, best, history, waiting)


def _means(pending: Sequence[Mapping[str, jax.Array]], done: int) -> dict[str, float]:
    """Means over steps, the last of which is `done`, brought to the host together."""
    rows = jax.device_get(list(pending))
    losses = [float(row["loss"]) for row in rows]
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {done - len(rows) + i + 1}; try a lower"
                " learning rate, or clip gradients (optax.clip_by_global_norm)"
            )
    # A metric may come with some batches only, as with a task of its own, or be NaN in
    # those that say nothing of it.
    names = dict.fromkeys(name for row in rows for name in row)
    found = {}
    for name in names:
        values = np.array([row[name] for row in rows if name in row], float)
        if name not in OURS:
            values = values[~np.isnan(values)]
        if len(values):
            found[name] = float(values.mean())
    return found


def _criterion(values: Mapping[str, float], best_by: str | None) -> str:
    if best_by is None and len(values) == 1:
        return next(iter(values))
    if best_by not in values:
        raise ValueError(
            f"best_by: got {best_by!r}, expected one of the scalars of eval_fn:"
            f" {', '.join(values) or 'there are none'}"
        )
    return best_by

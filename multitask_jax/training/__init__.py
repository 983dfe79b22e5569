"""Training: a state, a jitted step, a loop that resumes; sampling, gradients, writers.

    optimizer = training.adamw(1e-3, steps=1000)
    state = training.init_state(params, optimizer, jax.random.key(0))
    step = training.make_step(loss_fn, optimizer)
    result = training.fit(step, state, batch_at, steps=1000, workdir=..., eval_fn=...)

Modules for tasks: `sampling`, `gradients`; for metrics: `writers`.
"""

from multitask_jax.training import gradients, sampling, writers
from multitask_jax.training.loop import FitResult, fit
from multitask_jax.training.optimizers import adamw, decayed
from multitask_jax.training.saving import Best
from multitask_jax.training.state import TrainState, init_state, join, split, whole
from multitask_jax.training.step import Step, make_step

__all__ = [
    "Best",
    "FitResult",
    "Step",
    "TrainState",
    "adamw",
    "decayed",
    "fit",
    "gradients",
    "init_state",
    "join",
    "make_step",
    "sampling",
    "split",
    "whole",
    "writers",
]

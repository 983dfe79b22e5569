"""Which task trains at a step, and on which examples: pure functions of the step.

Nothing is carried from step to step, so that a resumed run needs the step alone. What
is expensive to find again (a permutation, counts of earlier turns) is memoised.

Legend: T tasks, n_t examples of task t, B examples of a batch.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BLOCK = 1024  # steps whose tasks are drawn together


class Turn(NamedTuple):
    """The task that trains, and how many turns it has had before: its own step."""

    task: int
    visit: int


def round_robin(sizes: Sequence[int], step: int, *, seed: int = 0) -> Turn:
    """One task after the other, whatever their sizes and the seed."""
    _check(sizes, step)
    return Turn(step % len(sizes), step // len(sizes))


def proportional(sizes: Sequence[int], step: int, *, seed: int = 0) -> Turn:
    """Task t with probability n_t / sum n: `temperature` at 1."""
    return temperature(sizes, step, seed=seed, temperature=1.0)


def temperature(
    sizes: Sequence[int], step: int, *, seed: int = 0, temperature: float = 2.0
) -> Turn:
    """Task t with a probability in proportion to n_t^(1 / temperature).

    1 is proportional; infinity gives every task the same share (Aharoni et al. 2019,
    arXiv 1903.00089; Raffel et al. 2020, section 3.5.2).

    Args:
      sizes: n_t, positive.
      step: from 0.
      seed: the same seed gives the same tasks.
      temperature: positive.

    Raises:
      ValueError: no tasks, or a number out of range.
    """
    _check(sizes, step)
    shares = probabilities(sizes, temperature=temperature)
    block, place = divmod(step, _BLOCK)
    tasks = _tasks(shares, seed, block)
    task = int(tasks[place])
    here = int(np.count_nonzero(tasks[:place] == task))
    return Turn(task, _turns_before(shares, seed, block)[task] + here)


def probabilities(sizes: Sequence[int], *, temperature: float) -> tuple[float, ...]:
    """p_t = n_t^(1 / temperature) / sum of these, [T].

    Raises:
      ValueError: no tasks, or a number that is not positive.
    """
    _check(sizes, 0)
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected a positive number")
    # As shares of the largest: small temperatures would overflow otherwise.
    powers = (np.asarray(sizes, np.float64) / max(sizes)) ** (1 / temperature)
    return tuple((powers / powers.sum()).tolist())


def epoch_indices(n: int, batch: int, step: int, *, seed: int = 0) -> np.ndarray:
    """Examples [B] of the step: each epoch shuffled anew, each example once an epoch.

    Epochs follow each other without a gap: a batch may end one and begin the next, so
    that none is short and no example is left out.

    Args:
      n: examples in all.
      batch: B, which may exceed n.
      step: from 0; with several tasks, the task's own: `Turn.visit`.
      seed: of the shuffles.

    Raises:
      ValueError: a number is out of range.
    """
    for name, got, least in (("n", n, 1), ("batch", batch, 1), ("step", step, 0)):
        if got < least:
            raise ValueError(f"{name}: got {got}, expected at least {least}")
    start, stop = step * batch, (step + 1) * batch
    parts = []
    for epoch in range(start // n, (stop - 1) // n + 1):
        order = _permutation(n, seed, epoch)
        parts.append(order[max(start - epoch * n, 0) : min(stop - epoch * n, n)])
    return np.concatenate(parts)


def _check(sizes: Sequence[int], step: int) -> None:
    if not len(sizes) or min(sizes) <= 0:
        raise ValueError(f"sizes: got {list(sizes)}, expected a positive number a task")
    if step < 0:
        raise ValueError(f"step: got {step}, expected at least 0")


@functools.lru_cache(maxsize=16)
def _tasks(shares: tuple[float, ...], seed: int, block: int) -> np.ndarray:
    # Inverse transform of uniform numbers: `Generator.choice` may change its way.
    uniform = np.random.default_rng((seed, block, 0)).random(_BLOCK)
    edges = np.cumsum(shares)[:-1]
    return np.searchsorted(edges, uniform, side="right")


@functools.cache
def _turns_of(shares: tuple[float, ...], seed: int, block: int) -> tuple[int, ...]:
    tasks = _tasks(shares, seed, block)
    return tuple(np.bincount(tasks, minlength=len(shares)).tolist())


@functools.lru_cache(maxsize=16)
def _turns_before(shares: tuple[float, ...], seed: int, block: int) -> tuple[int, ...]:
    turns = [_turns_of(shares, seed, b) for b in range(block)]
    return tuple(map(sum, zip(*turns, strict=True))) or (0,) * len(shares)


@functools.lru_cache(maxsize=32)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng((seed, epoch, 1)).permutation(n)
    return order.astype(np.int32 if n < 2**31 else np.int64)

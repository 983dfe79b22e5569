"""LiNeS for a single task: how much of a fine-tuning to keep, against forgetting.

Wang et al. (2025), arXiv 2410.17146. beta = 1 - alpha, so that the last block moves as
fine-tuned and the first by alpha; alpha is chosen on validation data of the target and
of control tasks.

Legend: A candidates for alpha, C control tasks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from multitask_jax.merging.core import merge
from multitask_jax.merging.lines import with_lines
from multitask_jax.merging.recipes import task_arithmetic

Score = Callable[[Any], Any]  # parameters -> a number, higher is better
ALPHAS = tuple(i / 10 for i in range(11))


class SingleTask(NamedTuple):
    """What `lines_single_task` chose, and from what."""

    alpha: float
    params: Any  # the base's structure and dtypes
    alphas: np.ndarray  # [A]
    target: np.ndarray  # [A] scores on the target task
    controls: np.ndarray  # [A, C] scores on the control tasks
    criterion: np.ndarray  # [A]
    fine_tuned: float  # the fine-tuned model on the target task
    zero_shot: np.ndarray  # [C] the base on the control tasks


def criterion(
    target: Any, controls: Any, *, fine_tuned: float, zero_shot: Any
) -> np.ndarray:
    """2 target / fine-tuned + mean_c control_c / zero-shot_c, for each candidate.

    Args:
      target: [A] scores of candidates on the target task, higher is better.
      controls: [A, C] their scores on control tasks.
      fine_tuned: the fine-tuned model's score on the target task.
      zero_shot: [C] the base's scores on the control tasks.

    Returns:
      [A], at most about 3.

    Raises:
      ValueError: shapes differ, a score is not finite, or one to divide by is not
        positive.
    """
    target, controls, zero_shot = (
        np.asarray(x, np.float64) for x in (target, controls, zero_shot)
    )
    shape = (*target.shape, *zero_shot.shape)
    if target.ndim != 1 or zero_shot.ndim != 1 or controls.shape != shape:
        raise ValueError(
            f"got target {target.shape}, controls {controls.shape}, zero_shot"
            f" {zero_shot.shape}; expected [A], [A, C], [C]"
        )
    if not zero_shot.size:
        raise ValueError("got no control tasks: nothing tells what is forgotten")
    if not (np.isfinite(target).all() and np.isfinite(controls).all()):
        raise ValueError("a candidate's score is NaN or infinite")
    divisors = np.array([fine_tuned, *zero_shot])
    if not (np.isfinite(divisors) & (divisors > 0)).all():
        raise ValueError(
            f"got scores fine_tuned={fine_tuned}, zero_shot={zero_shot.tolist()};"
            " expected positive numbers, like accuracies"
        )
    return 2 * target / fine_tuned + np.mean(controls / zero_shot, axis=1)


def select_alpha(
    alphas: Sequence[float],
    target: Any,
    controls: Any,
    *,
    fine_tuned: float,
    zero_shot: Any,
) -> float:
    """The alpha of the largest `criterion`; of equals the smallest, which moves less.

    Args:
      alphas: [A].
      target, controls, fine_tuned, zero_shot: as for `criterion`.

    Raises:
      ValueError: as `criterion`, or as many alphas as scores are not given.
    """
    values = criterion(target, controls, fine_tuned=fine_tuned, zero_shot=zero_shot)
    if np.shape(alphas) != values.shape:
        raise ValueError(f"got {np.shape(alphas)} alphas for {values.shape} scores")
    return min(a for a, v in zip(alphas, values, strict=True) if v == values.max())


def lines_single_task(
    base: Any,
    model: Any,
    target_score: Score,
    control_scores: Sequence[Score],
    *,
    alphas: Sequence[float] = ALPHAS,
    block_pattern: str | None = None,
) -> SingleTask:
    """theta_0 + (alpha + (1 - alpha) l / (L - 1)) tau, with alpha chosen by scores.

    One compiled program makes all candidates, one at a time.

    Args:
      base: theta_0, a pytree of arrays.
      model: the fine-tuned one, alike.
      target_score: parameters -> score on the task it was tuned for, on validation
        data; positive, higher is better.
      control_scores: the same for tasks that the base could do.
      alphas: candidates.
      block_pattern: as for `scale_by_depth`.

    Raises:
      ValueError: no alphas or control tasks, scores that are not positive numbers, or
        what `merge` raises.
    """
    if not len(alphas):
        raise ValueError("alphas: got none, expected numbers like 0, 0.1, ..., 1")

    @jax.jit
    def merged(alpha: Any, base: Any, model: Any) -> Any:
        method = with_lines(
            task_arithmetic(), alpha=alpha, beta=1 - alpha, block_pattern=block_pattern
        )
        return merge(method, base, [model])

    rows = []
    for alpha in alphas:
        params = merged(alpha, base, model)
        rows.append([float(score(params)) for score in (target_score, *control_scores)])
        del params  # before the next one is made
    table = np.array(rows)
    fine_tuned = float(target_score(model))
    zero_shot = np.array([float(score(base)) for score in control_scores])
    target, controls = table[:, 0], table[:, 1:]
    known = {"fine_tuned": fine_tuned, "zero_shot": zero_shot}
    alpha = select_alpha(alphas, target, controls, **known)
    return SingleTask(
        alpha,
        merged(alpha, base, model),
        np.array(alphas),
        target,
        controls,
        criterion(target, controls, **known),
        **known,
    )

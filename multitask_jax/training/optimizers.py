"""The optimiser most systems train with; everything else is optax's as it is."""

import re
from typing import Any

import jax
import optax

from multitask_jax import tree as trees

# Biases and norms: by the last part of the path, or "norm" anywhere in it.
_NOT_DECAYED = re.compile(r"(?:^|[/._])(?:bias|scale|offset|beta|gamma)$|norm|/ln_")


def decayed(params: Any) -> Any:
    """True for leaves that weight decay is for: matrices that no norm has.

    Before/after: {"dense": {"kernel": [4, 3], "bias": [3]}} ->
    {"dense": {"kernel": True, "bias": False}}.
    """
    chosen = {
        path: jax.numpy.ndim(x) > 1 and not _NOT_DECAYED.search(path.lower())
        for path, x in trees.flatten(params).items()
    }
    return trees.unflatten(params, chosen)


def adamw(
    peak: float,
    *,
    steps: int,
    warmup: float = 0.05,
    end: float = 0.0,
    weight_decay: float = 0.01,
    clip: float | None = None,
    **adam: Any,
) -> optax.GradientTransformation:
    """AdamW with linear warm-up and cosine decay, biases and norms not decayed.

    Args:
      peak: the highest learning rate.
      steps: of the run.
      warmup: the share of them in which the rate rises from 0.
      end: the rate after the last step.
      weight_decay: decoupled, as in AdamW.
      clip: the largest norm of a gradient; by default any.
      adam: b1, b2, eps and so on, for `optax.adamw`.

    Raises:
      ValueError: a number out of range.
    """
    if steps < 1 or not 0 <= warmup < 1:
        raise ValueError(
            f"got steps={steps}, warmup={warmup}; expected at least one step, and a"
            " share of them from 0 to less than 1"
        )
    rate = optax.warmup_cosine_decay_schedule(
        0.0, peak, round(warmup * steps), steps, end
    )
    optimizer = optax.adamw(rate, weight_decay=weight_decay, mask=decayed, **adam)
    if clip is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(clip), optimizer)

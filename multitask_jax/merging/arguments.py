"""Arguments that transforms and recipes share, checked where they are given."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# One number for all models, or one per model.
Shares = float | Sequence[float]


def check_choice(name: str, value: str, options: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of the options."""
    if value not in options:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(options)}")


def check_share(name: str, value: float) -> None:
    """Raises ValueError unless 0 < value <= 1."""
    if not np.isscalar(value) or not 0 < value <= 1:
        raise ValueError(f"{name}: got {value}, expected a number in (0, 1]")


def numbers(value: Shares) -> tuple[float, ...]:
    """One number or several, as a tuple."""
    return tuple(float(x) for x in np.atleast_1d(value))


def shares(name: str, value: Shares) -> tuple[float, ...]:
    """`numbers` of which each is in (0, 1]; raises ValueError otherwise."""
    out = numbers(value)
    for x in out:
        check_share(name, x)
    return out


def at_leaf(name: str, value: Shares | Mapping[str, Shares], path: str) -> Shares:
    """What holds for a leaf, of one value for all leaves or one by path.

    Raises:
      ValueError: a leaf that the mapping lacks.
    """
    if not isinstance(value, Mapping):
        return value
    if path not in value:
        raise ValueError(f"{name}: nothing for {path} among {len(value)} leaves")
    return value[path]


def per_model(xs: tuple[Any, ...], count: int, name: str) -> tuple[Any, ...]:
    """One for each of `count` models; raises ValueError unless there are 1 or `count`.

    Before/after, for 3 models: (0.2,) -> (0.2, 0.2, 0.2).
    """
    if len(xs) not in (1, count):
        raise ValueError(f"{name}: got {len(xs)} for {count} models; give 1 or {count}")
    return xs * count if len(xs) == 1 else xs

"""Searches over coefficients: a space in words, and three ways through it.

A search is a generator that yields coefficients and is sent what they are worth. It
depends on nothing else, so the same answers make the same sequence: a sweep that was
stopped goes on by sending the answers of its log again.

Legend: D coefficients; each is searched as a number in [0, 1] across its range.
"""

import itertools
import math
from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Value = float | str
Space = Mapping[str, tuple[Value, ...]]  # a grid's values, or (low, high)
Coefficients = dict[str, Value]


class Outcome(NamedTuple):
    """What coefficients are worth: higher is better, NaN is a failure."""

    value: float
    gradient: Mapping[str, float] | None = None  # d value / d coefficient


Search = Generator[Coefficients, Outcome, None]


def tidy(x: float, digits: int = 6) -> float:
    """Six digits: short to write, and exactly what was tried."""
    return float(f"{x:.{digits}g}")


def parse_grid(text: str) -> dict[str, tuple[Value, ...]]:
    """Values by name: "scale=0:1:3,density=0.1|0.2" -> scale 0, .5, 1; density .1, .2.

    start:stop:count is evenly spaced, ends included; a|b|c lists numbers or words.

    Raises:
      ValueError: names the part that is not so.
    """
    space: dict[str, tuple[Value, ...]] = {}
    for name, words, part in _parts(text):
        pieces = words.split(":")
        if len(pieces) == 1:
            values = tuple(map(_value, words.split("|")))
            if "" in values or not all(math.isfinite(v) for v in _numbers(values)):
                raise _unreadable(part, "values like 0.1|0.2|0.5")
        else:
            try:
                start, stop, count = float(pieces[0]), float(pieces[1]), int(pieces[2])
                if len(pieces) > 3 or count < 1 or not math.isfinite(stop - start):
                    raise ValueError
            except (ValueError, IndexError):
                raise _unreadable(part, "start:stop:count, like 0.2:2:10") from None
            values = tuple(tidy(x) for x in np.linspace(start, stop, count))
        space[name] = tuple(dict.fromkeys(values))
    return space


def parse_ranges(text: str) -> dict[str, tuple[float, float]]:
    """Ranges by name: "scale=0.2:2,t=0:1" -> scale (.2, 2), t (0, 1).

    Raises:
      ValueError: names the part that is not so.
    """
    space = {}
    for name, words, part in _parts(text):
        try:
            low, high = map(float, words.split(":"))
            if not (math.isfinite(high - low) and low < high):
                raise ValueError
        except ValueError:
            wanted = "low:high, like 0.2:2 (lists and counts are for --search=grid)"
            raise _unreadable(part, wanted) from None
        space[name] = (low, high)
    return space


def _parts(text: str) -> list[tuple[str, str, str]]:
    """(name, what it may be, both as written) for each part of a space."""
    out: list[tuple[str, str, str]] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, words = (x.strip() for x in part.partition("="))
        if not (name and equals and words):
            raise _unreadable(part, "name=values")
        if name in (known for known, *_ in out):
            raise ValueError(f"--ranges: {name} is there twice")
        out.append((name, words, part))
    if not out:
        raise ValueError(
            "--ranges: got nothing to search; pass for example"
            " --ranges=scale=0.2:2:10,density=0.1|0.2"
        )
    return out


def _value(word: str) -> Value:
    try:
        return float(word)
    except ValueError:
        return word.strip()


def _numbers(values: Sequence[Value]) -> list[float]:
    return [v for v in values if isinstance(v, float)]


def _unreadable(part: str, wanted: str) -> ValueError:
    return ValueError(f"--ranges: can't read {part!r}, expected {wanted}")


def grid(space: Space) -> Search:
    """All combinations; the last coefficient changes fastest."""
    for values in itertools.product(*space.values()):
        yield dict(zip(space, values, strict=True))


def _within(
    ranges: Mapping[str, tuple[float, float]], x: np.ndarray
) -> dict[str, Value]:
    """Coefficients at x [D] in [0, 1]."""
    pairs = zip(ranges.items(), x, strict=True)
    return {k: tidy(low + float(u) * (high - low)) for (k, (low, high)), u in pairs}


def cma_es(
    ranges: Mapping[str, tuple[float, float]], *, budget: int, seed: int
) -> Search:
    """CMA-ES (Hansen 2016, arXiv 1604.00772) from the middle of the ranges.

    Generations of 4 + 3 ln D candidates until the budget is spent or the distribution
    has shrunk to a point. A failure counts as the worst outcome so far.

    Raises:
      ValueError: the library is not installed; names the extra.
    """
    try:
        from cmaes import CMA
    except ModuleNotFoundError:
        raise ValueError(
            "--search=cmaes needs the package cmaes:"
            " pip install 'multitask-jax[search]'"
        ) from None
    count = len(ranges)
    bounds = np.tile([0.0, 1.0], (count, 1))
    optimiser = CMA(mean=np.full(count, 0.5), sigma=0.3, bounds=bounds, seed=seed)
    size, worst = optimiser.population_size, 0.0
    losses: list[float] = []
    while len(losses) < budget and not optimiser.should_stop():
        generation = []
        for _ in range(min(size, budget - len(losses))):
            x = optimiser.ask()
            outcome = yield _within(ranges, x)
            losses.append(-outcome.value)
            generation.append((x, -outcome.value))
        if len(generation) == size:
            worst = max((v for v in losses if math.isfinite(v)), default=0.0)
            optimiser.tell(
                [(x, v if math.isfinite(v) else worst) for x, v in generation]
            )


def gradient_ascent(
    ranges: Mapping[str, tuple[float, float]], *, steps: int, rate: float
) -> Search:
    """Adam from the middle of the ranges, its steps decaying to 0, kept within them.

    `rate` is a share of the range. Ends early where the gradient is 0.
    """
    import optax

    optimiser = optax.adam(optax.cosine_decay_schedule(rate, steps))
    x = np.full(len(ranges), 0.5, np.float32)
    widths = np.array([high - low for low, high in ranges.values()])
    state = optimiser.init(x)
    for _ in range(steps):
        outcome = yield _within(ranges, x)
        assert outcome.gradient is not None
        slope = np.array([outcome.gradient[name] for name in ranges]) * widths
        if not slope.any():
            return
        updates, state = optimiser.update(-slope.astype(np.float32), state)
        x = np.clip(x + np.asarray(updates), 0, 1)

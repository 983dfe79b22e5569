"""Who walks through the maps of `vizdoom_clips`: half by sight, half at random.

A walker takes what it sees and answers with how it moves, tic by tic (1/35 s). It
holds what it is up to, and draws from a generator of its own.

Legend: H, W pixels.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Action = list[float]  # forward, right (engine's speeds), degrees to the right, use
NEAR = 1.5  # metres ahead at which a walker turns, and tries to open what is there
FREE = 12.0  # metres beyond which no way is more open than another
SECTORS = 7  # of the view


class Look(NamedTuple):
    """What a walker sees."""

    depth: np.ndarray  # [H, W] metres, some rows at eye level
    moved: float  # metres since the last tic


Walker = Callable[[Look], Action]


def scripted(rng: np.random.Generator) -> Walker:
    """Heads for open space, opens doors, and turns around when stuck."""
    speed, sway = rng.uniform(4, 16), rng.normal(scale=0.5)
    turn, slow, turning, pushed = 0.0, 0.0, 0, 0
    side = rng.choice([-1.0, 1.0])

    def act(look: Look) -> Action:
        nonlocal turn, slow, turning, pushed, side
        open_ = openness(look.depth)
        ahead = open_[SECTORS // 2]
        slow = 0.9 * slow + 0.1 * (look.moved < 0.01)
        if slow > 0.6 and not turning:  # half a second without a step
            turning, side, slow = int(rng.integers(15, 35)), rng.choice([-1.0, 1.0]), 0
        use = 0.0
        pushed = max(pushed - 1, 0)
        if ahead < NEAR and not pushed:  # a second push would close the door again
            use, pushed = 1.0, 35
        if turning:
            turning -= 1
            target, forward = 5.0 * side, 0.0
        else:
            best = np.argmax(np.minimum(open_, FREE) - 0.1 * np.abs(_ANGLES))
            target = 0.12 * _ANGLES[best] + sway
            forward = speed * np.clip(ahead / NEAR - 0.3, 0.2, 1)
        turn += 0.25 * (target - turn)  # heads have mass
        return [float(forward), 0.0, float(turn), use]

    return act


def random(rng: np.random.Generator) -> Walker:
    """Changes speed and heading at random, and does not look where it goes."""
    target = _draw(rng)
    now = np.zeros(3)

    def act(look: Look) -> Action:
        nonlocal target, now
        if rng.random() < 1 / 25 or (look.moved < 0.01 and rng.random() < 0.1):
            target = _draw(rng)
        now = now + 0.2 * (target - now)
        return [*map(float, now), float(rng.random() < 0.02)]

    return act


WALKERS = (scripted, random)
_ANGLES = np.linspace(-1, 1, SECTORS) * 38.0  # degrees to the right, of a view of 90


def openness(depth: np.ndarray) -> np.ndarray:
    """Metres to what is nearest, by sector from left to right: [SECTORS].

    The nearest tenth of the pixels does not count: it may be a lamp or a post.
    """
    edges = np.linspace(0, depth.shape[1], SECTORS + 1).astype(int)
    return np.array(
        [
            np.partition(x := depth[:, a:b].ravel(), x.size // 10)[x.size // 10]
            for a, b in itertools.pairwise(edges)
        ]
    )


def _draw(rng: np.random.Generator) -> np.ndarray:
    """Speeds forward and right, degrees a tic: mostly forward, sometimes back."""
    forward = rng.uniform(3, 16) * rng.choice([1, 1, 1, 1, -0.5])
    return np.array([forward, rng.normal(scale=2), rng.normal(scale=2.5)])

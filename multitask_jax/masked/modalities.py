"""What a masked model is told of its modalities, and where their tokens lie.

A clip's tokens are one flat array: the modalities behind each other in their order,
each row by row (time first). A token's *position* is its index there. The vocabularies
stand behind each other in one table too: a token's *id* tells its modality.

Legend: M modalities, L = sum of their lengths, V = sum of their vocabularies, D width,
B batch.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Modality(NamedTuple):
    """One kind of token."""

    name: str
    grid: tuple[int, ...]  # (time, height, width) or (time,)
    vocabulary: int

    @property
    def length(self) -> int:
        """Tokens of a clip."""
        return math.prod(self.grid)


Modalities = tuple[Modality, ...]


def lengths(modalities: Modalities) -> np.ndarray:
    """Tokens of each; int32 [M]."""
    return np.array([m.length for m in modalities], np.int32)


def starts(modalities: Modalities) -> np.ndarray:
    """Position of the first token of each; int32 [M]."""
    return np.cumsum([0, *lengths(modalities)[:-1]]).astype(np.int32)


def first_ids(modalities: Modalities) -> np.ndarray:
    """Id of the first code of each; int32 [M]."""
    return np.cumsum([0, *(m.vocabulary for m in modalities[:-1])]).astype(np.int32)


def modality_of(modalities: Modalities) -> np.ndarray:
    """Index of the modality at each position; int32 [L]."""
    return np.repeat(np.arange(len(modalities), dtype=np.int32), lengths(modalities))


def modality_of_id(modalities: Modalities) -> np.ndarray:
    """Index of the modality of each id; int32 [V]."""
    sizes = [m.vocabulary for m in modalities]
    return np.repeat(np.arange(len(modalities), dtype=np.int32), sizes)


def indices(modalities: Modalities, names: Sequence[str]) -> list[int]:
    """Where the named ones stand.

    Raises:
      ValueError: a name that is none of theirs, or one twice.
    """
    known = [m.name for m in modalities]
    for name in names:
        if name not in known or list(names).count(name) > 1:
            raise ValueError(
                f"got modalities {', '.join(names)}; expected some of"
                f" {', '.join(known)}, each once"
            )
    return [known.index(name) for name in names]


def positions(modalities: Modalities, names: Sequence[str]) -> np.ndarray:
    """Of all tokens of the named ones, in the names' order; int32.

    Raises:
      ValueError: as `indices`.
    """
    first, each = starts(modalities), lengths(modalities)
    spans = [first[i] + np.arange(each[i]) for i in indices(modalities, names)]
    return np.concatenate([np.zeros(0, np.int32), *spans]).astype(np.int32)


def sin_cos(positions: np.ndarray, width: int, span: int | None = None) -> np.ndarray:
    """Sines and cosines of places [N], half of `width` each; [N, width].

    All sines before all cosines. Frequencies fall geometrically: from 1 to 1 / 10,000
    a place (Vaswani et al. 2017, arXiv 1706.03762, section 3.5), or, with `span`, from
    pi to pi / span: half a wave is between one place and the span.
    """
    if width % 2:
        raise ValueError(f"sin_cos: got width {width}, expected an even number")
    count = width // 2
    if span is None:
        frequency = 10_000.0 ** -(np.arange(count) / count)
    else:
        frequency = np.pi * float(span) ** -np.linspace(0, 1, count)
    angle = np.asarray(positions, np.float64)[:, None] * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def position_table(modalities: Modalities, width: int) -> np.ndarray:
    """Fixed sin-cos places in the grid of each modality, [L, D].

    Time, height and width have a third of the features each (time what is left over).
    Time is the clip's: the middle of each token, in places of the finest modality, so
    that what happens at once is alike in all of them; a trajectory has nothing but
    time, and 0 in the other features. Waves fit each axis: of those up to 10,000 places
    long, most are constant on 8 places, so that neighbours look alike and attention
    takes long to tell them apart (both our choice).
    """
    axes = max(len(m.grid) for m in modalities)
    part = width // axes // 2 * 2
    own = width - part * (axes - 1)  # of time
    finest = max(m.grid[0] for m in modalities)
    table = np.zeros((sum(lengths(modalities)), width), np.float32)
    for m, start in zip(modalities, starts(modalities), strict=True):
        time, *space = np.indices(m.grid).reshape(len(m.grid), -1)
        rows = slice(start, start + m.length)
        moment = (time + 0.5) * finest / m.grid[0] - 0.5
        table[rows, :own] = sin_cos(moment, own, finest)
        for i, (place, size) in enumerate(zip(space, m.grid[1:], strict=True)):
            first = own + i * part
            table[rows, first : first + part] = sin_cos(place, part, size)
    return table


def flatten(
    modalities: Modalities, tokens: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Codes by name [B, *grid] -> ids [B, L] and which modalities there are [B, M].

    A modality that `tokens` lacks gets its first code and is marked as missing; the
    inverse is `unflatten`.

    Raises:
      ValueError: unknown names, none at all, another grid, or codes outside of the
        vocabulary.
    """
    indices(modalities, list(tokens))
    if not tokens:
        raise ValueError(
            "flatten: got no tokens; expected those of a modality at least"
        )
    count = len(next(iter(tokens.values())))
    ids, present = [], []
    for m, first in zip(modalities, first_ids(modalities), strict=True):
        codes = np.asarray(tokens.get(m.name, np.zeros((count, *m.grid), np.int32)))
        if codes.shape != (count, *m.grid):
            raise ValueError(
                f"tokens of {m.name}: got shape {codes.shape}, expected"
                f" {(count, *m.grid)}"
            )
        if codes.size and not 0 <= codes.min() <= codes.max() < m.vocabulary:
            raise ValueError(
                f"tokens of {m.name}: got codes from {codes.min()} to {codes.max()},"
                f" expected 0 to {m.vocabulary - 1}"
            )
        ids.append(codes.reshape(count, -1).astype(np.int32) + first)
        present.append(np.full(count, m.name in tokens))
    return np.concatenate(ids, axis=1), np.stack(present, axis=1)


def unflatten(modalities: Modalities, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Ids [B, L] -> codes by name [B, *grid], of all modalities."""
    out = {}
    at = zip(modalities, starts(modalities), first_ids(modalities), strict=True)
    for m, start, first in at:
        codes = np.asarray(ids)[:, start : start + m.length] - first
        out[m.name] = codes.reshape(-1, *m.grid)
    return out

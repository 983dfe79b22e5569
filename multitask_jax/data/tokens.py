"""Sentences as token ids, in batches of few different lengths.

Padding costs time, and every new shape a compilation: sentences are sorted by length
and padded to one of a few lengths (buckets). All functions are pure; the batches of an
epoch depend on (seed, epoch) alone, so that training resumes anywhere.

Legend: N rows, S sentences a row (1 or 2), L tokens, B rows a batch.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BUCKETS = (8, 16, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512)


class Encoded(NamedTuple):
    """Token ids of N rows: `ids[n][s]` is an int32 array of a sentence's tokens."""

    ids: list[tuple[np.ndarray, ...]]

    def lengths(self) -> np.ndarray:
        """Tokens of the longest sentence of each row, [N]."""
        return np.array([max(map(len, row)) for row in self.ids])


class Batch(NamedTuple):
    """Padded rows; `rows` [B] says which, -1 for one that fills the batch up."""

    rows: np.ndarray
    ids: np.ndarray  # [B, S, L] int32
    mask: np.ndarray  # [B, S, L] int32, 1 where there is a token


def tokenizer_file(model_dir: str | os.PathLike[str]) -> Path:
    """The tokenizer.json of a Hugging Face directory.

    Raises:
      FileNotFoundError: there is none; says how to make it.
    """
    path = Path(model_dir) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not there; expected a Hugging Face directory with it, which"
            " transformers makes of a vocab.txt: AutoTokenizer.from_pretrained(DIR)"
            ".save_pretrained(DIR)"
        )
    return path


def encode(
    model_dir: str | os.PathLike[str],
    rows: Sequence[tuple[str, ...]],
    *,
    max_length: int = 64,
) -> Encoded:
    """Tokenises by the directory's tokenizer.json, special tokens included.

    Args:
      model_dir: a Hugging Face directory.
      rows: N tuples of sentences.
      max_length: longer sentences are cut.

    Raises:
      FileNotFoundError: no tokenizer.json there.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file(model_dir)))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    flat = [sentence for row in rows for sentence in row]
    found = iter(tokenizer.encode_batch(flat))
    return Encoded(
        [tuple(np.array(next(found).ids, np.int32) for _ in row) for row in rows]
    )


def pad(
    encoded: Encoded,
    rows: np.ndarray,
    *,
    size: int | None = None,
    buckets: Sequence[int] = BUCKETS,
) -> Batch:
    """A batch of these rows [B], filled up to `size` with empty ones.

    It is as long as the first of `buckets` that holds its longest sentence.
    """
    size = len(rows) if size is None else size
    longest = max(len(s) for i in rows for s in encoded.ids[i])
    length = next((b for b in buckets if b >= longest), longest)
    shape = (size, len(encoded.ids[0]), length)
    ids, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for b, i in enumerate(rows):
        for s, tokens in enumerate(encoded.ids[i]):
            ids[b, s, : len(tokens)] = tokens
            mask[b, s, : len(tokens)] = 1
    filled = np.concatenate([rows, np.full(size - len(rows), -1)])
    return Batch(filled, ids, mask)


def in_order(
    encoded: Encoded, batch_size: int, *, buckets: Sequence[int] = BUCKETS
) -> list[Batch]:
    """All rows once, sorted by length, in batches of one size."""
    order = np.argsort(encoded.lengths(), kind="stable")
    return [
        pad(encoded, order[i : i + batch_size], size=batch_size, buckets=buckets)
        for i in range(0, len(order), batch_size)
    ]


def by_row(batches: Sequence[Batch], values: Iterable[Any]) -> np.ndarray:
    """Values [N, ...] in the order of rows, from those of each batch, [B, ...]."""
    found: dict[int, np.ndarray] = {}
    for batch, x in zip(batches, values, strict=True):
        found |= {int(r): v for r, v in zip(batch.rows, np.asarray(x), strict=True)}
    return np.stack([found[row] for row in range(max(found) + 1)])


def steps_an_epoch(rows: int, batch_size: int) -> int:
    """Batches of an epoch; the last few rows of its order are left out."""
    return max(rows // batch_size, 1)


def shuffled(
    lengths: np.ndarray, batch_size: int, *, seed: int, epoch: int, window: int = 8
) -> np.ndarray:
    """Rows [steps, B] of an epoch's batches; rows of like length are together.

    Rows are shuffled, sorted by length within windows of `window` batches, and the
    batches shuffled again. Fewer rows than a batch are repeated.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    steps = steps_an_epoch(len(order), batch_size)
    order = np.resize(order, steps * batch_size)
    span = window * batch_size
    parts = [order[i : i + span] for i in range(0, len(order), span)]
    order = np.concatenate([p[np.argsort(lengths[p], kind="stable")] for p in parts])
    return rng.permutation(order.reshape(steps, batch_size))

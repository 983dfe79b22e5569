"""Embeddings of different vocabularies, aligned by token (`tokenizer_source`).

Row i of every aligned embedding is the output's token i. A model that lacks a token
gets the base's row for it, or if the base lacks it too, the mean of the models that
have it (as mergekit); a row that no token uses is zero.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from multitask_jax import tree
from multitask_jax.checkpoints import CheckpointError, Reader, TensorInfo
from multitask_jax.merging.mergekit import companions, vocabularies
from multitask_jax.merging.mergekit.views import Rows
from multitask_jax.merging.mergekit.vocabularies import Vocabulary

_TOKENS = re.compile(r"embed|wte|shared|head|output|tok_|word|decoder", re.IGNORECASE)
_OTHERS = re.compile(r"pos|wpe|type|patch|norm", re.IGNORECASE)
_MAX_ROWS = 1 << 22  # far more than any vocabulary has


class Alignment(NamedTuple):
    """The output's vocabulary, and which rows of each model are its tokens."""

    output: Vocabulary
    rows: int  # of the output's embeddings
    source: Path  # whose tokenizer files are written
    own: dict[Path, np.ndarray]  # by model: (rows,), -1 where it lacks the token
    donors: dict[Path, np.ndarray]  # likewise, what models without the token take
    readers: tuple[Reader, ...]
    embeddings: dict[Path, frozenset[str]]

    def place(self, reader: Reader, info: TensorInfo) -> tuple[TensorInfo, Rows | None]:
        """A tensor as the merge is to see it, and how its rows move (None: not)."""
        if info.name not in self.embeddings[reader.path]:
            return info, None
        own = self.own[reader.path]
        if np.array_equal(own, np.arange(info.shape[0])):
            return info, None
        donors = tuple(
            (r, info.name, self.donors[r.path])
            for r in self.readers
            if info.name in self.embeddings[r.path]
        )
        for donor, name, _ in donors:
            other = donor.tensors[name].shape[1:]
            if other != info.shape[1:]:
                raise CheckpointError(
                    f"{name}: rows of {info.shape[1:]} in {reader.path}, of {other} in"
                    f" {donor.path}: models of one width can be merged"
                )
        shape = (self.rows, *info.shape[1:])
        return info._replace(shape=shape), Rows(own, donors)


def embeddings_of(reader: Reader, like: frozenset[str] = frozenset()) -> frozenset[str]:
    """Tensors with a row a token: outside the layers, of vocab_size rows.

    `like`: names of another model's, which hold where config.json tells no vocab_size.
    """
    size = companions.vocabulary_size(_config(reader))
    paths = list(reader.tensors)
    if size is None and like:
        return like.intersection(paths)
    try:
        outside = [p for p, d in tree.block_depths(paths).items() if d is None]
    except ValueError:
        outside = paths
    found = []
    for path in outside:
        shape = reader.tensors[path].shape
        if len(shape) not in (1, 2) or _OTHERS.search(path):
            continue
        known = shape[0] == size if size else len(shape) == 2 and _TOKENS.search(path)
        if known:
            found.append(path)
    return frozenset(found)


def _config(reader: Reader) -> dict[str, Any] | None:
    return companions.read_config(reader.path) if reader.path.is_dir() else None


def check_rows(reference: Reader, readers: Sequence[Reader]) -> None:
    """Without a rule for tokenizers, vocabularies must be of one size.

    Raises:
      CheckpointError: names an embedding and tokenizer_source.
    """
    for name in sorted(embeddings_of(reference)):
        rows = reference.tensors[name].shape[0]
        for r in readers:
            info = r.tensors.get(r.aliases.get(name, name))
            if info is not None and info.shape[:1] != (rows,):
                raise CheckpointError(
                    f"tokenizer_source: got none, but {name} has {rows} rows in"
                    f" {reference.path} and {info.shape[0]} in {r.path}: to align them"
                    " by token, set tokenizer_source to base, union or a model's path"
                )


def align(
    rule: str,
    source: Path | None,
    readers: Sequence[Reader],
    base: Reader,
    *,
    base_given: bool,
    pad_to_multiple_of: int | None = None,
) -> tuple[Alignment, list[str]]:
    """Decides the output's vocabulary and every model's rows.

    Args:
      rule: "base", "union" or, as the recipe names it, a model.
      source: the directory of that model.
      readers: of all models, each once; the base among them.
      base: base_model, or the first model.
      base_given: whether the recipe names base_model: its rows then go before means.
      pad_to_multiple_of: rounds the number of rows up.

    Returns:
      The alignment, and notes in words.

    Raises:
      CheckpointError: a tokenizer can't be read.
    """
    notes: list[str] = []
    of_base = embeddings_of(base)
    found = {r.path: embeddings_of(r, of_base) for r in readers} | {base.path: of_base}
    if not any(found.values()):
        raise CheckpointError(
            f"tokenizer_source: {base.path} has no tensor with a row a token; leave"
            " tokenizer_source out"
        )
    vocabularies_of: dict[Path, Vocabulary] = {}
    for r in (base, *(r for r in readers if r.path != base.path)):
        size = max((r.tensors[n].shape[0] for n in found[r.path]), default=None)
        own = vocabularies.read_vocabulary(r.path, size)
        if own is None:
            base_size = max(
                (base.tensors[n].shape[0] for n in found[base.path]), default=0
            )
            if base.path not in vocabularies_of or size not in (None, base_size):
                raise CheckpointError(
                    f"tokenizer_source: {r.path} has no tokenizer.json, vocab.json or"
                    " vocab.txt; save its fast tokenizer there (AutoTokenizer"
                    ".from_pretrained(DIR).save_pretrained(DIR))"
                )
            notes.append(f"{r.path.name} has no tokenizer: taken to be the base's.")
            own = vocabularies_of[base.path]
        vocabularies_of[r.path] = own
    known = list(vocabularies_of.values())
    if rule == "union":
        output, source = vocabularies.union(known[0], known[1:]), base.path
        kinds = sorted({v.kind for v in known})
        if len(kinds) > 1:
            notes.append(
                f"tokenizer_source: union of {' and '.join(kinds)}: the base's"
                f" {known[0].kind} splits texts; tokens of the others that look"
                " different are rarely met."
            )
    elif rule == "base":
        output, source = known[0], base.path
    else:
        assert source is not None
        read = vocabularies_of.get(source) or vocabularies.read_vocabulary(source)
        if read is None:
            raise CheckpointError(f"tokenizer_source: {source} has no tokenizer")
        output = read
    rows = output.size
    if pad_to_multiple_of:
        rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
    if rows > _MAX_ROWS:
        raise CheckpointError(
            f"tokenizer: got {rows:,} rows, expected {_MAX_ROWS:,} at most; an id of"
            f" {output.path} is too large, or pad_to_multiple_of"
        )
    own_rows = {
        path: vocabularies.rows_of(output, v, rows)
        for path, v in vocabularies_of.items()
    }
    donors = dict(own_rows)
    if base_given:
        has = own_rows[base.path] >= 0
        for path, x in own_rows.items():
            if path != base.path:
                donors[path] = np.where(has, -1, x)
    nobody = sum(all(x[i] < 0 for x in own_rows.values()) for i in output.ids.values())
    if nobody:
        notes.append(f"{nobody} tokens of the tokenizer are in no model: rows of 0.")
    aligned = ", ".join(sorted(frozenset().union(*found.values())))
    notes.append(
        f"Rows aligned by token ({rows:,} rows, {len(output.ids):,} tokens): {aligned}."
    )
    return (
        Alignment(output, rows, source, own_rows, donors, tuple(readers), found),
        notes,
    )

"""Vocabularies of Hugging Face tokenizers, read from their files; rows by token.

Only JSON and text are read: tokenizer.json, or vocab.json / vocab.txt with
added_tokens.json. The output's vocabulary is the base's, a model's, or their union: the
base's tokens under their ids, then what each further model has besides, in the order of
the recipe.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from multitask_jax.checkpoints import CheckpointError
from multitask_jax.checkpoints.json_file import MAX_BYTES, check_regular, read_json

# Everything that belongs to a tokenizer in a Hugging Face directory.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "*.model",
    "*.tiktoken",
)


class Vocabulary(NamedTuple):
    """A tokenizer's tokens."""

    ids: dict[str, int]
    added: dict[str, dict[str, Any]]  # settings of added tokens, by content
    kind: str  # "BPE", "WordPiece", "Unigram", ...
    path: Path

    @property
    def size(self) -> int:
        """Rows that an embedding of it has: the largest id and one."""
        return 1 + max(self.ids.values(), default=-1)


def read_vocabulary(folder: Path, size: int | None = None) -> Vocabulary | None:
    """The vocabulary of a checkpoint, None if its files have none that can be read.

    Args:
      folder: a Hugging Face directory.
      size: rows of the embedding; tokens beyond are left out, as no row is theirs.

    Raises:
      CheckpointError: the files are damaged, or two tokens have one id.
    """
    if not folder.is_dir():
        return None
    added: dict[str, dict[str, Any]] = {}
    path = folder / "tokenizer.json"
    try:
        if path.exists():
            content = read_json(path)
            kind, ids = _model(content["model"])
            for entry in content.get("added_tokens") or []:
                added[entry["content"]] = entry
        else:
            kind, ids, path = _slow(folder)
            extra = folder / "added_tokens.json"
            if ids and extra.exists():
                known = read_json(extra)
                added = {t: {"content": t, "id": i} for t, i in known.items()}
        ids |= {token: entry["id"] for token, entry in added.items()}
        if not all(isinstance(t, str) and type(i) is int for t, i in ids.items()):
            raise TypeError("tokens are texts, their ids integers")
        "".join(ids).encode()  # no halves of surrogate pairs
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path}: not a tokenizer: {e!r}") from None
    if not ids:
        return None
    if size is not None:
        ids = {token: i for token, i in ids.items() if i < size}
        added = {token: entry for token, entry in added.items() if token in ids}
    if len(set(ids.values())) < len(ids) or min(ids.values(), default=0) < 0:
        twice = sorted(ids.values())
        bad = next((a for a, b in itertools.pairwise(twice) if a == b), -1)
        raise CheckpointError(f"{path}: the id {bad} belongs to two tokens, or to none")
    return Vocabulary(ids, added, kind, path)


def _model(model: Mapping[str, Any]) -> tuple[str, dict[str, int]]:
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: [token, score] by id
        vocab = {token: i for i, (token, _) in enumerate(vocab)}
    return str(model.get("type", "BPE")), dict(vocab)


def _slow(folder: Path) -> tuple[str, dict[str, int], Path]:
    path = folder / "vocab.json"
    if path.exists():
        return "BPE", read_json(path), path
    path = folder / "vocab.txt"
    if path.exists():
        if check_regular(path) > MAX_BYTES:
            raise CheckpointError(f"{path}: more than {MAX_BYTES} bytes")
        lines = path.read_text(encoding="utf-8").split("\n")
        lines = lines[:-1] if lines[-1] == "" else lines
        return "WordPiece", {token: i for i, token in enumerate(lines)}, path
    return "", {}, path


def union(base: Vocabulary, others: Sequence[Vocabulary]) -> Vocabulary:
    """The base's tokens, then what others have besides: words first, then added ones.

    Before/after: {a: 0, b: 1} and {b: 0, c: 1, <x>: 2 (added)} ->
    {a: 0, b: 1, c: 2, <x>: 3}.
    """
    ids, added = dict(base.ids), dict(base.added)
    following = base.size

    def append(token: str, entry: dict[str, Any]) -> None:
        nonlocal following
        if token not in ids:
            ids[token] = following
            added[token] = entry | {"id": following}
            following += 1

    for other in others:
        for token in sorted(other.ids, key=other.ids.__getitem__):
            if token not in other.added:
                append(token, added_token(token))
    for other in others:
        for token in sorted(other.added, key=other.ids.__getitem__):
            append(token, added_token(token) | other.added[token])
    return Vocabulary(ids, added, base.kind, base.path)


def added_token(content: str) -> dict[str, Any]:
    """An entry of tokenizer.json's added_tokens: a word of its own."""
    return {
        "id": -1,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": True,
        "special": False,
    }


def rows_of(output: Vocabulary, model: Vocabulary, rows: int) -> np.ndarray:
    """(rows,) the model's row of each row of the output, -1 where it has none."""
    out = np.full(rows, -1, np.int64)
    for token, i in output.ids.items():
        out[i] = model.ids.get(token, -1)
    return out


# -- files -----------------------------------------------------------------------------


def write_tokenizer(output: Vocabulary, source: Path, target: Path) -> None:
    """Puts the tokenizer of `source` into `target`, with tokens of a union added.

    Args:
      output: the vocabulary of the merged model.
      source: the directory whose tokenizer it extends.
      target: a directory that may hold another one's files.
    """
    for pattern in TOKENIZER_FILES:
        for old in target.glob(pattern):
            old.unlink()
        for file in source.glob(pattern):
            (target / file.name).write_bytes(file.read_bytes())
    before = read_vocabulary(source)
    assert before is not None
    # `source` may know tokens that have no row: they would index beyond the embedding.
    new = {t: e for t, e in output.added.items() if before.ids.get(t) != e["id"]}
    if not new and set(before.ids) == set(output.ids):
        return
    path = target / "tokenizer.json"
    if path.exists():
        content = read_json(path)
        model = content["model"]
        if isinstance(model["vocab"], dict):
            kept = {t: i for t, i in model["vocab"].items() if t in output.ids}
            dropped = set(model["vocab"]) - set(kept)
            model["vocab"] = kept
            if dropped and "merges" in model:
                model["merges"] = [m for m in model["merges"] if _kept(m, dropped)]
        entries = sorted(output.added.values(), key=lambda e: e["id"])
        content["added_tokens"] = [_plain(e) for e in entries]
        text = json.dumps(content, ensure_ascii=False, indent=2)
        path.write_text(text + "\n", encoding="utf-8")
    else:
        known = {t: e["id"] for t, e in output.added.items()}
        text = json.dumps(known, ensure_ascii=False, indent=2)
        (target / "added_tokens.json").write_text(text + "\n", encoding="utf-8")
    _declare(target / "tokenizer_config.json", new)


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    return added_token(entry["content"]) | dict(entry)


def _kept(merge: Any, dropped: set[str]) -> bool:
    """Whether neither half of a BPE merge, nor what it makes, is gone."""
    halves = merge.split(" ") if isinstance(merge, str) else list(merge)
    return not dropped.intersection([*halves, "".join(halves)])


def _declare(path: Path, new: Mapping[str, Mapping[str, Any]]) -> None:
    """tokenizer_config.json lists added tokens too."""
    if not path.exists():
        return
    config = read_json(path)
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for entry in map(_plain, new.values()):
            decoder[str(entry.pop("id"))] = entry
        text = json.dumps(config, ensure_ascii=False, indent=2)
        path.write_text(text + "\n", encoding="utf-8")

"""JSON that strangers wrote: bounded before it is parsed, no key lost."""

import json
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from multitask_jax.checkpoints.types import CheckpointError

MAX_BYTES = 100_000_000
# A few bytes of JSON are an object of a few hundred: what bounds memory is the number
# of values. A safetensors header has about ten a tensor.
MAX_VALUES = 5_000_000


def check_regular(path: Path) -> int:
    """The size of a file, links followed; a pipe or a device would hang or never end.

    Raises:
      CheckpointError: a directory, pipe, device, or nothing.
    """
    try:
        status = path.stat()
    except OSError as e:
        raise CheckpointError(f"{path}: can't be opened: {e.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: expected a regular file, or a link to one")
    return status.st_size


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      CheckpointError: no regular file, larger than `max_bytes`, or as `parse_json`.
    """
    size = check_regular(path)
    if size > max_bytes:
        raise CheckpointError(f"{path}: got {size} bytes, more than {max_bytes} bytes")
    return parse_json(path.read_bytes(), path)


def parse_json(text: bytes, where: Path) -> dict[str, Any]:
    """A JSON object without repeated keys.

    Raises:
      CheckpointError: anything else, or more than `MAX_VALUES` values.
    """
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise CheckpointError(f"{where}: JSON of more than {MAX_VALUES:,} values")
    try:
        # Not json.loads(bytes): that guesses an encoding, and lets surrogates in.
        out = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{where}: damaged: not valid JSON: {e}") from None
    if not isinstance(out, dict):
        raise CheckpointError(
            f"{where}: damaged: got a JSON {type(out).__name__}, not an object"
        )
    return out


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise CheckpointError(f"the key {key[:80]!r} occurs twice")
        out[key] = value
    return out

"""JSON that a run writes for its later stages: a file is whole, or it is not there."""

import json
from pathlib import Path
from typing import Any


def write(path: Path, value: Any, indent: int | None = None) -> None:
    """Writes a file of JSON, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=indent) + "\n")
    partial.replace(path)


def read(path: Path) -> Any:
    """What `write` wrote.

    Raises:
      ValueError: it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(
            f"{path}: expected JSON, got a damaged file ({e}); remove {path.parent} and"
            " make it again"
        ) from None

"""Where metrics go: a writer is two functions, one that adds and one that takes back.

A run that is resumed from step s trains the steps after it again, so that what was
written of them must go first: `rewind(s)`.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

Row = Mapping[str, float]


class Writer(NamedTuple):
    """`write(step, metrics)` adds; `rewind(step)` forgets what is after `step`."""

    write: Callable[[int, Row], None]
    rewind: Callable[[int], None] = lambda step: None


def jsonl(path: str | os.PathLike[str]) -> Writer:
    """One JSON object a line, {"step": 20, "loss": 0.5}, flushed at once.

    Rewinding to 0, as a new run does, empties the file. A last line that was cut off
    goes, too.

    Raises:
      ValueError: on rewinding, a line before the last is no such object.
    """
    path = Path(path)

    def write(step: int, metrics: Row) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Opened for each line: nothing is left open, and a line is there once written.
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def rewind(step: int) -> None:
        if not path.exists():
            return
        kept = [
            line
            for number, line in _lines(path)
            if number is not None and number <= step
        ]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)  # whole or not at all

    return Writer(write, rewind)


def log(emit: Callable[[str], None] | None = None) -> Writer:
    """One line of text a record: "step 20: loss 0.5"; to absl's log unless given.

    Args:
      emit: takes a line, `print` for standard output.
    """
    if emit is None:
        from absl import logging

        emit = logging.info

    def write(step: int, metrics: Row) -> None:
        emit(f"step {step}: " + ", ".join(f"{k} {v:.6g}" for k, v in metrics.items()))

    return Writer(write)


def combine(*writers: Writer) -> Writer:
    """All of them, in their order."""

    def write(step: int, metrics: Row) -> None:
        for writer in writers:
            writer.write(step, metrics)

    def rewind(step: int) -> None:
        for writer in writers:
            writer.rewind(step)

    return Writer(write, rewind)


def _lines(path: Path) -> list[tuple[int | None, str]]:
    """(step, line) of a file; None for a last line that was cut off."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    out: list[tuple[int | None, str]] = []
    for i, line in enumerate(lines):
        try:
            out.append((int(json.loads(line)["step"]), line))
        except (ValueError, KeyError, TypeError):
            if i + 1 < len(lines):
                raise ValueError(
                    f'{path}, line {i + 1}: got {line[:80]!r}, expected {{"step": ...}}'
                ) from None
            out.append((None, line))
    # A line without its end is whole only by chance.
    if out and not out[-1][1].endswith("\n"):
        out[-1] = (None, out[-1][1])
    return out

"""Results of a study that can be stopped: one record a line, none is made twice."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class Store:
    """Results by (part, row, seed), one JSON a line; what is there is not redone."""

    def __init__(self, path: Path):
        self.path = path
        self.records: dict[tuple[str, str, int], dict[str, Any]] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            try:
                self._keep(json.loads(line))
            except ValueError:
                break  # the last line of a run that was killed while writing it
        if lines and len(lines) > len(self.records):
            text = "".join(json.dumps(r) + "\n" for r in self.records.values())
            path.write_text(text)

    def _keep(self, record: dict[str, Any]) -> None:
        self.records[(record["part"], record["row"], record["seed"])] = record

    def once(
        self, part: str, row: str, seed: int, make: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The record of that name, made and written unless it is there."""
        if (part, row, seed) not in self.records:
            start = time.perf_counter()
            made = dict(make())
            spent = round(time.perf_counter() - start, 2)
            record = {"part": part, "row": row, "seed": seed, **made, "spent": spent}
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            self._keep(record)
        return self.records[(part, row, seed)]


def remember(config: Any, workdir: Path, free: Sequence[str]) -> None:
    """Writes config.json; refuses a folder whose results are of another config.

    Args:
      config: a dataclass.
      workdir: made if it is not there.
      free: fields that may differ from an earlier run.

    Raises:
      ValueError: other fields differ; tells them.
    """
    path = workdir / "config.json"
    told = dataclasses.asdict(config)
    if path.exists():
        stored = json.loads(path.read_text())
        other = {k: (stored.get(k), v) for k, v in told.items() if stored.get(k) != v}
        if different := {k: v for k, v in other.items() if k not in free}:
            raise ValueError(
                f"{workdir} has results of another run (there, here): {different};"
                " pass another --workdir or remove it"
            )
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told, indent=1) + "\n")

"""Results of a study that can be stopped: one record a line, none is made twice."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import json_files, sweep_log


class Store:
    """Results by (part, row, seed), one JSON a line; what is there is not redone.

    Raises:
      ValueError: the folder's metrics.jsonl has other lines.
    """

    def __init__(self, workdir: Path):
        self.workdir = workdir
        self.records: dict[tuple[str, str, int], dict[str, Any]] = {}
        for record in sweep_log.read_lines(workdir):
            if not {"part", "row", "seed"} <= record.keys():
                raise ValueError(
                    f"{workdir / 'metrics.jsonl'}: got a line of {list(record)},"
                    " expected part, row and seed; pass another --workdir or remove it"
                )
            self._keep(record)

    def _keep(self, record: dict[str, Any]) -> None:
        self.records[(record["part"], record["row"], record["seed"])] = record

    def add(
        self, part: str, row: str, seed: int, made: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Writes a record of that name and returns it."""
        record = {"part": part, "row": row, "seed": seed, **made}
        sweep_log.append(self.workdir, record)
        self._keep(record)
        return record

    def once(
        self, part: str, row: str, seed: int, make: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The record of that name, made and written unless it is there."""
        if (part, row, seed) not in self.records:
            start = time.perf_counter()
            made = dict(make())
            spent = round(time.perf_counter() - start, 2)
            self.add(part, row, seed, {**made, "spent": spent})
        return self.records[(part, row, seed)]


def changed(
    path: Path, told: Mapping[str, Any], free: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """What a file of settings has otherwise than it is told now: (there, here) by name.

    Nothing without the file; names in `free` may differ.
    """
    if not path.exists():
        return {}
    stored = json_files.read(path)
    return {
        k: (stored.get(k), v)
        for k, v in told.items()
        if k not in free and stored.get(k) != v
    }


def remember(config: Any, workdir: Path, free: Sequence[str], **also: Any) -> None:
    """Writes config.json; refuses a folder whose results are of another config.

    Args:
      config: a dataclass.
      workdir: made if it is not there.
      free: fields that may differ from an earlier run.
      **also: what results depend on besides the config.

    Raises:
      ValueError: other fields differ; tells them.
    """
    path = workdir / "config.json"
    told = dataclasses.asdict(config) | also
    if different := changed(path, told, free):
        raise ValueError(
            f"{workdir} has results of another run (there, here): {different};"
            " pass another --workdir or remove it"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    json_files.write(path, told, indent=1)

"""Checkpoints of a run, by Orbax: all that its later steps depend on, or nothing.

A step's directory holds the state (without frozen leaves, which the caller has), the
best parameters so far, and, as its metadata, the history and a fingerprint of the run.
Orbax renames it into place when all is written.
"""

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from multitask_jax import tree as trees
from multitask_jax.training.state import TrainState

_KEPT = 2  # the newest, and one to go back to by hand if that should be damaged


class Best(NamedTuple):
    """Parameters with the highest value on validation, and at which step that was."""

    params: Any
    step: int
    value: float


class Saved(NamedTuple):
    """A checkpoint: with it, and the run's arguments, the later steps are the same."""

    state: TrainState
    best: Best | None
    history: list[dict[str, float]]


def fingerprint(state: TrainState, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a run must share with a checkpoint to go on from it, by name.

    The configuration, the shapes of the state, the key and the bytes of frozen leaves.

    Raises:
      ValueError: the configuration can't be written as JSON.
    """
    out: dict[str, Any] = {}
    for name, value in (config or {}).items():
        try:
            out[f"config/{name}"] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            raise ValueError(
                f"config: {name} is a {type(value).__name__}; expected numbers,"
                " strings, and lists or dictionaries of them"
            ) from None
    for path, leaf in trees.flatten(state._replace(frozen=None)).items():
        out[path] = f"{leaf.dtype} {list(leaf.shape)}"
    typed = jnp.issubdtype(state.key.dtype, jax.dtypes.prng_key)
    words = jax.random.key_data(state.key) if typed else state.key
    out["key's words"] = np.asarray(words).tolist()
    if state.frozen is not None:
        crc = 0
        for path, leaf in trees.flatten(state.frozen).items():
            flat = np.ravel(np.asarray(leaf))
            crc = zlib.crc32(flat.view(np.uint8), zlib.crc32(path.encode(), crc))
        out["frozen's CRC-32"] = crc
    return out


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint, or None."""
    steps = _steps(Path(folder))
    return steps[-1] if steps else None


def save(
    folder: str | os.PathLike[str], saved: Saved, about: Mapping[str, Any]
) -> None:
    """Writes the checkpoint folder/STEP, then removes all but the newest two."""
    from orbax.checkpoint import v1 as ocp

    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    state, best = saved.state._replace(frozen=None), saved.best
    metadata = {"fingerprint": dict(about), "history": saved.history, "best": None}
    if best is not None:
        metadata["best"] = {"step": best.step, "value": best.value}
    arrays = {"state": state, "best": None if best is None else best.params}
    ocp.save(folder / str(int(state.step)), arrays, custom_metadata=metadata)
    kept = _steps(folder)[-_KEPT:]
    for path in folder.iterdir():
        # Older steps, and what a killed run left half written: STEP.orbax-...
        if path not in kept and path.is_dir() and path.name.split(".")[0].isdecimal():
            shutil.rmtree(path)


def restore(path: Path, like: TrainState, about: Mapping[str, Any]) -> Saved:
    """Reads a checkpoint, its arrays placed as those of `like`, on any mesh.

    Raises:
      ValueError: it is of a run with another fingerprint; says what differs.
      CheckpointError: it is damaged.
    """
    from multitask_jax.checkpoints import orbax_file

    reader = orbax_file.open_reader(path.absolute())
    metadata = reader.metadata
    reader.close()
    _check(path, metadata["fingerprint"], about)
    state = like._replace(frozen=None)
    best = metadata["best"]
    arrays = {"state": state, "best": None if best is None else state.params}
    # Descriptions, not arrays: those of `like` need not live while others are read.
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays
    )
    arrays = orbax_file.restore(path, target)
    if best is not None:
        best = Best(arrays["best"], best["step"], best["value"])
    state = arrays["state"]._replace(frozen=like.frozen)
    return Saved(state, best, metadata["history"])


def _steps(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    # Orbax's unfinished directories have a longer name.
    found = [path for path in folder.iterdir() if path.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name))


def _check(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    names = [*there, *(name for name in here if name not in there)]
    differ = [
        f"{name}: {there.get(name, 'nothing')!r} there, {here.get(name, 'nothing')!r}"
        " here"
        for name in names
        if name not in there or name not in here or there[name] != here[name]
    ]
    if differ:
        more = f"; and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise ValueError(
            f"{path} is of another run: {'; '.join(differ[:5])}{more}. Train in another"
            " workdir, or remove this one"
        )

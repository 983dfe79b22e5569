"""Tokenizers on disk: config.json, and an Orbax checkpoint of what was learned.

    PATH/config.json    the configuration
    PATH/arrays/        variables and statistics

All of it is written beside PATH and renamed into place when complete.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from multitask_jax.checkpoints import CheckpointError, orbax_file, staging
from multitask_jax.checkpoints.json_file import read_json
from multitask_jax.masked.tokenizers import model
from multitask_jax.masked.tokenizers.types import (
    CHANNELS,
    Config,
    Statistics,
    Tokenizer,
)

_CONFIG, _ARRAYS = "config.json", "arrays"


def save(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Writes a tokenizer; one that is there already is replaced at the end.

    Raises:
      ValueError: something else is at `path`.
    """
    from orbax.checkpoint import v1 as ocp

    path = Path(path).expanduser().absolute()
    if path.exists() and not (path / _CONFIG).is_file():
        raise ValueError(
            f"{path}: exists and is no tokenizer; remove it, or choose another path"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    staging.remove_stale(path)
    partial = staging.ours(path)
    arrays = {"variables": tokenizer.variables, "statistics": tokenizer.statistics}
    text = json.dumps(dataclasses.asdict(tokenizer.config), indent=2)
    try:
        partial.mkdir()
        ocp.save(partial / _ARRAYS, jax.tree.map(jnp.asarray, arrays))
        (partial / _CONFIG).write_text(text + "\n")
        if path.exists():
            old = staging.replaced(path)
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old)
        else:
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer that `save` wrote, bit for bit.

    Raises:
      CheckpointError: there is none, its configuration is none, or its arrays are
        damaged or of another configuration.
    """
    path = Path(path).expanduser().absolute()
    if not (path / _CONFIG).is_file():
        raise CheckpointError(
            f"{path}: no {_CONFIG} in it: not a tokenizer; train one, and `save` it"
        )
    config = _read_config(path / _CONFIG)
    variables = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    channels = jax.ShapeDtypeStruct((CHANNELS[config.kind],), np.float32)
    target = {"variables": variables, "statistics": Statistics(channels, channels)}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), target
    )
    arrays = orbax_file.restore(path / _ARRAYS, target)
    statistics = Statistics(*map(np.asarray, arrays["statistics"]))
    return Tokenizer(config, arrays["variables"], statistics)


def _read_config(path: Path) -> Config:
    settings: dict[str, Any] = read_json(path)
    known = {field.name for field in dataclasses.fields(Config)}
    if settings.keys() != known:
        raise CheckpointError(
            f"{path}: got the settings {sorted(settings)}, expected {sorted(known)};"
            " it may be of another version: train the tokenizer anew"
        )
    try:
        return Config(**settings | {"levels": tuple(settings["levels"])})
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"{path}: damaged: {e}") from None

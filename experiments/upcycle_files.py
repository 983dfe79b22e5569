"""What `experiments.upcycle` reads and writes: models, and what lies beside them."""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from multitask_jax import checkpoints
from multitask_jax.checkpoints import Reader, TensorInfo, staging
from multitask_jax.checkpoints.json_file import read_json
from multitask_jax.moe import files


def opened(path: str) -> contextlib.closing[Reader]:
    """A whole checkpoint.

    Raises:
      CheckpointError: as `checkpoints.open`; of a change (an adapter, a delta) the
        message says how to make a model of it.
    """
    if checkpoints.is_change(path):
        raise checkpoints.CheckpointError(
            f"{path}: got an adapter or a delta, expected whole models: experts are"
            " made of their tensors. Make one first: python -m experiments.merge"
            f" --method=task_arithmetic --base=BASE --models={path} --output=MODEL"
        )
    return contextlib.closing(checkpoints.open(path))


def home(path: str) -> Path:
    """The folder of config and tokenizer: a file's own if it has a config.json."""
    file = Path(path)
    beside = file.is_file() and (file.parent / "config.json").is_file()
    return file.parent if beside else file


def config_of(path: str) -> dict[str, Any] | None:
    """The model's config.json, if there is one."""
    file = home(path) / "config.json"
    return read_json(file) if file.is_file() else None


def write_config(directory: Path, about: Mapping[str, Any]) -> None:
    """config.json."""
    text = json.dumps(about, indent=2) + "\n"
    (directory / "config.json").write_text(text)


def layout_of(config: Any, reader: Reader, path: str) -> tuple[str, files.Layout]:
    """--layout by name, or what names (and a dense model's config.json) tell."""
    name = config.layout
    if name == "auto":
        if config.to_dense:
            mixtral = any(".block_sparse_moe." in n for n in reader.tensors)
        else:
            kind = (config_of(path) or {}).get("model_type")
            mixtral = kind in ("llama", "mistral")
        slashes = any("/" in n for n in reader.tensors)
        name = "stacked" if slashes else "mixtral" if mixtral else "names"
    layout = files.LAYOUTS[name]
    if config.mlp_pattern:
        layout = layout._replace(pattern=config.mlp_pattern)
    return name, layout


def dtype_of(tensors: Iterable[TensorInfo]) -> np.dtype | None:
    """The one dtype of a model's floats, that what is merged beside gets it; or None.

    A base may have been stored in another one.
    """
    found = {t.dtype for t in tensors if jnp.issubdtype(t.dtype, np.floating)}
    return found.pop() if len(found) == 1 else None


@contextlib.contextmanager
def temporary(output: str) -> Iterator[Path]:
    """A folder beside the output, on the same disk, for as long as it is needed.

    What a killed run leaves of it goes with the next one to the same output.
    """
    path = Path(output).expanduser().absolute()
    staging.remove_stale(path)
    directory = staging.ours(path)
    directory.mkdir(parents=True)
    pulse = staging.Pulse(directory)
    try:
        yield directory
    finally:
        pulse.stop()
        shutil.rmtree(directory, ignore_errors=True)

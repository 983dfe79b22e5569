"""EgoM2P as `experiments.egom2p` keeps it in a folder: parameters and tokenizers."""

from pathlib import Path
from typing import Any

import jax

from experiments import egom2p_folders as folders
from experiments import egom2p_tokens as tokens_of
from experiments.egom2p_evaluation import Model
from multitask_jax import checkpoints
from multitask_jax import tree as trees
from multitask_jax.models.egom2p import Shape


def save_params(path: Path, params: Any) -> None:
    """Parameters as an Orbax checkpoint, which `experiments.merge` reads too."""
    from orbax.checkpoint import v1 as ocp

    ocp.save(path.absolute(), params)


def load_params(path: Path) -> Any:
    """What `save_params` or a merge wrote."""
    # To the device once, not at every call.
    return jax.device_put(trees.nest(checkpoints.read_tensors(path)))


def load_model(workdir: Path, shape: Shape) -> Model:
    """The model that `pretrain` saved: of model/ and tokenizers/, no clips or tokens.

    Raises:
      ValueError: it was trained on tokens of other tokenizers than are there now.
      FileNotFoundError: no model or no tokenizers.
    """
    frozen = tokens_of.load(workdir / "tokenizers")
    path = folders.there(workdir / "model" / "params", "pretrain")
    folders.fit_together(workdir, "model")
    return Model(load_params(path), tokens_of.modalities_of(frozen), shape, frozen)

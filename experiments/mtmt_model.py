"""A trained MTMT on disk: parameters as safetensors, all else as JSON.

Legend: N people, F features, A arms, O outcomes.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from experiments import json_files
from multitask_jax import checkpoints
from multitask_jax import tree as trees
from multitask_jax.data.trial_features import Encoder
from multitask_jax.models import mtmt

_ABOUT = "about.json"


def save(
    folder: str | os.PathLike[str],
    params: Any,
    *,
    sizes: mtmt.Sizes,
    features: int,
    mean: np.ndarray,
    spread: np.ndarray,
    about: Mapping[str, Any],
) -> None:
    """Writes the folder, whole or not at all; an older one is replaced.

    Args:
      folder: where to.
      params: of MTMT.
      sizes: of MTMT.
      features: F.
      mean, spread: [O], of outcomes, which were standardised by them.
      about: what else to keep: names of arms and outcomes, the encoder.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    flat = {p: np.ascontiguousarray(x) for p, x in trees.flatten(params).items()}
    save_file(flat, partial / "model.safetensors")
    known = {
        **about,
        "sizes": sizes._asdict(),
        "features": features,
        "mean": np.asarray(mean, float).tolist(),
        "spread": np.asarray(spread, float).tolist(),
    }
    (partial / _ABOUT).write_text(json.dumps(known, indent=2) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def amend(folder: str | os.PathLike[str], **about: Any) -> None:
    """Changes what else was kept of a saved model, such as its policy_outcome."""
    file = Path(folder) / _ABOUT
    json_files.write(file, json_files.read(file) | about, indent=2)


def load(
    folder: str | os.PathLike[str],
) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """The model as a function of features, [N, F] -> [N, A, O], and what was kept.

    Raises:
      FileNotFoundError: no such folder.
      ValueError (CheckpointError among them): it is not a model of `save`.
    """
    folder = Path(folder)
    if not (folder / _ABOUT).is_file():
        raise FileNotFoundError(
            f"{folder}: no {_ABOUT} there; expected the folder model/ in the --workdir"
            " of experiments.mtmt"
        )
    try:
        about = json.loads((folder / _ABOUT).read_text())
        kept = dict(about["sizes"])
        kept["tiers"] = tuple(map(tuple, kept["tiers"]))
        sizes = mtmt.Sizes(**kept)
        # float64: effects are small differences of outcomes that may be large.
        mean, spread = (np.array(about[k], np.float64) for k in ("mean", "spread"))
        features = int(about["features"])
        _check(about, sizes, features, mean, spread)
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(
            f"{folder / _ABOUT} can't be read ({type(e).__name__}: {e}); train again"
        ) from e
    tensors = checkpoints.read_tensors(folder / "model.safetensors")
    params = jax.tree.map(jnp.asarray, trees.nest(tensors))
    wanted = jax.eval_shape(lambda k: mtmt.init(k, features, sizes), jax.random.key(0))
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, dict(wanted)):
        raise ValueError(f"{folder}: the parameters do not fit {sizes}; train again")
    apply = jax.jit(lambda x: mtmt.predict(params, x, sizes=sizes))

    def predict(x: np.ndarray) -> np.ndarray:
        return mean[None, None] + spread[None, None] * np.asarray(apply(x))

    return predict, about


def _check(
    about: Mapping[str, Any],
    sizes: mtmt.Sizes,
    features: int,
    mean: np.ndarray,
    spread: np.ndarray,
) -> None:
    """Names, scale and encoder, against the sizes; ValueError tells what differs."""
    types = mtmt.Sizes._field_defaults | {"arms": 3, "outcomes": 3}
    for name, like in types.items():
        if type(got := getattr(sizes, name)) is not type(like):
            raise ValueError(f"sizes: got {name}={got!r}, expected one like {like!r}")
    if (shape := np.array(sizes.tiers, float).shape)[:-1] != (sizes.arms,):
        raise ValueError(f"sizes: got tiers {shape}, expected [{sizes.arms}, effects]")
    for name, count in (("arms", sizes.arms), ("outcomes", sizes.outcomes)):
        got = about[name]
        if not isinstance(got, list) or [type(n) for n in got] != [str] * count:
            raise ValueError(f"{name}: got {got!r}, expected {count} names")
    if not mean.shape == spread.shape == (sizes.outcomes,):
        raise ValueError(
            f"mean, spread: got {mean.shape}, {spread.shape}, expected"
            f" {sizes.outcomes} numbers each"
        )
    if about.get("encoder") is not None:
        width = len(Encoder.from_json(about["encoder"]).features)
        if width != features:
            raise ValueError(
                f"encoder: it makes {width} features, the model takes {features}"
            )

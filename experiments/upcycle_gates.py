"""Gates of `experiments.upcycle`: random ones, or of means of data.

Legend: E experts, D width.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from multitask_jax import merging
from multitask_jax.checkpoints import Reader
from multitask_jax.merging.fitted.moments import Moments
from multitask_jax.moe import files, upcycling


def check_flags(config: Any) -> None:
    """Refuses flags of the other kind of gates, which would go unused.

    Raises:
      ValueError: names the flag; or its value makes no gate.
    """
    unused, kind = (
        (("gate_stddev", "seed"), "random gates, not of --gate_data's")
        if config.gate_data
        else (("sharpness",), "gates of --gate_data")
    )
    for name in unused:
        if getattr(config, name) is not None:
            raise ValueError(f"--{name}: it is of {kind}; leave it out")
    if config.sharpness is not None and not 0 < config.sharpness < math.inf:
        raise ValueError(f"--sharpness: got {config.sharpness}, expected more than 0")
    if config.gate_stddev is not None and not 0 <= config.gate_stddev < math.inf:
        raise ValueError(
            f"--gate_stddev: got {config.gate_stddev}, expected at least 0, and finite"
        )


def made(
    config: Any,
    paths: Sequence[str] | None,
    reader: Reader,
    first: Mapping[str, str],
    layout: files.Layout,
    experts: int,
) -> tuple[dict[str, dict[str, np.ndarray]], str]:
    """A gate by block, {"kernel": [D, E]} and perhaps "bias" [E]; where they come from.

    Args:
      config: --sharpness, or --gate_stddev and --seed.
      paths: of files of moments, one an expert; none for random gates.
      reader: a dense model.
      first: its tensor of each block whose inputs the gate sees as well.
      layout: whether gates of data have a bias.
      experts: E.

    Raises:
      ValueError: another number of files, a tensor without moments, or of another
        width; or moments that no gate can be made of.
    """
    widths = {b: files.width_of(reader.tensors[n], layout) for b, n in first.items()}
    if paths:
        gates = _of_data(config, paths, first, widths, layout, experts)
        return gates, "gates are the nearest of the means of --gate_data"
    stddev = 0.02 if config.gate_stddev is None else config.gate_stddev
    key = jax.random.key(config.seed or 0)
    gates = upcycling.random_gates(key, widths, experts, stddev=stddev)
    return jax.device_get(gates), "gates are random: train them (and the experts)"


def _of_data(
    config: Any,
    paths: Sequence[str],
    first: Mapping[str, str],
    widths: Mapping[str, int],
    layout: files.Layout,
    count: int,
) -> dict[str, dict[str, np.ndarray]]:
    if len(paths) != count:
        raise ValueError(f"--gate_data: got {len(paths)} files for {count} models")
    moments = [merging.load_moments(p) for p in paths]
    make = upcycling.gate_from_means if layout.bias else upcycling.gate_without_bias
    gates = {}
    for block, name in first.items():
        rows = [
            _of(m, name, widths[block], p) for m, p in zip(moments, paths, strict=True)
        ]
        try:
            gate = make(
                np.stack([m.mean for m in rows]),
                float(np.mean([m.variance for m in rows])),
                sharpness=1.0 if config.sharpness is None else config.sharpness,
            )
        except ValueError as e:
            raise ValueError(
                f"--gate_data, {name}: {e}: --layout=names, or no --gate_data"
            ) from e
        gates[block] = {k: np.asarray(x) for k, x in gate.items()}
    return gates


def _of(moments: Mapping[str, Moments], name: str, width: int, path: str) -> Moments:
    """The tensor's moments, checked."""
    if name not in moments:
        raise ValueError(
            f"{path}: no moments of {name}, got {list(moments)[:3]}, ...; compute them"
            " on parameters by the checkpoint's names"
        )
    mean, variance = moments[name]
    if mean.shape != (width,) or variance.size != 1:
        raise ValueError(
            f"{path}: {name}: got a mean {list(mean.shape)} and a variance"
            f" {list(variance.shape)}, expected [{width}] and one number: moments of"
            " what this tensor is multiplied by"
        )
    if not np.isfinite(mean).all() or not 0 <= variance.item() < math.inf:
        raise ValueError(
            f"{path}: {name}: got moments that are not finite (or a negative"
            " variance); compute them again, of activations without NaN and infinity"
        )
    return moments[name]

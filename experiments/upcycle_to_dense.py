"""The way back of `experiments.upcycle`: a mixture's experts, merged."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import parsing, upcycle_files
from multitask_jax import checkpoints, merging
from multitask_jax.merging.disk import set_config_dtype
from multitask_jax.moe import configs, dense_files

# What nothing is made of here.
_OF_MIXTURES = ("experts", "k", "gate_data", "sharpness", "gate_stddev", "seed")


def run(
    config: Any, models: Sequence[str], method: merging.Method
) -> tuple[int, list[str]]:
    """Writes the dense model; `config` is `experiments.upcycle.Config`.

    Returns:
      The number of experts, and what to know.

    Raises:
      ValueError (CheckpointError among them): a flag or a file is not as it should be;
        nothing was written.
    """
    unused = [n for n in _OF_MIXTURES if getattr(config, n) is not None]
    if len(models) != 1 or unused:
        raise ValueError(
            f"--to_dense: got {len(models)} --models"
            f" {' '.join(f'--{n}' for n in unused)}, expected one mixture, without"
            f" {', '.join(f'--{n}' for n in _OF_MIXTURES)}"
        )
    if config.mlp_pattern and not config.base:
        raise ValueError(
            "--mlp_pattern with --to_dense: needs --base, whose names the dense model"
            " gets"
        )
    notes = [f"experts merged by {config.method}; all else is the mixture's as it was"]
    with contextlib.ExitStack() as stack:
        moe = stack.enter_context(upcycle_files.opened(models[0]))
        layout = upcycle_files.layout_of(config, moe, models[0])[1]
        base = config.base
        if base is not None:
            base = stack.enter_context(upcycle_files.opened(base))
        dense = dense_files.dense_models(moe, layout, base)
        # Gates may be of another dtype than all else.
        gates = set(dense.gates)
        kept = [t for name, t in moe.tensors.items() if name not in gates]
        dtype = upcycle_files.dtype_of(kept)
        about = upcycle_files.config_of(models[0])
        dense_about = None if about is None else configs.config_of_dense(about)
        if base is None and about is not None and dense_about is None:
            notes.append(
                f"left out config.json: no dense class is known for model_type"
                f" {about.get('model_type')!r} (or the mixture is of an earlier"
                " version); write one, or give --base, whose the dense model gets"
            )

        def aside(directory: Path, *of: Any) -> list[str]:
            """What lies beside the weights, before the output appears."""
            # Of a file, which the merge knows no folder of.
            home = upcycle_files.home(config.base or models[0])
            checkpoints.copy_companions(home, directory)
            if base is None and about is not None:
                (directory / "config.json").unlink()
            if base is None and dense_about is not None:
                upcycle_files.write_config(directory, dense_about)
            set_config_dtype(directory, dtype)
            return []

        merging.merge_checkpoints(
            method._replace(aside=aside),
            dense.base,
            dense.experts,
            config.output,
            # All else is the mixture's own, and no change that experts made.
            include="|".join(f"^{re.escape(name)}$" for name in dense.own),
            out_dtype=None if dtype is None else dtype.name,
            recipe={
                "method": config.method,
                "density": config.density,
                "scale": config.scale,
                "experts of": models[0],
            },
            max_shard_size=parsing.size_in_bytes(
                "max_shard_size", config.max_shard_size
            ),
            overwrite=config.overwrite,
            progress=config.progress,
        )
    if dense.gates:
        names = ", ".join(dense.gates[:3])
        notes.append(f"left out {len(dense.gates)} tensors of gates: {names}, ...")
    else:
        notes.append("it has no gates: taken for a mixture whose experts ids choose")
    return len(dense.experts), notes

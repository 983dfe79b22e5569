"""Dense checkpoints become a mixture of experts, and a mixture one dense model.

    python -m experiments.upcycle --models=A --experts=8 --output=MOE  # copies
    python -m experiments.upcycle --models=A,B,C --base=BASE --output=MOE  # specialists
    python -m experiments.upcycle --to_dense --models=MOE --method=ties --base=BASE \
        --output=DENSE

The feed-forward layers become experts, one a model (or copies of the only one: sparse
upcycling, Komatsuzaki et al. 2023, arXiv 2212.05055); everything else is merged by
--method, the mean by default (Branch-Train-MiX, Sukhbaatar et al. 2024, arXiv
2403.07816). Gates are random, or with --gate_data send tokens to the specialist whose
own data looks most like them (Mixtral's gates have no bias: what the means have in
common is then left out of them):

    moments = merging.input_moments(apply_fn, params, batches)  # of A, on A's data
    # (with rows=, a function to the mask, where examples are padded)
    merging.save_moments("A/moments.safetensors", moments)

--layout=mixtral writes what transformers' Mixtral loads (of Llama and Mistral models),
names any other Hugging Face names, stacked the parameters of `layers.moe.MoE` (kind
"gelu", "mlp" or "swiglu" is yours to tell; normalize="after_topk"). The way back merges
the experts by any method of `experiments.merge`; all else is the mixture's as it was,
but for gates, which are left out.
Stacked experts get the names of our `layers.transformer.Block` (those with a gate:
block/mlp/{gate,up,down}), or those that --base has, by --mlp_pattern if it is given.

Legend: E experts, D width.
"""

import contextlib
import dataclasses
import inspect
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import flags, merge, parsing
from experiments.flags import flag
from multitask_jax import checkpoints, merging
from multitask_jax.checkpoints import Reader
from multitask_jax.checkpoints.json_file import read_json
from multitask_jax.merging.fitted.moments import Moments
from multitask_jax.moe import configs, dense_files, files, upcycling

# What --to_dense makes nothing of.
_OF_MIXTURES = ("experts", "k", "gate_data", "sharpness", "gate_stddev", "seed")


@dataclasses.dataclass(frozen=True)
class Config:
    """What becomes of what."""

    models: str = flag("Checkpoints, comma-separated: experts' origins, in order.", "")
    output: str = flag("Directory to write; it must not exist.", "")
    base: str | None = flag("Their common origin, for methods that need one.")
    to_dense: bool = flag("The other way: --models is one mixture.", False)
    experts: int | None = flag("Copies of the only model.")
    k: int | None = flag("Experts a token, for config.json; 2 if not given.")
    method: str = flag(
        "Merges everything else (or, --to_dense, the experts alone).", "linear"
    )
    density: str | None = flag("Of the method, as for experiments.merge.")
    scale: float | None = flag("Of the method, as for experiments.merge.")
    layout: Literal["auto", "mixtral", "names", "stacked"] = flag(
        "Names of the tensors; auto: stacked for names with slashes, mixtral for Llama"
        " and Mistral, else names.",
        "auto",
    )
    mlp_pattern: str | None = flag(
        "Regex of feed-forward tensors with groups `block` and `leaf`, if their names"
        " are not known to the layout; --to_dense looks for them in --base."
    )
    gate_data: str | None = flag("Files of merging.save_moments, one a model.")
    sharpness: float | None = flag(
        "How hard a gate of --gate_data decides; 1 if not given: by the probabilities"
        " of Gaussians of one variance in each dimension around the means."
    )
    gate_stddev: float | None = flag("Of random gates; 0.02 if not given.")
    seed: int | None = flag("Of random gates; 0 if not given.")
    max_shard_size: str | None = flag("Of an output file, like 5GB.")
    overwrite: bool = flag("Replace a checkpoint at --output.", False)
    progress: bool = flag("Show a progress bar.", True)


class Result(NamedTuple):
    """What was written."""

    output: Path
    experts: int
    notes: tuple[str, ...]


def run(config: Config) -> Result:
    """Writes the mixture, or the dense model.

    Raises:
      ValueError (CheckpointError among them): a flag or a file is not as it should be;
        nothing was written.
    """
    models = _expanded(config.models) or []
    if not models or not config.output:
        raise ValueError("--models and --output: got none; see --help")
    config = parsing.expanded(config, "base")
    parsing.one_of("method", config.method, tuple(merging.METHODS))
    method = _method(config)
    result = (to_dense if config.to_dense else to_experts)(config, models, method)
    print(f"wrote {result.output}: {result.experts} experts")
    for note in result.notes:
        print(f"- {note}")
    return result


def to_experts(config: Config, models: Sequence[str], method: merging.Method) -> Result:
    """Dense checkpoints to a mixture."""
    copies = _copies(config, models)
    count = copies or len(models)
    about = _config_json(models[0])
    k = 2 if config.k is None else config.k
    if not 1 <= k <= count:
        raise ValueError(f"--k: got {k}, expected 1 to {count}, the experts")
    if config.k is not None and about is None:
        raise ValueError(
            f"--k: {models[0]} has no config.json to write it to; leave it out, and"
            " tell k the code that runs the mixture"
        )
    _check_gate_flags(config)
    # What is refused is refused before anything is merged.
    inputs = [Path(m) for m in [*models, *([config.base] if config.base else [])]]
    checkpoints.check_output(config.output, overwrite=config.overwrite, inputs=inputs)
    size = parsing.size_in_bytes("max_shard_size", config.max_shard_size)
    notes = []
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(_opened(m)) for m in models]
        name, layout = _layout(config, readers[0], models[0])
        if about is not None:
            about = configs.config_of_mixture(
                about, name, count, k, Path(models[0]) / "config.json"
            )
        found = files.found_in(readers[0], layout)
        files.check_alike(readers, list(found))
        first = files.gate_inputs(readers[0], found)
        rest = readers[0]
        gates, how = _gates(config, rest, first, layout, len(models), copies)
        notes.append(how)
        if len(models) > 1:
            temporary = stack.enter_context(
                tempfile.TemporaryDirectory(
                    prefix=".upcycle-", dir=_parent(config.output)
                )
            )
            merged = merging.merge_checkpoints(
                method,
                config.base,
                models,
                f"{temporary}/rest",
                out_dtype=_dtype_of(readers[0]),
                report_files=False,
                progress=config.progress,
            )
            rest = stack.enter_context(_opened(str(merged.output)))
            notes.append(f"everything but experts and gates is their {config.method}")
        origins = readers if len(models) > 1 else readers * copies
        outputs = files.plan(origins, rest, layout, gates)
        if name == "stacked" and copies:
            notes.append(
                "run it by layers.moe.MoE(normalize='after_topk'): weights of a token's"
                " experts then sum to 1, and copies give the dense model's output"
            )
        if not layout.bias and config.gate_data:
            notes.append(
                "Mixtral's gate has no bias: what the means have in common is left out"
            )
        _write(config, outputs, inputs, rest, about, size)
    return Result(Path(config.output), len(origins), tuple(notes))


def to_dense(config: Config, models: Sequence[str], method: merging.Method) -> Result:
    """A mixture's experts, merged."""
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
    with contextlib.ExitStack() as stack:
        moe = stack.enter_context(_opened(models[0]))
        layout = _layout(config, moe, models[0], dense=False)[1]
        base = stack.enter_context(_opened(config.base)) if config.base else None
        dense = dense_files.dense_models(moe, layout, base)
        about = _config_json(models[0])
        if config.base is None and about is not None:
            # The merge copies the mixture's companions, config.json with them.
            method = _with_config(method, configs.config_of_dense(about))
        merging.merge_checkpoints(
            method,
            dense.base,
            dense.experts,
            config.output,
            # All else is the mixture's own, and no change that experts made.
            include="|".join(f"^{re.escape(name)}$" for name in dense.own),
            out_dtype=_dtype_of(moe),
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
    gates = dense.gates
    notes = (
        f"experts merged by {config.method}; all else is the mixture's as it was",
        f"left out {len(gates)} tensors of gates: {', '.join(gates[:3])}, ...",
    )
    return Result(Path(config.output), len(dense.experts), notes)


def _expanded(text: str | None) -> list[str] | None:
    """Paths of a flag, ~ written out."""
    found = parsing.paths(text)
    return found and [os.path.expanduser(p) for p in found]


def _method(config: Config) -> merging.Method:
    """The method with its options.

    Raises:
      ValueError: an option that it does not take.
    """
    taken = inspect.signature(merging.METHODS[config.method]).parameters
    for name in ("density", "scale"):
        if getattr(config, name) is not None and name not in taken:
            raise ValueError(f"--{name}: {config.method} does not take it")
    options = {k: getattr(config, k) for k in ("base", "method", "density", "scale")}
    return merge.build_method(merge.Config(**options))


def _dtype_of(reader: Reader) -> str | None:
    """The one dtype of a model's floats, that what is merged beside gets it; or None.

    A base may have been stored in another one.
    """
    infos = reader.tensors.values()
    found = {i.dtype.name for i in infos if jnp.issubdtype(i.dtype, np.floating)}
    return found.pop() if len(found) == 1 else None


def _check_gate_flags(config: Config) -> None:
    """Refuses flags of the other kind of gates, which would go unused."""
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
    parsing.at_least(config, gate_stddev=0)


def _with_config(method: merging.Method, about: Mapping[str, Any]) -> merging.Method:
    """The method, whose merge writes this config.json before its output appears."""

    def aside(directory: Path, *of: Any) -> list[str]:
        _write_config(directory, about)
        return method.aside(directory, *of) if method.aside else []

    return method._replace(aside=aside)


def _write_config(directory: Path, about: Mapping[str, Any]) -> None:
    text = json.dumps(about, indent=2) + "\n"
    (directory / "config.json").write_text(text)


def _copies(config: Config, models: Sequence[str]) -> int:
    """E of one model; 0 of several."""
    if len(models) > 1:
        if config.experts not in (None, len(models)):
            raise ValueError(
                f"--experts={config.experts}: each of {len(models)} models is an expert"
            )
        return 0
    merges = ("base", "density", "scale")
    if config.method != Config.method or any(
        getattr(config, n) is not None for n in merges
    ):
        raise ValueError(
            "--method, --base, --density, --scale: nothing is merged of one model's"
            " copies; leave them out"
        )
    if config.experts is None or config.experts < 2 or config.gate_data:
        raise ValueError(
            "one model becomes experts that are copies: give their number by --experts"
            " (at least 2), and no --gate_data"
        )
    return config.experts


def _layout(
    config: Config, reader: Reader, model: str, *, dense: bool = True
) -> tuple[str, files.Layout]:
    name = config.layout
    if name == "auto":
        about = _config_json(model) or {}
        kinds = ("llama", "mistral") if dense else ("mixtral",)
        slashes = any("/" in n for n in reader.tensors)
        mixtral = about.get("model_type") in kinds
        name = "stacked" if slashes else "mixtral" if mixtral else "names"
    layout = files.LAYOUTS[name]
    if config.mlp_pattern:
        layout = layout._replace(pattern=config.mlp_pattern)
    return name, layout


def _gates(
    config: Config,
    rest: Reader,
    first: Mapping[str, str],
    layout: files.Layout,
    count: int,
    copies: int,
) -> tuple[dict[str, dict[str, np.ndarray]], str]:
    """{"kernel": [D, E]} (and "bias") by block, and where they come from."""
    paths = _expanded(config.gate_data)
    if not paths:
        widths = {
            block: files.width_of(rest.tensors[name], layout)
            for block, name in first.items()
        }
        gates = upcycling.random_gates(
            jax.random.key(config.seed or 0),
            widths,
            copies or count,
            stddev=0.02 if config.gate_stddev is None else config.gate_stddev,
        )
        return jax.device_get(gates), "gates are random: train them (and the experts)"
    if len(paths) != count:
        raise ValueError(f"--gate_data: got {len(paths)} files for {count} models")
    moments = [merging.load_moments(p) for p in paths]
    gates = {}
    for block, name in first.items():
        rows = [_moments_of(m, name, p) for m, p in zip(moments, paths, strict=True)]
        make = upcycling.gate_from_means if layout.bias else upcycling.gate_without_bias
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
    return gates, "gates are the nearest of the means of --gate_data"


def _moments_of(moments: Mapping[str, Moments], name: str, path: str) -> Moments:
    if name not in moments:
        raise ValueError(
            f"{path}: no moments of {name}, got {list(moments)[:3]}, ...; compute them"
            " on parameters by the checkpoint's names"
        )
    return moments[name]


def _write(
    config: Config,
    outputs: Sequence[files.Output],
    inputs: Sequence[Path],
    rest: Reader,
    about: Mapping[str, Any] | None,
    max_shard_size: int | None,
) -> None:
    options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    writer = checkpoints.create(
        config.output,
        [o.info for o in outputs],
        format="orbax" if rest.format == "orbax" else "safetensors",
        overwrite=config.overwrite,
        inputs=inputs,
        **options,
    )
    with writer:
        files.write(writer, outputs, progress=config.progress)
        writer.complete()
        checkpoints.copy_companions(inputs[0], writer.directory)
        if about is not None:
            _write_config(writer.directory, about)


def _opened(path: str) -> contextlib.closing[Reader]:
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


def _config_json(path: str) -> dict[str, Any] | None:
    file = Path(path) / "config.json"
    return read_json(file) if file.is_file() else None


def _parent(output: str) -> Path:
    """Where the output goes, as one that is moved there needs the same disk."""
    parent = Path(output).expanduser().absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    return parent


if __name__ == "__main__":
    flags.main(Config, flags.plain_errors(run))
